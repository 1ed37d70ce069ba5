"""Writing a file so that it is either whole or not there, and digests of what was written."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from curate.errors import OutputError

_CHUNK_BYTES = 1 << 20


def replace(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside `target`, flush to disk, then rename: a kill leaves the old file or the new.

    Args:
        target: where the file goes; parent folders are made.
        write: called with a temporary path in the same folder.

    Raises:
        OutputError: the disk is full or refuses the write; the message names `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(target)
    try:
        write(temporary)
        publish(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{target} could not be written: {error.strerror or error}",
            fix="free some space or choose another --out, then run the same command again;"
            " what is finished is kept",
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Fill a folder beside `target`, flush it to disk, then rename: all its files or none.

    Args:
        target: where the folder goes; what lies there already is replaced.
        write: called with an empty folder beside it.

    Raises:
        OutputError: the disk is full or refuses the write; the message names `target`.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        for path in sorted(temporary.rglob("*")):
            _flush(path)
        _flush(temporary)
        if target.exists():  # a folder with files in it cannot be renamed over
            shutil.rmtree(target)
        temporary.rename(target)
        _flush(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"{target} could not be written: {error.strerror or error}",
            fix="free some space or choose another --out, then run the same command again;"
            " what is finished is kept",
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_for(target: Path) -> Path:
    """Where to write what will be `target`: hidden, in the same folder."""
    # The process id keeps a late worker, thought dead, from writing into another's file.
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def publish(temporary: Path, target: Path) -> None:
    """Flush a finished file to disk, then give it its name."""
    _flush(temporary)
    temporary.replace(target)
    _flush(target.parent)


def write_json(target: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """`value` as JSON at `target`, written whole or not at all; keys keep their order."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    replace(target, lambda path: path.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The JSON value at `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def digest_file(path: Path) -> str:
    """xxh3-128 of the bytes of `path`, as 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def fingerprint(**parts: Any) -> str:
    """Digest of named values that JSON can hold; equal values give equal digests, in any order."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _flush(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
