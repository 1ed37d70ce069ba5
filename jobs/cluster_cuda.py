"""One Dask worker for each GPU of this machine, through dask-cuda."""

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from curate.errors import ConfigError, MissingDependencyError
from jobs.cluster_settings import Cluster

_DEVICES = Path("/dev")


def check_cuda() -> None:
    """Whether this machine can hold workers on GPUs; loads neither torch nor CUDA.

    Raises:
        MissingDependencyError: says what is missing.
    """
    missing: list[str] = []
    if not visible_gpus(os.environ):
        missing.append("no NVIDIA GPU is visible")
    if find_spec("dask_cuda") is None:
        missing.append("dask-cuda is not installed")
    if _torch_version().endswith("+cpu"):
        missing.append(f"torch {_torch_version()} is built for CPUs alone")
    if missing:
        raise MissingDependencyError(
            f"cluster.kind is cuda, but {' and '.join(missing)}",
            fix="pip install 'curate-data[cuda]' on a machine with GPUs, or use cluster.kind local",
        )


def visible_gpus(variables: Mapping[str, str]) -> list[str]:
    """Numbers or names of the GPUs that this process may use, by the driver's device files."""
    here = sorted(int(path.name[6:]) for path in _DEVICES.glob("nvidia[0-9]*"))
    chosen = variables.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(number) for number in here]
    names = [name.strip() for name in chosen.split(",")]
    return [name for name in names if here and name not in ("", "-1", "NoDevFiles")]


def cuda_options(settings: Cluster, gpus: list[str]) -> dict[str, Any]:
    """What dask-cuda is asked for: one process, one thread and one `GPU` for each device.

    Args:
        settings: of `cluster`.
        gpus: those that are visible; dask-cuda gives each worker its own in
            `CUDA_VISIBLE_DEVICES`.

    Raises:
        ConfigError: there are more workers than GPUs.
    """
    workers = settings.workers or len(gpus)
    if workers > len(gpus):
        raise ConfigError(
            f"cluster.workers is {workers}, but {len(gpus)} GPUs are visible: each worker has one",
            fix="leave cluster.workers out, or lower it",
        )
    return {
        "CUDA_VISIBLE_DEVICES": gpus[:workers],
        "n_workers": workers,
        "threads_per_worker": 1,
        "resources": {"GPU": 1},
        # No spilling, no limits: results are files, and pinned memory looks like the process'.
        "memory_limit": None,
        "device_memory_limit": None,
        "jit_unspill": False,
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
        "scheduler_kwargs": {"allowed_failures": 0},
    }


@contextmanager
def open_cuda(settings: Cluster) -> Generator[Any]:
    """A cluster with one worker for each GPU."""
    options = cuda_options(settings, visible_gpus(os.environ))
    with import_module("dask_cuda").LocalCUDACluster(**options) as cluster:
        yield cluster


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""
