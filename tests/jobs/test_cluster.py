"""Kinds of clusters: settings that fit, one version on all workers, and what a worker keeps."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from certificates import CAN_BE_MADE, certificate

import jobs.cluster_cuda
import jobs.cluster_profile
from curate.errors import ConfigError, InputError, MissingDependencyError, TryAgainError
from jobs.cluster import Cluster, Pool, check_cluster, open_pool
from jobs.cluster_cuda import cuda_options, visible_gpus
from jobs.cluster_dask import security
from jobs.cluster_settings import Slurm
from jobs.cluster_workers import KEPT, forget, identity, memory_bytes, take_gpu
from jobs.settings import parse_settings

ROOT = Path(__file__).parents[2]

NO_MODELS = {("jobs.store", "_refreshed")}
"""Mappings of modules that stay: a few words in each."""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 4}, r"cluster\.workers is set, but cluster\.kind is inline"),
        (
            {"kind": "local", "address": "tcp://h:1"},
            r"cluster\.address is set, but cluster\.kind is local",
        ),
        ({"kind": "local", "slurm": {"partition": "gpu"}}, r"cluster\.slurm is set"),
        ({"kind": "slurm", "memory_gb": 4}, r"cluster\.memory_gb is set"),
        ({"kind": "cuda", "tls_key": "k.pem"}, r"cluster\.tls_key is set"),
        ({"kind": "address"}, "there is no address"),
        ({"kind": "scheduler-file"}, "scheduler_file is not set"),
        ({"kind": "local", "workers": 0}, "start at 1"),
        ({"kind": "local", "wait_minutes": 0}, "wait_minutes is 0"),
        ({"kind": "slurm", "tls_cert": "c.pem"}, "tls_ca_file is not"),
        ({"kind": "slurm", "slurm": {"partion": "gpu"}}, r"slurm\.partion"),
        ({"kind": "slurm", "slurm": {"gpus": 4, "processes": 2}}, "each process works on one GPU"),
        ({"kind": "slurm", "slurm": {"cores": 0}}, "start at 1"),
        ({"kind": "slurm", "slurm": {"processes": 0}}, "start at 1"),
        ({"kind": "slurm", "slurm": {"walltime": "a day"}}, "walltime is 'a day'"),
    ],
)
def test_a_setting_of_another_kind_is_refused(given: dict[str, Any], message: str):
    values = {"run": "r", "sources": {"s": {"path": "x"}}, "cluster": given}
    with pytest.raises(ConfigError, match=message):
        parse_settings(values)


def test_a_run_folder_of_an_older_version_opens():
    """It holds the default of every kind."""
    old = {"kind": "inline", "workers": 2, "address": None, "threads": 3}
    values = {"run": "r", "sources": {"s": {"path": "x"}}, "cluster": old}
    assert parse_settings(values).cluster == Cluster(threads=3)
    old |= {"kind": "address", "address": "tcp://h:1"}
    assert parse_settings(values).cluster == Cluster(kind="address", address="tcp://h:1", threads=3)
    old |= {"kind": "local", "address": None, "workers": 5}
    assert parse_settings(values).cluster == Cluster(kind="local", workers=5, threads=3)


def test_walltimes_are_read_as_slurm_reads_them():
    seconds = {
        "90": 5400, "90:30": 5430, "04:00:00": 14400, "2-12": 216000, "1-00:30": 88200,
        "1-12:00:01": 129601,
    }  # fmt: skip
    assert {text: Slurm(walltime=text).seconds for text in seconds} == seconds


def test_workers_end_before_their_job_does():
    for walltime in ("1", "10", "04:00:00", "7-00:00:00"):
        job = Slurm(walltime=walltime)
        lifetime, stagger = job.lifetime
        assert 0 < lifetime - stagger < lifetime + stagger < job.seconds
    assert Slurm(walltime="04:00:00").lifetime == (13800, 300)


def test_as_many_jobs_as_hold_the_workers():
    assert Cluster(kind="slurm", workers=5, slurm=Slurm(gpus=4)).num_jobs == 2
    assert Cluster(kind="slurm", workers=5, slurm=Slurm(gpus=4)).num_workers == 8
    assert Cluster(kind="slurm").num_jobs == 1
    assert [Cluster(kind="local", workers=n).num_workers for n in (None, 3)] == [2, 3]


def test_each_process_of_a_job_takes_a_gpu_of_its_own():
    taken: list[str] = []
    for name in ("curate-7-0", "curate-7-1", "curate-7-2"):
        variables = {"CUDA_VISIBLE_DEVICES": "2,5,6"}
        take_gpu(name, variables)
        taken.append(variables["CUDA_VISIBLE_DEVICES"])
    assert taken == ["2", "5", "6"]
    for variables in ({}, {"CUDA_VISIBLE_DEVICES": "3"}):
        before = dict(variables)
        take_gpu("curate-7", variables)
        assert variables == before


def test_without_a_gpu_or_dask_cuda_the_kind_says_which_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before anything is started."""
    devices, packages = tmp_path / "dev", tmp_path / "packages"
    for folder in (devices, packages):
        folder.mkdir()
    monkeypatch.setattr(jobs.cluster_cuda, "_DEVICES", devices)
    monkeypatch.setattr(jobs.cluster_cuda, "_torch_version", lambda: "2.13.0+cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.syspath_prepend(str(packages))
    with pytest.raises(MissingDependencyError) as caught, open_pool(Cluster(kind="cuda")):
        pass
    assert caught.value.what == (
        "cluster.kind is cuda, but no NVIDIA GPU is visible and dask-cuda is not installed and"
        " torch 2.13.0+cpu is built for CPUs alone"
    )
    assert caught.value.exit_code == 6
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl"):
        (devices / name).touch()
    assert visible_gpus({}) == ["0", "1", "10"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1,10"}) == ["1", "10"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    monkeypatch.setattr(jobs.cluster_cuda, "_torch_version", lambda: "2.13.0")
    with pytest.raises(MissingDependencyError, match=r"is cuda, but dask-cuda is not installed\n"):
        check_cluster(Cluster(kind="cuda"))
    (packages / "dask_cuda.py").touch()
    importlib.invalidate_caches()
    check_cluster(Cluster(kind="cuda"))


def test_cuda_gives_each_worker_one_gpu_and_tasks_ask_for_it():
    options = cuda_options(Cluster(kind="cuda", workers=2), ["0", "1", "3"])
    assert options["CUDA_VISIBLE_DEVICES"] == ["0", "1"]
    assert (options["n_workers"], options["threads_per_worker"]) == (2, 1)
    assert options["resources"] == {"GPU": 1}
    with pytest.raises(ConfigError, match=r"cluster\.workers is 4, but 3 GPUs are visible"):
        cuda_options(Cluster(kind="cuda", workers=4), ["0", "1", "3"])


def test_a_report_is_refused_where_there_is_none_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    local = Cluster(kind="local")
    with pytest.raises(ConfigError, match=r"--profile .* cluster\.kind is inline"):
        check_cluster(Cluster(), profile=tmp_path / "p.html")
    with pytest.raises(ConfigError, match="there is no folder"):
        check_cluster(local, profile=tmp_path / "no" / "p.html")
    monkeypatch.setattr(jobs.cluster_profile, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs bokeh"):
        check_cluster(local, profile=tmp_path / "p.html")


def test_dasks_report_is_saved(tmp_path: Path):
    pytest.importorskip("bokeh")
    report = tmp_path / "report.html"
    with open_pool(Cluster(kind="local", workers=1), profile=report) as pool:
        pool.executor.submit(os.getpid).result()
    assert "getpid" in report.read_text()


def test_certificates_are_paths_that_must_be_there(tmp_path: Path):
    paths: dict[str, Any]
    paths = {name: str(tmp_path / name) for name in ("tls_ca_file", "tls_cert", "tls_key")}
    settings = Cluster(kind="address", address="tls://127.0.0.1:9", **paths)
    with pytest.raises(ConfigError, match=r"cluster\.tls_ca_file: there is no file"):
        security(settings)
    for path in paths.values():
        Path(path).touch()
    found = security(settings)
    assert found.require_encryption
    assert found.get_tls_config_for_role("client") == {
        "ca_file": paths["tls_ca_file"], "cert": paths["tls_cert"], "key": paths["tls_key"],
        "ciphers": None,
    }  # fmt: skip
    assert security(Cluster(kind="address", address="tcp://h:1")) is None


def load_large() -> int:
    """Keeps 200 MB in the way that modules of ours do."""
    vars(importlib.import_module("jobs.lengths"))["_tokenizers"]["x"] = (
        bytearray(b"x") * 200_000_000
    )
    return memory_bytes()


def worker_environment() -> tuple[str, ...]:
    names = ("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "TOKENIZERS_PARALLELISM")
    return tuple(os.environ.get(name, "") for name in names)


def until(condition: Any, *, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    before = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        with open_pool(Cluster(kind="local", workers=1, threads=3, memory_gb=8)) as pool:
            yield pool
    finally:
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def test_workers_are_told_how_many_threads_they_have(pool: Pool):
    assert set(pool.client.run(worker_environment).values()) == {("3", "3", "false")}

    def limits(dask_worker: Any) -> tuple[Any, Any]:
        memory = dask_worker.memory_manager
        return memory.memory_limit, memory.memory_pause_fraction

    assert set(pool.client.run(limits).values()) == {(8_000_000_000, False)}


def test_the_window_follows_workers_that_come_and_go(pool: Pool):
    assert pool.window == 2
    pool.client.cluster.scale(2)
    assert until(lambda: pool.window == 4)
    pool.client.cluster.scale(1)
    assert until(lambda: pool.window == 2)


def test_a_worker_lets_go_of_what_it_keeps_between_stages(pool: Pool):
    before = pool.executor.submit(load_large).result()
    assert max(pool.client.run(memory_bytes).values()) > before - 20_000_000
    pool.forget()
    assert until(lambda: max(pool.client.run(memory_bytes).values()) < before - 180_000_000)


def test_all_that_a_process_keeps_is_let_go_of():
    """Also what a module that is written tomorrow keeps."""
    from jobs.plan import __dict__ as plan

    caches = [value for value in plan.values() if hasattr(value, "cache_info")]
    assert caches
    mappings = {
        (path.relative_to(ROOT).as_posix().removesuffix(".py").replace("/", "."), node.target.id)
        for room in ("curate/models", "jobs", "scorers", "mixers")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Dict) and not node.value.keys
    }  # fmt: skip
    assert mappings - NO_MODELS == set(KEPT.items())
    for name, mapping in KEPT.items():
        vars(importlib.import_module(name))[mapping]["key"] = object()
    forget()
    assert not any(vars(sys.modules[name])[mapping] for name, mapping in KEPT.items())
    assert not any(value.cache_info().currsize for value in caches)


def start(*arguments: str, path: Path = ROOT) -> subprocess.Popen[str]:
    """A process of Dask's, whose packages of ours stand in `path`."""
    variables = {**os.environ, "PYTHONPATH": f"{path}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=variables, cwd=path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def worker(file: Path, path: Path = ROOT, nanny: str = "--no-nanny") -> subprocess.Popen[str]:
    options = ("--nthreads", "1", nanny, "--no-dashboard", "--death-timeout", "60")
    return start("distributed.cli.dask_worker", "--scheduler-file", str(file), *options, path=path)


def num_workers(file: Path) -> int:
    from distributed import Client

    with Client(scheduler_file=str(file)) as client:
        return len(dict(cast(Any, client.nthreads())))


@contextmanager
def ending(processes: list[subprocess.Popen[str]]) -> Generator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def other_version(folder: Path) -> None:
    """Our packages, which differ by one line."""
    for package in ("curate", "jobs", "mixers", "scorers"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.pyc"))
    with (folder / "jobs" / "measuring.py").open("a") as file:
        file.write("# another line\n")


def test_workers_of_another_version_are_refused_and_later_ones_too(tmp_path: Path):
    """A scheduler and workers that run already."""
    other = tmp_path / "other"
    other_version(other)
    file = tmp_path / "scheduler.json"
    options = ("--scheduler-file", str(file), "--port", "0", "--no-dashboard")
    running = [start("distributed.cli.dask_scheduler", *options), worker(file)]
    settings = Cluster(kind="scheduler-file", scheduler_file=str(file), wait_minutes=0.5)
    with ending(running):
        with open_pool(settings) as pool:
            assert pool.window == 2
            running.append(worker(file, other))
            said, _ = running[-1].communicate(timeout=60)
            assert f"and the run has curate {identity().version} ({identity().digest})" in said
            running.append(worker(file))
            assert until(lambda: pool.window == 4)
            assert pool.executor.submit(identity).result() == identity()
        # The scheduler serves others once we are gone.
        running.append(worker(file, other))
        assert until(lambda: num_workers(file) == 3)
        told = pytest.raises(MissingDependencyError, match=r"has curate .* and this is")
        with told as refused, open_pool(settings):
            pass
        assert refused.value.exit_code == 6
        short = Cluster(kind="scheduler-file", scheduler_file=str(file), wait_minutes=0.02)
        running[-1].kill()
        assert until(lambda: num_workers(file) == 2)
        with open_pool(short) as pool:
            for process in running[1:4]:
                process.kill()
            with pytest.raises(TryAgainError, match="has no workers, for") as lost:
                assert not until(lambda: pool.window == 0)
        assert lost.value.exit_code == 75
        with pytest.raises(TryAgainError, match="has no workers, for"), open_pool(short):
            pass


def test_what_a_refused_worker_was_given_is_not_held_against_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The scheduler hands it tasks before it has been asked for its version."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    other, file, gate = tmp_path / "other", tmp_path / "scheduler.json", tmp_path / "gate"
    other_version(other)
    options = ("--scheduler-file", str(file), "--port", "0", "--no-dashboard")
    running = [start("distributed.cli.dask_scheduler", *options), worker(file)]
    settings = Cluster(kind="scheduler-file", scheduler_file=str(file), wait_minutes=0.5)
    with ending(running), open_pool(settings) as pool:
        waiting = [pool.executor.submit(until, gate.exists, seconds=60) for _ in range(4)]
        for nanny in ("--no-nanny", "--no-nanny", "--nanny"):
            running.append(worker(file, other, nanny))
            said, _ = running[-1].communicate(timeout=60)  # it ends
            assert said.count("refused: this worker has curate") == 1
        gate.touch()
        assert all(future.result(timeout=60) for future in waiting)


def test_a_scheduler_file_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jobs.cluster_dask._ANSWER_SECONDS", 0.1)
    file = tmp_path / "scheduler.json"
    settings = Cluster(kind="scheduler-file", scheduler_file=str(file))
    with pytest.raises(TryAgainError, match="there is no scheduler file"), open_pool(settings):
        pass
    for text in ("", "nothing", "[]", json.dumps({"id": "x"})):
        file.write_text(text)
        with pytest.raises(InputError, match="is no scheduler file"), open_pool(settings):
            pass


def test_a_scheduler_file_is_found_at_home_and_awaited_until_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The scheduler makes the file first, and then writes into it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "scheduler.json"
    file.touch()
    asked: list[float] = []

    def write(seconds: float) -> None:
        asked.append(seconds)
        file.write_text(json.dumps({"address": "nowhere://h:1"}))

    monkeypatch.setattr("jobs.cluster_dask.time.sleep", write)
    settings = Cluster(kind="scheduler-file", scheduler_file="~/scheduler.json")
    with pytest.raises(ConfigError, match="nowhere"), open_pool(settings):
        pass
    assert len(asked) == 1


def test_a_scheduler_that_has_gone_is_told_while_workers_are_awaited_too():
    """The client closes itself when it cannot connect again, and has no scheduler from then on."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, processes=False, protocol="tcp://",
        host="127.0.0.1", dashboard_address="127.0.0.1:0",
    ) as cluster:  # fmt: skip
        address = str(getattr(cluster, "scheduler_address"))  # noqa: B009 - has no type
        with open_pool(Cluster(kind="address", address=address)) as pool:
            pool.client.sync(pool.client._close)  # as it does itself
            pool.forget()
            with pytest.raises(TryAgainError, match=f"at {address} has gone") as gone:
                assert pool.window
    assert gone.value.exit_code == 75


@pytest.mark.skipif(not CAN_BE_MADE, reason="openssl makes the certificates")
def test_a_scheduler_with_certificates_is_reached_by_their_paths(tmp_path: Path):
    from distributed import LocalCluster

    paths = certificate(tmp_path)
    server = security(Cluster(kind="address", address="tls://h:1", **paths))
    with LocalCluster(
        n_workers=1, processes=False, protocol="tls://", security=server,
        host="127.0.0.1", dashboard_address="127.0.0.1:0",
    ) as cluster:  # fmt: skip
        address = str(getattr(cluster, "scheduler_address"))  # noqa: B009 - has no type
        assert address.startswith("tls://")
        with open_pool(Cluster(kind="address", address=address, **paths)) as pool:
            assert pool.executor.submit(os.getpid).result() == os.getpid()
        bare = Cluster(kind="address", address=address)
        with pytest.raises(ConfigError, match="certificates"), open_pool(bare):
            pass


TWICE = """
from jobs.cluster import Cluster, open_pool

if __name__ == "__main__":
    for _ in range(2):
        with open_pool(Cluster(kind="local", workers=1)) as pool:
            assert pool.executor.submit(int, "7").result() == 7
"""


def test_a_process_opens_a_second_cluster_after_the_first(tmp_path: Path):
    """Dask's own defaults are loaded with it, and must not go with the settings of the first."""
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    subprocess.run([sys.executable, str(script)], check=True, timeout=120, cwd=ROOT)
