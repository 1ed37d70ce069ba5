"""Dask workers in Slurm jobs, through dask-jobqueue; jobs that end are replaced.

The scheduler runs in the process of the command, which may sit on a login node or in a job of its
own. Dask's own adaptive scaling forgets workers that end by their lifetime, so that a loop of ours
counts the jobs and submits new ones.
"""

import asyncio
import logging
import re
import shutil
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

from curate.errors import ConfigError, MissingDependencyError, TryAgainError
from jobs.cluster_settings import Cluster
from jobs.cluster_workers import environment

log = logging.getLogger(__name__)

_LOOK_SECONDS = 15.0
_IN_VAIN = 3
"""Jobs in a row that end before a worker of theirs has come; then none is submitted any more."""


def check_slurm(*, submits: bool = True) -> None:
    """Whether jobs can be described, and submitted from here.

    Raises:
        MissingDependencyError: dask-jobqueue or Slurm's commands are missing.
    """
    if find_spec("dask_jobqueue") is None:
        raise MissingDependencyError(
            "cluster.kind is slurm, but dask-jobqueue is not installed",
            fix="pip install 'curate-data[slurm]'",
        )
    if submits and shutil.which("sbatch") is None:
        raise MissingDependencyError(
            "cluster.kind is slurm, but there is no `sbatch` on this machine",
            fix="run the command on a login node of the cluster, or use cluster.kind local",
        )


def job_options(settings: Cluster) -> dict[str, Any]:
    """What dask-jobqueue is asked for: the arguments of its `SLURMCluster` that describe a job."""
    job = settings.job
    lifetime, stagger = job.lifetime
    extra = ["--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s"]
    # Slurm itself ends a job that takes too much; Dask's limits would pause workers for ever.
    extra += ["--memory-limit", "0"]
    if job.gpus:
        extra += ["--resources", "GPU=1"]
    gpus = [f"--gres=gpu:{job.gpus}"] if job.gpus else []
    logs = job.log_directory and str(Path(job.log_directory).expanduser())
    exports = [f"export {name}={value}" for name, value in environment(settings.threads).items()]
    return {
        "queue": job.partition,
        "account": job.account,
        "walltime": job.walltime,
        # One thread of Dask's for each process: a task has the process to itself.
        "cores": job.num_processes,
        "job_cpu": job.cores or settings.threads * job.num_processes,
        "memory": job.memory,
        "processes": job.num_processes,
        "job_name": "curate",
        "job_extra_directives": [*gpus, *job.directives],
        "job_script_prologue": [*exports, *job.prologue],
        "worker_extra_args": extra,
        "python": job.python,
        "interface": job.interface,
        "log_directory": logs,
        "death_timeout": 300,
    }


def job_script(settings: Cluster) -> str:
    """The script of a job as it would be submitted; nothing is started.

    Raises:
        MissingDependencyError: dask-jobqueue is not installed.
    """
    check_slurm(submits=False)
    from dask_jobqueue.slurm import SLURMJob

    from jobs.cluster_dask import security

    protocol = "tls" if settings.tls_ca_file else "tcp"
    # dask-jobqueue would make the folder of the logs at once.
    asked = job_options(settings)
    options = {**asked, "log_directory": None}
    job = SLURMJob(
        scheduler=f"{protocol}://{socket.gethostname()}:PORT",  # known once it runs
        name="curate-0",
        protocol=f"{protocol}://" if settings.tls_ca_file else None,
        security=security(settings),
        **options,
    )
    script, logs = str(job.job_script()), asked["log_directory"]
    if logs is None:
        return script
    first = f"#SBATCH -J {options['job_name']}\n"
    path = f"{logs}/{options['job_name']}-%J"
    return script.replace(first, f"{first}#SBATCH -e {path}.err\n#SBATCH -o {path}.out\n")


@contextmanager
def open_slurm(settings: Cluster) -> Generator["Jobs"]:
    """A cluster whose workers come as Slurm starts their jobs; all are cancelled at the end.

    Raises:
        ConfigError: Slurm refuses the job.
    """
    from dask import config
    from dask_jobqueue.slurm import SLURMCluster

    from jobs.cluster_dask import security

    options = {key: value for key, value in job_options(settings).items() if value is not None}
    if "log_directory" in options:
        Path(options["log_directory"]).mkdir(parents=True, exist_ok=True)
    # Dask would cancel a job whose worker is away for a moment, and knows nothing of its group.
    with (
        config.set({"distributed.deploy.lost-worker-timeout": "365 days"}),
        SLURMCluster(
            n_workers=0,
            name="curate",
            job_cls=_job_class(),
            security=security(settings),
            silence_logs="critical",
            scheduler_options={"dashboard_address": "127.0.0.1:0", "allowed_failures": 0},
            **options,
        ) as cluster,
    ):
        jobs = Jobs(cluster, settings.num_jobs, settings.job.num_processes)
        jobs.submit()
        log.info("submitted %d Slurm jobs of %d workers", settings.num_jobs, jobs.processes)
        with jobs.kept_up():
            yield jobs


def _job_class() -> Any:
    """dask-jobqueue's job, which keeps why it was refused, and has ended when it is closed."""
    from dask_jobqueue.slurm import SLURMJob
    from distributed.core import Status

    class Job(SLURMJob):
        refused = ""

        async def start(self) -> None:
            try:
                await super().start()
            except (OSError, RuntimeError) as error:
                self.refused = _said(str(error))
                self.status = Status.running  # until it is taken out of the books

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    return Job


class Jobs:
    """As many jobs as are wanted: those that have ended are replaced."""

    def __init__(self, cluster: Any, wanted: int, processes: int) -> None:
        """Of a cluster that has no jobs yet.

        Args:
            cluster: of dask-jobqueue.
            wanted: jobs.
            processes: workers in each.
        """
        self.cluster = cluster
        self.wanted = wanted
        self.processes = processes
        self._seen = set[str]()
        self._in_vain = 0
        self._problem: TryAgainError | None = None

    def problem(self) -> TryAgainError | None:
        """Why no more jobs are submitted."""
        return self._problem

    def submit(self) -> None:
        """Submit what is missing.

        Raises:
            ConfigError: Slurm refuses a job.
        """
        self.cluster.scale(jobs=self.wanted)
        self.cluster.sync(_settle, self.cluster)
        refused = {name: job.refused for name, job in self._jobs.items() if job.refused}
        if refused:
            self.cluster.sync(self.cluster.scale_down, list(refused))
            raise ConfigError(
                f"Slurm refuses the job: {next(iter(refused.values()))}",
                fix="correct cluster.slurm; `--dry-run` shows the script of a job",
            )

    @contextmanager
    def kept_up(self) -> Generator[None]:
        """Inside, a thread looks after the jobs now and then."""
        over = Event()

        def look() -> None:
            while not over.wait(_LOOK_SECONDS):
                try:
                    self.replace()
                except (OSError, RuntimeError, ConfigError) as error:
                    log.warning("Slurm jobs could not be replaced, trying again: %s", error)

        thread = Thread(target=look, name="slurm-jobs", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def replace(self) -> list[str]:
        """Take ended jobs out of the books and submit others.

        Returns:
            Names of those that have ended.

        Raises:
            ConfigError: Slurm refuses a job.
        """
        if self._problem is not None:
            return []
        ended = self.ended()
        if not ended:
            if len(self._jobs) < self.wanted:  # Slurm has refused some
                self.submit()
            return []
        came = self._seen.intersection(ended)
        self._in_vain = 0 if came else self._in_vain + len(ended)
        ids = ", ".join(str(self._jobs[name].job_id) for name in ended)
        self.cluster.sync(self.cluster.scale_down, ended)
        self._seen.difference_update(ended)  # the next job may have the same name
        if self._in_vain >= _IN_VAIN:
            self._problem = TryAgainError(
                f"{self._in_vain} Slurm jobs have ended before a worker of theirs came (the last:"
                f" {ids}); no more are submitted",
                fix="see what the jobs have written; `--dry-run` shows their script",
            )
            log.error("%s", self._problem.what)
            return ended
        log.info("Slurm jobs %s have ended; submitting as many", ids)
        self.submit()
        return ended

    def ended(self) -> list[str]:
        """Names of the jobs that have had workers and have none, or that Slurm no longer knows."""
        there = cast(Mapping[str, Any], self.cluster.scheduler_info)["workers"]
        workers = {str(entry["name"]) for entry in there.values()}
        alive = {name for name in self._jobs if workers & self._workers_of(name)}
        self._seen |= alive
        silent = [name for name in self._jobs if name not in alive]
        if not silent:
            return []
        known = self._known_to_slurm()
        # A worker that is being started anew is away for a moment: Slurm decides where it can.
        return [
            name
            for name in silent
            if (name in self._seen if known is None else self._jobs[name].job_id not in known)
        ]

    @property
    def _jobs(self) -> Mapping[str, Any]:
        return dict(self.cluster.workers)

    def _workers_of(self, name: str) -> set[str]:
        if self.processes == 1:
            return {name}
        return {f"{name}-{number}" for number in range(self.processes)}

    def _known_to_slurm(self) -> set[str] | None:
        """Jobs that wait or run; None where Slurm does not say."""

        async def ask() -> tuple[int, bytes]:
            process = await asyncio.create_subprocess_exec(
                "squeue", "--noheader", "--me", "--format", "%i",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            said, _ = await process.communicate()
            return process.returncode or 0, said

        with suppress(OSError):
            code, said = self.cluster.sync(ask)
            if code == 0:
                return set(said.decode().split())
        return None


async def _settle(cluster: Any) -> None:
    """Until all jobs have been submitted."""
    await cluster


def _said(text: str) -> str:
    """What `sbatch` wrote, out of dask-jobqueue's report of it."""
    match = re.search(r"stderr:\s*(.*)", text, re.DOTALL)
    words = (match.group(1) if match else text).split()
    return " ".join(words) or "sbatch failed"
