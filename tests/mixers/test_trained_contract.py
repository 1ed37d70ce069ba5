"""What every mixer of the catalog must do that trains before it knows.

Each is asked for its passes on a small run. Every rule that they name is then put through the real
loop: its data are the run's, its reference, where it has one, is made up.
"""

import json
import math
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # see jobs.proxy_ranks
from tiny_models import LLAMA, byte_tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import mixers.proxy
from curate.config import parse
from curate.models.sequences import Sequences
from curate.plan.mixture import load_mixture
from jobs.all_stages import load
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.lengths import lengths_run
from jobs.mix import mix_run, mixer_for, plan_mix
from jobs.mix_passes import PASSES, mix_passes
from jobs.proxy_work import Making, open_data, open_proxy
from jobs.sequences import open_sequences
from jobs.settings import Settings, parse_settings
from jobs.training_work import open_workshop
from mixers.proxy import Files, ProxyResult, run_proxy
from mixers.proxy_settings import Proxy
from mixers.rules import Rule

INLINE = Pool(InlineExecutor(), 1)
LETTERS = {"capital": "ABCDEFGH", "figure": "01234567", "lower": "abcdefgh", "vowel": "aeiou"}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
PROXY: dict[str, Any] = {
    "steps": 6, "sequences": 16, "length": 16, "lr": 0.01, "held_out": 2,
    "resume_every_seconds": 0.0, "model": {"model_type": "llama", **LLAMA, **SMALL},
}  # fmt: skip
PLAIN = "jobs.proxy_rules:plain"
OPTIONS: dict[str, dict[str, Any]] = {
    "dga": {"every": 2, "sequences": 2, "target_sequences": 4},
    "dmo": {"check": False},
    "doremi": {"reference": {"seeds": [0]}},
    "regmix": {"runs": 8, "check": False},
    "scalebio": {"lr": 0.5},
}
"""Mixer -> options that keep it small; `proxy` is set for all."""


class World(NamedTuple):
    """A run with an index and token counts, for every mixer."""

    root: Path

    def settings(self, name: str) -> Settings:
        values = json.loads((self.root / "settings.json").read_text())
        proxy = PROXY | OPTIONS.get(name, {}).get("proxy", {})
        values["mix"] = {"mixer": name, **OPTIONS.get(name, {}), "proxy": proxy}
        return parse_settings(values)

    def rules(self, name: str) -> dict[str, dict[str, Any]]:
        """Rule of a mixer -> payload of the first task that names it, once the job is done."""
        settings = self.settings(name)
        mix_run(settings, pool=INLINE)
        found: dict[str, dict[str, Any]] = {}
        for task in mix_passes(settings, *mixer_for(settings)).tasks:
            if "rule" in task.payload:
                found.setdefault(task.payload["rule"], task.payload)
        if len(found) > 1:
            found.pop(PLAIN, None)
        return {f"{name} {rule}".replace(":", "-"): own for rule, own in found.items()}


class MadeUp:
    """Losses of a reference that differ from sequence to sequence."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences

    def __call__(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        counts = self._sequences.read(numbers).num_scored
        return np.repeat(3 + (numbers % 7) / 4, counts).astype(np.float32)


class Run(NamedTuple):
    result: ProxyResult
    rule: Rule
    model: torch.nn.Module
    weights: list[list[float]]
    """Of each step, for the domains in their order."""


def run_rule(
    folder: Path,
    payload: dict[str, Any],
    *,
    die_after: int | None = None,
    backwards: bool = False,
) -> Run:
    """The rule of a task in the loop, with whatever the task says of data and model."""
    folder.mkdir(exist_ok=True, parents=True)
    shop, proxy = open_workshop(payload), parse(Proxy, payload["proxy"])
    data = open_data(shop, {**payload, "reference": None})
    if backwards:
        key, names = str(payload["sequences"]), data.sequences.domains[::-1]
        turned = open_sequences(shop.settings, key, payload["parts"], domains=names)
        data = data._replace(sequences=turned, held_out=None)
    if payload["reference"]:
        data = data._replace(reference=MadeUp(data.sequences))
    rule = load(payload["rule"])(Making(shop.settings, proxy, data, dict(payload["options"])))
    optimiser = open_proxy(shop, proxy)
    weights: list[list[float]] = []

    def told(step: int, found: Tensor) -> None:
        weights.append(found.tolist())
        if step == die_after:
            raise KeyboardInterrupt

    files = Files(folder=folder, fingerprint="f")
    result = run_proxy(optimiser, shop.task, data, rule, proxy, files, told=told)
    return Run(result, rule, optimiser.model, weights)


def write_world(root: Path) -> World:
    generator = np.random.default_rng(0)
    rows = [
        {"text": "".join(generator.choice(list(letters), 30)), "topic": name}
        for place, (name, letters) in enumerate(LETTERS.items())
        for _ in range(40 + 10 * place)
    ]
    pl.DataFrame(rows).write_parquet(root / "rows.parquet")
    wanted = ["".join(generator.choice(list("01234567"), 30)) for _ in range(20)]
    pl.DataFrame({"text": wanted}).write_parquet(root / "target.parquet")
    byte_tokenizer(merges=False).save_pretrained(root / "tokenizer")
    values = {
        "run": str(root / "run"),
        "sources": {
            "rows": {"path": str(root / "rows.parquet"), "text": "text", "domain": "topic"}
        },
        "target": {"path": str(root / "target.parquet"), "text": "text"},
        "task": {"kind": "causal-lm", "max_tokens": 16},
        "model": {"tokenizer": str(root / "tokenizer"), "device": "cpu"},
        "index": {"held_out": 0.1},
        "plan": {"keep": 0.5},
    }
    (root / "settings.json").write_text(json.dumps(values))
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    lengths_run(settings, pool=INLINE)
    return World(root)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def equal_counts(shares: npt.NDArray[np.float64], size: int, seed: int) -> Any:
    """Whatever the shares are."""
    return np.full(len(shares), size // len(shares))


def all_of_the_last(shares: npt.NDArray[np.float64], size: int, seed: int) -> Any:
    return np.array([0] * (len(shares) - 1) + [size])


@pytest.mark.parametrize("name", PASSES)
def test_a_run_that_dies_twice_ends_in_the_same_bits_of_a_simplex(
    name: str, world: World, tmp_path: Path
):
    for rule, payload in world.rules(name).items():
        whole = run_rule(tmp_path / rule / "whole", payload)
        assert math.fsum(whole.result.mixture.values()) == pytest.approx(1), rule
        for weights in [*whole.weights, list(whole.result.mixture.values())]:
            assert all(0 <= weight < math.inf for weight in weights), rule
        for step in (2, 4):
            with pytest.raises(KeyboardInterrupt):
                run_rule(tmp_path / rule / "killed", payload, die_after=step)
        again = run_rule(tmp_path / rule / "killed", payload)
        assert again.result == whole.result, rule
        assert len(again.weights) < len(whole.weights), rule
        assert again.weights == whole.weights[-len(again.weights) :], rule
        ours, theirs = whole.rule.state(), again.rule.state()
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=0, equal_nan=True)
        for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(one, two), rule
        tables = [
            pl.read_parquet(tmp_path / rule / which / "trajectory.parquet")
            for which in ("whole", "killed")
        ]
        assert tables[0].equals(tables[1]), rule
        assert set(whole.rule.columns) <= set(tables[0].columns), rule


@pytest.mark.parametrize("name", PASSES)
def test_names_decide_and_not_the_order_of_the_domains(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mixers.proxy, "stratified_counts", equal_counts)
    for rule, payload in world.rules(name).items():
        forwards = run_rule(tmp_path / rule / "forwards", payload).result.mixture
        backwards = run_rule(tmp_path / rule / "backwards", payload, backwards=True).result.mixture
        assert list(backwards) == list(forwards)[::-1]
        assert backwards == pytest.approx(forwards, rel=1e-3), rule


@pytest.mark.parametrize("name", PASSES)
def test_domains_without_a_token_keep_what_they_are_to_each_other(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All batches are of the last domain alone; a rule may draw the others by itself."""
    asked: list[str] = []

    class Watched(mixers.proxy.LoopStep):
        def more(self, purpose: str, each: int | Tensor) -> Any:
            asked.append(purpose)
            return super().more(purpose, each)

    monkeypatch.setattr(mixers.proxy, "stratified_counts", all_of_the_last)
    monkeypatch.setattr(mixers.proxy, "LoopStep", Watched)
    for rule, payload in world.rules(name).items():
        asked.clear()
        found = run_rule(tmp_path / rule, payload)
        assert math.fsum(found.result.mixture.values()) == pytest.approx(1), rule
        if not asked:
            rows = np.array(found.weights)[:, :-1]
            shares = rows / rows.sum(1, keepdims=True)
            np.testing.assert_allclose(shares, shares[:1].repeat(len(rows), 0), rtol=1e-6)


@pytest.mark.parametrize("name", PASSES)
def test_the_job_ends_in_a_mixture_with_a_reason_for_each_domain(name: str, world: World):
    settings = world.settings(name)
    summary = mix_run(settings, pool=INLINE)
    assert [row["domain"] for row in summary["domains"]] == sorted(LETTERS)
    assert all(row["why"] for row in summary["domains"])
    path = world.root / "run" / "mixtures" / name / "mixture.json"
    found = load_mixture(path)
    for phase in found.phases:
        assert math.fsum(phase.weights.values()) == pytest.approx(1)
        assert all(0 <= weight <= 1 for weight in phase.weights.values())
    state = plan_mix(settings)
    assert state.done == state.total
    written = path.stat().st_mtime_ns
    assert mix_run(settings, pool=INLINE) == summary
    assert path.stat().st_mtime_ns == written


def _rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.distributed.init_process_group("gloo")
    payloads = json.loads(Path(folder, "payloads.json").read_text())
    found = {
        rule: run_rule(Path(folder, str(rank), rule), payload).result.mixture
        for rule, payload in payloads.items()
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_go_the_way_of_one(world: World, tmp_path: Path):
    rules = {rule: own for name in PASSES for rule, own in world.rules(name).items()}
    (tmp_path / "payloads.json").write_text(json.dumps(rules))
    alone = {rule: run_rule(tmp_path / rule, own).result.mixture for rule, own in rules.items()}
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    spawn(_rank, args=(str(tmp_path), port), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for rule, mixture in alone.items():
        assert first[rule] == pytest.approx(mixture, rel=1e-3), rule
