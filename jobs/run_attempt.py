"""A task on its worker: what came of it, who did it, and signs of life while it runs."""

import errno
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from curate.data import pulse
from curate.data.partitions import Output
from curate.errors import CurateError, OutputError, TryAgainError

Kind = Literal["data", "io", "memory", "unknown", "full", "stop"]
"""Of an error. data: the same anywhere; io: a disk, a mount or a network; memory: of a GPU or of
the host; full: the worker's own disk; stop: the run folder cannot be written, by nobody."""

PULSE = "curate"
"""Name of the signs of life among a worker's metrics."""

_INLINE = "inline"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BEAT_SECONDS = 0.5
_last_told = 0.0


class Failed(NamedTuple):
    """How a task failed on its worker."""

    kind: Kind
    error: Exception
    trace: str
    """The traceback, which an error does not carry from one process to another."""


class Attempt(NamedTuple):
    """What comes back from a worker."""

    worker: str
    """Its name, for people."""
    address: str
    """Of the worker; empty inline."""
    seconds: float
    receipt: dict[str, Any]
    failed: Failed | None = None


def attempt(
    payload: dict[str, Any],
    work: Callable[[dict[str, Any]], dict[str, Any]],
    path: str,
    fingerprint: str,
    root: str,
) -> Attempt:
    """Do the work, or see that it is done: its last worker may have died before it could say so.

    Args:
        payload: of the task.
        work: writes the output and returns a receipt.
        path: of the output.
        fingerprint: of the output.
        root: folder that all workers write into; a disk that is full elsewhere is this one's own.
    """
    name, address = _announce()
    started = time.monotonic()
    try:
        receipt = {} if Output(Path(path)).is_done(fingerprint) else work(payload)
        return Attempt(name, address, time.monotonic() - started, receipt)
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        kind = kind_of(error, Path(root))
        _let_go(error)
        failed = Failed(kind, _portable(error) if address else error, trace)
        return Attempt(name, address, time.monotonic() - started, {}, failed)


def kind_of(error: BaseException, root: Path) -> Kind:
    """What an error means for another attempt.

    Args:
        error: of a task.
        root: folder that all workers write into.
    """
    chain = list(_chain(error))
    system = next((e for e in chain if isinstance(e, OSError)), None)
    named = getattr(system, "filename", None)
    elsewhere = isinstance(named, str | os.PathLike) and not _is_below(Path(named), root)
    is_full = system is not None and system.errno in _FULL
    if isinstance(error, OutputError):
        return "full" if elsewhere and is_full else "stop"
    if is_full:
        return "full" if elsewhere or named is None else "stop"
    if system is not None or isinstance(error, TryAgainError):
        return "io"
    if any(_is_out_of_memory(e) for e in chain):
        return "memory"
    return "data" if isinstance(error, CurateError) else "unknown"


def _chain(error: BaseException) -> Generator[BaseException]:
    """The error, and those that it came from."""
    seen = set[int]()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _is_below(path: Path, root: Path) -> bool:
    return path.absolute().is_relative_to(root.absolute())


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: planning and writing load no torch.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _let_go(error: BaseException) -> None:
    """Drop what the frames of an error hold: tables, tensors, a GPU's memory."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot travel between processes."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - its own words
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _announce() -> tuple[str, str]:
    """Name and address of the worker; its scheduler hears what runs here, and signs of life."""
    if "distributed" not in sys.modules:
        return _INLINE, ""
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:
        return _INLINE, ""
    global _last_told
    now = time.monotonic()
    if now > _last_told + _BEAT_SECONDS:
        _last_told = now
        worker.loop.add_callback(_tell, worker)
    return shown_name(worker.name), str(worker.contact_address)


def shown_name(name: Any) -> str:
    """A worker's name, for people: those of a local cluster are numbers."""
    return f"worker-{name}" if str(name).isdecimal() else str(name)


async def _tell(worker: Any) -> None:
    """In the worker's own loop: what it runs must be known before it can die of it."""
    worker.metrics.setdefault(PULSE, _signs)
    if worker.status.name == "running":
        await worker.heartbeat()


def _signs(_: Any) -> dict[str, float]:
    """What a worker sends along with its heartbeats."""
    return {"beats": pulse.beats(), "cpu": time.process_time()}
