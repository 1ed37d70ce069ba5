"""Values that formats could lose or change, and memory that must not show in the bytes."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from data.shards_by_hand import finished, write_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.data.shard_formats import open_format
from curate.data.shard_formats.cells import byte_cells
from curate.data.shard_formats.json_text import json_cells, json_lines
from curate.data.shard_formats.mds import Mds
from curate.data.shard_formats.sink import Context
from curate.data.shard_settings import Shards
from curate.errors import CurateError

words = st.text(st.characters(codec="utf-8"), max_size=8)
records = st.fixed_dictionaries(
    {
        "word": st.none() | words,
        "number": st.none() | st.integers(-(2**63), 2**63 - 1),
        "share": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "raw": st.none() | st.binary(max_size=5),
        "list": st.none() | st.lists(st.none() | words, max_size=3),
        "deep": st.none()
        | st.fixed_dictionaries({"b": st.none() | st.lists(st.none() | st.binary(max_size=3))}),
    }
)
KINDS = pa.schema(
    [
        ("word", pa.string()),
        ("number", pa.int64()),
        ("share", pa.float64()),
        ("raw", pa.binary()),
        ("list", pa.list_(pa.string())),
        ("deep", pa.struct([("b", pa.list_(pa.binary()))])),
    ]
)


def encoded(value: Any) -> Any:
    """Bytes as base64, wherever they are."""
    if isinstance(value, dict):
        return {name: encoded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [encoded(part) for part in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


@settings(max_examples=60, deadline=None)
@given(st.lists(records, min_size=1, max_size=6), st.integers(0, 3))
def test_json_of_any_rows_is_what_python_says(rows: list[dict[str, Any]], first: int):
    table = pa.Table.from_pylist(rows, schema=KINDS).slice(first)
    assert [json.loads(line) for line in json_lines(table)] == encoded(rows[first:])
    for name in KINDS.names:
        cells = json_cells(table.column(name).combine_chunks())
        assert [json.loads(cell) for cell in cells] == [encoded(row[name]) for row in rows[first:]]


def test_json_has_null_for_what_is_no_number_and_texts_for_what_it_does_not_know():
    table = pa.table(
        {
            "x": pa.array([math.nan, math.inf, 1.5], pa.float32()),
            "half": pa.array([0.5, 2.0, None], pa.float16()),
            "large": pa.array([2**64 - 1, 0, None], pa.uint64()),
            "took": pa.array([1_500_000, None, 0], pa.duration("us")),
            "map": pa.array([[("k", b"\xff")], None, []], pa.map_(pa.string(), pa.binary())),
            "keys": pa.array([["a"], None, ["b"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        }
    )
    rows = [json.loads(line) for line in json_lines(table)]
    assert [row["x"] for row in rows] == [None, None, 1.5]
    assert [row["half"] for row in rows] == [0.5, 2.0, None]
    assert [row["large"] for row in rows] == [2**64 - 1, 0, None]
    assert [row["took"] for row in rows] == ["PT1.5S", None, "P0D"]
    assert [row["map"] for row in rows] == [[{"key": "k", "value": "/w=="}], None, []]
    assert [row["keys"] for row in rows] == [["a"], None, ["b"]]


def test_what_lies_under_a_null_does_not_show_in_arrow_files(tmp_path: Path):
    def table(hidden: int) -> pa.Table:
        """Equal values; memory that differs where they are null, and one that was cut."""
        missing = np.array([False, True, False, True])
        valid = pa.py_buffer(np.packbits(~missing, bitorder="little").tobytes())
        numbers = pa.py_buffer(np.array([1, hidden, 3, hidden], np.int64))
        number = pa.Array.from_buffers(pa.int64(), 4, [valid, numbers])
        inner = pa.array([1, hidden, 3, hidden], pa.int64())
        struct = pa.StructArray.from_arrays([inner], ["a"], mask=pa.array(missing))
        listed = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), struct)
        text = pa.array(["x" * hidden, "a", "b", "c", "d"]).slice(1)
        columns = {"number": number, "struct": struct, "listed": listed, "text": text}
        return finished(pa.table(columns))

    assert table(5).equals(table(9))
    (one,) = write_by_hand("arrow", tmp_path / "one", table(5), row_groups=1)
    (two,) = write_by_hand("arrow", tmp_path / "two", table(9), row_groups=1)
    assert one.read_bytes() == two.read_bytes()


def test_dictionaries_and_maps_become_what_datasets_knows(tmp_path: Path):
    keyed = pa.dictionary(pa.int8(), pa.string())
    table = pa.table(
        {
            "kind": pa.array(["a", None, "b"], keyed),
            "kinds": pa.array([["a"], None, []], pa.list_(keyed)),
            "part": pa.array([{"k": "a"}, None, {"k": None}], pa.struct([("k", keyed)])),
            "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        }
    )
    write_by_hand("arrow", tmp_path, finished(table))
    loaded = datasets.load_from_disk(str(tmp_path / "arrow" / "web"))
    assert isinstance(loaded, datasets.Dataset)
    assert loaded["kind"][:] == ["a", None, "b"]
    assert loaded["kinds"][:] == [["a"], None, []]
    assert loaded["part"][:] == [{"k": "a"}, None, {"k": None}]
    assert loaded["map"][:] == [[{"key": "k", "value": 1}], None, []]


def test_a_folder_of_two_schemas_gets_no_documents_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
):
    receipts = [
        {"file": f"arrow/web/data-0000{at}-of-00002.arrow", "facts": {"schema_digest": f"{at}"}}
        for at in range(2)
    ]
    assert open_format("arrow").documents(receipts) == {}
    assert "arrow/web" in caplog.text


def test_the_level_of_json_lines_is_that_of_the_settings(tmp_path: Path):
    table = finished(pa.table({"text": [f"{row**7} {row**9}" for row in range(1000)]}))
    found: dict[str, bytes] = {}
    for name, chosen in {
        "default": Shards(format="jsonl"),
        "three": Shards(format="jsonl", compression_level=3),
        "most": Shards(format="jsonl", compression_level=19),
        "of gzip": Shards(format="jsonl", compression="gzip", compression_level=9),
    }.items():
        (path,) = write_by_hand("jsonl", tmp_path / name, table, settings=chosen)
        found[name] = path.read_bytes()
    assert found["default"] == found["three"] == found["of gzip"]
    assert len(found["most"]) < len(found["three"])
    assert zstandard.get_frame_parameters(found["most"]).has_checksum


def test_json_lines_are_one_frame_which_readers_do_not_stop_within(tmp_path: Path):
    table = finished(pa.table({"text": ["a", "b", "c", "d"]}))
    (path,) = write_by_hand("jsonl", tmp_path, table, row_groups=4)
    frame = zstandard.ZstdDecompressor().decompressobj()
    assert frame.decompress(path.read_bytes()).count(b"\n") == 4
    assert frame.eof
    assert frame.unused_data == b""


def test_a_shard_too_large_for_mosaic_s_offsets_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("curate.data.shard_formats.mds._LARGEST", 1000)
    table = finished(pa.table({"text": ["x" * 400] * 3}))
    with pytest.raises(CurateError, match=r"larger than the format mds allows.*") as caught:
        write_by_hand("mds", tmp_path, table)
    assert "size_mb" in str(caught.value.fix)


def test_a_long_list_of_numbers_has_a_length_of_more_than_one_byte(tmp_path: Path):
    lists = [list(range(length)) for length in (0, 1, 255, 256, 70_000)]
    table = finished(pa.table({"ids": pa.array(lists, pa.list_(pa.uint32()))}))
    (path,) = write_by_hand("mds", tmp_path, table, row_groups=1)
    data = path.read_bytes()
    first = json.loads((path.parent / "index.json").read_text())["shards"][0]
    assert dict(zip(first["column_names"], first["column_encodings"], strict=True))["ids"] == (
        "ndarray:uint32"
    )
    for values in lists:
        length = len(values)
        size = 1 if length < 2**8 else 2 if length < 2**16 else 4
        code = {1: 0, 2: 1, 4: 2}[size]
        cell = bytes([4 + code]) + length.to_bytes(size, "little")
        assert data.count(cell + np.array(values, "<u4").tobytes()) >= 1


def test_a_null_in_one_shard_leaves_the_encoding_of_others(tmp_path: Path):
    stars = pa.array([1, 2, None, 4], pa.int32())
    tags = pa.array([[1], [2], [3], [None]], pa.list_(pa.int8()))
    table = finished(pa.table({"stars": stars, "tags": tags}))
    (path, _) = write_by_hand("mds", tmp_path, table, shards=2, row_groups=1)
    shards = json.loads((path.parent / "index.json").read_text())["shards"]
    found = [dict(zip(s["column_names"], s["column_encodings"], strict=True)) for s in shards]
    assert [encodings["stars"] for encodings in found] == ["int32", "json"]
    assert [encodings["tags"] for encodings in found] == ["ndarray:int8", "json"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_cells_of_a_slice_are_those_of_its_rows(kind: pa.DataType):
    array = pa.array(["a", "bcd", None, "é", ""], kind)
    wanted = [b"a", b"bcd", b"", "é".encode(), b""]
    assert byte_cells(array) == wanted
    assert byte_cells(array.slice(1, 3)) == wanted[1:4]
    assert byte_cells(array.slice(5)) == []
    assert byte_cells(array.slice(1).dictionary_encode()) == wanted[1:]


def test_rows_of_mds_wait_on_disk_without_a_name(tmp_path: Path):
    table = finished(pa.table({"text": ["a" * 1000] * 50}))
    path = tmp_path / ".shard.00000.mds.1.tmp"
    sink = Mds().open([path], table.schema, Context(Shards(), {}, None))
    sink.write(table)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size == 0
    sink.close()
    assert Mds().count_rows([path]) == 50
