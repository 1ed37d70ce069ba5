"""Runs scripts in the environment of Mosaic Streaming, which `make mosaic` builds."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]
PYTHON = _ROOT / ".venv-mosaic" / "bin" / "python"

needs_mosaic = pytest.mark.skipif(
    not (_ROOT / ".venv-mosaic" / ".installed").exists(),
    reason="`make mosaic` has not put Mosaic Streaming into .venv-mosaic",
)


def start(script: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """A script under way, with more environment variables."""
    stub = str(Path(__file__).parent / "stub")
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": stub} | variables
    return subprocess.Popen(
        [str(PYTHON), str(script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> Any:
    """The JSON value on the last line that a script prints."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])
