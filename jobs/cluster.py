"""Where tasks run: in this process, or on Dask workers that `jobs.cluster_dask` opens."""

from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.cluster_settings import Cluster, Slurm

__all__ = ["Cluster", "InlineExecutor", "Pool", "Slurm", "ask_workers_devices", "check_cluster",
           "is_cluster_lost", "is_worker_lost", "open_pool"]  # fmt: skip

_IN_FLIGHT_PER_WORKER = 2


class InlineExecutor(Executor):
    """Runs each task in the caller, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Pool:
    """An executor, and how many tasks it is given at a time."""

    def __init__(
        self,
        executor: Executor,
        window: int,
        client: Any = None,
        *,
        threads: Callable[[], int] | None = None,
    ) -> None:
        """An executor with a window.

        Args:
            executor: runs the tasks.
            window: tasks in flight, where `threads` does not say how many workers there are.
            client: of Dask, for work that must be on several workers at once; None inline.
            threads: how many tasks the workers that are there now can run at a time.
        """
        self.executor = executor
        self.client = client
        self._window = window
        self._threads = threads

    @property
    def window(self) -> int:
        """Tasks in flight: enough that no worker waits for the next, few enough to stop at once.

        It follows the workers that come and go; read it in every turn of a loop.

        Raises:
            TryAgainError: there has been no worker for longer than the settings allow.
        """
        if self._threads is None:
            return self._window
        return _IN_FLIGHT_PER_WORKER * max(1, self._threads())

    def forget(self) -> None:
        """Between stages: every process lets go of the models and tables that it has kept."""
        if self.client is None:
            from jobs.cluster_workers import forget

            forget()
        else:
            from jobs.cluster_dask import forget_everywhere

            forget_everywhere(self.client)


@contextmanager
def open_pool(settings: Cluster, *, profile: Path | None = None) -> Generator[Pool]:
    """The executor that `settings` ask for, closed at the end.

    Args:
        settings: of `cluster`.
        profile: where Dask's report of all that ran is saved, if anywhere.

    Raises:
        TryAgainError: the scheduler does not answer, or has no workers.
        ConfigError: its address is none, a certificate is missing, or Slurm refuses the job.
        MissingDependencyError: as `check_cluster`, or a worker has another version of curate.
    """
    check_cluster(settings, profile=profile)
    if settings.kind == "inline":
        yield Pool(InlineExecutor(), 1)
        return
    from jobs.cluster_dask import LiveWorkers, open_client
    from jobs.cluster_profile import profiling

    # Tasks ask for a GPU where each worker has one: two never share it.
    more: dict[str, Any] = {"resources": {"GPU": 1}} if settings.has_gpus else {}
    with open_client(settings) as opened, profiling(opened.client, profile):
        # pure=False: a second attempt at a task must run, not return the first one's result.
        executor = opened.client.get_executor(pure=False, retries=0, **more)
        live = LiveWorkers(opened, settings.wait_seconds)
        yield Pool(executor, _IN_FLIGHT_PER_WORKER, opened.client, threads=live.count)


def check_cluster(settings: Cluster, *, profile: Path | None = None) -> None:
    """Refuse what cannot work on this machine, before anything is started or written.

    Raises:
        MissingDependencyError: a package, a GPU or Slurm is not there.
        ConfigError: a report of Dask is asked for where nothing runs on Dask.
    """
    if profile is not None:
        from jobs.cluster_profile import check_profile

        check_profile(settings, profile)
    if settings.kind == "cuda":
        from jobs.cluster_cuda import check_cuda

        check_cuda()
    elif settings.kind == "slurm":
        from jobs.cluster_slurm import check_slurm

        check_slurm()


def ask_workers_devices(settings: Cluster) -> None:
    """Let `model.device` mean the devices of the workers, where they are other machines."""
    if settings.kind in ("slurm", "address", "scheduler-file"):
        from curate.models.elsewhere import run_elsewhere

        run_elsewhere(has_gpus=settings.has_gpus)


def is_worker_lost(error: BaseException) -> bool:
    """Whether a task failed because its worker died, by its own fault or a neighbour's."""
    return type(error).__name__ in ("KilledWorker", "WorkerDied")


def is_cluster_lost(error: BaseException) -> bool:
    """Whether the scheduler is gone, has dropped the task, or has no worker for it."""
    return type(error).__name__ in (
        "CancelledError", "FutureCancelledError", "CommClosedError", "NoValidWorkerError",
    )  # fmt: skip
