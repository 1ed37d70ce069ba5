"""What a working copy knows of its store: one line for each change, read by all its processes.

A line holds a file's name, size and tag in the store and the stamp of the local file with the same
content; without a stamp there is no such local file, and a line with a name alone says that the
store has it no more. Lines are appended under a lock; now and then the whole is written anew. A
line that is lost costs a fetch, no more.
"""

import fcntl
import json
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import NamedTuple


class Entry(NamedTuple):
    """A file of the store."""

    size: int
    tag: str
    """What the store tells versions of a file apart by."""
    local: str | None
    """Stamp of the local file that has this content; None where there is none."""


class Journal:
    """The lines of one working copy.

    Args:
        folder: of the copy; `journal.jsonl` and `journal.lock` lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._lock_path = folder / "journal.jsonl", folder / "journal.lock"
        self._threads, self._depth, self._handle = RLock(), 0, -1
        self._inode, self._offset = -1, 0
        self._entries: dict[str, Entry] = {}
        self._missing: set[str] = set()

    @contextmanager
    def locked(self) -> Generator[None]:
        """Inside, no other process or thread changes the journal."""
        with self._threads:
            if self._depth == 0:
                self._handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
                fcntl.flock(self._handle, fcntl.LOCK_EX)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    os.close(self._handle)

    def get(self, name: str) -> Entry | None:
        """What is known of one file now."""
        with self._threads:
            self._catch_up()
            return self._entries.get(name)

    def entries(self) -> dict[str, Entry]:
        """Name -> what is known of it now."""
        with self._threads:
            self._catch_up()
            return dict(self._entries)

    def missing(self) -> set[str]:
        """Names of what the store has and the copy does not."""
        with self._threads:
            self._catch_up()
            return set(self._missing)

    def append(self, changes: Iterable[tuple[str, Entry | None]]) -> None:
        """Note what has changed; None is for what the store has no more."""
        # A line that a killed process has left unfinished ends at the first line break.
        text = "".join(f"\n{_line(name, entry)}\n" for name, entry in changes)
        if not text:
            return
        with self.locked(), self._path.open("ab") as file:
            file.write(text.encode())

    def rewrite(self, entries: Mapping[str, Entry]) -> None:
        """In place of all that was known."""
        with self.locked():
            temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
            text = "".join(f"{_line(name, entry)}\n" for name, entry in entries.items())
            temporary.write_bytes(text.encode())
            temporary.replace(self._path)

    def _catch_up(self) -> None:
        """Read what has been added since the last time, or everything after a rewrite."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            self._inode, self._offset = -1, 0
            self._entries, self._missing = {}, set()
            return
        with file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self._inode, self._offset = facts.st_ino, 0
                self._entries, self._missing = {}, set()
            if facts.st_size == self._offset:
                return
            file.seek(self._offset)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        for line in text[:whole].splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            name, *facts = json.loads(line)
            entry = Entry(*facts) if facts else None
        except (ValueError, TypeError):  # blank, or cut short by a kill
            return
        self._missing.discard(name)
        if entry is None:
            self._entries.pop(name, None)
            return
        self._entries[name] = entry
        if entry.local is None:
            self._missing.add(name)


def _line(name: str, entry: Entry | None) -> str:
    return json.dumps([name, *(entry or ())], ensure_ascii=True)
