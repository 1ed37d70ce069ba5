"""The help of every command, and how quickly it comes."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from curate import __version__

Curate = Callable[..., Any]
"""Runs a command: code, out, err."""

STAGES = ("index", "train", "score", "mix", "plan", "write", "run")
COMMANDS = (*STAGES, "init", "status", "show", "verify", "diff", "methods", "doctor", "schema")
HEAVY = ("torch", "polars", "pyarrow", "transformers", "datasets", "distributed", "dask",
         "pydantic", "yaml", "numpy", "rich")  # fmt: skip


def test_help_lists_every_command(curate: Curate):
    result = curate("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(curate: Curate, command: str):
    result = curate(command, "--help")
    assert result.code == 0
    assert result.out.startswith(f"Usage: curate {command}")
    assert result.err == ""


@pytest.mark.parametrize("command", STAGES)
def test_every_stage_has_the_common_options(curate: Curate, command: str):
    out = curate(command, "--help").out
    for option in ("--config", "--set", "--out", "--json", "--events", "--quiet", "--verbose",
                   "--dry-run", "--measure", "--workers", "--device"):  # fmt: skip
        assert f"{option} " in out


def test_help_loads_no_heavy_library():
    code = (
        "import sys, json\n"
        "from curate.cli import main\n"
        "main(['--help'])\n"
        "print('\\n' + json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(out.stdout.splitlines()[-1]))
    assert "typer" in loaded
    assert not loaded.intersection(HEAVY)


def test_help_answers_at_once():
    """The best of three: the machine may be busy with other things."""
    walls: list[float] = []
    processors: list[float] = []
    for _ in range(3):
        before, started = _children_seconds(), time.perf_counter()
        subprocess.run([sys.executable, "-m", "curate", "--help"], capture_output=True, check=True)
        walls.append(time.perf_counter() - started)
        processors.append(_children_seconds() - before)
    assert min(walls) < 0.5
    if "COV_CORE_SOURCE" not in os.environ:
        assert min(processors) < 0.15


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_version_is_printed(curate: Curate):
    assert curate("--version").out == f"curate {__version__}\n"


def test_an_unknown_option_is_a_usage_error(curate: Curate):
    result = curate("index", "x.yaml", "--nonsense")
    assert result.code == 2
    assert "--nonsense" in result.err
    assert result.out == ""


def test_no_command_is_a_usage_error_with_the_help(curate: Curate):
    result = curate()
    assert (result.code, result.out) == (2, "")
    assert "Commands:" in result.err
