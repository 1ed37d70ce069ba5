"""Where faiss is loaded: the one place that knows which of its builds is there.

The builds for the CPU and for a GPU own the same import name, so exactly one is installed. It is
imported inside functions only: everything that needs no search works without it.
"""

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from curate.errors import MissingDependencyError

_CPU_EXTRA = "pip install 'curate-data[cpu]', or [gpu] for a GPU"
_GPU_EXTRA = "run on the CPU, or pip install 'curate-data[gpu]' in place of faiss-cpu"


def faiss_module(threads: int | None = None) -> ModuleType:
    """The faiss module.

    Args:
        threads: how many of the CPU's threads it shall use from now on; None leaves it as it is.

    Raises:
        MissingDependencyError: no build of faiss is installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its wrapper's types name no module
            faiss = import_module("faiss")
    except ImportError as error:
        raise MissingDependencyError(
            "searching and clustering vectors needs faiss, which is not installed", fix=_CPU_EXTRA
        ) from error
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    return faiss


def is_gpu(device: str) -> bool:
    """Whether `cpu`, `cuda` or `cuda:1` is a GPU."""
    return device.partition(":")[0] == "cuda"


@cache
def gpu_resources() -> Any:
    """Memory and streams that all of a process's searches on its GPU share.

    Raises:
        MissingDependencyError: the faiss installed is built for CPUs, or sees no GPU.
    """
    faiss = faiss_module()
    if not hasattr(faiss, "StandardGpuResources"):
        raise MissingDependencyError("the faiss installed is built for CPUs only", fix=_GPU_EXTRA)
    if faiss.get_num_gpus() == 0:
        raise MissingDependencyError("faiss sees no GPU on this machine", fix=_GPU_EXTRA)
    return faiss.StandardGpuResources()


def gpu_number(device: str) -> int:
    """1 of `cuda:1`, and 0 of `cuda`."""
    return int(device.partition(":")[2] or 0)
