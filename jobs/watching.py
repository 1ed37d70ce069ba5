"""What long tasks say of themselves while they run: read now and then, and told."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

from curate.data.files import read_json
from curate.errors import InputError

_SECONDS = 1.0

Tell = Callable[[str, str, float], object]
"""Given the name of a task, how far it is in words, and how many tasks' worth all have done."""


@contextmanager
def watching(payloads: Iterable[tuple[str, Mapping[str, Any]]], tell: Tell) -> Generator[None]:
    """Tells how far tasks are, from a thread: inline the driver itself is at work.

    Args:
        payloads: name and payload of each task that is due. A payload's `progress` is a file that
            the task writes while it runs and removes at its end: JSON with `step`, `total` and
            `weights`, a sentence. Where no payload has one, nothing is done.
        tell: called when a file has changed, once a second at most.
    """
    files = {name: Path(given["progress"]) for name, given in payloads if "progress" in given}
    if not files:
        yield
        return
    over = Event()
    # What a killed run has left behind says nothing of this one.
    before = {name: _changed(path) for name, path in files.items()}

    def watch() -> None:
        last: list[dict[str, Any]] = []
        while not over.wait(_SECONDS):
            running = {n: p for n, p in files.items() if _changed(p) not in (None, before[n])}
            said = [(name, facts) for name, path in running.items() if (facts := _read(path))]
            if said and (now := [facts for _, facts in said]) != last:
                last = now
                name, facts = said[0]
                more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
                part = sum(each["step"] / each["total"] for each in now)
                tell(name, f"{_sentence(facts)}{more}", part)

    thread = Thread(target=watch, name="watching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _changed(path: Path) -> int | None:
    """When the file was written last; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return cast(dict[str, Any] | None, read_json(path))
    except (OSError, InputError):  # where a rename is not at once, as on some network drives
        return None


def _sentence(facts: Mapping[str, Any]) -> str:
    return f"step {facts['step']:,} of {facts['total']:,}, {facts['weights']}"
