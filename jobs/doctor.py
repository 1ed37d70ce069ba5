"""Is this machine ready, and does the engine compute a model the way the model does itself."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

_LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "polars", "pyarrow",
              "numpy", "pydantic", "typer")  # fmt: skip
_FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cuvs")
_OF_DASK = {
    "bokeh": ("Dask's dashboard and --profile", "profile"),
    "dask-jobqueue": ("cluster.kind slurm", "slurm"),
    "dask-cuda": ("cluster.kind cuda", "cuda"),
}
"""Distribution -> what needs it, and the extra that brings it."""
_LOW_DISK_BYTES = 2e9


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "note", "bad"]
    """bad: something will fail; note: worth knowing."""
    text: str
    fix: str = ""


def checks() -> Iterator[Check]:
    """Everything that can be told without a model, cheap things first."""
    yield _python()
    yield from _libraries()
    yield _dask()
    yield from _beside_dask()
    yield _faiss()
    yield _machine()
    yield _devices()
    yield from _disk()


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _libraries() -> Iterator[Check]:
    for name in _LIBRARIES:
        found = installed(name)
        if found is None:
            yield Check(name, "bad", "not installed", f"pip install {name}")
        else:
            yield Check(name, "ok", found)


def _dask() -> Check:
    dask, distributed = installed("dask"), installed("distributed")
    text = f"dask {dask or 'missing'}, distributed {distributed or 'missing'}"
    if dask is None or distributed is None:
        return Check("dask", "bad", text, "pip install dask distributed")
    if dask != distributed:
        return Check("dask", "bad", f"{text}: they belong together", "install the same version")
    return Check("dask", "ok", text)


def _beside_dask() -> Iterator[Check]:
    """What some clusters need; where none of them is wanted, nothing is missing."""
    for name, (what, extra) in _OF_DASK.items():
        found = installed(name)
        if found is None:
            text = f"not installed; {what} needs it"
            yield Check(name, "note", text, f"pip install 'curate-data[{extra}]'")
        else:
            yield Check(name, "ok", found)


def _faiss() -> Check:
    found = [f"{name} {number}" for name in _FAISS if (number := installed(name))]
    text = ", ".join(found)
    if len(found) > 1:
        return Check(
            "faiss", "bad", f"{text}: all of them own the package `faiss`, the last one installed"
            " wins", "uninstall all of them, then install one: pip install 'curate-data[cpu]'"
        )  # fmt: skip
    if not found:
        return Check("faiss", "note", "not installed", "pip install 'curate-data[cpu]' or [gpu]")
    return Check("faiss", "ok", text)


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Check("machine", "ok", f"{platform.machine()}, {cores} cores, {memory:.0f} GB memory")


def _devices() -> Check:
    if installed("torch") is None:
        return Check("devices", "bad", "torch is missing", "pip install torch")
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, no GPU answers" if built else "torch for CPU"
        return Check("devices", "ok" if built is None else "note", f"cpu ({why})")
    names = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}"
        f" {torch.cuda.get_device_properties(index).total_memory / 1e9:.0f} GB"
        for index in range(torch.cuda.device_count())
    ]
    return Check("devices", "ok", ", ".join(names))


def _disk() -> Iterator[Check]:
    places = {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir())}
    for name, path in places.items():
        free = shutil.disk_usage(path).free
        text = f"{path}: {free / 1e9:.1f} GB free"
        if not os.access(path, os.W_OK):
            yield Check(f"disk ({name})", "bad", f"{path} cannot be written", "change its rights")
        elif free < _LOW_DISK_BYTES:
            yield Check(f"disk ({name})", "note", text, "free some space before a large run")
        else:
            yield Check(f"disk ({name})", "ok", text)


def installed(name: str) -> str | None:
    """Version of a distribution, or None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
