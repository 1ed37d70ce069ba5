"""A run on S3, against a server of its own: the bytes of a local run, kills, lost networks."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from e2e.small_run import ROOT, bytes_of, settings, write_config, write_inputs
from killed import is_killed
from pyarrow.fs import FileSelector, FileType, S3FileSystem

FOLDERS = ("examples", "lengths", "plan", "scores", "shards")
CHANGES: dict[str, Any] = {
    "task": {},
    "model": {},
    "checkpoints": {},
    "mix": {},
    "score": {"scorers": ["length", "random"]},
    "plan": {"score": "num_chars", "keep": {"token_share": 0.5}},
}


class Store:
    """The server, seen by a client that shares no code with the one under test."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.files = S3FileSystem(
            access_key="k", secret_key="k", region="us-east-1", scheme="http",
            endpoint_override=self.address, allow_bucket_creation=True,
        )  # fmt: skip

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "k",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{endpoint or self.address}",
        }

    def objects(self, *folders: str) -> dict[str, int]:
        """Name, from the bucket on -> when it was written; hidden ones too."""
        found: dict[str, int] = {}
        for folder in folders:
            selector = FileSelector(folder, recursive=True, allow_not_found=True)
            for entry in self.files.get_file_info(selector):
                if entry.type == FileType.File:
                    found[entry.path] = entry.mtime_ns
        return found

    def read(self, name: str) -> bytes:
        with self.files.open_input_file(name) as file:
            return file.read()

    def bytes_of(self, run: str, *folders: str) -> dict[str, str]:
        """What `small_run.bytes_of` gives of a local run."""
        names = [name.removeprefix(f"{run}/") for name in self.objects(run)]
        return {
            name: hashlib.sha256(self.read(f"{run}/{name}")).hexdigest()
            for name in sorted(names)
            if name.startswith(tuple(f"{folder}/" for folder in folders))
            and not any(part.startswith(".") for part in name.split("/"))
        }


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < end, "the server never came"
                time.sleep(0.05)
        found_store = Store(port)
        found_store.files.create_dir("bucket")
        yield found_store
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / "data"
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def local(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the same run writes on this machine."""
    run = tmp_path_factory.mktemp("local") / "run"
    config = write_config(run.parent / "c.yaml", settings(inputs, run, **CHANGES))
    done = curate("run", config, environment={})
    assert done.returncode == 0, done.stderr
    return bytes_of(run, *FOLDERS)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "curate", *map(str, arguments)]


def curate(*arguments: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_on_s3_has_the_bytes_of_a_local_one_and_one_client_at_a_time(
    store: Store, inputs: Path, local: dict[str, str], tmp_path: Path
):
    run = "s3://bucket/team/run"
    values = settings(inputs, Path("x"), **CHANGES, cluster={"kind": "local", "workers": 2})
    config = write_config(tmp_path / "c.yaml", {**values, "run": run})
    environment = {**store.environment(), "CURATE_SCRATCH": str(tmp_path / "scratch")}
    elsewhere = {**environment, "CURATE_SCRATCH": str(tmp_path / "elsewhere")}
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(
            command("run", config), stdout=log, stderr=log, cwd=ROOT,
            env={**os.environ, **environment},
        )  # fmt: skip
    try:
        while not store.objects("bucket/team/run/examples"):
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        first.send_signal(signal.SIGSTOP)
        refused = curate("plan", run, environment=elsewhere)
        told = curate("status", run, "--json", environment=elsewhere)
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    finally:
        first.kill()
        first.wait()
    assert refused.returncode == 5, refused.stderr
    assert f"{run} is in use by another client (pid {first.pid} on " in refused.stderr
    assert "last heard of" in refused.stderr
    assert f"pid {first.pid} on " in json.loads(told.stdout)["in_use_by"]

    assert store.bytes_of("bucket/team/run", *FOLDERS) == local
    left = set(store.objects("bucket/team/run"))
    assert not [name for name in left if ".lock" in name or ".live" in name or ".tmp" in name]
    shard = next(name for name in left if name.endswith(".parquet") and "/shards/" in name)
    table = pq.read_table(shard, filesystem=store.files)
    manifest = json.loads(store.read("bucket/team/run/shards/manifest.json"))
    assert table.num_rows == next(
        entry["rows"] for entry in manifest["shards"] if shard.endswith(entry["file"])
    )
    # Another machine has nothing but the address.
    checked = curate("verify", run, "--json", environment=elsewhere)
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["rows"] == manifest["rows"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_and_cut_off_runs_go_on_from_nothing_but_the_store(
    store: Store, inputs: Path, local: dict[str, str], tmp_path: Path, monkeypatch: Any
):
    run, scratch = "s3://bucket/killed", tmp_path / "scratch"
    values = settings(inputs, Path("x"), **CHANGES)
    config = write_config(tmp_path / "c.yaml", {**values, "run": run})
    for name, value in {**store.environment(), "CURATE_SCRATCH": str(scratch)}.items():
        monkeypatch.setenv(name, value)

    def marks(*folders: str) -> dict[str, int]:
        time.sleep(0.05)  # asked again and again
        found = store.objects(*(f"bucket/killed/{folder}" for folder in folders))
        return {name: written for name, written in found.items() if "/.done/" in name}

    with Relay(store.address) as relay:
        with (tmp_path / "log").open("wb") as log:
            cut = subprocess.Popen(
                command("run", config), stdout=log, stderr=log, cwd=ROOT,
                env={**os.environ, **store.environment(relay.address)},
            )  # fmt: skip
        while len(marks("examples")) < 3 and cut.poll() is None:
            pass
        relay.cut()
        said = (tmp_path / "log").read_text
        assert cut.wait(timeout=120) == 75, said()
    assert "cannot be reached" in said()
    assert "run the same command again" in said()
    assert "Traceback" not in said()
    shutil.rmtree(scratch)
    before = marks("examples")
    for folder, number in (("scores", 4), ("shards.done", 1)):
        assert is_killed(command("run", config), lambda: len(marks(folder)) >= number)  # noqa: B023
        shutil.rmtree(scratch)
        now = marks("examples", "scores", "shards.done")
        assert before.items() <= now.items(), "done again"
        before = now
    # The settings are in the store too.
    done = curate("run", run, environment={})
    assert done.returncode == 0, done.stderr
    assert "in s3://bucket/killed/shards" in done.stdout
    assert before.items() <= marks("examples", "scores", "shards.done").items(), "done again"
    assert store.bytes_of("bucket/killed", *FOLDERS) == local
    # From another machine it looks as done as it is.
    shutil.rmtree(scratch)
    told = json.loads(curate("status", run, "--json", environment={}).stdout)
    assert all(not stage["remaining"] and stage["done"] for stage in told["stages"]), told


def test_a_bucket_that_is_missing_and_credentials_that_are(
    store: Store, inputs: Path, tmp_path: Path
):
    environment = {**store.environment(), "CURATE_SCRATCH": str(tmp_path / "scratch")}
    values = settings(inputs, Path("x"), **CHANGES)
    config = write_config(tmp_path / "c.yaml", {**values, "run": "s3://nowhere/run"})
    done = curate("index", config, environment=environment)
    assert done.returncode == 3, done.stderr
    assert "make the bucket, or correct the address" in done.stderr
    nobody = {
        **environment,
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    done = curate("status", "s3://bucket/run", environment=nobody)
    assert done.returncode == 3, done.stderr
    assert "check the store's credentials" in done.stderr


class Relay:
    """A way to the server that can be cut."""

    def __init__(self, server: str) -> None:
        host, _, port = server.partition(":")
        self._server = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        """Close it, and all connections that go through it."""
        self._listener.close()
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)
