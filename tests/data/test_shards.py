"""The writer: original columns and types, the order of copies, and bytes that depend on nothing
but the plan."""

import datetime as dt
import decimal
import io
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.planned_run import TOKENIZER, Row, planned_run
from PIL import Image

from curate.data.choice import IntArray
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.shard_columns import ADDED, shard_schema
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Group
from curate.data.shard_settings import Shards
from curate.data.shard_survey import survey
from curate.data.shard_writer import ComponentWriter
from curate.data.shards import write_group


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), shade).save(buffer, "PNG")
    return buffer.getvalue()


def every_type(rows: int) -> pa.Table:
    """A table with the column types that data sets have, nulls in most of them."""
    instant = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns = {
        "image": pa.array(
            [{"bytes": png(i % 256), "path": None} if i % 7 else None for i in range(rows)], image
        ),
        "label": pa.array([i % 3 for i in range(rows)], pa.int64()),
        "messages": pa.array(
            [[{"role": "user", "content": f"q{i}"}] * (i % 3) for i in range(rows)], pa.list_(turn)
        ),
        "features": pa.array([[i / 2, None, -i] for i in range(rows)], pa.list_(pa.float32())),
        "fixed": pa.array([[i, i + 1] for i in range(rows)], pa.list_(pa.int16(), 2)),
        "kind": pa.array([f"k{i % 5}" for i in range(rows)]).dictionary_encode(),
        "when": pa.array(
            [instant + dt.timedelta(seconds=i) for i in range(rows)], pa.timestamp("us", "UTC")
        ),
        "day": pa.array([dt.date(2026, 1, 1) + dt.timedelta(i) for i in range(rows)]),
        "price": pa.array([decimal.Decimal(i) / 100 for i in range(rows)], pa.decimal128(12, 2)),
        "long": pa.array([f"text {i}" for i in range(rows)], pa.large_string()),
        "raw": pa.array([bytes([0, 255, i % 256]) for i in range(rows)], pa.binary()),
        "flag": pa.array([None if i % 4 == 0 else i % 2 == 0 for i in range(rows)], pa.bool_()),
        "small": pa.array([i % 200 for i in range(rows)], pa.uint8()),
        "nested": pa.array(
            [{"a": [{"b": i}], "c": {"d": f"{i}"}} if i % 5 else None for i in range(rows)],
            pa.struct(
                [
                    ("a", pa.list_(pa.struct([("b", pa.int32())]))),
                    ("c", pa.struct([("d", pa.string())])),
                ]
            ),
        ),
        "empty": pa.nulls(rows, pa.string()),
    }
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog", "cow"], "_type": "ClassLabel"},
    }
    table = pa.table(columns)
    return table.replace_schema_metadata(
        {b"huggingface": json.dumps({"info": {"features": features}}).encode(), b"mine": b"kept"}
    )


def write_all(run: RunFolder, shards: Shards | None = None) -> list[Path]:
    """All shards of a planned run, without the stage around them."""
    shards = shards or Shards()
    found = survey(run, run.partitions(), shards, seed=0)
    for group in found.groups:
        schema = found.schemas[group.partitions[0].source]
        write_group(
            run,
            group,
            terms=found.terms,
            schema=schema,
            context=Context(shards, {}, None),
            tokenizer=None,
        )
    return sorted((run.root / "shards").rglob("*.parquet"))


def read_all(paths: list[Path]) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in paths])


def test_all_column_types_values_and_metadata_survive(tmp_path: Path):
    original = every_type(230)
    planned_run(
        tmp_path, {"a": {"x.parquet": original}}, lambda _s, _f, row: Row("a", copies=row % 2)
    )
    (path,) = write_all(RunFolder(tmp_path / "run"))
    # Not the memory table but the stored one: Parquet itself knows no dictionary of 32-bit keys.
    stored = pq.read_table(tmp_path / "data" / "a" / "x.parquet")
    written = pq.read_table(path)
    kept = stored.take(pa.array(range(1, 230, 2)))
    for name in stored.column_names:
        assert written.schema.field(name).type == stored.schema.field(name).type, name
        assert written.column(name).to_pylist() == kept.column(name).to_pylist(), name
    assert written.column_names == [*stored.column_names, *ADDED.names]
    assert written.schema.metadata[b"mine"] == b"kept"


def test_datasets_still_sees_images_and_class_names(tmp_path: Path):
    planned_run(tmp_path, {"a": {"x.parquet": every_type(20)}}, lambda _s, _f, _r: Row("a"))
    paths = write_all(RunFolder(tmp_path / "run"))
    features = datasets.Features.from_arrow_schema(pq.read_schema(paths[0]))
    assert isinstance(features["image"], datasets.Image)
    assert features["label"].names == ["cat", "dog", "cow"]
    stored = json.loads(pq.read_schema(paths[0]).metadata[b"huggingface"])["info"]["features"]
    assert {name: stored[name]["dtype"] for name in ADDED.names} == {
        "curate_source": "string",
        "curate_file": "string",
        "curate_row": "int64",
        "curate_weight": "float32",
        "curate_domain": "string",
    }


def test_copies_come_one_round_after_the_other(tmp_path: Path):
    table = pa.table({"n": range(30)})
    planned_run(tmp_path, {"a": {"x.parquet": table}}, lambda _s, _f, row: Row("a", copies=row % 3))
    written = read_all(write_all(RunFolder(tmp_path / "run"))).column("n").to_pylist()
    once = [n for n in range(30) if n % 3]
    twice = [n for n in range(30) if n % 3 == 2]
    assert written == once + twice


def test_large_rows_are_handled_in_pieces_and_copies_follow_their_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = pa.table({"n": range(40), "text": [f"{i}" * 5000 for i in range(40)]})
    monkeypatch.setattr("curate.data.shard_layout._PIECE_BYTES", 100_000)  # about ten rows
    planned_run(
        tmp_path,
        {"a": {"x.parquet": table}},
        lambda _s, _f, row: Row("a", copies=2 if row % 2 else 0),
        row_group_rows=16,
    )
    run = RunFolder(tmp_path / "run")
    (group,) = survey(run, run.partitions(), Shards(), seed=0).groups
    (rows,) = group.piece_rows
    assert 5 < rows < 20
    written = read_all(write_all(run)).column("n").to_pylist()
    expected: list[int] = []
    for first in range(0, 40, rows):
        expected += [n for n in range(first, min(40, first + rows)) if n % 2] * 2
    assert written == expected


def test_keys_weights_and_domains_stand_beside_each_row(tmp_path: Path):
    tables = {
        "a": {"x.parquet": pa.table({"n": range(100)}), "y.parquet": pa.table({"n": range(60)})}
    }

    def decide(_source: str, file: str, row: int) -> Row | None:
        if row % 10 == 9:
            return None  # set aside by the index
        return Row("even" if row % 2 == 0 else "odd", copies=row % 4, weight=row / 8)

    planned_run(tmp_path, tables, decide)
    written = read_all(write_all(RunFolder(tmp_path / "run")))
    found = Counter[tuple[object, ...]]()
    for row in written.to_pylist():
        assert row["n"] == row["curate_row"]
        found[tuple(row[name] for name in ADDED.names)] += 1
    wanted = Counter[tuple[object, ...]]()
    for file, rows in (("x.parquet", 100), ("y.parquet", 60)):
        for row in range(rows):
            decided = decide("a", file, row)
            if decided is not None and decided.copies:
                key = ("a", file, row, decided.weight, decided.domain)
                assert isinstance(decided.copies, int)
                wanted[key] += decided.copies
    assert found == wanted


def test_columns_of_an_earlier_run_are_replaced_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    table = pa.table({"curate_weight": [9.0] * 10, "n": range(10), "curate_domain": ["old"] * 10})
    planned_run(tmp_path, {"a": {"x.parquet": table}}, lambda _s, _f, _r: Row("new", weight=2.0))
    written = read_all(write_all(RunFolder(tmp_path / "run")))
    assert written.column_names == ["n", *ADDED.names]
    assert set(written.column("curate_weight").to_pylist()) == {2.0}
    assert set(written.column("curate_domain").to_pylist()) == {"new"}
    assert "curate_weight" in caplog.text


def test_notes_of_pandas_on_its_index_are_dropped():
    payload = pa.schema([("n", pa.int64())], metadata={b"pandas": b"{}", b"other": b"1"})
    assert shard_schema(payload).metadata == {b"other": b"1"}


def test_sources_with_different_columns_share_one_schema(tmp_path: Path):
    tables = {
        "a": {"x.parquet": pa.table({"text": ["one", "two"], "stars": [1, 2]})},
        "b": {"y.parquet": pa.table({"text": ["three"], "tags": [["t"]]})},
    }
    planned_run(tmp_path, tables, lambda source, _f, _r: Row(source))
    paths = write_all(RunFolder(tmp_path / "run"))
    first, second = (pq.read_table(path) for path in paths)
    assert first.schema == second.schema
    assert first.column("tags").to_pylist() == [None, None]
    assert second.column("stars").to_pylist() == [None]
    assert second.column("tags").to_pylist() == [["t"]]


def test_types_that_widen_within_a_source_are_cast(tmp_path: Path):
    tables = {
        "a": {
            "x.parquet": pa.table({"n": pa.array([1, 2], pa.int32())}),
            "y.parquet": pa.table({"n": pa.array([1 << 40], pa.int64())}),
        }
    }
    planned_run(tmp_path, tables, lambda _s, _f, _r: Row("a"))
    written = read_all(write_all(RunFolder(tmp_path / "run")))
    assert written.column("n").type == pa.int64()
    assert written.column("n").to_pylist() == [1, 2, 1 << 40]


def test_files_have_page_indexes_row_groups_of_equal_size_and_the_codec_asked_for(tmp_path: Path):
    table = pa.table({"text": [f"{i} {i * i} some words" for i in range(2000)]})
    planned_run(tmp_path, {"a": {"x.parquet": table}}, lambda _s, _f, _r: Row("a"))
    shards = Shards(size_mb=0.02, compression="gzip", compression_level=1)
    paths = write_all(RunFolder(tmp_path / "run"), shards)
    assert len(paths) > 1
    for path in paths:
        metadata = pq.read_metadata(path)
        assert metadata.num_row_groups >= 4
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert max(sizes) - min(sizes) <= 1
        columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
        assert all(column.compression == "GZIP" for column in columns)
        assert all(column.has_offset_index for column in columns)
        # The extremes of texts would help nobody to skip a page.
        with_extremes = {column.path_in_schema: column.has_column_index for column in columns}
        assert with_extremes["curate_row"]
        assert not with_extremes["text"]


def test_how_the_rows_are_read_does_not_show_in_the_bytes(tmp_path: Path):
    """Row groups of the input, partitions and pieces may all be cut otherwise."""
    table = pa.table(
        {"text": [f"{i} " * (i % 9) for i in range(600)], "n": range(600)}
    ).append_column("kind", pa.array([f"k{i // 77}" for i in range(600)]).dictionary_encode())
    seen: list[list[bytes]] = []
    for name, group, rows in (("one", 600, 600), ("two", 37, 100)):
        root = tmp_path / name
        planned_run(
            root,
            {"a": {"x.parquet": table}},
            lambda _s, _f, row: Row("a" if row % 3 else "b", copies=int(row % 5 > 0)),
            partition_rows=rows,
            row_group_rows=group,
        )
        seen.append([path.read_bytes() for path in write_all(RunFolder(root / "run"))])
    assert seen[0] == seen[1]


def test_a_rare_domain_does_not_keep_all_that_was_read_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its rows wait long for their row group."""
    table = pa.table({"n": range(4000), "text": [f"{i:04}" * 250 for i in range(4000)]})
    kind = pa.array([f"k{i // 900}" for i in range(4000)]).dictionary_encode()
    planned_run(
        tmp_path,
        {"a": {"x.parquet": table.append_column("kind", kind)}},
        lambda _s, _f, row: Row("web" if row % 100 else "rare", copies=1 + (row % 400 == 0)),
        row_group_rows=100,
    )
    monkeypatch.setattr("curate.data.shard_layout._PIECE_BYTES", 100_000)
    add = ComponentWriter.add
    held: list[int] = []

    def seen(writer: ComponentWriter, rows: pa.Table, tokens: IntArray | None) -> None:
        held.append(pa.total_allocated_bytes())
        add(writer, rows, tokens)

    monkeypatch.setattr(ComponentWriter, "add", seen)
    before = pa.total_allocated_bytes()
    write_all(RunFolder(tmp_path / "run"), Shards(row_group_mb=0.2))
    assert len(held) > 40
    assert max(held) - before < 1_000_000  # of 4 MB


def test_receipts_count_rows_and_tokens_of_each_shard(tmp_path: Path):
    table = pa.table({"text": [f"{i**5} {i**7}" for i in range(300)]})
    planned_run(
        tmp_path,
        {"a": {"x.parquet": table}},
        lambda _s, _f, row: Row("a" if row % 2 else "b", copies=row % 3, tokens=row),
    )
    run = RunFolder(tmp_path / "run")
    found = survey(run, run.partitions(), Shards(size_mb=0.002), seed=0)
    receipts = [
        receipt
        for group in found.groups
        for receipt in write_group(
            run,
            group,
            terms=found.terms,
            schema=found.schemas["a"],
            context=Context(Shards(), {}, None),
            tokenizer=TOKENIZER,
        )
    ]
    assert len(receipts) > 3
    for receipt in receipts:
        rows = pq.read_table(run.shards / receipt["file"]).column("curate_row").to_pylist()
        assert receipt["rows"] == len(rows)
        assert receipt["tokens"] == sum(rows)
        assert receipt["bytes"] == (run.shards / receipt["file"]).stat().st_size


def test_a_failing_group_leaves_no_file_behind(tmp_path: Path):
    table = pa.table({"text": [f"text {i}" for i in range(300)]})
    planned_run(
        tmp_path, {"a": {"x.parquet": table}}, lambda _s, _f, row: Row("a" if row < 280 else "b")
    )
    run = RunFolder(tmp_path / "run")
    found = survey(run, run.partitions(), Shards(), seed=0)
    (group,) = found.groups
    gone = [*group.partitions[:-1], _elsewhere(group.partitions[-1])]
    broken = Group(group.name, tuple(gone), group.piece_rows, group.shards)
    with pytest.raises(Exception, match="there is no"):
        write_group(
            run,
            broken,
            terms=found.terms,
            schema=found.schemas["a"],
            context=Context(Shards(), {}, None),
            tokenizer=None,
        )
    assert [path for path in run.shards.rglob("*") if path.is_file()] == []


def _elsewhere(part: Partition) -> Partition:
    return Partition(
        name=part.name,
        source=part.source,
        file=part.file,
        address=part.address + ".gone",
        first_row=part.first_row,
        num_rows=part.num_rows,
        stamp=part.stamp,
    )


def test_views_of_texts_and_bytes_become_texts_and_bytes(tmp_path: Path):
    """Arrow takes no rows of views, and `datasets` does not know them."""
    texts = [None if i % 7 == 0 else f"text {i} \u00e9" for i in range(300)]
    views = pa.table(
        {
            "text": pa.array(texts, pa.string_view()),
            "bytes": pa.array([bytes([i % 256]) * 20 for i in range(300)], pa.binary_view()),
            "list": pa.array([[str(i), None] for i in range(300)], pa.list_(pa.string_view())),
            "both": pa.array([{"a": str(i)} for i in range(300)],
                             pa.struct([pa.field("a", pa.string_view())])),
        }
    )  # fmt: skip
    planned_run(
        tmp_path,
        {"a": {"x.parquet": views}},
        lambda _s, _f, row: Row("web", copies=row % 3),
        row_group_rows=1000,  # Arrow writes no parts of views
    )
    (path,) = write_all(RunFolder(tmp_path / "run"), Shards())
    found = pq.read_table(path)
    rows = found["curate_row"].to_pylist()
    assert sorted(rows) == sorted(row for row in range(300) for _ in range(row % 3))
    wanted = views.to_pylist()
    assert found.select(views.column_names).to_pylist() == [wanted[row] for row in rows]
    assert not any("view" in str(field.type) for field in found.schema)
