"""When a worker hangs: nothing moves, for too long, while it has a task."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from curate.errors import ConfigError, CurateError, InputError, OutputError, TryAgainError
from jobs.run_attempt import attempt, kind_of
from jobs.run_stalls import Sign, Watch

STALL = 100.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def hanging_after(steps: list[tuple[float, Sign]]) -> list[float]:
    """Moments at which the one worker was found to hang."""
    clock = Clock()
    watch = Watch(None, STALL, clock)
    found: list[float] = []
    for now, sign in steps:
        clock.now = now
        if watch.hanging({"w": sign}):
            found.append(now)
    return found


def sign(beats: float = 0, cpu: float = 0.0, at_work: str = "k", held: str = "k") -> Sign:
    return Sign("w", beats, cpu, tuple(at_work), tuple(held))


def every(step: float, end: float) -> list[float]:
    return [step * number for number in range(int(end / step) + 1)]


def test_a_worker_that_does_nothing_hangs_after_the_limit_and_not_before():
    assert hanging_after([(now, sign()) for now in every(10, 130)]) == [110, 120, 130]


def test_a_sign_of_life_now_and_then_is_enough_for_ever():
    assert not hanging_after([(now, sign(beats=now // 90)) for now in every(10, 5000)])


def test_arithmetic_counts_for_eight_times_as_long_and_a_tick_does_not():
    busy = hanging_after([(now, sign(cpu=0.9 * now)) for now in every(10, 900)])
    assert busy[0] == 810
    idle = hanging_after([(now, sign(cpu=0.02 * now)) for now in every(10, 900)])
    assert idle[0] == 110


def test_a_worker_without_a_task_does_not_hang_and_begins_anew_with_one():
    steps = [(now, sign(at_work="", held="")) for now in every(10, 1000)]
    steps += [(1010 + now, sign()) for now in every(10, 110)]
    assert hanging_after(steps) == [1120]


def test_a_worker_that_could_not_even_say_that_it_began_hangs_too():
    steps = [(now, sign(at_work="", held="k")) for now in every(10, 110)]
    assert hanging_after(steps) == [110]


def test_without_a_limit_nothing_hangs():
    clock = Clock()
    watch = Watch(None, 0, clock)
    for clock.now in every(10, 10_000):
        assert not watch.hanging({"w": sign()})


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = errno.ENOSPC


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InputError("bad row", fix=""), "data"),
        (ConfigError("wrong", fix=""), "data"),
        (chained(InputError("no file", fix=""), FileNotFoundError(2, "gone", "/mnt/x")), "io"),
        (ConnectionResetError(), "io"),
        (TryAgainError("later", fix=""), "io"),
        (ValueError("what"), "unknown"),
        (MemoryError(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (chained(CurateError("one example", fix=""), MemoryError()), "memory"),
        (OSError(FULL, "full", "/scratch/x"), "full"),
        (OSError(FULL, "full"), "full"),
        (OSError(FULL, "full", "/run/plan/x"), "stop"),
        (OutputError("full", fix=""), "stop"),
        (chained(OutputError("full", fix=""), OSError(FULL, "full", "/run/plan/x")), "stop"),
        (chained(OutputError("full", fix=""), OSError(FULL, "full", "/scratch/x")), "full"),
        (chained(OutputError("no", fix=""), PermissionError(13, "no", "/run/plan/x")), "stop"),
    ],
)  # fmt: skip
def test_an_error_says_whether_another_worker_may_do_better(error: Exception, kind: str):
    assert kind_of(error, Path("/run")) == kind


def test_an_error_lets_go_of_what_its_frames_hold_and_keeps_its_lines(tmp_path: Path):
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def work(_: dict[str, Any]) -> dict[str, Any]:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise ValueError("so it is")

    found = attempt({}, work, str(tmp_path / "x"), "f", str(tmp_path))
    assert found.failed is not None
    assert found.failed.kind == "unknown"
    assert 'raise ValueError("so it is")' in found.failed.trace
    assert held[0]() is None
    assert (found.worker, found.address) == ("inline", "")
