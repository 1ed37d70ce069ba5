"""A proxy that several workers train together; how far it is, for those who wait."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from rich.console import Console
from tiny_models import byte_tokenizer, save_language_model

from curate.cli.reporter import Reporter, make_bars
from curate.config import parse
from curate.data.partitions import Output
from curate.errors import ConfigError, DivergedError
from curate.models.checkpoints import load_state
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.index import index_run
from jobs.own_passes import DrivenPhase, Phase, drive
from jobs.proxy_ranks import proxy_phase
from jobs.proxy_work import proxy_base, train_proxy
from jobs.run import Progress, Task, ignore, run_tasks
from jobs.settings import Settings, parse_settings
from mixers.proxy_settings import Proxy

INLINE = Pool(InlineExecutor(), 1)
TWO: dict[str, Any] = {"kind": "local", "workers": 2}
PROXY: dict[str, Any] = {
    "steps": 30, "sequences": 8, "length": 24, "lr": 3e-3, "held_out": 4, "ranks": 2,
    "resume_every_seconds": 0.0,
}  # fmt: skip
WORDS = {"count": "one two three four five six ", "vowels": "a e i o u a e i ", "same": "na na na "}


def values(root: Path, *, run: str = "run", cluster: Any = None, **mix: Any) -> dict[str, Any]:
    return {
        "run": str(root / run),
        "sources": {"rows": {"path": str(root / "rows.parquet"), "text": "text", "domain": "kind"}},
        "task": {"kind": "causal-lm", "max_tokens": 24},
        "model": {"name": str(root / "model"), "device": "cpu"},
        "index": {"held_out": 0.2},
        "cluster": cluster or {"kind": "inline"},
        "mix": {"mixer": "doremi", **mix},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of three domains, indexed, and a model."""
    root = tmp_path_factory.mktemp("ranks")
    rows = [(f"{row} {text * 3}", kind) for kind, text in WORDS.items() for row in range(24)]
    table = pl.DataFrame(rows, schema=["text", "kind"], orient="row")
    table.write_parquet(root / "rows.parquet")
    save_language_model(root / "model", tokenizer=byte_tokenizer(merges=False))
    index_run(parse_settings(values(root)), pool=INLINE)
    return root


def settings_of(root: Path, cluster: dict[str, Any] = TWO) -> Settings:
    return parse_settings(values(root, cluster=cluster))


def task_of(
    root: Path, name: str, cluster: dict[str, Any] = TWO, *, step_size: float = 3e-3, **proxy: Any
) -> Task:
    """A run whose mixture follows from its losses; what it draws from is made."""
    chosen = parse(Proxy, {**PROXY, "lr": step_size, **proxy})
    base, phases = proxy_base(settings_of(root, cluster), "test", chosen)
    for phase in phases:
        run_tasks(phase.name, phase.tasks, phase.work, pool=INLINE)
    options = {"shares": "uniform", "reweight": {"uniform_share": 0.0}}
    return base.task(name, rule="jobs.proxy_rules:plain", proxy=chosen, options=options)


def result(task: Task) -> dict[str, Any]:
    return json.loads(task.output.path.read_text())


def driven(task: Task) -> DrivenPhase:
    phase = proxy_phase("proxies", [task], train_proxy)
    assert isinstance(phase, DrivenPhase)
    return phase


def train_noting_where_it_starts(payload: dict[str, Any]) -> dict[str, Any]:
    """On the first rank: the step after which each attempt goes on, in a file beside the run."""
    folder = Path(payload["folder"])
    saved = load_state(folder / "resume" / "state.safetensors")
    with folder.with_suffix(".starts").open("a") as starts:
        starts.write(f"{saved[1]['optimiser']['step'] if saved else 0}\n")
    return train_proxy(payload)


def gloo_threads() -> list[str]:
    """Of this process: what is left after a group's end may abort the end of the process."""
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if name.startswith("pt_gloo")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_find_what_one_process_finds_and_again_where_one_dies(root: Path):
    alone = task_of(root, "alone", {"kind": "inline"}, ranks=1)
    train_proxy(alone.payload)
    together, killed = task_of(root, "together"), task_of(root, "killed", steps=60)
    told: list[Progress] = []
    with open_pool(Cluster(**TWO)) as pool:
        outcome = drive(driven(together), pool=pool, listener=told.append)
        assert not outcome.failures
        assert not any(pool.client.run(gloo_threads).values())
        victims = dict(pool.client.run(os.getpid))
        state = Path(killed.payload["folder"]) / "resume" / "state.safetensors"
        with when_there(state, lambda: os.kill(victims[max(victims)], signal.SIGKILL)) as done:
            phase = proxy_phase("proxies", [killed], train_noting_where_it_starts)
            assert isinstance(phase, DrivenPhase)
            outcome = drive(phase, pool=pool, listener=ignore)
        assert done == [True]
        assert not outcome.failures
        assert set(victims.values()) != set(pool.client.run(os.getpid).values())
    one, two = result(alone), result(together)
    assert two["mixture"] == pytest.approx(one["mixture"], rel=1e-4)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-3)
    assert two["num_tokens"] == one["num_tokens"]
    assert (told[-1].stage, told[-1].done, told[-1].name) == ("proxies", 1, "together")
    folder = Path(killed.payload["folder"])
    table = pl.read_parquet(folder / "trajectory.parquet")
    assert table["step"].unique().sort().to_list() == list(range(1, 61))
    assert result(killed)["steps"] == 60
    first, again = map(int, folder.with_suffix(".starts").read_text().split())
    assert 0 == first < again, "it goes on from what the dead group has saved"
    assert not state.exists()
    assert not list(folder.parent.glob(".*"))


@contextmanager
def when_there(path: Path, act: Any) -> Any:
    """Does something in a thread once a file is there."""
    done: list[bool] = []

    def wait() -> None:
        end = time.monotonic() + 600
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)
        done.append(path.exists())
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield done
    thread.join()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_diverges_says_so_and_the_others_stop(root: Path):
    task = task_of(root, "diverges", step_size=1e30, clip_norm=0.0)
    with open_pool(Cluster(**TWO)) as pool:
        outcome = drive(driven(task), pool=pool, listener=ignore)
        (error,) = outcome.failures.values()
        assert isinstance(error, DivergedError)
        assert "loss of domain" in error.what
        again = drive(driven(task_of(root, "after", steps=3)), pool=pool, listener=ignore)
        assert not again.failures, "the workers are of use again"


def test_ranks_without_as_many_workers_are_refused(root: Path):
    with pytest.raises(ConfigError, match="there is one process"):
        driven(task_of(root, "x", {"kind": "inline"}))
    with pytest.raises(ConfigError, match="there are 2 workers"):
        driven(task_of(root, "x", ranks=3))
    with pytest.raises(ConfigError, match="trained by 1"):
        train_proxy(task_of(root, "x").payload)
    one = task_of(root, "x", {"kind": "inline"}, ranks=1)
    assert isinstance(proxy_phase("proxies", [one], train_proxy), Phase)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_trains_the_proxies_of_a_command(root: Path):
    """Two processes of one `curate mix`; its mixture is that of a single process."""
    proxy = {**PROXY, "steps": 6, "lr": 3e-3}
    reference = {"seeds": [0]}
    found: list[dict[str, float]] = []
    for ranks in (1, 2):
        given = values(
            root, run=f"torchrun-{ranks}", proxy={**proxy, "ranks": ranks}, reference=reference
        )
        config = root / f"{ranks}.yaml"
        config.write_text(yaml.safe_dump(given))
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        command = [sys.executable, "-m"]
        if ranks > 1:
            start = ["--nproc-per-node", str(ranks), "--master-port", str(port), "-m"]
            command += ["torch.distributed.run", *start]
        done = subprocess.run(
            [*command, "curate", "mix", str(config), "--json"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        summary = json.loads(done.stdout)["stages"]["mix"]
        found.append({row["domain"]: row["weight"] for row in summary["domains"]})
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def slow_write(payload: dict[str, Any]) -> dict[str, Any]:
    """Says how far it is for a while."""
    path = Path(payload["progress"])
    for step in payload["steps"]:
        path.write_text(json.dumps({"step": step, "total": 4, "weights": "web 0.750, code 0.250"}))
        time.sleep(0.3)
    path.unlink()
    return {}


def test_what_a_running_task_says_reaches_the_listener(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Inline too, and without what killed runs have left behind."""
    monkeypatch.setattr("jobs.watching._SECONDS", 0.02)
    tasks: list[Task] = []
    for name, steps in (("a", [1, 2]), ("b", [])):
        progress = tmp_path / f"{name}.json"
        progress.write_text(json.dumps({"step": 4, "total": 4, "weights": "of a killed run"}))
        payload = {"progress": str(progress), "steps": steps}
        tasks.append(Task(name, payload, Output(tmp_path / name), "f"))
    told: list[Progress] = []
    run_tasks("proxies", tasks, slow_write, pool=INLINE, listener=told.append)
    running = [replace(progress, seconds=0.0) for progress in told if progress.detail]
    said = "of 4, web 0.750, code 0.250"
    assert running == [
        Progress("proxies", 0, 2, "a", f"step 1 {said}", 0.25),
        Progress("proxies", 0, 2, "a", f"step 2 {said}", 0.5),
    ]
    assert [progress.done for progress in told if not progress.detail] == [1, 2]


def test_the_loop_says_how_far_it_is(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mixers.proxy._SHOW_SECONDS", 0.0)
    monkeypatch.setattr("jobs.watching._SECONDS", 0.0005)
    task = task_of(root, "told", {"kind": "inline"}, ranks=1, steps=20)
    told: list[Progress] = []
    run_tasks("proxies", [task], train_proxy, pool=INLINE, listener=told.append)
    details = [progress.detail for progress in told if progress.detail]
    assert details
    assert re.match(r"step \d+ of 20, \w+ 0\.\d{3}, ", details[0])
    assert not Path(task.payload["progress"]).exists()


def test_a_bar_shows_the_weights_and_goes_on_within_a_task():
    screen = io.StringIO()
    bars = make_bars(screen)
    reporter = Reporter(events=None, quiet=False, bars=bars)
    reporter(Progress("proxies", 1, 4, "a", "step 5 of 10, web 0.750", 0.5))
    assert bars.tasks[0].completed == 1.5
    console = Console(file=screen, width=120)
    console.print(bars.get_renderable())
    assert "step 5 of 10, web 0.750" in screen.getvalue()
    assert "1/4" in screen.getvalue()
    reporter(Progress("proxies", 2, 4, "a"))
    assert bars.tasks[0].completed == 2
    assert bars.tasks[0].fields["detail"] == ""


def test_without_a_terminal_a_line_comes_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    reporter = Reporter(events=None, quiet=False, bars=None)
    for second in range(60):
        now[0] = 100.0 + second
        reporter(Progress("proxies", 0, 2, "a", f"step {second} of 60, web 0.750", 0.5))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"proxies: a: step {second} of 60, web 0.750" for second in (21, 42)]
    Reporter(events=None, quiet=True, bars=None)(Progress("proxies", 0, 2, "a", "step", 0.5))
    assert not capsys.readouterr().err
