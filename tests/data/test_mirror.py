"""A working copy and its store: what comes first, what is undone, what is brought up to date."""

import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from curate.data import files
from curate.data.mirror import (
    address_in,
    attach,
    copy_for,
    copy_of,
    ensure,
    forget_folder,
    held_below,
    shown_place,
)
from curate.data.mirror_copy import Mirror
from curate.data.mirror_journal import Entry, Journal
from curate.data.mirror_lock import LOCK, holding, owner_of
from curate.data.partitions import Output, remove_strays
from curate.data.pulse import beats
from curate.errors import CurateError, InputError, OutputError, RunFolderError, StoreLostError


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("CURATE_SCRATCH", str(tmp_path / "scratch"))
    real = MemoryFileSystem.info

    def info(self: Any, path: str, **more: Any) -> dict[str, Any]:
        # As in a listing, which real stores give the same tags in.
        found: dict[str, Any] = dict(real(self, path, **more))
        return {**found, "created": found["created"].timestamp()} if "created" in found else found

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    name = f"memory://bucket-{uuid.uuid4().hex}/run"
    yield name
    memory = fsspec.filesystem("memory")
    if memory.exists(name):
        memory.rm(name, recursive=True)


@pytest.fixture
def mirror(address: str) -> Mirror:
    return copy_for(address)


def other(mirror: Mirror, place: Path) -> Mirror:
    """The working copy of another machine."""
    return attach(place / "other.copy" / "run", mirror.address)


def in_store(mirror: Mirror) -> dict[str, bytes]:
    memory = fsspec.filesystem("memory")
    base = mirror.address.removeprefix("memory:/")
    return {path.removeprefix(f"{base}/"): memory.cat(path) for path in memory.find(base)}


def write(mirror: Mirror, name: str, text: str = "x", fingerprint: str = "f") -> Output:
    output = Output(mirror.root / name)
    output.write(lambda path: path.write_text(text), fingerprint)
    return output


def spy(monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> list[str]:
    """What the store is told from now on."""
    told: list[str] = []
    system, base = mirror.system()
    for name in ("put_file", "rm_file"):
        real = getattr(system, name)

        def seen(*args: Any, _name: str = name, _real: Any = real, **more: Any) -> Any:
            key = args[-1]
            told.append(f"{_name.split('_')[0]} {str(key).removeprefix(f'{base}/')}")
            return _real(*args, **more)

        monkeypatch.setattr(system, name, seen, raising=False)
    return told


def test_addresses_are_known_even_when_a_path_has_lost_a_slash():
    assert address_in(Path("s3://bucket/run/")) == "s3://bucket/run"
    assert address_in("gs://bucket/a/b") == "gs://bucket/a/b"
    assert address_in("runs/a") is None
    assert address_in("/tmp/s3:/x") is None
    assert address_in("file:///tmp/x") is None


def test_a_file_is_in_the_store_before_it_has_its_name_and_its_mark_is_last(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
):
    write(mirror, "scores/a.parquet", "old")
    told = spy(monkeypatch, mirror)
    output = write(mirror, "scores/a.parquet", "new")
    assert told == [
        "rm scores/.done/a.parquet.json", "put scores/a.parquet", "put scores/.done/a.parquet.json"
    ]  # fmt: skip
    assert in_store(mirror)["scores/a.parquet"] == b"new"
    told.clear()
    output.remove()
    assert told == ["rm scores/.done/a.parquet.json", "rm scores/a.parquet"]
    assert in_store(mirror) == {}


def test_what_the_store_refuses_is_not_here_either(mirror: Mirror, monkeypatch: pytest.MonkeyPatch):
    write(mirror, "scores/a.parquet", "old")

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError("no route")

    monkeypatch.setattr(mirror.system()[0], "put_file", lost)
    with pytest.raises(StoreLostError, match="cannot be reached") as caught:
        write(mirror, "scores/a.parquet", "new")
    assert caught.value.exit_code == 75
    assert isinstance(caught.value, OutputError)  # any other write would fail the same way
    assert (mirror.root / "scores/a.parquet").read_text() == "old"
    assert Output(mirror.root / "scores/a.parquet").mark() is None


def test_rights_and_buckets_that_are_missing_are_told_from_lost_networks(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
):
    class NoCredentialsError(Exception):
        pass

    for error, kind, said in (
        (PermissionError("denied"), InputError, "credentials and their rights"),
        (NoCredentialsError("none"), InputError, "credentials and their rights"),
        (FileNotFoundError("bucket"), InputError, "make the bucket"),
        (TimeoutError("late"), StoreLostError, "run the same command again"),
    ):

        def fails(*_: Any, _error: Exception = error, **__: Any) -> None:
            raise _error

        monkeypatch.setattr(mirror.system()[0], "put_file", fails)
        with pytest.raises(kind, match=said):
            write(mirror, "a.json")


def test_a_deleted_copy_is_brought_back_and_counts_as_done_before(mirror: Mirror, tmp_path: Path):
    write(mirror, "scores/a.parquet", "content")
    again = other(mirror, tmp_path)
    again.refresh()
    output = Output(again.root / "scores/a.parquet")
    assert output.mark() is None  # a mark is a document, and was not asked for
    again.bring(lambda name: name.endswith(".json"))
    assert output.is_done("f")
    assert not output.path.exists()
    ensure(output.path)
    assert output.path.read_text() == "content"
    assert [path.name for path in held_below(again.root / "scores")].count("a.parquet") == 1


def test_a_mark_whose_file_is_missing_in_the_store_is_not_done(mirror: Mirror, tmp_path: Path):
    write(mirror, "scores/a.parquet", "content")
    fsspec.filesystem("memory").rm(f"{mirror.address}/scores/a.parquet")
    again = other(mirror, tmp_path)
    again.refresh()
    again.bring(lambda _: True)
    assert not Output(again.root / "scores/a.parquet").is_done("f")
    assert Output(again.root / "scores/a.parquet").mark() is None
    mirror.refresh()
    assert not Output(mirror.root / "scores/a.parquet").is_done("f")
    assert not (mirror.root / "scores/a.parquet").exists()


def test_a_stale_copy_is_brought_up_to_date(mirror: Mirror, tmp_path: Path):
    write(mirror, "scores/a.parquet", "one", "1")
    write(mirror, "scores/b.parquet", "same", "1")
    write(mirror, "scores/c.parquet", "goes", "1")
    again = other(mirror, tmp_path)
    again.refresh(owner=True)
    again.bring(lambda _: True)
    write(again, "scores/a.parquet", "two", "2")  # of the same size
    Output(again.root / "scores/c.parquet").remove()
    kept = (mirror.root / "scores/b.parquet").stat().st_mtime_ns
    mirror.refresh(owner=True)
    mirror.bring(lambda _: True)
    assert Output(mirror.root / "scores/a.parquet").is_done("2")
    assert (mirror.root / "scores/a.parquet").read_text() == "two"
    assert (mirror.root / "scores/b.parquet").stat().st_mtime_ns == kept
    assert not (mirror.root / "scores/c.parquet").exists()


def test_what_a_killed_process_left_goes_when_the_run_is_opened_and_not_when_it_is_looked_at(
    mirror: Mirror,
):
    write(mirror, "scores/a.parquet")
    stray = mirror.root / "scores" / "half.bin"
    stray.write_text("half")
    mirror.refresh()
    assert stray.exists()
    mirror.refresh(owner=True)
    assert not stray.exists()
    assert (mirror.root / "scores/a.parquet").exists()


def test_a_folder_is_whole_in_the_store_or_goes(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = mirror.root / "checkpoints" / "step-1"

    def fill(text: str, *names: str) -> None:
        def fill_it(place: Path) -> None:
            for name in names:
                (place / name).write_text(text)

        files.replace_folder(folder, fill_it)

    fill("one", "config.json", "model.safetensors", "old.json")
    fill("two", "config.json", "model.safetensors")
    names = ["checkpoints/step-1/config.json", "checkpoints/step-1/model.safetensors"]
    assert sorted(in_store(mirror)) == names
    system, _ = mirror.system()
    real = system.put_file

    def breaks(source: str, key: str, **more: Any) -> None:
        if key.endswith("model.safetensors"):
            raise ConnectionResetError("gone")
        real(source, key, **more)

    monkeypatch.setattr(system, "put_file", breaks)
    with pytest.raises(StoreLostError):
        fill("three", "config.json", "model.safetensors")
    assert (folder / "config.json").read_text() == "two"
    again = other(mirror, tmp_path)
    again.refresh()  # who only looks sees nothing of it
    assert list(held_below(again.root)) == []
    assert len(in_store(mirror)) == 3
    again.refresh(owner=True)
    assert in_store(mirror) == {}


def test_what_was_written_or_removed_past_the_primitives_follows(mirror: Mirror):
    write(mirror, "scores/a.parquet")
    (mirror.root / "scores/a.parquet").unlink()
    (mirror.root / "notes").mkdir()
    (mirror.root / "notes/plain.txt").write_text("plain")
    (mirror.root / "notes/.plain.txt.12.tmp").write_text("half")
    mirror.sweep()
    assert set(in_store(mirror)) == {"scores/.done/a.parquet.json", "notes/plain.txt"}


def test_tables_of_partitions_that_are_gone_leave_the_store_too(mirror: Mirror, tmp_path: Path):
    write(mirror, "scores/part-1.parquet")
    write(mirror, "scores/part-2.parquet")
    again = other(mirror, tmp_path)
    again.refresh()
    assert remove_strays(again.root / "scores", {"part-2"}) == 1
    assert set(in_store(mirror)) == {"scores/part-2.parquet", "scores/.done/part-2.parquet.json"}


def test_a_folder_elsewhere_is_never_taken_for_the_run(mirror: Mirror, tmp_path: Path):
    write(mirror, "scores/a.parquet")
    (tmp_path / "outside").mkdir()
    (mirror.root / "link").symlink_to(tmp_path / "outside")
    files.remove_folder(mirror.root / "link" / "x")
    files.remove_folder(mirror.root / ".live")
    files.remove(mirror.root / "link")
    forget_folder(mirror.root)
    assert len(in_store(mirror)) == 2
    assert copy_of(tmp_path / "outside") is None
    assert shown_place(tmp_path / "outside") == str(tmp_path / "outside")
    assert shown_place(mirror.root / "shards") == f"{mirror.address}/shards"


def test_a_journal_survives_a_line_that_was_cut_short(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.append([("a", Entry(1, "t", None)), ("b", Entry(2, "t", "s"))])
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('["c", 3, "t')
    reader = Journal(tmp_path)
    assert set(reader.entries()) == {"a", "b"}
    journal.append([("a", None), ("d", Entry(4, "t", None))])
    assert set(reader.entries()) == {"b", "d"}
    assert reader.missing() == {"d"}
    journal.rewrite({"e": Entry(5, "t", None)})
    assert reader.entries() == {"e": Entry(5, "t", None)}


def test_a_second_client_is_refused_and_told_who_is_there(mirror: Mirror, tmp_path: Path):
    again = other(mirror, tmp_path)
    with holding(mirror):
        assert f"pid {os.getpid()} on " in (owner_of(again) or "")
        with (
            pytest.raises(RunFolderError, match=rf"pid {os.getpid()} on .*last heard of 0 s ago"),
            holding(again),
        ):
            pass
    assert owner_of(again) is None
    with holding(again):
        pass


def test_a_lock_that_is_silent_or_whose_process_died_is_taken_over(
    mirror: Mirror, caplog: pytest.LogCaptureFixture
):
    def lock(**facts: Any) -> None:
        own = {"token": "t", "pid": 1, "host": "far", "machine": "far", "since": time.time() - 900,
               "beat": time.time(), "started": "1"}  # fmt: skip
        mirror.pipe(LOCK, json.dumps({**own, **facts}).encode())

    lock()
    with pytest.raises(RunFolderError, match="pid 1 on far, for 15 min"), holding(mirror):
        pass
    lock(beat=time.time() - 600)
    with holding(mirror):
        assert "is taken over" in caplog.text
    with holding(mirror):
        own = json.loads(mirror.read(LOCK) or b"")
    lock(machine=own["machine"], pid=own["pid"], started="another process of that number")
    with holding(mirror):
        pass


def test_who_has_lost_the_lock_writes_no_more(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("curate.data.mirror_lock.BEAT_SECONDS", 0.02)
    with holding(mirror):
        taken = {"token": "t", "pid": 1, "host": "far", "since": 0, "beat": time.time()}
        mirror.pipe(LOCK, json.dumps(taken).encode())
        end = time.monotonic() + 10
        while mirror.lost is None and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(RunFolderError, match="was taken over by pid 1 on far"):
            write(mirror, "a.json")
    assert "this client stops" in caplog.text
    assert mirror.read(LOCK) is not None  # it is another's


def test_a_driver_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CURATE_SCRATCH", str(tmp_path))

    def none(*_: Any, **__: Any) -> None:
        raise ImportError("no gcsfs")

    monkeypatch.setattr("fsspec.core.url_to_fs", none)
    with pytest.raises(CurateError, match=r"pip install 'curate-data\[gs\]'") as caught:
        copy_for("gs://bucket/run").refresh()
    assert caught.value.exit_code == 6


def test_a_file_on_its_way_is_a_sign_of_life(mirror: Mirror, tmp_path: Path):
    (tmp_path / "a").write_bytes(bytes(100))
    before = beats()
    mirror.put(tmp_path / "a", "a")
    sent = beats()
    assert sent > before
    mirror.refresh()
    mirror.bring(lambda _: True)
    assert beats() > sent
