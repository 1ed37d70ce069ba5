"""One client at a time works in a run that lies in a store: a lock with owner and heartbeat.

The lock is an object that is made only where there is none (`If-None-Match`, where the store has
it). Its owner writes it anew every few seconds. A lock that has been silent for long is taken over,
and one whose owner was a process of this machine that has ended is at once. A store that cannot
make an object conditionally leaves a moment in which two clients could both believe to be first; so
the lock is read again after a moment, and the last that has written it stays.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from curate.data.mirror_copy import Mirror
from curate.data.storage import run_errors
from curate.errors import CurateError, RunFolderError

log = logging.getLogger(__name__)

LOCK = ".lock.json"
BEAT_SECONDS = 15.0
SILENT_SECONDS = 120.0
"""After so much silence the owner counts as gone."""
_SETTLE_SECONDS = 0.5


@contextmanager
def holding(mirror: Mirror) -> Generator[None]:
    """Inside, no other client works in the run.

    Raises:
        RunFolderError: another one does; names it, and tells when it was last heard of.
    """
    own: dict[str, Any] = {
        "token": uuid.uuid4().hex,
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": os.uname().nodename,
        "machine": _machine(),
        "since": time.time(),
    }
    _take(mirror, own)
    _drop_live(mirror)  # of a client that was killed
    over = Event()
    thread = Thread(target=_beat, args=(mirror, own, over), name="lock of the run", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if mirror.lost is None:
            try:
                _drop_live(mirror)
                mirror.delete(LOCK)
            except CurateError as error:
                log.warning(
                    "the lock of %s stays for %.0f s: %s", mirror.address, SILENT_SECONDS,
                    error.what,
                )  # fmt: skip
        mirror.lost = None


def owner_of(mirror: Mirror) -> str | None:
    """Who works in the run now, in words; None where nobody does."""
    lock = _read(mirror)
    return None if lock is None or _silence(lock) > SILENT_SECONDS or _died(lock) else _told(lock)


def _take(mirror: Mirror, own: dict[str, Any]) -> None:
    found = _read(mirror)
    # Looked at first: a store that passes over the condition would write over it.
    if found is None and _create(mirror, own):
        return
    found = found or _read(mirror)
    if found is not None:
        silence = _silence(found)
        if not _died(found) and silence <= SILENT_SECONDS:
            raise RunFolderError(
                f"{mirror.address} is in use by another client ({_told(found)})",
                fix="wait until it has finished, or choose another address with --out; a lock that"
                f" is silent for {SILENT_SECONDS:.0f} s is taken over",
            )
        log.warning("%s: the lock of %s is taken over", mirror.address, _told(found))
    mirror.pipe(LOCK, _text(own))
    time.sleep(_SETTLE_SECONDS)
    now = _read(mirror)
    if now is None or now.get("token") != own["token"]:
        who = "another client" if now is None else _told(now)
        raise RunFolderError(
            f"{mirror.address} has just been taken by {who}", fix="wait until it has finished"
        )


def _create(mirror: Mirror, own: dict[str, Any]) -> bool:
    """Make the lock where there is none; False where there is one, or the store cannot tell."""
    system, base = mirror.system()
    with run_errors(mirror.address):
        try:
            system.pipe_file(f"{base}/{LOCK}", _text(own), mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, ValueError, TypeError):  # unknown to this store
            return False
        except OSError as error:
            if "NotImplemented" not in str(error) and "not implemented" not in str(error):
                raise
            return False
    return True


def _beat(mirror: Mirror, own: dict[str, Any], over: Event) -> None:
    """Write the lock anew now and then; say so where it is somebody else's."""
    while not over.wait(BEAT_SECONDS):
        try:
            now = _read(mirror)
            if now is not None and now.get("token") != own["token"]:
                mirror.lost = f"{mirror.address} was taken over by {_told(now)}"
                log.error("%s; this client stops", mirror.lost)
                return
            mirror.pipe(LOCK, _text(own))
            _send_live(mirror)
        except CurateError as error:  # the work itself will tell, if it lasts
            log.debug("heartbeat: %s", error.what)


def _send_live(mirror: Mirror) -> None:
    """What the stages say of themselves, for `curate status` on other machines."""
    for path in (mirror.root / ".live").glob("*.json"):
        with suppress(OSError):
            mirror.pipe(f".live/{path.name}", path.read_bytes())


def fetch_live(mirror: Mirror) -> None:
    """The same on a machine that only looks; what is old goes."""
    system, base = mirror.system()
    with run_errors(mirror.address):
        try:
            names = [Path(path).name for path in system.find(f"{base}/.live")]
        except FileNotFoundError:
            names = []
    folder = mirror.root / ".live"
    found = ((name, mirror.read(f".live/{name}")) for name in names)
    contents = {name: content for name, content in found if content is not None}
    for path in folder.glob("*.json"):
        if path.name not in contents:
            path.unlink(missing_ok=True)
    for name, content in contents.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _drop_live(mirror: Mirror) -> None:
    """Nothing runs any more."""
    system, base = mirror.system()
    with run_errors(mirror.address), suppress(FileNotFoundError):
        for path in system.find(f"{base}/.live"):
            system.rm_file(path)


def _read(mirror: Mirror) -> dict[str, Any] | None:
    content = mirror.read(LOCK)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(own: dict[str, Any]) -> bytes:
    return json.dumps({**own, "beat": time.time()}, indent=1).encode()


def _silence(lock: dict[str, Any]) -> float:
    """Seconds since the owner was heard of, by the clocks of both machines."""
    return time.time() - float(lock.get("beat", 0))


def _told(lock: dict[str, Any]) -> str:
    silent = max(0.0, _silence(lock))
    held = max(0.0, time.time() - float(lock.get("since", 0)))
    return (
        f"pid {lock.get('pid')} on {lock.get('host')}, for {_age(held)}, last heard of"
        f" {_age(silent)} ago"
    )


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _died(lock: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    if lock.get("machine") != _machine():
        return False
    try:
        os.kill(int(lock["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError):
        return False
    return _started(int(lock["pid"])) != lock.get("started")


def _machine() -> str:
    """Of this boot of this machine, and of the process numbers that are seen here."""
    facts = [os.uname().nodename]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(facts)


def _started(pid: int) -> str | None:
    """When a process began, as the system counts; None where it does not say, or it has ended."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if facts[0] == "Z" else facts[19]
    except (OSError, IndexError):
        return None
