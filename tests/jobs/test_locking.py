"""Two processes never work in one run folder, on file systems without locks neither."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curate.errors import RunFolderError
from jobs import locking
from jobs.locking import LOCK, local_holder, locked, read_owner

QUICK = 0.05


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locking, "_BEAT_SECONDS", QUICK)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch):
    """Nobody waits."""

    def refuse(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s")

    monkeypatch.setattr("jobs.locking.time.sleep", refuse)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("jobs.locking.fcntl.flock", refuse)


def write(root: Path, **changes: Any) -> None:
    now = time.time()
    values = {"pid": 77, "host": "node-7", "command": "score", "since": now - 7500, "beat": 3,
              "alive": now, **changes}  # fmt: skip
    (root / LOCK).write_text(json.dumps(values))


def beating(root: Path, over: threading.Event) -> Callable[[], None]:
    """Another machine that is alive."""

    def work() -> None:
        number = 3
        while not over.wait(QUICK / 2):
            number += 1
            write(root, beat=number)

    return work


def test_the_second_is_told_who_is_at_work_since_when_and_on_what(tmp_path: Path):
    with locked(tmp_path, "score"):
        said = rf"in use by another process .pid {os.getpid()} on \S+: curate score, since .* UTC"
        with pytest.raises(RunFolderError, match=said) as caught, locked(tmp_path, "plan"):
            pass
        assert caught.value.exit_code == 5
        holder = local_holder(tmp_path)
        assert holder is not None
        assert f"pid {os.getpid()} on" in holder
        assert re.search(r", \d+ seconds? ago", holder)
    assert local_holder(tmp_path) is None
    assert read_owner(tmp_path) is None


def test_signs_of_life_go_on_while_it_is_held(tmp_path: Path, quick: None):
    with locked(tmp_path, "score"):
        first = read_owner(tmp_path)
        time.sleep(6 * QUICK)
        later = read_owner(tmp_path)
    assert first is not None
    assert later is not None
    assert later.beat > first.beat
    assert later.since == first.since


def test_another_machine_that_lives_is_not_disturbed_though_its_lock_is_not_seen(
    tmp_path: Path, quick: None
):
    write(tmp_path)
    over = threading.Event()
    thread = threading.Thread(target=beating(tmp_path, over))
    thread.start()
    try:
        said = r"pid 77 on node-7: curate score, since .* UTC, 2 hours ago"
        with pytest.raises(RunFolderError, match=said), locked(tmp_path, "score"):
            pass
        assert "node-7" in (local_holder(tmp_path) or "")
    finally:
        over.set()
        thread.join()


def test_another_machine_that_has_died_is_waited_for_once(tmp_path: Path, quick: None):
    write(tmp_path)
    began = time.monotonic()
    with locked(tmp_path, "score"):
        assert time.monotonic() - began >= 4 * QUICK
        owner = read_owner(tmp_path)
        assert owner is not None
        assert owner.pid == os.getpid()


def test_a_machine_that_has_been_silent_for_long_is_not_waited_for(tmp_path: Path, impatient: None):
    write(tmp_path, alive=time.time() - 3600)
    assert local_holder(tmp_path) is None
    with locked(tmp_path, "score"):
        pass


def test_without_locks_a_process_of_this_machine_is_known_by_its_number(
    tmp_path: Path, quick: None, without_locks: None, request: pytest.FixtureRequest
):
    here = os.uname().nodename
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        write(tmp_path, host=here, pid=other.pid)
        over = threading.Event()

        def live() -> None:
            number = 3
            while not over.wait(QUICK / 2):
                number += 1
                write(tmp_path, host=here, pid=other.pid, beat=number)

        thread = threading.Thread(target=live)
        thread.start()
        try:
            said = pytest.raises(RunFolderError, match=f"pid {other.pid} on")
            with said, locked(tmp_path, "score"):
                pass
        finally:
            over.set()
            thread.join()
    finally:
        other.communicate()
    write(tmp_path, host=here, pid=other.pid)
    request.getfixturevalue("impatient")
    with locked(tmp_path, "score"):
        pass


def test_without_locks_a_process_of_another_user_lives(
    tmp_path: Path, quick: None, without_locks: None, monkeypatch: pytest.MonkeyPatch
):
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("jobs.locking.os.kill", refuse)
    write(tmp_path, host=os.uname().nodename)
    assert "pid 77 on" in (local_holder(tmp_path) or "")


def test_a_lock_of_an_older_version_or_half_a_file_is_free(tmp_path: Path):
    for text in ("pid 12 on node-3\n", '{"pid": 12, "ho'):
        (tmp_path / LOCK).write_text(text)
        with locked(tmp_path, "score"):
            pass
