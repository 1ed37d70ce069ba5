"""What runs on every worker beside the tasks: is its curate ours, which GPU is its own, and
letting go of models.

Nothing here loads torch or Dask before it must.
"""

import ctypes
import gc
import hashlib
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

_PACKAGES = ("curate", "jobs", "mixers", "scorers")

KEPT = {
    "curate.models.load": "_last",
    "jobs.influence_adam": "_last",
    "jobs.influence_sides": "_last",
    "jobs.lengths": "_tokenizers",
    "jobs.vog_work": "_open",
}
"""Module -> its mapping of what it keeps for the next task, beside the bounded `lru_cache`s."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which curate a process runs."""

    version: str
    digest: str
    """Of the text of all its modules."""

    def __str__(self) -> str:
        return f"curate {self.version} ({self.digest})"


@cache
def identity() -> Identity:
    """Of this process: the same version with other lines in it would give other bytes."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return Identity(version("curate-data"), digest.hexdigest()[:12])


def environment(threads: int) -> dict[str, str]:
    """Variables that a worker's process is started with: threads of every library, no forks."""
    libraries = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
    found = {f"{library}_NUM_THREADS": str(threads) for library in libraries}
    return {**found, "POLARS_MAX_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def take_gpu(name: str, variables: MutableMapping[str, str]) -> None:
    """Leave a process of a job one of the job's GPUs: the one of its number.

    Args:
        name: of the worker: of several in a job, it ends with `-` and their number.
        variables: of the process; those that Slurm sets name the job's GPUs.
    """
    own = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
    number = name.rpartition("-")[2]
    if len(own) > 1 and number.isdecimal():
        variables["CUDA_VISIBLE_DEVICES"] = own[int(number) % len(own)]


def forget() -> None:
    """Drop every model, tokenizer and table that this process keeps for the next task.

    What is kept is in a bounded `lru_cache` of one of our modules, or in a mapping of `KEPT`.
    """
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] in _PACKAGES]:
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) == module.__name__ and _is_bounded(value):
                value.cache_clear()
    for name, mapping in KEPT.items():
        if name in sys.modules:
            vars(sys.modules[name])[mapping].clear()
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        _free_gpu(torch)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        log.debug("memory is not given back: no malloc_trim")


async def forget_here() -> None:
    """`forget`, for Dask: what nobody waits for has to be a coroutine."""
    forget()


def _is_bounded(value: Any) -> bool:
    parameters = getattr(value, "cache_parameters", None)
    return callable(parameters) and _most(parameters()) is not None


def _most(parameters: Any) -> int | None:
    return parameters["maxsize"] if isinstance(parameters, Mapping) else None


def _free_gpu(torch: ModuleType) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def memory_bytes() -> int:
    """Resident memory of this process."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
