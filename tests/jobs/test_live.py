"""What a running stage says of itself: true, small, whole at any moment, gone at the end."""

import json
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from curate.data.files import write_json
from curate.errors import InputError
from jobs.live import clear_live, live, read_live


def raw(root: Path, stage: str = "score") -> dict[str, object]:
    return json.loads((root / ".live" / f"{stage}.json").read_text())


def wait_for(condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_reader_sees_counts_rates_and_workers_while_the_stage_runs(tmp_path: Path):
    with live(tmp_path, "score", total=12, skipped=2, workers=2) as tracker:
        for name in "abcd":
            tracker.started(name, "w1")
            tracker.finished(name, "w1", 2.0, {"rows": 100, "num_tokens": 1000})
        tracker.started("e", "w2")
        tracker.failed("e", "w2", InputError("e is bad", fix="mend it"))
        tracker.started("f", "w2")
        wait_for(lambda: raw(tmp_path)["failed"] == 1 and raw(tmp_path)["running"])
        start = raw(tmp_path)["started"]
        assert isinstance(start, float)
        [found] = read_live(tmp_path, now=start + 40)
    counts = (found.total, found.done, found.skipped, found.failed, found.remaining, found.running)
    assert counts == (12, 6, 2, 1, 5, 1)
    assert found.tasks_per_second == pytest.approx(4 / 40)
    assert found.rows_per_second == pytest.approx(400 / 40)
    assert found.tokens_per_second == pytest.approx(4000 / 40)
    assert found.seconds_left == pytest.approx(5 / 0.1)
    first, second = found.workers
    assert (first.name, first.done, first.running) == ("w1", 4, ())
    assert first.rows_per_second == pytest.approx(50)
    assert (second.name, second.failed, second.running) == ("w2", 1, ("f",))
    assert second.running_seconds is not None
    assert 0 < second.running_seconds <= 40
    assert second.rows_per_second is None
    assert [(f["name"], f["error"]) for f in found.failures] == [("e", "e is bad")]


def test_what_starts_just_after_a_write_is_seen_though_nothing_else_happens(tmp_path: Path):
    """Inline a task may run for hours, and the loop says nothing meanwhile."""
    with live(tmp_path, "train", total=1) as tracker:
        tracker.started("seed-0", "here")
        wait_for(lambda: read_live(tmp_path)[0].running == 1)


def test_it_writes_by_the_clock_and_not_by_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[int] = []

    def note(*_: object, **__: object) -> None:
        written.append(1)

    monkeypatch.setattr("jobs.live.write_json", note)
    monkeypatch.setattr("jobs.live._SECONDS", 3_600.0)
    with live(tmp_path, "score", total=10_000) as tracker:
        for i in range(10_000):
            tracker.finished(f"part-{i}", "w", 0.1, {"rows": 1})
    assert len(written) == 1, "as the stage begins"


def test_the_file_of_ten_thousand_tasks_stays_small(tmp_path: Path):
    with live(tmp_path, "score", total=10_000, workers=8) as tracker:
        for i in range(10_000):
            tracker.started(f"part-{i}", f"worker-{i % 8}")
            if i % 2:
                tracker.failed(f"part-{i}", f"worker-{i % 8}", "bad")
            else:
                tracker.finished(f"part-{i}", f"worker-{i % 8}", 1.0, {"rows": 7})
        wait_for(lambda: raw(tmp_path)["done"] == 5_000)
        assert (tmp_path / ".live" / "score.json").stat().st_size < 8_000
        assert len(read_live(tmp_path)[0].failures) == 20


def test_workers_that_come_and_go_for_weeks_are_summed(tmp_path: Path):
    with live(tmp_path, "score", total=2_000) as tracker:
        tracker.started("long", "worker-long")
        for i in range(1_999):
            tracker.finished(f"part-{i}", f"worker-{i}", 1.0, {"rows": 2})
        assert len(tracker.workers) <= 513
        assert "worker-long" in tracker.workers
        assert sum(sums.rows for sums in tracker.workers.values()) == 2 * 1_999


def test_rates_are_of_the_last_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A slow start, a model that is loaded say, is forgotten."""
    clock = [1_000.0]
    monkeypatch.setattr("jobs.live.time.time", lambda: clock[0])
    with live(tmp_path, "score", total=1_000) as tracker:
        clock[0] += 3_600
        for i in range(200):
            clock[0] += 10
            tracker.finished(f"part-{i}", "w", 10.0, {"rows": 50})
        values = tracker.values()
        (tmp_path / ".live" / "score.json").write_text(json.dumps(values))
        [found] = read_live(tmp_path)
    assert found.rows_per_second == pytest.approx(5.0)
    assert found.seconds_left == pytest.approx(800 * 10)


def test_a_task_that_says_how_far_it_is_counts_in_part(tmp_path: Path):
    with live(tmp_path, "train", total=2) as tracker:
        tracker.started("seed-0", "here")
        tracker.said("step 25 of 100", 0.25)
        (tmp_path / ".live" / "train.json").write_text(json.dumps(tracker.values()))
        [found] = read_live(tmp_path, now=tracker.started_at + 50)
        assert (found.detail, found.rows_per_second) == ("step 25 of 100", None)
        assert found.seconds_left == pytest.approx(1.75 / (0.25 / 50))


def test_a_task_that_lost_its_worker_no_longer_runs_there(tmp_path: Path):
    with live(tmp_path, "score", total=2) as tracker:
        tracker.started("a", "w1")
        tracker.dropped("a")
        assert not tracker.running
        tracker.started("a", "w2")
        assert tracker.running["a"].worker == "w2"


def test_the_file_goes_when_the_stage_ends_well(tmp_path: Path):
    with live(tmp_path, "score", total=1) as tracker:
        tracker.finished("a", "w", 1.0, {})
    assert not (tmp_path / ".live").exists()


@pytest.mark.parametrize("raises", [True, False])
def test_the_file_stays_when_it_does_not_and_nothing_runs_in_it(tmp_path: Path, raises: bool):
    def end() -> None:
        with live(tmp_path, "score", total=2) as tracker:
            tracker.started("a", "w")
            if raises:
                raise KeyboardInterrupt
            tracker.failed("a", "w", "bad")

    if raises:
        with pytest.raises(KeyboardInterrupt):
            end()
    else:
        end()
    [found] = read_live(tmp_path)
    assert (found.ended, found.running) == (True, 0)
    clear_live(tmp_path)
    assert read_live(tmp_path) == []
    assert not (tmp_path / ".live").exists()


def test_without_a_run_folder_nothing_is_written_and_the_sums_are_there():
    with live(None, "score", total=1) as tracker:
        tracker.finished("a", "w", 1.0, {"rows": 5, "num_tokens": None})
    assert (tracker.done, tracker.rows, tracker.num_tokens) == (1, 5, 0)


def test_a_write_that_fails_is_made_good_though_nothing_else_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / ".live").write_text("a file where the folder should be")
    tried: list[Path] = []

    def note(path: Path, values: dict[str, Any], *, flush: bool) -> None:
        tried.append(path)
        write_json(path, values, flush=flush)

    monkeypatch.setattr("jobs.live.write_json", note)
    with live(tmp_path, "train", total=1) as tracker:
        tracker.started("seed-0", "here")
        wait_for(lambda: len(tried) > 1)
        (tmp_path / ".live").unlink()
        wait_for(lambda: [one.running for one in read_live(tmp_path)] == [1])


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path):
    (tmp_path / ".live").write_text("a file where the folder should be")
    with live(tmp_path, "score", total=1) as tracker:
        tracker.finished("a", "w", 1.0, {})
    assert tracker.done == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"started": "now"}', "\x00\xff"])
def test_a_file_that_is_damaged_or_of_another_version_is_passed_over(tmp_path: Path, text: str):
    (tmp_path / ".live").mkdir()
    (tmp_path / ".live" / "score.json").write_text(text)
    assert read_live(tmp_path) == []


def test_names_of_stages_and_of_tasks_may_be_any(tmp_path: Path):
    with live(tmp_path, "lengths for ../the arms", total=1) as tracker:
        tracker.started("../\x1b[31m", "tcp://127.0.0.1:1")
        assert [path.name for path in (tmp_path / ".live").glob("*.json")] == [
            "lengths-for-the-arms.json"
        ]
        assert read_live(tmp_path)[0].stage == "lengths for ../the arms"


def test_many_threads_may_speak_at_once(tmp_path: Path):
    with live(tmp_path, "score", total=4_000) as tracker:

        def speak(worker: int) -> None:
            for i in range(1_000):
                tracker.started(f"{worker}-{i}", f"w{worker}")
                tracker.finished(f"{worker}-{i}", f"w{worker}", 0.0, {"rows": 1})

        threads = [Thread(target=speak, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (tracker.done, tracker.rows, tracker.running) == (4_000, 4_000, {})
