"""Opening a Dask cluster of each kind, and looking after the workers that come and go.

Dask is imported by the functions: planning on this machine alone does without.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from curate.errors import ConfigError, CurateError, InputError, TryAgainError
from jobs.cluster_plugins import prepared
from jobs.cluster_settings import Cluster
from jobs.cluster_workers import environment, forget_here

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 30
_LOOK_SECONDS = 1.0
_WAKE_SECONDS = 0.2

QUIET = {
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "5s",
}
"""Fifty wakes a second and two looks at the machine are three quarters of what an idle process of
Dask's costs, clients of other schedulers too."""

OURS = {
    # A model that loads or a tokenizer at work may hold the interpreter for minutes.
    "distributed.scheduler.worker-ttl": "1 hour",
    # A worker that is away at that moment, dead or starting slowly, would never be started again.
    "distributed.deploy.lost-worker-timeout": "3650 days",
    # A worker that was paused for its memory would never go on: what it holds is its model.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    # The last thousand messages to each worker, every one with the settings of its task, would
    # take 20 MB a worker.
    "distributed.admin.low-level-log-length": 100,
    **QUIET,
}
"""Configuration of Dask for schedulers and workers that we start ourselves."""

Problem = Callable[[], CurateError | None]
"""Why no worker will come any more, where that is known."""


class Opened(NamedTuple):
    """A cluster that has workers."""

    client: Any
    problem: Problem


@contextmanager
def open_client(settings: Cluster) -> Generator[Opened]:
    """A client of Dask with at least one worker, each of which runs this version of curate.

    Raises:
        TryAgainError: the scheduler does not answer, or has no workers.
        ConfigError: a setting is wrong.
        MissingDependencyError: a worker has another version.
    """
    # Before our settings: loaded within them, its defaults would go when ours do, and a second
    # cluster in this process would find none.
    import distributed as _  # noqa: F401
    from dask import config

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ExitStack() as stack:
        if settings.kind in ("address", "scheduler-file"):
            stack.enter_context(config.set(QUIET))
            opened = stack.enter_context(_connected(settings))
        else:
            variables = environment(settings.threads)
            # Nannies of this process set them here too; the next cluster may want others.
            stack.callback(_restore, {name: os.environ.get(name) for name in variables})
            names = {f"distributed.nanny.pre-spawn-environ.{n}": v for n, v in variables.items()}
            stack.enter_context(config.set({**OURS, **names}))
            opened = stack.enter_context(_started(settings))
        stack.enter_context(prepared(opened.client, settings))
        _wait_for_workers(opened, settings.wait_seconds)
        yield opened


def _restore(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _started(settings: Cluster) -> Generator[Opened]:
    """A client of a cluster of our own, which ends with it."""
    from distributed import Client

    problem: Problem = _none
    with ExitStack() as stack:
        if settings.kind == "local":
            cluster = stack.enter_context(_local(settings))
        elif settings.kind == "cuda":
            from jobs.cluster_cuda import open_cuda

            cluster = stack.enter_context(open_cuda(settings))
        else:
            from jobs.cluster_slurm import open_slurm

            jobs = stack.enter_context(open_slurm(settings))
            cluster, problem = jobs.cluster, jobs.problem
        client = stack.enter_context(Client(cluster))
        if find_spec("bokeh") is not None:
            log.info("dashboard: %s", client.dashboard_link)
        yield Opened(client, problem)


def _none() -> None:
    """Nothing is wrong."""


@contextmanager
def _local(settings: Cluster) -> Generator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=settings.num_workers,
        threads_per_worker=1,
        processes=True,
        # Any free port: the usual one may be taken by another run.
        dashboard_address="127.0.0.1:0",
        memory_limit=0 if settings.memory_gb is None else int(settings.memory_gb * 1e9),
        # Dask would send a task to three more workers; `run_tasks` tries it alone.
        scheduler_kwargs={"allowed_failures": 0},
        # What fails is told by the tasks; at the end workers complain of closed doors.
        silence_logs=logging.CRITICAL,
    ) as cluster:
        yield cluster


@contextmanager
def _connected(settings: Cluster) -> Generator[Opened]:
    """A client of a scheduler that runs already."""
    from distributed import Client
    from distributed.comm.addressing import get_address_host_port, parse_address
    from distributed.comm.registry import get_backend

    file = Path(settings.scheduler_file or "").expanduser()
    address = settings.address or _address_in(file)
    where = "cluster.address" if settings.address else f"{settings.scheduler_file}"
    certificates = security(settings)
    try:
        scheme, _ = parse_address(address)
        get_backend(scheme)
        if scheme in ("tcp", "tls"):
            get_address_host_port(address)
        client = Client(address, timeout=_ANSWER_SECONDS, security=certificates)
    except (OSError, TimeoutError) as error:
        raise TryAgainError(
            f"the Dask scheduler at {address} does not answer: {error}",
            fix=f"start it, or correct {where}",
        ) from error
    except (ValueError, TypeError, RuntimeError) as error:  # from the parsers of addresses and TLS
        raise ConfigError(
            f"{where} is {address!r}: {error}",
            fix="write it as tcp://host:8786, or tls://host:8786 with certificates",
        ) from error
    with client:
        yield Opened(client, _none)


def _address_in(path: Path) -> str:
    """What a scheduler has written of itself; it may be about to start, or just writing."""
    end = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < end and not (path.is_file() and path.stat().st_size):
        time.sleep(0.2)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["address"])
    except FileNotFoundError as error:
        raise TryAgainError(
            f"there is no scheduler file {path}",
            fix=f"start it: `dask scheduler --scheduler-file {path}`",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no scheduler file of Dask", fix="correct cluster.scheduler_file"
        ) from error


def security(settings: Cluster) -> Any:
    """Certificates by their paths, or None: then Dask's own configuration counts.

    Raises:
        ConfigError: a file is missing.
    """
    if settings.tls_ca_file is None:
        return None
    from distributed.security import Security

    paths: dict[str, str] = {}
    for name in ("tls_ca_file", "tls_cert", "tls_key"):
        path = Path(str(getattr(settings, name))).expanduser()
        if not path.is_file():
            raise ConfigError(f"cluster.{name}: there is no file {path}", fix="correct the path")
        paths[name] = str(path)
    ca, cert, key = paths.values()
    roles = {f"tls_{role}_{what}": path for role in ("client", "scheduler", "worker")
             for what, path in (("cert", cert), ("key", key))}  # fmt: skip
    return Security(tls_ca_file=ca, require_encryption=True, **roles)


def _wait_for_workers(opened: Opened, seconds: float) -> None:
    """Until the first has come.

    Raises:
        TryAgainError: none has come in time.
    """
    live = LiveWorkers(opened, seconds)
    while not live.count():
        time.sleep(_WAKE_SECONDS)


class LiveWorkers:
    """How many tasks the workers can run at a time; asked at most once a second."""

    def __init__(self, opened: Opened, wait_seconds: float) -> None:
        """Of a cluster.

        Args:
            opened: whose workers.
            wait_seconds: how long there may be none.
        """
        self._client, self._problem = opened
        self._address = opened.client.scheduler.address
        self._wait_seconds = wait_seconds
        self._number = 0
        self._seen_at = time.monotonic()
        self._asked_at = -_LOOK_SECONDS

    def count(self) -> int:
        """Of all workers together; what it was the last time, where the scheduler is silent.

        Raises:
            TryAgainError: there has been no worker for too long, or the scheduler has gone.
            CurateError: none will come any more.
        """
        if self._client.status == "closed":  # by itself, when it cannot connect again
            raise TryAgainError(
                f"the Dask scheduler at {self._address} has gone",
                fix="start one, then run the same again; what is finished is kept",
            )
        now = time.monotonic()
        if now - self._asked_at < _LOOK_SECONDS:
            return self._number
        self._asked_at = now
        try:
            found = self._client.sync(self._client.scheduler.ncores, callback_timeout=5)
        except (OSError, TimeoutError):  # whether it is gone is told by the tasks
            return self._number
        self._number = sum(found.values())
        if self._number:
            self._seen_at = now
            return self._number
        problem = self._problem()
        if problem is not None:
            raise problem
        if now - self._seen_at > self._wait_seconds:
            raise TryAgainError(
                f"the Dask scheduler at {self._address} has no workers, for"
                f" {now - self._seen_at:,.0f} seconds now",
                fix=f"start some (`dask worker {self._address} --nthreads 1 --memory-limit 0`),"
                " then run the same again",
            )
        return 0


def forget_everywhere(client: Any) -> None:
    """Have every worker let go of its models; nobody waits for those that are busy or gone."""
    # Where the client has closed itself, it has no scheduler to ask: the next stage will tell.
    with suppress(OSError, TimeoutError, AttributeError):
        client.run(forget_here, wait=False, on_error="ignore")
