"""Reading rows again: original types and metadata, only the rows asked for, bounded memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.data.example import Source
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import payload_schema, read_fields, read_rows
from curate.data.tables import read_examples
from curate.errors import InputError
from jobs.cluster import Cluster, open_pool
from jobs.index import index_run
from jobs.settings import parse_settings


def index(run: Path, rows: int = 100, /, **sources: dict[str, Any]) -> RunFolder:
    settings = parse_settings(
        {
            "run": str(run),
            "sources": sources,
            "index": {"partition_rows": rows, "max_bad_rows": 1.0},
        }
    )
    with open_pool(Cluster()) as pool:
        index_run(settings, pool=pool)
    return RunFolder(run)


def rich_table(rows: int) -> pa.Table:
    """Images, nested lists, dictionaries, and the metadata that `datasets` keeps."""
    kind = [f"k{i % 3}" for i in range(rows)]
    table = pa.table(
        {
            "text": [f"text {i}" for i in range(rows)],
            "image": pa.array([{"bytes": bytes([i % 256]), "path": None} for i in range(rows)]),
            "nested": [[{"a": i, "b": [str(i)] * (i % 3)}] for i in range(rows)],
            "kind": pa.array(kind).dictionary_encode(),
            "small": pa.array(range(rows), pa.int16()),
            "when": pa.array(range(rows), pa.timestamp("us", tz="UTC")),
        }
    )
    features = {"image": {"_type": "Image"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return table.replace_schema_metadata(metadata)


@pytest.mark.parametrize("group", [30, 100, 1000], ids=["joined", "equal", "cut"])
def test_all_types_and_metadata_survive_in_any_order(tmp_path: Path, group: int) -> None:
    table = rich_table(1000)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group)
    run = index(tmp_path / "run", s={"path": f"{tmp_path}/a.parquet"})
    parts = run.partitions()
    assert [part.num_rows for part in parts] == ([90] * 10 + [100] if group == 30 else [100] * 10)
    whole = pa.concat_tables([read_rows(run, part, None) for part in parts])
    plain = pq.read_table(tmp_path / "a.parquet")
    assert whole.schema.equals(plain.schema, check_metadata=True)
    assert whole.to_pylist() == table.to_pylist()
    part = parts[5]
    generator = np.random.default_rng(0)
    for _ in range(20):
        wanted = generator.integers(part.first_row, part.first_row + part.num_rows, 7)
        got = read_rows(run, part, ["when", "nested", "kind"], wanted)
        assert got.to_pylist() == table.select(["when", "nested", "kind"]).take(wanted).to_pylist()
    nothing = read_rows(run, part, ["text", "kind"], np.array([], np.int64))
    assert nothing.num_rows == 0
    assert nothing.schema.field("kind").type == table.schema.field("kind").type


def test_only_the_row_groups_of_the_wanted_rows_are_read(tmp_path: Path) -> None:
    pq.write_table(rich_table(1000), tmp_path / "a.parquet", row_group_size=10)
    run = index(tmp_path / "run", s={"path": f"{tmp_path}/a.parquet"})
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    # Overwrite all data but the row group of row 25: whoever reads more notices.
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    with (tmp_path / "a.parquet").open("r+b") as file:
        for at in range(metadata.num_row_groups):
            if at != 2:
                chunk = metadata.row_group(at).column(0)
                file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
                file.write(b"\xff" * chunk.total_compressed_size)
    part = refreshed(run.partitions()[0])
    assert read_rows(run, part, ["text"], np.array([25])).to_pylist() == [{"text": "text 25"}]
    with pytest.raises(InputError, match=r"a\.parquet is damaged"):
        read_rows(run, part, ["text"], np.array([35]))
    # The damage of one read does not stick to the next.
    assert read_rows(run, part, ["text"], np.array([25])).num_rows == 1


def refreshed(part: Partition) -> Partition:
    status = Path(part.address).stat()
    return replace(part, stamp=f"{status.st_size}-{status.st_mtime_ns}")


def test_a_file_that_changed_after_the_index_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(rich_table(10), path)
    run = index(tmp_path / "run", s={"path": str(path)})
    (part,) = run.partitions()
    assert read_rows(run, part, ["text"]).num_rows == 10
    os.utime(path, ns=(5, 5))
    with pytest.raises(InputError, match=r"has changed since.*\n.*curate index"):
        read_rows(run, part, ["text"])
    path.unlink()
    with pytest.raises(InputError, match="there is no"):
        read_rows(run, part, ["text"])


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    pq.write_table(rich_table(10), tmp_path / "a.parquet")
    run = index(tmp_path / "run", s={"path": f"{tmp_path}/a.parquet"})
    with pytest.raises(InputError, match=r"s/a\.parquet has no column 'imag'.*\n.*mean image\?"):
        read_rows(run, run.partitions()[0], ["imag"])


def test_fields_follow_the_examples_row_by_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}],
         "label": i % 2} for i in range(6)
    ]  # fmt: skip
    rows[2]["messages"] = []
    lines = [json.dumps(row) for row in rows]
    lines[4] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    run = index(tmp_path / "run", s={"path": f"{tmp_path}/a.jsonl"})
    (part,) = run.partitions()
    source = Source(path="", messages="messages")
    fields = read_fields(run, part, source)
    assert read_examples(run, part)["row"].to_list() == [0, 1, 3, 5]
    assert fields.schema == {
        "messages": pl.List(pl.Struct({"role": pl.String, "content": pl.String})),
        "label": pl.Int64,
    }
    assert fields["label"].to_list() == [0, 1, 1, 1]
    assert fields["messages"].to_list()[2] == [
        {"role": "user", "content": "q3"}, {"role": "assistant", "content": "a3"}
    ]  # fmt: skip
    payload = read_rows(run, part, None)
    assert payload.column_names == ["messages", "label"]
    assert payload.num_rows == 6


def test_features_and_pairs_are_fields_too(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"x": [[1, 2], None, [3, 4]], "p": ["a", "b", "c"], "r": ["d", "e", "f"]}),
        tmp_path / "a.parquet",
    )
    place = f"{tmp_path}/a.parquet"
    run = index(tmp_path / "one", s={"path": place, "features": "x"})
    fields = read_fields(run, run.partitions()[0], Source(path=place, features="x"))
    assert fields["features"].dtype == pl.Array(pl.Float32, 2)
    assert fields["features"].to_numpy().tolist() == [[1, 2], [3, 4]]
    run = index(tmp_path / "two", s={"path": place, "prompt": "p", "response": "r"})
    fields = read_fields(run, run.partitions()[0], Source(path=place, prompt="p", response="r"))
    assert fields.columns == ["prompt", "response", "label"]
    assert fields["response"].to_list() == ["d", "e", "f"]


def test_invalid_utf8_elsewhere_in_the_file_does_not_stop_the_fields(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"too"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(BaseException, match=r"(?i)utf"):  # why it is read as binary first
        pl.read_parquet(tmp_path / "a.parquet")
    run = index(tmp_path / "run", s={"path": f"{tmp_path}/a.parquet"})
    fields = read_fields(run, run.partitions()[0], Source(path="", text="text"))
    assert fields["text"].to_list() == ["good", "too"]


# -- the schema of the payload --------------------------------------------------------------------


def test_the_payload_schema_is_the_union_of_all_files(tmp_path: Path) -> None:
    def metadata(name: str) -> dict[bytes, bytes]:
        features = {"info": {"features": {name: {"_type": "Image"}}}}
        return {b"huggingface": json.dumps(features).encode(), b"x": name.encode()}

    first = pa.schema([pa.field("text", pa.string(), nullable=False), ("n", pa.int32()),
                       ("a", pa.null())])  # fmt: skip
    second = pa.schema([("text", pa.large_string()), ("n", pa.int64()), ("a", pa.float32()),
                        ("b", pa.list_(pa.int8()))])  # fmt: skip
    for name, kind in (("one", first), ("two", second)):
        row = {"text": "t", "n": 1, "a": None, "b": None}
        rows = [{key: row[key] for key in kind.names}]
        table = pa.Table.from_pylist(rows, kind).replace_schema_metadata(metadata(name))
        pq.write_table(table, tmp_path / f"{name}.parquet")
    run = index(tmp_path / "run", s={"path": f"{tmp_path}/*.parquet"})
    union = payload_schema(run, run.partitions())
    assert union.equals(
        pa.schema([("text", pa.large_string()), ("n", pa.int64()), ("a", pa.float32()),
                   ("b", pa.list_(pa.int8()))])
    )  # fmt: skip
    merged = json.loads(union.metadata[b"huggingface"])
    assert set(merged["info"]["features"]) == {"one", "two"}
    assert b"x" not in union.metadata


def test_types_with_nothing_in_common_name_the_column_and_both_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "meta": [{"a": 1}]}), tmp_path / "one.parquet")
    pq.write_table(pa.table({"text": ["a"], "meta": ["x"]}), tmp_path / "two.parquet")
    run = index(tmp_path / "run", s={"path": f"{tmp_path}/*.parquet"})
    with pytest.raises(InputError, match=r"'meta'.*s/one\.parquet.*s/two\.parquet"):
        payload_schema(run, run.partitions())


# -- stores and memory ----------------------------------------------------------------------------


def test_rows_in_a_store_are_read_and_changes_noticed(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    pq.write_table(rich_table(50), tmp_path / "a.parquet", row_group_size=20)
    data = (tmp_path / "a.parquet").read_bytes()
    try:
        system.pipe("/reading/a.parquet", data)
        run = index(tmp_path / "run", s={"path": "memory://reading/a.parquet"})
        (part,) = run.partitions()
        assert read_rows(run, part, ["text"], np.array([49, 3])).column("text").to_pylist() == [
            "text 49", "text 3"
        ]  # fmt: skip
        system.pipe("/reading/a.parquet", data)
        other = replace(part, stamp="stale")
        with pytest.raises(InputError, match="has changed"):
            read_rows(run, other, ["text"])
    finally:
        system.rm("/reading", recursive=True)


_MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import read_rows
from curate.data.storage import local_stamp
path = Path(sys.argv[1])
run = RunFolder(path.parent)
parts = [
    Partition(name=str(at), source="s", file="f", address=str(path), first_row=at,
              num_rows=5_000, stamp=local_stamp(path))
    for at in range(0, 200_000, 5_000)
]
read_rows(run, parts[0], None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(read_rows(run, part, None).num_rows for part in parts)
assert total == 200_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_row_group_of_two_hundred_megabytes_is_never_whole_in_memory(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, 200 << 20, np.uint8).tobytes()
    values = pa.Array.from_buffers(pa.binary(1 << 10), 200 << 10, [None, pa.py_buffer(noise)])
    table = pa.table({"x": values}).slice(0, 200_000)
    path = tmp_path / "big.parquet"
    pq.write_table(table, path, row_group_size=200_000, use_dictionary=False, compression="none")
    assert pq.ParquetFile(path).num_row_groups == 1
    command = [sys.executable, "-c", _MEASURE, path]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 40_000  # kilobytes above the first partition
