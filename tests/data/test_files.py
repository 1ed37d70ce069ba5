"""Whole files or none, and digests."""

import errno
import os
from pathlib import Path

import pytest
import xxhash

from curate.data.files import (
    digest_file,
    fingerprint,
    read_json,
    remove_temporaries,
    replace,
    replace_folder,
    temporary_for,
    write_json,
)
from curate.errors import InputError, OutputError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(target, fail)
    assert read_json(target) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"a\.bin could not be written: No space.*\n.*free some"):
        replace(tmp_path / "a.bin", full)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "helps"),
    [
        (errno.ENOSPC, "free some space or choose another place,"),
        (errno.EDQUOT, "free some space or choose another place,"),
        (errno.EACCES, "choose another place (--out"),
        (errno.EROFS, "choose another place (--out"),
        (errno.EIO, "look after the disk"),
    ],
)
def test_what_helps_depends_on_why_a_file_could_not_be_written(
    tmp_path: Path, number: int, helps: str
) -> None:
    def refused(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    for write in (replace, replace_folder):
        with pytest.raises(OutputError) as caught:
            write(tmp_path / "a", refused)
        assert caught.value.fix.startswith(helps)
        assert os.strerror(number) in caught.value.what
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/a.bin", "file/sub/a.bin"])
def test_a_place_below_a_file_is_refused_and_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"could not be written: .*\n.*choose another place"):
        replace(tmp_path / place, lambda path: path.write_bytes(b"y"))
    assert (tmp_path / "file").read_bytes() == b"x"


def test_the_digest_of_a_file_is_xxh3_128_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(data)
    assert digest_file(tmp_path / "a") == xxhash.xxh3_128_hexdigest(data)


def test_fingerprints_depend_on_values_and_not_on_order() -> None:
    assert fingerprint(a=1, b={"x": 1, "y": 2}) == fingerprint(b={"y": 2, "x": 1}, a=1)
    assert fingerprint(a=1, b=2) != fingerprint(a=2, b=1)


def test_json_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a.json") is None


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    inner = tmp_path / "scores"
    inner.mkdir()
    temporary_for(inner / "part-1.parquet").write_bytes(b"half")
    temporary_for(inner / "seed-0").mkdir()
    (temporary_for(inner / "seed-0") / "model").write_bytes(b"half")
    for name in ("part-1.parquet", ".notes.tmp", "a.123.tmp"):
        (inner / name).write_bytes(b"whole")
    assert remove_temporaries(tmp_path) == 2
    assert {path.name for path in inner.iterdir()} == {"part-1.parquet", ".notes.tmp", "a.123.tmp"}


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe{}"])
def test_a_damaged_json_file_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json is damaged: .*\n.*remove it and run"):
        read_json(path)
