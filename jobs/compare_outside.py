"""Arms that somebody else trains: a command of the user's, or numbers in a CSV file."""

import json
import math
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from curate.data.layout import RunFolder
from curate.errors import CurateError, InputError
from jobs.compare_arms import result_output
from jobs.compare_settings import filled

VERSION = 1

REPORTED = "reported"
"""Part under which stand the numbers that a command or a CSV gives."""

_MOST = 1e100
"""Beyond it a number is none that a spread can be taken of."""
_MOST_SEED = 2**63

_COLUMNS = {"arm": pl.String, "seed": pl.Int64, "metric": pl.String, "value": pl.Float64}


@dataclass(frozen=True, slots=True)
class Result:
    """One number of one arm with one seed."""

    arm: str
    seed: int
    metric: str
    value: float
    """Not a number where the run diverged."""


def run_command(payload: dict[str, Any]) -> dict[str, Any]:
    """Run a command of the user's for one arm and seed, and write down what it printed.

    Raises:
        CurateError: it failed, or its last line is no JSON object of numbers.
    """
    started = time.monotonic()
    words = filled(payload["command"], payload["values"])
    name = f"arm {payload['values']['arm']}, seed {payload['values']['seed']}"
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CurateError(
            f"{name}: {words[0]} cannot be started: {error.strerror or error}",
            fix="name a program that is on PATH, such as python",
        ) from error
    if done.returncode:
        raise CurateError(
            f"{name}: the command ended with code {done.returncode}: {_tail(done.stderr)}",
            fix="run it by hand: " + shlex.join(words),
        )
    metrics = _metrics(done.stdout, name)
    measured = [
        {"part": REPORTED, "metric": metric, "value": value, "num_examples": 0}
        for metric, value in metrics.items()
    ]
    value: dict[str, Any] = {
        "schema_version": 1,
        "seed": payload["seed"],
        "steps": None,
        "tokens": None,
        "parameters": None,
        "epochs": None,
        "diverged": None,
        "points": [{"step": None, "tokens": None, "measured": measured}],
    }
    seconds = round(time.monotonic() - started, 3)
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    result_output(RunFolder(Path(payload["run"])), payload["key"]).write(
        lambda path: path.write_text(text, encoding="utf-8"),
        payload["fingerprint"],
        seconds=seconds,
    )
    return {"seconds": seconds}


def read_results(path: Path) -> list[Result]:
    """The numbers in a CSV file with the columns arm, seed, metric, value.

    Raises:
        InputError: the file is missing, lacks a column, has something else than numbers where they
            belong, or says a thing twice; names the line.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}", fix="check the path")
    try:
        table = pl.read_csv(path, infer_schema=False)
        table.columns = [column.strip() for column in table.columns]
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path} cannot be read: {error}", fix="write it as CSV") from error
    for column in _COLUMNS:
        if column not in table.columns:
            raise InputError(
                f"{path} has no column {column}",
                fix="give it the columns arm, seed, metric, value",
            )
    found: list[Result] = []
    seen: dict[tuple[str, int, str], int] = {}
    for line, row in enumerate(table.select(*_COLUMNS).iter_rows(), start=2):
        if not any(row):  # an empty line, such as the last one
            continue
        result = _result(row, f"{path}, line {line}")
        key = (result.arm, result.seed, result.metric)
        if key in seen:
            raise InputError(
                f"{path}, line {line} says again what line {seen[key]} says of {result.arm},"
                f" seed {result.seed}, {result.metric}",
                fix="keep one of them",
            )
        seen[key] = line
        found.append(result)
    return found


def known(number: float) -> float | None:
    """The number, or None where the run diverged: it is not finite, or beyond all measure."""
    return number if abs(number) < _MOST else None


def _result(row: tuple[Any, ...], where: str) -> Result:
    arm, seed, metric, value = ("" if cell is None else str(cell).strip() for cell in row)
    if not arm or not metric:
        raise InputError(f"{where} names no arm or no metric", fix="fill in every column")
    try:
        # An empty value is a run that gave none.
        result = Result(arm, int(seed), metric, float(value) if value else math.nan)
    except ValueError as error:
        raise InputError(
            f"{where}: seed {seed!r} or value {value!r} is no number", fix="correct the line"
        ) from error
    if abs(result.seed) >= _MOST_SEED:
        raise InputError(f"{where}: seed {seed!r} has too many digits", fix="use a smaller seed")
    return result


def _metrics(printed: str, name: str) -> dict[str, float | None]:
    """The numbers of the last line that is not empty; null for one that is not finite."""
    lines = [line for line in printed.splitlines() if line.strip()]
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        value = None
    if not isinstance(value, dict) or not value:
        raise CurateError(
            f"{name}: the last line of the command is no JSON object: {_tail(printed)}",
            fix='print one at the end, such as {"accuracy": 0.91}',
        )
    found: dict[str, float | None] = {}
    for metric, number in value.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise CurateError(
                f"{name}: metric {metric} is {number!r}, not a number", fix="print numbers only"
            )
        found[str(metric)] = None if number is None else known(number)
    return found


def _tail(text: str) -> str:
    """The last words of a program, on one line."""
    words = " ".join(text.split())
    return f"... {words[-300:]}" if len(words) > 300 else words or "it printed nothing"
