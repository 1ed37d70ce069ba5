"""Tables: equal bytes for equal frames, and keys that are compared wherever tables meet."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from curate.data.files import digest_file
from curate.data.layout import RunFolder
from curate.data.partitions import Partition, save_partitions
from curate.data.tables import meet, read_examples, read_table, scan, write_table
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


@pytest.mark.parametrize("keep", [0, 40])
def test_a_damaged_table_is_named_with_what_to_do(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "part-a.parquet"
    write_table(pl.DataFrame({"row": [1, 2, 3]}), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"part-a\.parquet is missing or damaged.*\n.*remove"):
        read_table(path)
