"""Damaged files of a run folder: one message that names the file, never a traceback."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

Curate = Callable[..., Any]
"""Runs a command: code, out, err."""
Config = Callable[..., Path]
"""Writes settings."""

TABLES = ("examples", "quarantine", "scores/random", "plan")


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x55
    path.write_bytes(bytes(content))


@pytest.fixture
def done(curate: Curate, config: Config, data: Path, tmp_path: Path) -> Path:
    """A finished run without a model, one of whose rows was set aside."""
    frame = pl.read_parquet(data)
    pl.concat([frame, pl.DataFrame({"text": [None], "label": [0]})]).write_parquet(data)
    path = config(index={"max_bad_rows": 0.5}, mix={"mixer": "unimax"})
    assert curate("run", path, "-q").code == 0
    return tmp_path / "run"


def commands(run: Path) -> list[tuple[Any, ...]]:
    """Those that look, then those that work."""
    return [
        ("status", run),
        ("show", run),
        ("show", run, "--quarantine"),
        ("write", run, "--dry-run", "--measure"),
        ("plan", run),
        ("run", run),
    ]


@pytest.mark.parametrize("damage", [tear, empty, flip])
@pytest.mark.parametrize("folder", TABLES)
def test_a_damaged_table_is_named_or_made_anew(
    curate: Curate, done: Path, folder: str, damage: Callable[[Path], None]
):
    (table,) = (done / folder).glob("part-*.parquet")
    good = table.read_bytes()
    damage(table)
    codes: dict[str, int] = {}
    for command in commands(done):
        result = curate(*command)
        codes[" ".join(command[:1] + command[2:])] = result.code
        assert "Traceback" not in result.err, command
        if result.code:
            assert result.code == 3
            assert f"{table} is missing or damaged" in result.err
            assert "remove what is left of it and run `curate" in result.err
    if folder == "quarantine":
        assert codes["status"] == codes["show"] == codes["show --quarantine"] == 3
    if damage is not flip and folder != "quarantine":
        assert codes["run"] == 0
    table.unlink()
    assert curate("run", done, "-q").code == 0
    assert table.read_bytes() == good


JSON = ("manifest.json", "examples/partitions.json", "plan/summary.json", "plan/thresholds.json",
        "mixtures/unimax/mixture.json", "shards/manifest.json", "failures.json")  # fmt: skip


@pytest.mark.parametrize("content", ["[]", "{}", '{"stages": [], "partitions": [{"name": 1}]}', ""])
@pytest.mark.parametrize("file", JSON)
def test_a_json_file_of_another_shape_is_named_or_made_anew(
    curate: Curate, done: Path, file: str, content: str
):
    path = done / file
    path.write_text(content)
    for command in commands(done):
        result = curate(*command)
        assert "Traceback" not in result.err, command
        if result.code:
            assert result.code == 3
            assert str(path) in result.err
            assert re.search(r"\n  fix: .*remove", result.err)


def test_a_mark_of_another_shape_is_as_good_as_none(curate: Curate, done: Path):
    shards = {p: p.read_bytes() for p in (done / "shards").rglob("*.parquet")}
    for mark in done.rglob(".done/*.json"):
        mark.write_text('{"rows": 1}')
    assert curate("status", done).code == 0
    assert curate("run", done, "-q").code == 0
    assert {p: p.read_bytes() for p in (done / "shards").rglob("*.parquet")} == shards
