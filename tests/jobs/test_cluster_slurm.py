"""Slurm: the script of a job, and a whole run on jobs that a Slurm of three scripts starts."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import polars as pl
import pytest
from certificates import CAN_BE_MADE, certificate
from e2e.small_run import bytes_of
from tiny_models import byte_tokenizer

import jobs.cluster_slurm
from curate.errors import ConfigError, MissingDependencyError, TryAgainError
from jobs.all_stages import run_stages, stages_for
from jobs.cluster import Cluster, Slurm, open_pool
from jobs.cluster_slurm import job_script
from jobs.opening import open_run
from jobs.run import Progress, ignore
from jobs.settings import parse_settings

pytest.importorskip("dask_jobqueue")

SBATCH = """#!/bin/bash
exec 9>{state}/lock; flock 9
number=$(( $(ls {state} | grep -c '[.]sh$') + 1 ))
cp "$1" {state}/$number.sh
SLURM_JOB_ID=$number CUDA_VISIBLE_DEVICES=4,5 setsid bash {state}/$number.sh \\
    >{state}/$number.out 2>&1 9>&- &
echo $! >{state}/$number.pid
echo "Submitted batch job $number"
"""
SQUEUE = """#!/bin/bash
for file in {state}/*.pid; do
    kill -0 $(cat $file) 2>/dev/null && basename $file .pid
done
exit 0
"""
SCANCEL = """#!/bin/bash
kill -TERM -- -$(cat {state}/$1.pid) 2>/dev/null || exit 1
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm on the path, which starts each job at once; the folder of what it was given."""
    state, commands = tmp_path / "state", tmp_path / "bin"
    state.mkdir()
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        (commands / name).write_text(text.format(state=state))
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setattr(jobs.cluster_slurm, "_LOOK_SECONDS", 0.3)
    return state


def running(state: Path) -> list[str]:
    """Jobs of which a process is left."""
    groups = {int(path.read_text()): path.stem for path in state.glob("*.pid")}
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) in groups:
            found.append(groups[int(fields[2])])
    return sorted(set(found))


def until(condition: Callable[[], Any], *, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


FULL = Cluster(
    kind="slurm",
    workers=16,
    threads=2,
    slurm=Slurm(
        partition="gpu", account="team", walltime="08:00:00", memory="256GB", cores=32, gpus=4,
        directives=("--constraint=a100",), prologue=("module load cuda",), interface="lo",
        python="/shared/venv/bin/python",
    ),
)  # fmt: skip


def neutral(script: str) -> str:
    """Without the scheduler's address and the worker's name."""
    script = re.sub(r"(tcp|tls)://\S+", "ADDRESS", script)
    return re.sub(r"--name \S+", "--name NAME", script)


def test_the_script_of_a_job_is_what_dask_jobqueue_submits(tmp_path: Path):
    """Its cluster, asked in the words of its own documentation."""
    logs = tmp_path / "logs"
    from dask_jobqueue.slurm import SLURMCluster

    variables = ["OMP", "MKL", "OPENBLAS", "NUMEXPR"]
    with SLURMCluster(
        queue="gpu", account="team", walltime="08:00:00", cores=4, job_cpu=32, memory="256GB",
        processes=4, job_name="curate", interface="lo", death_timeout=300,
        log_directory=str(logs / "dask"),
        python="/shared/venv/bin/python",
        job_extra_directives=["--gres=gpu:4", "--constraint=a100"],
        job_script_prologue=[
            *[f"export {name}_NUM_THREADS=2" for name in variables],
            "export POLARS_MAX_THREADS=2", "export TOKENIZERS_PARALLELISM=false",
            "module load cuda",
        ],
        worker_extra_args=[
            "--lifetime", "28200s", "--lifetime-stagger", "300s", "--memory-limit", "0",
            "--resources", "GPU=1",
        ],
        scheduler_options={"dashboard_address": "127.0.0.1:0"},
    ) as cluster:  # fmt: skip
        expected = str(cast(Any, cluster).job_script())
    found = job_script(replace(FULL, slurm=replace(FULL.job, log_directory=str(logs / "ours"))))
    assert neutral(found).replace("/ours/", "/dask/") == neutral(expected)
    assert not (logs / "ours").exists()
    for line in ("#SBATCH -p gpu", "#SBATCH -A team", "#SBATCH -t 08:00:00", "#SBATCH --mem=239G",
                 "#SBATCH --cpus-per-task=32", "#SBATCH --gres=gpu:4"):  # fmt: skip
        assert line in found.splitlines()
    assert "--nworkers 4" in found
    assert "--nthreads 1 " in found


def test_logs_at_home_are_not_in_a_folder_called_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Slurm reads the path as it stands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    script = job_script(replace(FULL, slurm=replace(FULL.job, log_directory="~/logs")))
    assert f"#SBATCH -o {tmp_path}/logs/curate-%J.out\n" in script
    assert "~" not in script


def test_certificates_go_to_the_workers_as_paths(tmp_path: Path):
    paths: dict[str, Any]
    paths = {name: str(tmp_path / name) for name in ("tls_ca_file", "tls_cert", "tls_key")}
    for path in paths.values():
        Path(path).write_text("secret")
    script = job_script(Cluster(kind="slurm", **paths))
    assert f"--tls-ca-file {paths['tls_ca_file']}" in script
    assert f"--tls-key {paths['tls_key']}" in script
    assert "tls://" in script
    assert "secret" not in script


def test_without_slurm_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    missing = pytest.raises(MissingDependencyError, match="no `sbatch` on this machine")
    with missing as caught, open_pool(Cluster(kind="slurm")):
        pass
    assert caught.value.exit_code == 6


def test_a_job_that_slurm_refuses_is_told_in_its_words(slurm: Path):
    sbatch = slurm.parent / "bin" / "sbatch"
    sbatch.write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n"
    )
    refused = pytest.raises(ConfigError, match=r"refuses the job: .*invalid partition specified: x")
    with refused, open_pool(Cluster(kind="slurm")):
        pass


def test_jobs_that_end_before_their_workers_come_are_not_submitted_for_ever(slurm: Path):
    script = Cluster(kind="slurm", slurm=Slurm(prologue=("exit 1",)))
    vain = pytest.raises(TryAgainError, match="3 Slurm jobs have ended before a worker")
    with vain, open_pool(script):
        pass
    assert len(list(slurm.glob("*.sh"))) == 3


def visible() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_the_processes_of_a_job_have_a_gpu_each_and_tasks_ask_for_one(tmp_path: Path, slurm: Path):
    """And they come by TLS, where there are certificates."""
    paths = certificate(tmp_path) if CAN_BE_MADE else {}
    settings = Cluster(kind="slurm", workers=2, slurm=Slurm(gpus=2), **paths)
    with open_pool(settings) as pool:
        assert until(lambda: pool.window == 4)
        assert pool.client.scheduler.address.startswith("tls://" if paths else "tcp://")
        assert sorted(pool.client.run(visible).values()) == ["4", "5"]
        future = pool.executor.submit(visible)
        assert future.result() in ("4", "5")
    assert until(lambda: not running(slurm))


def values(root: Path, run: str, **cluster: Any) -> dict[str, Any]:
    return {
        "run": str(root / run),
        "sources": {"rows": {"path": str(root / "rows.parquet"), "text": "text"}},
        "task": {"kind": "causal-lm"},
        "index": {"partition_rows": 20},
        "score": {"scorers": ["length", "random"]},
        "plan": {"score": "num_chars", "keep": 0.5},
        "model": {"tokenizer": str(root / "tokenizer")},
        "shards": {"size_mb": 0.01},
        "cluster": cluster,
    }


@pytest.mark.slow
def test_a_run_on_slurm_is_that_of_one_process_and_an_ended_job_is_replaced(
    tmp_path: Path, slurm: Path
):
    byte_tokenizer(merges=False).save_pretrained(tmp_path / "tokenizer")
    rows = [f"{row} " + "words of a text " * (row % 17) for row in range(160)]
    pl.DataFrame({"text": rows}).write_parquet(tmp_path / "rows.parquet", row_group_size=20)
    killed: list[str] = []

    def listen(progress: Progress) -> None:
        """After the first task of the scores, the first job is over, as at its time limit."""
        if progress.stage == "index" or killed:
            return
        killed.append(progress.stage)
        os.killpg(int((slurm / "1.pid").read_text()), signal.SIGKILL)
        assert until(lambda: (slurm / "3.sh").exists()), "no job takes its place"

    seen: list[dict[str, str]] = []
    for run, listener, cluster in (
        ("inline", ignore, {"kind": "inline"}),
        ("slurm", listen, {"kind": "slurm", "workers": 2, "slurm": {"memory": "2GB"}}),
    ):
        settings = parse_settings(values(tmp_path, run, **cluster))
        with open_run(settings) as full, open_pool(full.cluster) as pool:
            run_stages(full, stages_for(full, "run"), pool=pool, listener=listener)
        seen.append(bytes_of(tmp_path / run, "examples", "scores", "plan", "shards"))
    assert len(seen[0]) > 25
    assert seen[1] == seen[0]
    assert killed
    assert neutral((slurm / "3.sh").read_text()) == neutral(job_script(full.cluster))
    assert until(lambda: not running(slurm)), "jobs are cancelled at the end"
