"""The job loop: what is skipped, what a failure costs, what ends the stage."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from curate.data.partitions import Output
from curate.errors import (
    ConfigError,
    CurateError,
    InputError,
    OutputError,
    TooManyBadError,
    TryAgainError,
)
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.run import Progress, Task, raise_all, raise_failures, run_tasks

INLINE = Pool(InlineExecutor(), 1)


def write_name(payload: dict[str, Any]) -> dict[str, Any]:
    """Writes its name; `kill_once` dies like a machine, the first time."""
    once = payload.get("kill_once")
    if once and not Path(once).exists():
        Path(once).touch()
        os._exit(1)
    if payload["name"] in payload.get("kill_always", []):
        with Path(payload["path"]).with_suffix(".deaths").open("a") as deaths:
            deaths.write("x")
        os._exit(1)
    if payload["name"] in payload.get("bad", []):
        raise InputError(f"{payload['name']} is bad", fix="mend it")
    if payload["name"] in payload.get("bugs", []):
        raise ZeroDivisionError(payload["name"])
    if payload["name"] in payload.get("full", []):
        raise OutputError("no space", fix="free some")
    output = Output(Path(payload["path"]))
    output.write(lambda path: path.write_text(payload["name"]), payload["fingerprint"], rows=1)
    after = payload.get("kill_after")
    if after:
        Path(after).write_text(str(output.path.stat().st_mtime_ns))
        os._exit(1)
    return {"rows": 1, "pid": os.getpid()}


def tasks(folder: Path, names: str, fingerprint: str = "f", **more: Any) -> list[Task]:
    found: list[Task] = []
    for name in names:
        output = Output(folder / f"{name}.txt")
        payload = {"name": name, "path": str(output.path), "fingerprint": fingerprint, **more}
        found.append(Task(name, payload, output, fingerprint))
    return found


def test_what_is_done_is_not_done_again_and_a_changed_fingerprint_is(tmp_path: Path):
    assert run_tasks("s", tasks(tmp_path, "abc"), write_name, pool=INLINE).done == list("abc")
    again = run_tasks("s", tasks(tmp_path, "abcd"), write_name, pool=INLINE)
    assert (again.done, again.skipped) == (["d"], list("abc"))
    assert run_tasks("s", tasks(tmp_path, "ab", "g"), write_name, pool=INLINE).done == ["a", "b"]


def test_a_file_that_was_cut_short_is_made_again(tmp_path: Path):
    run_tasks("s", tasks(tmp_path, "ab"), write_name, pool=INLINE)
    (tmp_path / "a.txt").write_text("")
    assert run_tasks("s", tasks(tmp_path, "ab"), write_name, pool=INLINE).done == ["a"]


def test_one_bad_partition_does_not_stop_the_others_and_is_named_at_the_end(tmp_path: Path):
    outcome = run_tasks("score", tasks(tmp_path, "abcd", bad=["b"]), write_name, pool=INLINE)
    assert outcome.done == list("acd")
    with pytest.raises(TooManyBadError, match="1 of 4 tasks failed; b: b is bad") as caught:
        raise_failures("score", outcome)
    assert caught.value.fix == "mend it"
    assert caught.value.exit_code == 4


def test_what_is_wrong_with_a_task_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        outcome = run_tasks("s", tasks(tmp_path, "abcd", bad=["b", "d"]), write_name, pool=INLINE)
        with pytest.raises(TooManyBadError) as caught:
            raise_failures("s", outcome)
    told = caplog.text + str(caught.value)
    assert told.count("b is bad") == told.count("d is bad") == 1


def test_others_go_on_only_where_there_are_others(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run_tasks("one", tasks(tmp_path, "a", bad=["a"]), write_name, pool=INLINE)
    run_tasks("two", tasks(tmp_path, "bc", bad=["b", "c"]), write_name, pool=INLINE)
    assert [record.getMessage() for record in caplog.records] == [
        "one: a failed",
        "two: b failed; the others go on",
        "two: c failed",
    ]


def test_the_failures_of_groups_side_by_side_are_all_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    found = {
        name: run_tasks(
            name, tasks(tmp_path / name, names, bad=["b", "d"]), write_name, pool=INLINE
        )
        for name, names in {"whole": "a", "first": "ab", "second": "bd"}.items()
    }
    caplog.clear()
    with pytest.raises(
        TooManyBadError, match=r"^first: 1 of 2 tasks failed; b: b is bad"
    ) as caught:
        raise_all(found)
    others = ["second: b failed: b is bad", "second: d failed: d is bad"]
    assert [record.getMessage() for record in caplog.records] == others
    assert caught.value.others == others
    assert caught.value.tasks == ["b", "b", "d"]
    raise_all({"whole": found["whole"]})


def test_a_bug_in_one_task_is_set_aside_after_the_others_have_finished(tmp_path: Path):
    outcome = run_tasks("s", tasks(tmp_path, "abc", bugs=["a"]), write_name, pool=INLINE)
    assert outcome.done == ["b", "c"]
    with pytest.raises(TooManyBadError, match="a: ZeroDivisionError: a") as caught:
        raise_failures("s", outcome)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_where_all_fail_the_error_keeps_its_kind(tmp_path: Path):
    outcome = run_tasks("s", tasks(tmp_path, "ab", bad=["a", "b"]), write_name, pool=INLINE)
    with pytest.raises(InputError, match="2 of 2 tasks failed; a: a is bad") as caught:
        raise_failures("s", outcome)
    assert caught.value.exit_code == 3
    outcome = run_tasks("s", tasks(tmp_path, "c", bugs=["c"]), write_name, pool=INLINE)
    with pytest.raises(ZeroDivisionError):
        raise_failures("s", outcome)


def test_a_full_disk_stops_the_stage_and_keeps_what_is_finished(tmp_path: Path):
    with pytest.raises(OutputError, match="no space"):
        run_tasks("s", tasks(tmp_path, "abc", full=["b"]), write_name, pool=INLINE)
    assert run_tasks("s", tasks(tmp_path, "abc"), write_name, pool=INLINE).done == ["b", "c"]


def test_the_listener_counts_what_was_there_before(tmp_path: Path):
    run_tasks("s", tasks(tmp_path, "a"), write_name, pool=INLINE)
    heard: list[Progress] = []
    run_tasks("s", tasks(tmp_path, "abc"), write_name, pool=INLINE, listener=heard.append)
    assert [(p.done, p.total, p.name) for p in heard] == [(2, 3, "b"), (3, 3, "c")]


def test_only_a_window_of_tasks_is_in_flight(tmp_path: Path):
    """The scheduler of a billion rows must see a handful of tasks at a time."""
    unfinished = 0
    most = 0

    class Counting(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            nonlocal unfinished, most
            unfinished += 1
            most = max(most, unfinished)
            return super().submit(fn, *args, **kwargs)

    def finish(_: Progress) -> None:
        nonlocal unfinished
        unfinished -= 1

    names = "abcdefghijklmnop"
    with Counting(2) as executor:
        pool = Pool(executor, 3)
        outcome = run_tasks("s", tasks(tmp_path, names), write_name, pool=pool, listener=finish)
    assert sorted(outcome.done) == list(names)
    assert most == 3


@pytest.fixture(scope="module")
def local_pool():
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        yield pool


def test_tasks_run_on_processes_of_a_dask_cluster(tmp_path: Path, local_pool: Pool):
    outcome = run_tasks(
        "s", tasks(tmp_path, "abcdefgh"), write_name, pool=local_pool, keep_receipts=True
    )
    pids = {receipt["pid"] for receipt in outcome.receipts.values()}
    assert sorted(outcome.done) == list("abcdefgh")
    assert os.getpid() not in pids
    assert len(pids) <= 2


def test_a_users_error_comes_back_from_a_dask_worker_whole(tmp_path: Path, local_pool: Pool):
    outcome = run_tasks("s", tasks(tmp_path, "ab", bad=["a"]), write_name, pool=local_pool)
    (error,) = outcome.failures.values()
    assert isinstance(error, InputError)
    assert (error.what, error.fix) == ("a is bad", "mend it")


def test_a_worker_that_dies_costs_its_partition_and_nothing_else(tmp_path: Path, local_pool: Pool):
    some = tasks(tmp_path, "abcdef")
    some[2].payload["kill_once"] = str(tmp_path / "died")
    outcome = run_tasks("s", some, write_name, pool=local_pool)
    assert (tmp_path / "died").exists()
    assert sorted(outcome.done) == list("abcdef")
    assert not outcome.failures


def test_a_worker_that_dies_after_its_work_does_not_cost_it(tmp_path: Path, local_pool: Pool):
    """It has written table and mark, but nobody was told."""
    some = tasks(tmp_path, "abc")
    some[1].payload["kill_after"] = str(tmp_path / "died")
    outcome = run_tasks("s", some, write_name, pool=local_pool)
    assert (tmp_path / "died").read_text() == str(some[1].output.path.stat().st_mtime_ns)
    assert sorted(outcome.done) == list("abc")


def test_a_poisonous_partition_is_blamed_and_its_neighbours_are_not(
    tmp_path: Path, local_pool: Pool
):
    outcome = run_tasks(
        "s", tasks(tmp_path, "abcdef", kill_always=["c"]), write_name, pool=local_pool
    )
    assert sorted(outcome.done) == list("abdef")
    with pytest.raises(CurateError, match=r"1 of 6 tasks failed; c: the worker died 3 times"):
        raise_failures("s", outcome)
    assert (tmp_path / "c.deaths").read_text() == "xxx"


def test_a_scheduler_that_does_not_answer_can_be_tried_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jobs.cluster_dask._ANSWER_SECONDS", 2)
    settings = Cluster(kind="address", address="tcp://127.0.0.1:9")
    with pytest.raises(TryAgainError, match="does not answer"), open_pool(settings):
        pass


@pytest.mark.parametrize("address", ["head", "carrier-pigeon://head:8786"])
def test_an_address_that_is_none_is_a_wrong_setting(address: str):
    settings = Cluster(kind="address", address=address)
    with pytest.raises(ConfigError, match=r"cluster\.address is"), open_pool(settings):
        pass


def test_a_scheduler_that_has_no_workers_can_be_tried_again():
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster:
        address = str(getattr(cluster, "scheduler_address"))  # noqa: B009 - has no type
        settings = Cluster(kind="address", address=address, wait_minutes=1 / 60)
        with pytest.raises(TryAgainError, match="has no workers"), open_pool(settings):
            pass


def test_a_scheduler_that_dies_can_be_tried_again(tmp_path: Path):
    class Dying(InlineExecutor):
        """Runs `a` and then, like Dask without its scheduler, cancels what it is given."""

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            if args[0]["name"] == "a":
                return super().submit(fn, *args, **kwargs)
            future = Future[Any]()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(TryAgainError, match="train: the Dask cluster went away"):
        run_tasks("train", tasks(tmp_path, "abc"), write_name, pool=Pool(Dying(), 1))
    assert run_tasks("train", tasks(tmp_path, "abc"), write_name, pool=INLINE).skipped == ["a"]
