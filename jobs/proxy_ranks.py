"""One proxy run by several processes: ranks on Dask workers, or those that torchrun started.

The first rank does the task's work as a single process would; where that trains, it tells the
others, which wait for it, and all go through the loop together. What is written, the first writes.

On Dask each rank is a function on a worker of its own. The ranks meet through a file beside the
run's folder. Where a worker dies, the connections break and the other ranks stop at once; all start
again from the state that was saved last.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from curate.config import parse
from curate.errors import ConfigError, CurateError, DivergedError, TryAgainError
from jobs.cluster import Cluster, Pool, is_cluster_lost, is_worker_lost
from jobs.own_passes import DrivenPhase, Phase
from jobs.proxy_work import train_together
from jobs.run import Listener, Receipt, Task
from mixers.ranks import from_first, num_ranks

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_WAKE_SECONDS = 0.5
_LOOK_SECONDS = 5.0
_GRACE_SECONDS = 60.0
"""Which ranks have to stop once another has failed; then their workers are started anew."""
_MEETING = timedelta(minutes=5)
"""In which all ranks must have come."""
_SILENCE = timedelta(minutes=30)
"""After which a rank that says nothing counts as dead; one that ends is noticed at once."""

Work = Callable[[dict[str, Any]], Receipt]


class LostRanksError(TryAgainError):
    """Another rank has ended before its time."""


def proxy_phase(name: str, tasks: Sequence[Task], work: Work) -> Phase | DrivenPhase:
    """A phase of proxy runs: side by side, or with several ranks one after the other.

    Args:
        name: for messages.
        tasks: their payloads say the proxy's settings; tasks that train nothing go along.
        work: trains with `train_proxy`, once or not at all.

    Raises:
        ConfigError: there are no workers for the ranks that the settings ask for.
    """
    for task in tasks:
        if "rule" in task.payload:
            _check_workers(task.payload)
    if num_ranks() > 1 or all(ranks_of(task.payload) == 1 for task in tasks):
        return Phase(name, list(tasks), work)
    return DrivenPhase(name, list(tasks), partial(_drive, name, work))


def ranks_of(payload: Mapping[str, Any]) -> int:
    """Processes that a task asks for: more than one only where it trains a proxy."""
    return int(payload["proxy"]["ranks"]) if "rule" in payload else 1


def _check_workers(payload: Mapping[str, Any]) -> None:
    ranks, cluster = ranks_of(payload), payload["settings"]["cluster"]
    started = num_ranks()
    if started > 1 and (ranks != started or cluster["kind"] != "inline"):
        raise ConfigError(
            f"torchrun has started {started} processes, but mix.proxy.ranks is {ranks} and"
            f" cluster.kind {cluster['kind']}",
            fix=f"set mix.proxy.ranks to {started} and cluster.kind to inline",
        )
    workers = parse(Cluster, cluster).num_workers
    if started > 1 or ranks == 1 or workers is None:
        return
    if cluster["kind"] == "inline":
        raise ConfigError(
            f"mix.proxy.ranks is {ranks}, but there is one process",
            fix=f"set cluster to {{kind: local, workers: {ranks}}}, or mix.proxy.ranks to 1",
        )
    if workers < ranks:
        raise ConfigError(
            f"mix.proxy.ranks is {ranks}, but there are {workers} workers",
            fix=f"set cluster.workers to {ranks} or more",
        )


def _drive(name: str, work: Work, payload: dict[str, Any], pool: Pool, _: Listener) -> Receipt:
    """One run on as many workers as it has ranks, again where a worker dies."""
    ranks = ranks_of(payload)
    assert pool.client is not None
    patience = parse(Cluster, payload["settings"]["cluster"]).wait_seconds
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            pool.client.wait_for_workers(ranks, timeout=patience)
        except TimeoutError as error:
            raise TryAgainError(
                f"{name}: there are fewer than {ranks} Dask workers",
                fix="start as many as mix.proxy.ranks",
            ) from error
        errors, receipt = _together(pool.client, payload, work, ranks)
        lost = next((error for error in errors if is_worker_lost(error)), None)
        own = [e for e in errors if not is_worker_lost(e) and not isinstance(e, LostRanksError)]
        for error in own:
            if is_cluster_lost(error):
                raise TryAgainError(
                    f"{name}: the Dask cluster went away ({error or type(error).__name__})",
                    fix="run the same command again; it goes on where it stopped",
                ) from error
            raise error
        if not errors:
            return receipt
        if attempt == _ATTEMPTS:
            raise lost or errors[0]
        log.warning("%s: %s lost a rank, trying again", name, payload.get("name", "a task"))
    raise AssertionError("unreachable")


def _together(
    client: Any, payload: dict[str, Any], work: Work, ranks: int
) -> tuple[list[BaseException], Receipt]:
    """The errors of all ranks, and the receipt of the first where there is none."""
    folder = Path(payload["folder"])
    meeting = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:12]}.meeting")
    meeting.parent.mkdir(parents=True, exist_ok=True)
    for left in meeting.parent.glob(f".{folder.name}-*.meeting"):
        left.unlink(missing_ok=True)
    workers = sorted(client.nthreads())[:ranks]
    futures = [
        client.submit(
            train_rank, payload, work, str(meeting), rank, ranks,
            workers=[worker], allow_other_workers=False, pure=False, retries=0,
        )
        for rank, worker in enumerate(workers)
    ]  # fmt: skip
    try:
        _wait(client, futures, workers)
        errors = [error for future in futures if (error := _error_of(future)) is not None]
        return errors, {} if errors else futures[0].result()
    finally:
        client.cancel(futures)
        with suppress(OSError):
            meeting.unlink(missing_ok=True)


def _wait(client: Any, futures: Sequence[Any], workers: Sequence[str]) -> None:
    """Until all ranks have ended; where one has failed, the others for a while."""
    pairs = list(zip(futures, workers, strict=True))
    gone = set[str]()
    failed_at = looked_at = 0.0
    while stuck := [w for future, w in pairs if not future.done() and w not in gone]:
        time.sleep(_WAKE_SECONDS)
        now = time.monotonic()
        if now - looked_at > _LOOK_SECONDS:
            looked_at = now
            # A function that was sent to a worker which is gone would wait for it for ever.
            gone = set(workers) - set(client.nthreads())
        if not failed_at and (gone or any(f.status in ("error", "lost") for f in futures)):
            failed_at = now
        if failed_at and now - failed_at > _GRACE_SECONDS:
            client.restart_workers([worker for worker in stuck if worker not in gone])
            return


def _error_of(future: Any) -> BaseException | None:
    """What a rank ended with; one that has not ended is lost."""
    if not future.done():
        return LostRanksError("a rank did not stop", fix="run the same command again")
    if future.status == "finished":
        return None
    if future.status == "cancelled":
        return TryAgainError("the scheduler dropped a rank", fix="run the same command again")
    return cast(BaseException, future.exception())


def train_rank(payload: dict[str, Any], work: Work, meeting: str, rank: int, ranks: int) -> Receipt:
    """On a worker: one rank's part of a task.

    Raises:
        LostRanksError: another rank is gone.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _group(meeting, rank, ranks):
        if rank:
            serve()
            return {}
        receipt = work(payload)
        from_first(None)
        return receipt


@contextmanager
def _group(meeting: str, rank: int, ranks: int) -> Generator[None]:
    """Inside, this process is one of several."""
    _before_joining()
    try:
        store = dist.FileStore(meeting, ranks)  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(_MEETING)
        dist.init_process_group(
            _backend(), store=store, rank=rank, world_size=ranks, timeout=_SILENCE
        )
        yield
    except CurateError:
        raise
    except RuntimeError as error:
        if not is_connection_lost(error):
            raise
        raise LostRanksError(
            f"rank {rank} of {ranks} has lost another one: {str(error).splitlines()[0]}",
            fix="run the same command again; it goes on where it stopped",
        ) from error
    finally:
        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _before_joining() -> None:
    """Load torch's compiler, as transformers does with a model.

    A group that is there when it is imported is held for ever: its threads then run on into the
    end of the interpreter, which at times aborts the process ("terminate called without an active
    exception", torch 2.13).
    """
    import_module("torch._dynamo")


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def is_connection_lost(error: RuntimeError) -> bool:
    """Whether a rank failed because another one has ended."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed"))


@contextmanager
def under_torchrun() -> Generator[bool]:
    """Whether this process goes on: inside, others that torchrun started do what the first says.

    Where torchrun has not started it, or alone, it is like any other.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield True
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _before_joining()
    # Before the first one trains it may index for hours; torchrun itself ends all where one dies.
    dist.init_process_group(_backend(), timeout=timedelta(days=7))
    try:
        if dist.get_rank():
            serve()
            yield False
        else:
            yield True
            from_first(None)
    except RuntimeError as error:
        if dist.get_rank() and is_connection_lost(error):
            raise SystemExit(1) from None  # the first one has said why
        raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def serve() -> None:
    """As a rank that is not the first: train what the first one says, until it is over."""
    while (payload := from_first(None)) is not None:
        # It is raised in every rank; the first one says so, and may have more to train.
        with suppress(DivergedError):
            train_together(payload)
