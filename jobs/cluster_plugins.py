"""On each Dask worker before its first task: is its curate ours, and which GPU is its own."""

import asyncio
import logging
import os
import signal
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

from curate.errors import MissingDependencyError
from jobs.cluster_settings import Cluster
from jobs.cluster_workers import Identity, identity

_ANSWER_SECONDS = 30
_LEAVE_SECONDS = 0.5
_PLUGIN = "curate"


@contextmanager
def prepared(client: Any, settings: Cluster) -> Generator[None]:
    """Workers of this version of curate alone, those that come later too."""
    if settings.kind in ("local", "cuda"):  # of this very environment
        client.register_plugin(_deaf(), name=_PLUGIN)
        yield
        return
    _compare(client)
    client.register_plugin(_same(takes_gpu=settings.kind == "slurm"), name=_PLUGIN)
    try:
        _compare(client)  # those that came in between
        yield
    finally:
        if settings.kind != "slurm":
            # A scheduler that outlives us may serve another version tomorrow.
            with suppress(Exception):
                remove = client.scheduler.unregister_worker_plugin
                client.sync(remove, name=_PLUGIN, callback_timeout=_ANSWER_SECONDS)


def _compare(client: Any) -> None:
    """Ask every worker which curate it has.

    Raises:
        MissingDependencyError: another one than this process, or none.
    """
    here = identity()
    found = cast(Mapping[str, Any], client.run(identity, on_error="return"))
    for worker, there in found.items():
        if there == here:
            continue
        if isinstance(there, OSError):  # it is gone
            continue
        has = str(there) if isinstance(there, Identity) else f"no curate that answers ({there!r})"
        raise MissingDependencyError(
            f"the Dask worker at {worker} has {has}, and this is {here}",
            fix="start workers from the same environment as this command",
        )


def _deaf() -> Any:
    """A plugin for workers on this machine: Ctrl-C reaches them too, but the parent decides.

    A worker that ended by itself would leave the parent waiting for the tasks it held.
    """
    from distributed import Worker, WorkerPlugin

    class Deaf(WorkerPlugin):
        def setup(self, worker: Worker) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return Deaf()


def _same(*, takes_gpu: bool) -> Any:
    """A plugin that runs on every worker before its first task, and refuses other versions."""
    from distributed import Status, Worker, WorkerPlugin

    class Same(WorkerPlugin):
        """Carried to workers by value: it must run where our packages differ or are missing."""

        def __init__(self, version: str, digest: str) -> None:
            self.wanted = version, digest

        async def setup(self, worker: Worker) -> None:
            try:
                from jobs import cluster_workers

                here = cluster_workers.identity()
                found = here.version, here.digest
            except (ImportError, AttributeError) as error:
                await self.refuse(worker, f"none ({error})")
                return
            if found != self.wanted:
                await self.refuse(worker, "{} ({})".format(*found))
                return
            if takes_gpu:
                cluster_workers.take_gpu(str(worker.name), os.environ)

        async def refuse(self, worker: Worker, has: str) -> None:
            wanted = "{} ({})".format(*self.wanted)
            reason = f"this worker has curate {has}, and the run has curate {wanted}"
            logging.getLogger("distributed.worker").error("refused: %s", reason)
            # It may have tasks already. It begins none, and leaves the scheduler, or they would
            # count as what it died of. A nanny answers once its worker has started, not before.
            worker.status = Status.closing_gracefully
            with suppress(Exception):
                await worker.scheduler.retire_workers(
                    workers=[worker.address], close_workers=False, remove=True
                )
            asyncio.get_running_loop().call_later(
                _LEAVE_SECONDS, lambda: worker.loop.add_callback(worker.close, reason=reason)
            )
            raise RuntimeError(reason)

    here = identity()
    return Same(here.version, here.digest)
