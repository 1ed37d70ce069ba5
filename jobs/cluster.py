"""Where tasks run: in this process, on a Dask cluster of local processes, or on one elsewhere."""

import logging
import os
import signal
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError, TryAgainError

_IN_FLIGHT_PER_WORKER = 2
_WORKERS_SECONDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Settings of `cluster`."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["inline", "local", "address"] = "inline"
    """inline: this process; local: Dask workers as processes on this machine; address: a running
    Dask scheduler."""
    workers: int = 2
    """Processes of a local cluster."""
    address: str | None = None
    """Of the scheduler: `tcp://host:8786`."""
    threads: int = 1
    """Threads of one worker's arithmetic, inline too: sums depend on it in their last digits."""

    def __post_init__(self) -> None:
        if self.kind == "address" and not self.address:
            raise ConfigError("cluster.kind is address, but there is no address",
                              fix="set cluster.address to tcp://host:8786")  # fmt: skip
        if self.workers < 1 or self.threads < 1:
            raise ConfigError("cluster.workers and cluster.threads start at 1", fix="raise them")


class InlineExecutor(Executor):
    """Runs each task in the caller, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True, slots=True)
class Pool:
    """An executor, and how many tasks it is given at a time."""

    executor: Executor
    window: int
    """Tasks in flight: enough that no worker waits for the next, few enough to stop at once."""
    client: Any = None
    """Of Dask, for work that must be on several workers at once; None inline."""


@contextmanager
def open_pool(settings: Cluster) -> Generator[Pool]:
    """The executor that `settings` ask for, closed at the end.

    Raises:
        TryAgainError: the scheduler does not answer, or has no workers.
        ConfigError: its address is none.
    """
    if settings.kind == "inline":
        yield Pool(InlineExecutor(), 1)
        return
    with _client(settings) as client:
        workers = max(1, sum(client.nthreads().values()))
        # pure=False: a second attempt at a task must run, not return the first one's result.
        window = _IN_FLIGHT_PER_WORKER * workers
        yield Pool(client.get_executor(pure=False, retries=0), window, client)


@contextmanager
def _client(settings: Cluster) -> Generator[Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from distributed import Client, LocalCluster

    if settings.kind == "local":
        with (
            LocalCluster(
                n_workers=settings.workers,
                threads_per_worker=1,
                processes=True,
                # Any free port: the usual one may be taken by another run.
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                # Dask would send a task to three more workers; `run_tasks` tries it alone.
                scheduler_kwargs={"allowed_failures": 0},
                # What fails is told by the tasks; at the end workers complain of closed doors.
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster) as client,
        ):
            client.register_plugin(_deaf_to_interrupts())
            yield client
        return
    try:
        client = Client(settings.address, timeout=30)
    except (OSError, TimeoutError) as error:
        raise TryAgainError(
            f"the Dask scheduler at {settings.address} does not answer: {error}",
            fix="start it, or correct cluster.address",
        ) from error
    except ValueError as error:  # from the parser of addresses
        raise ConfigError(
            f"cluster.address is {settings.address!r}: {error}",
            fix="set cluster.address to tcp://host:8786",
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
        except TimeoutError as error:
            raise TryAgainError(
                f"the Dask scheduler at {settings.address} has no workers",
                fix=f"start some: `dask worker {settings.address} --nthreads 1`",
            ) from error
        yield client


def _deaf_to_interrupts() -> Any:
    """A plugin for workers of our own: Ctrl-C reaches them too, but the parent decides.

    A worker that ended by itself would leave the parent waiting for the tasks it held.
    """
    from distributed import Worker, WorkerPlugin

    class Deaf(WorkerPlugin):
        def setup(self, worker: Worker) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return Deaf()


def is_worker_lost(error: BaseException) -> bool:
    """Whether a task failed because its worker died, by its own fault or a neighbour's."""
    return type(error).__name__ in ("KilledWorker", "WorkerDied")


def is_cluster_lost(error: BaseException) -> bool:
    """Whether the scheduler is gone or has dropped the task."""
    return type(error).__name__ in ("CancelledError", "FutureCancelledError", "CommClosedError")
