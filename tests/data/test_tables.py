"""Tables: equal bytes for equal frames, and keys that are compared wherever tables meet."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from curate.data.files import digest_file
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition, save_partitions
from curate.data.tables import (
    damage_named,
    meet,
    read_examples,
    read_table,
    scan,
    table_columns,
    table_paths,
    write_table,
)
from curate.errors import CurateError, InputError


def frame(rows: list[int], file: str = "f", **columns: list[float]) -> pl.DataFrame:
    count = len(rows)
    return pl.DataFrame({"source": ["s"] * count, "file": [file] * count, "row": rows, **columns})


def part(ordinal: int) -> Partition:
    return Partition(name=f"part-x-{ordinal:05d}", source="s", file="f", address="f.parquet",
                     first_row=ordinal, num_rows=1, stamp="")  # fmt: skip


def test_tables_with_the_same_keys_meet_and_others_are_refused_by_key() -> None:
    meet(frame([1, 2, 5]), frame([1, 2, 5], el2n=[0.0, 0.0, 0.0]))
    with pytest.raises(
        CurateError, match=r"differ at row 1: \('s', 'f', 2\) against \('s', 'f', 3"
    ):
        meet(frame([1, 2, 5]), frame([1, 3, 5]))
    with pytest.raises(CurateError, match="have 3 and 2 rows"):
        meet(frame([1, 2, 5]), frame([1, 2]))
    with pytest.raises(CurateError, match="'g'"):
        meet(frame([1]), frame([1], file="g"))


_WRITE = """
import sys, polars as pl
from pathlib import Path
from curate.data.tables import write_table
half = pl.DataFrame({"row": range(150_000), "t": [f"t{i}" for i in range(150_000)]})
write_table(pl.concat([half, half], rechunk=False), Path(sys.argv[1]))
"""


def test_the_bytes_of_a_table_depend_on_neither_chunks_nor_threads(tmp_path: Path) -> None:
    half = pl.DataFrame({"row": range(150_000), "t": [f"t{i}" for i in range(150_000)]})
    write_table(pl.concat([half, half], rechunk=True), tmp_path / "whole")
    environment = {"POLARS_MAX_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", _WRITE, tmp_path / "chunks"]
    subprocess.run(command, check=True, env=environment)
    assert digest_file(tmp_path / "whole") == digest_file(tmp_path / "chunks")


def test_scan_reads_partitions_in_canonical_order_and_refuses_gaps(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    parts = [part(2), part(0), part(1)]  # canonical is as listed, not as sorted by name
    save_partitions(tmp_path / "examples" / "partitions.json", parts)
    for at, entry in enumerate(parts):
        with pytest.raises(InputError, match="tables are missing"):
            scan(run, "examples")
        write_table(frame([at]), run.examples(entry).path)
    assert scan(run, "examples").collect()["row"].to_list() == [0, 1, 2]
    assert read_examples(run, parts[1], ["row"]).columns == ["row"]


def test_a_partition_that_is_not_indexed_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fix: run `curate index"):
        read_examples(RunFolder(tmp_path), part(0))
    with pytest.raises(InputError, match="is not complete"):
        scan(RunFolder(tmp_path), "examples")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("keep", [0, 40])
def test_a_damaged_table_is_named_with_what_to_do(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "part-a.parquet"
    write_table(pl.DataFrame({"row": [1, 2, 3]}), path)
    path.write_bytes(path.read_bytes()[:keep])
    for read in (read_table, table_columns):
        with pytest.raises(InputError, match=r"part-a\.parquet is missing or damaged.*\n.*remove"):
            read(path)


def test_the_command_that_makes_a_damaged_table_anew_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    for folder, command in (("scores/el2n", "score"), ("plan", "plan"), ("quarantine", "index")):
        path = tmp_path / folder / "part-a.parquet"
        with pytest.raises(InputError, match=f"run `curate {command} {tmp_path}` again"):
            read_table(path)


def test_no_flipped_byte_of_a_finished_table_goes_unnoticed(tmp_path: Path) -> None:
    """Without the mark's digest a third of them read as other numbers."""
    output = Output(tmp_path / "part-a.parquet")
    table = frame([1, 2, 3], el2n=[0.1, 0.2, 0.3])
    output.write(lambda path: write_table(table, path), "made from")
    assert read_table(output.path).equals(table)
    size = output.path.stat().st_size
    for at in range(0, size, 41):
        flip(output.path, at)
        with pytest.raises(InputError, match=r"part-a\.parquet is missing or damaged"):
            read_table(output.path, ["el2n"])
        flip(output.path, at)
    assert read_table(output.path).equals(table)


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_table_among_many_is_named(tmp_path: Path, damaged: int) -> None:
    run = RunFolder(tmp_path)
    parts = [part(0), part(1)]
    save_partitions(tmp_path / "examples" / "partitions.json", parts)
    for at, entry in enumerate(parts):
        write_table(frame([at]), run.examples(entry).path)
    path = run.examples(parts[damaged]).path
    path.write_bytes(path.read_bytes()[:-20])
    with (
        pytest.raises(InputError, match=rf"{path.name} is missing or damaged"),
        damage_named(table_paths(run, "examples")),
    ):
        scan(run, "examples").collect()
