"""Commands that are killed in the middle of their work, with every process they have started."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def found(folder: Path, *patterns: str) -> int:
    """How many paths below a folder match now, hidden ones too.

    `Path.glob` fails where a folder goes away while it is looked into.
    """
    return sum(
        len(glob(pattern, root_dir=folder, recursive=True, include_hidden=True))  # noqa: PTH207
        for pattern in patterns
    )


def curate_command(*arguments: object) -> list[str]:
    """`curate` as a user types it."""
    return [sys.executable, "-m", "curate", *map(str, arguments)]


def run_to_end(command: Sequence[str]) -> str:
    """What a command prints, which must come to a good end."""
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def is_killed(
    command: Sequence[str],
    moment: Callable[[], bool],
    *,
    delay: float = 0.0,
    within: float = 120,
) -> bool:
    """Start a command and kill its process group once `moment` holds.

    Args:
        command: and its arguments.
        moment: asked all the time.
        delay: seconds between the moment and the kill.
        within: seconds in which it must come.

    Returns:
        False where the command came to a good end before.
    """
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            end = time.monotonic() + within
            while process.poll() is None and not moment():
                assert time.monotonic() < end, "the moment never came"
                time.sleep(0.001)
            time.sleep(delay)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        log.seek(0)
        assert code in (0, -signal.SIGKILL), log.read().decode()[-4000:]
    return code == -signal.SIGKILL
