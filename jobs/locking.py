"""One process at a time in a run folder: a lock that says who holds it, and that he still lives.

`.lock` is held with `flock`, which the system lets go of when the process ends, however it ends.
Between machines that is not enough: some network file systems have no locks, or keep them to one
machine. So the holder also writes into the file, every few seconds, that it is alive; what another
machine has written counts as long as it goes on.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread

from curate.errors import OutputError, RunFolderError

log = logging.getLogger(__name__)

LOCK = ".lock"
_BEAT_SECONDS = 5.0
_BEATS_MISSED = 4
"""How many signs of life may be missing: a network file system shows them late."""
_MOST_BYTES = 2000
_LOOKED_AT_SECONDS = 0.25
"""For a moment it is held by those who only ask who holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who holds a run folder."""

    pid: int
    host: str
    command: str
    since: float
    """Seconds since 1970."""
    beat: int
    """Grows every few seconds."""
    alive: float
    """When it grew last, by the holder's own clock."""

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine."""
        return self.host == os.uname().nodename

    def __str__(self) -> str:
        began = datetime.fromtimestamp(self.since, UTC).isoformat(" ", "minutes")[:16]
        return (
            f"pid {self.pid} on {self.host}: curate {self.command}, since {began} UTC,"
            f" {_lasting(time.time() - self.since)} ago"
        )


@contextmanager
def locked(root: Path, command: str) -> Generator[None]:
    """Hold `root/.lock`.

    Args:
        root: the run folder; it is there.
        command: what is run, for those who find it locked.

    Raises:
        RunFolderError: another process works there.
        OutputError: nothing can be written there.
    """
    try:
        handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(
            f"nothing can be written into the run folder {root}: {error.strerror}",
            fix="make it writable, or choose another folder with --out",
        ) from error
    try:
        has_locks = _take(handle, root)
        _wait_for_silence(root, has_locks=has_locks)
        now = time.time()
        me = Owner(pid=os.getpid(), host=os.uname().nodename, command=command, since=now, beat=0,
                   alive=now)  # fmt: skip
        with _beating(handle, me):
            yield
    finally:
        os.close(handle)


def local_holder(root: Path) -> str | None:
    """Which process works in the run folder now, or None; takes nothing from it."""
    try:
        handle = os.open(root / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(read_owner(root))
    except OSError:  # a file system without locks
        owner = read_owner(root)
        return str(owner) if owner is not None and _may_live(owner, has_locks=False) else None
    finally:
        os.close(handle)
    owner = read_owner(root)
    return str(owner) if owner is not None and _may_live(owner, has_locks=True) else None


def read_owner(root: Path) -> Owner | None:
    """Who has written into the lock last and has not ended in order; opened anew, so that a
    network file system shows what there is now."""
    try:
        with (root / LOCK).open("rb") as file:
            return Owner(**json.loads(file.read(_MOST_BYTES)))
    except (OSError, ValueError, TypeError):  # none, being written, or of an older version
        return None


def _take(handle: int, root: Path) -> bool:
    """Whether the file system has locks; it is held then."""
    until = time.monotonic() + _LOOKED_AT_SECONDS
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise _in_use(root, read_owner(root)) from error
                time.sleep(_LOOKED_AT_SECONDS / 5)
    except OSError as error:
        log.warning("the file system of %s has no locks (%s): a second process is told by the"
                    " first one's signs of life alone", root, error.strerror)  # fmt: skip
        return False
    return True


def _wait_for_silence(root: Path, *, has_locks: bool) -> None:
    """Where another machine may be at work, look whether it goes on."""
    owner = read_owner(root)
    if owner is None or not _may_live(owner, has_locks=has_locks):
        return
    log.info("%s: the last process (%s) has not ended in order; looking whether it lives", root,
             owner)  # fmt: skip
    until = time.monotonic() + _BEATS_MISSED * _BEAT_SECONDS
    while time.monotonic() < until:
        time.sleep(_BEAT_SECONDS / 10)
        now = read_owner(root)
        if now is None:  # it has just ended, or is writing
            continue
        if now != owner:
            raise _in_use(root, now)
    log.info("%s: it does not; its work goes on here", root)


def _may_live(owner: Owner, *, has_locks: bool) -> bool:
    """Whether who has written last may still be at work; on this machine the system knows."""
    if not owner.is_here:
        # Clocks of two machines differ: minutes are added before its silence is believed.
        return abs(time.time() - owner.alive) < _BEATS_MISSED * _BEAT_SECONDS + 600
    if has_locks:
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return owner.pid != os.getpid()


@contextmanager
def _beating(handle: int, me: Owner) -> Generator[None]:
    over = Event()

    def write(beat: int) -> None:
        text = json.dumps(asdict(replace(me, beat=beat, alive=time.time()))) + "\n"
        with suppress(OSError):  # of a full disk the tasks themselves will tell
            # Never shorter than before, so that a reader finds it whole.
            os.pwrite(handle, text.ljust(500).encode(), 0)
            os.fsync(handle)

    def beat() -> None:
        number = 0
        while not over.wait(_BEAT_SECONDS):
            number += 1
            write(number)

    os.ftruncate(handle, 0)
    write(0)
    thread = Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        os.ftruncate(handle, 0)  # it ended in order: nobody needs to wait


def _in_use(root: Path, owner: Owner | None) -> RunFolderError:
    return RunFolderError(
        f"{root} is in use by another process ({_named(owner)})",
        fix="wait until it has finished, or choose another folder with --out",
    )


def _named(owner: Owner | None) -> str:
    return "unknown" if owner is None else str(owner)


def _lasting(seconds: float) -> str:
    """A while, in the largest unit that is not a fraction."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            number = int(seconds // size)
            return f"{number} {unit}{'s' if number > 1 else ''}"
    number = max(0, int(seconds))
    return f"{number} second{'' if number == 1 else 's'}"
