"""Writing a file so that it is either whole or not there, and digests of what was written."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from curate.data.mirror import forget, forget_folder, held, sending, sending_folder
from curate.data.pulse import beat
from curate.errors import InputError, OutputError

_CHUNK_BYTES = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_PLACE = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENOENT, errno.EEXIST,
     errno.EISDIR, errno.ENAMETOOLONG}
)  # fmt: skip
"""Where another place helps, and more space does not."""
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def replace(target: Path, write: Callable[[Path], object], *, flush: bool = True) -> None:
    """Write beside `target`, flush to disk, then rename: a kill leaves the old file or the new.

    Args:
        target: where the file goes; parent folders are made.
        write: called with a temporary path in the same folder.
        flush: False for files that may be lost, or torn, when the machine itself goes down.

    Raises:
        OutputError: the disk is full or refuses the write; the message names `target`.
    """
    temporary = temporary_for(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        publish(temporary, target, flush=flush)
    except OSError as error:
        with suppress(OSError):  # where a parent is a file, or the folder takes nothing
            temporary.unlink(missing_ok=True)
        raise _refused(target, error) from error
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
        with sending_folder(temporary, target):
            if target.exists():  # a folder with files in it cannot be renamed over
                shutil.rmtree(target)
            temporary.rename(target)
        _flush(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _refused(target, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _refused(target: Path, error: OSError) -> OutputError:
    """The error of a write that failed, with what helps against this one."""
    if error.errno in _FULL:
        way = "free some space or choose another place"
    elif error.errno in _NO_PLACE:
        way = "choose another place (--out, or run in the settings)"
    else:
        way = "look after the disk or choose another place"
    why = "its parent is a file" if isinstance(error, FileExistsError) else error.strerror
    return OutputError(
        f"{target} could not be written: {why or error}",
        fix=f"{way}, then run the same command again; what is finished is kept",
    )


def temporary_for(target: Path) -> Path:
    """Where to write what will be `target`: hidden, in the same folder."""
    # The process id keeps a late worker, thought dead, from writing into another's file.
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a file or folder is one that a writer which was killed has left behind."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(root: Path) -> int:
    """Remove what killed writers left below `root`; call it while nobody writes there.

    Returns:
        How many files and folders were removed.
    """
    found = [path for path in root.rglob(".*.tmp") if is_temporary(path)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)


def publish(temporary: Path, target: Path, *, flush: bool = True) -> None:
    """Flush a finished file to disk, then give it its name; in a store it has it before."""
    if flush:
        _flush(temporary)
    with sending(temporary, target):
        temporary.replace(target)
    beat()
    if flush:
        _flush(target.parent)


def discard(path: Path) -> None:
    """Remove a file, where there is one, so that it does not come back after a power cut."""
    forget(path)
    if path.exists():
        path.unlink()
        _flush(path.parent)


def remove(path: Path) -> None:
    """Remove a file, where there is one."""
    forget(path)
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and all below it, where there is one."""
    forget_folder(path)
    shutil.rmtree(path, ignore_errors=True)


def size_of(path: Path) -> int | None:
    """Bytes of a file, whether it is here or only in the store; None where there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return held(path)


def write_json(target: Path, value: Mapping[str, Any] | list[Any], *, flush: bool = True) -> None:
    """`value` as JSON at `target`, written whole or not at all; keys keep their order."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    replace(target, lambda path: path.write_text(text, encoding="utf-8"), flush=flush)


def read_json(path: Path) -> Any:
    """The JSON value at `path`, or None where there is no such file.

    Raises:
        InputError: what is there is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # not UTF-8, or no JSON
        raise misshapen(path, str(error)) from error


def read_document(path: Path, **keys: type) -> dict[str, Any] | None:
    """The JSON object at `path`, or None where there is no such file.

    Args:
        path: of the file.
        **keys: what it must hold, each with the type of its value.

    Raises:
        InputError: it is no JSON, no object, or lacks one of the keys.
    """
    value = read_json(path)
    if value is None and not path.exists():
        return None
    if not isinstance(value, dict):
        raise misshapen(path, "it holds no JSON object")
    for key, kind in keys.items():
        if not isinstance(value.get(key), kind):
            raise misshapen(path, f"it has no {key}")
    return value


def misshapen(path: Path, why: str) -> InputError:
    """The error of a JSON file whose values are not of the shape that curate writes."""
    return InputError(
        f"{path} is damaged: {why}",
        fix="restore it; in a run folder, remove it and run the same command again",
    )


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
