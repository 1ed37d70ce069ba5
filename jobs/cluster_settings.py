"""Settings of `cluster`: what kind, how many workers, and what each kind needs beside."""

import math
import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError

Kind = Literal["inline", "local", "cuda", "slurm", "address", "scheduler-file"]

_TLS = ("tls_ca_file", "tls_cert", "tls_key")
_KEYS: dict[str, tuple[str, ...]] = {
    "inline": (),
    "local": ("workers", "memory_gb"),
    "cuda": ("workers",),
    "slurm": ("workers", "slurm", *_TLS),
    "address": ("address", *_TLS),
    "scheduler-file": ("scheduler_file", *_TLS),
}
"""Kind -> the settings that are its own, beside those in `_COMMON`."""

_COMMON = {"kind", "threads", "wait_minutes", "stall_minutes"}

_WALLTIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_MOST_EARLY_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """Settings of `cluster.slurm`: one job, of which as many are submitted as workers need."""

    __pydantic_config__: ClassVar = STRICT

    partition: str | None = None
    """Partition (queue) that jobs go to; by default Slurm's own default."""
    account: str | None = None
    """Account that is charged."""
    walltime: str = "04:00:00"
    """Limit of a job, as Slurm writes it: `04:00:00` or `1-12:00:00`. Workers end by themselves
    shortly before, and another job takes their place while there is work."""
    cores: int | None = None
    """Cores of a job; by default `threads` for each of its processes."""
    memory: str = "16GB"
    """Memory of a job, such as `64GB`."""
    gpus: int = 0
    """GPUs of a job: one for each of its processes, or none."""
    processes: int | None = None
    """Worker processes in a job; by default one for each of its GPUs, and one where it has none."""
    directives: tuple[str, ...] = ()
    """More lines for the head of the script, without `#SBATCH`: `--constraint=a100`."""
    prologue: tuple[str, ...] = ()
    """Lines before the worker starts: `module load cuda`, `source /shared/venv/bin/activate`."""
    python: str | None = None
    """Python on the nodes; by default the path of the one that runs the command."""
    interface: str | None = None
    """Network interface over which nodes are reached: `ib0`."""
    log_directory: str | None = None
    """Folder that all nodes see for the jobs' output; by default Slurm's own place."""

    def __post_init__(self) -> None:
        given = [number for number in (self.cores, self.processes) if number is not None]
        if min(given, default=1) < 1 or self.gpus < 0:
            raise ConfigError("slurm.cores and slurm.processes start at 1, slurm.gpus at 0",
                              fix="raise them")  # fmt: skip
        if self.gpus and self.gpus != self.num_processes:
            raise ConfigError(
                f"slurm.gpus is {self.gpus}, but slurm.processes is {self.num_processes}: each"
                " process works on one GPU",
                fix="leave slurm.processes out, or set it to slurm.gpus",
            )
        if not self.seconds:
            raise ConfigError(f"slurm.walltime is {self.walltime!r}", fix="write it as 04:00:00")

    @property
    def num_processes(self) -> int:
        """Worker processes of a job."""
        return self.processes or max(1, self.gpus)

    @property
    def seconds(self) -> int:
        """The limit of a job; 0 where it is none."""
        match = _WALLTIME.fullmatch(self.walltime)
        if match is None:
            return 0
        days, *parts = match.groups()
        given = [int(part) for part in parts if part is not None]
        # Slurm reads one number as minutes, two as minutes:seconds, and after days hours first.
        if days is None and len(given) < 3:
            given = [0, *given]
        hours, minutes, seconds = (*given, 0, 0)[:3]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def lifetime(self) -> tuple[int, int]:
        """Seconds after which a worker ends by itself, and by how much that is spread around."""
        early = min(_MOST_EARLY_SECONDS, self.seconds // 6)
        return max(1, self.seconds - early), early // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Settings of `cluster`."""

    __pydantic_config__: ClassVar = STRICT

    kind: Kind = "inline"
    """inline: this process; local: Dask workers as processes on this machine; cuda: one for each of
    its GPUs; slurm: workers in jobs that are submitted; address, scheduler-file: a Dask scheduler
    that runs already."""
    workers: int | None = None
    """Worker processes of kind local (2 by default), cuda (by default one for each GPU that is
    visible) and slurm (by default one job's)."""
    threads: int = 1
    """Threads of one worker's arithmetic, inline too: sums depend on it in their last digits."""
    memory_gb: float | None = None
    """Of kind local: a worker that grows beyond is ended and its partition tried again. By default
    there is no limit."""
    address: str | None = None
    """Of kind address, that of the scheduler: `tcp://host:8786`, or `tls://host:8786`."""
    scheduler_file: str | None = None
    """Of kind scheduler-file: what `dask scheduler --scheduler-file` has written."""
    tls_ca_file: str | None = None
    """Path of the certificate authority, for connections by TLS; by default what Dask's own
    configuration says. Paths alone stand here, never a key itself."""
    tls_cert: str | None = None
    """Path of this user's certificate."""
    tls_key: str | None = None
    """Path of this user's key."""
    slurm: Slurm | None = None
    """Of kind slurm: what a job asks for."""
    wait_minutes: float | None = None
    """How long to go on without a single worker, before the command ends with exit code 75; by
    default 5, and a day for slurm, where jobs wait in a queue."""
    stall_minutes: float = 30.0
    """A Dask worker on which nothing has moved for so long, no batch, no file, no arithmetic, is
    restarted, and its task tried elsewhere; 0: never. One that computes without a word gets eight
    times as long."""

    def __post_init__(self) -> None:
        self._refuse_keys_of_others()
        if self.kind == "address" and not self.address:
            raise ConfigError("cluster.kind is address, but there is no address",
                              fix="set cluster.address to tcp://host:8786")  # fmt: skip
        if self.kind == "scheduler-file" and not self.scheduler_file:
            raise ConfigError("cluster.kind is scheduler-file, but scheduler_file is not set",
                              fix="set cluster.scheduler_file to its path")  # fmt: skip
        if (self.workers is not None and self.workers < 1) or self.threads < 1:
            raise ConfigError("cluster.workers and cluster.threads start at 1", fix="raise them")
        for name in ("memory_gb", "wait_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"cluster.{name} is {value}", fix="set it above 0, or leave it")
        if self.stall_minutes < 0:
            raise ConfigError(f"cluster.stall_minutes is {self.stall_minutes}",
                              fix="set it above 0, or to 0 for never")  # fmt: skip
        given = [name for name in _TLS if getattr(self, name) is not None]
        if given and len(given) < len(_TLS):
            missing = next(name for name in _TLS if name not in given)
            raise ConfigError(f"cluster.{given[0]} is set, but cluster.{missing} is not",
                              fix=f"set all of {', '.join(_TLS)}")  # fmt: skip

    def _refuse_keys_of_others(self) -> None:
        own = {*_COMMON, *_KEYS[self.kind]}
        for field in fields(self):
            if field.name in own or getattr(self, field.name) is None:
                continue
            kinds = [kind for kind, keys in _KEYS.items() if field.name in keys]
            raise ConfigError(
                f"cluster.{field.name} is set, but cluster.kind is {self.kind}",
                fix=f"set cluster.kind to {' or '.join(kinds)}, or take {field.name} out",
            )

    @property
    def job(self) -> Slurm:
        """Of kind slurm: one job."""
        return self.slurm or Slurm()

    @property
    def num_jobs(self) -> int:
        """Of kind slurm: how many jobs hold the workers."""
        return math.ceil((self.workers or 1) / self.job.num_processes)

    @property
    def num_workers(self) -> int | None:
        """How many workers there will be; None where that is not known before it runs."""
        match self.kind:
            case "inline":
                return 1
            case "local":
                return self.workers or 2
            case "slurm":
                return self.num_jobs * self.job.num_processes
            case _:
                return self.workers

    @property
    def has_gpus(self) -> bool:
        """Whether every worker has a GPU of its own."""
        return self.kind == "cuda" or (self.kind == "slurm" and self.job.gpus > 0)

    @property
    def stall_seconds(self) -> float:
        """After how long without a move a worker is taken to hang; 0: never."""
        return 60 * self.stall_minutes

    @property
    def wait_seconds(self) -> float:
        """How long to go on without a worker."""
        default = 24 * 60 if self.kind == "slurm" else 5
        return 60 * (default if self.wait_minutes is None else self.wait_minutes)


ALL_KEYS = frozenset(field.name for field in fields(Cluster))


def keys_of(kind: str) -> frozenset[str]:
    """Settings of `cluster` that fit a kind; of an unknown one all."""
    own = _KEYS.get(kind)
    if own is None:
        return ALL_KEYS
    return frozenset({*_COMMON, *own})


def without_foreign_defaults(values: Any) -> Any:
    """The section as it is read: run folders of older versions hold the default of every kind."""
    if not isinstance(values, dict) or values.get("kind", "inline") == "local":
        return values
    if "address" in values and "scheduler_file" not in values:
        return {key: value for key, value in values.items() if key != "workers"}
    return values
