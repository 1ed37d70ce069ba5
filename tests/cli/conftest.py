"""Runs commands in this process, as the console script would."""

import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from curate.cli import main


@dataclass(frozen=True)
class Result:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


Curate = Callable[..., Result]


@pytest.fixture
def curate(capsys: pytest.CaptureFixture[str]) -> Generator[Curate]:
    """`curate("index", path)` -> code, stdout, stderr."""
    signals = {number: signal.getsignal(number) for number in
               (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}  # fmt: skip

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    yield run
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small table of texts with classes."""
    path = tmp_path / "data.parquet"
    count = 40
    texts = [f"text number {i} says {'yes' if i % 2 else 'no'}" for i in range(count)]
    frame = pl.DataFrame({"text": texts, "label": [i % 2 for i in range(count)]})
    frame.write_parquet(path)
    return path


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Callable[..., Path]:
    """Writes settings that need no model; keywords replace sections."""

    def write(name: str = "config.yaml", **sections: Any) -> Path:
        from curate.config import to_yaml

        values: dict[str, Any] = {
            "run": str(tmp_path / "run"),
            "sources": {"a": {"path": str(data), "text": "text"}},
            "score": {"scorers": ["random"]},
            "plan": {"score": "random", "keep": 0.5},
        }
        path = tmp_path / name
        path.write_text(to_yaml({**values, **sections}))
        return path

    return write
