"""Shards of one format, written from a table without a run, for the tests of formats."""

import datetime as dt
import decimal
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from curate.data.example import Source
from curate.data.files import digest_file, publish, temporary_for
from curate.data.shard_columns import shard_schema
from curate.data.shard_formats import open_format
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Component, Shard, folder_name, split_evenly
from curate.data.shard_settings import Shards

TEXTS = [
    "plain",
    "",
    "línea 1\nline 2\r\n",
    "日本語 😀 \u2028 \x00 \x1f",
    '"quoted" \\ \t',
    "x" * 100_000,
]


def picture(kind: str, shade: int) -> bytes:
    """A small image file of one grey."""
    buffer = io.BytesIO()
    Image.new("L", (6, 4), shade).save(buffer, kind)
    return buffer.getvalue()


def all_types(rows: int, *, nulls: bool) -> pa.Table:
    """The types that data sets have; with nulls, every third value of `maybe_` columns is one."""

    def maybe(value: Any, at: int) -> Any:
        return None if nulls and at % 3 == 1 else value

    each = range(rows)
    instant = dt.datetime(2026, 3, 1, 12, 30, 15, 250, tzinfo=dt.UTC)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    deep = pa.struct([("a", pa.list_(pa.struct([("b", pa.int32())]))), ("raw", pa.binary())])
    table = pa.table(
        {
            "text": pa.array([f"{at} {TEXTS[at % len(TEXTS)]}" for at in each]),
            "image": pa.array(
                [{"bytes": picture("PNG", at % 256), "path": f"{at}.png"} for at in each], image
            ),
            "label": pa.array([at % 3 for at in each], pa.int64()),
            "messages": pa.array(
                [[{"role": "user", "content": maybe(f"é{at}", at)}] * (at % 3) for at in each],
                pa.list_(turn),
            ),
            "maybe_numbers": pa.array(
                [maybe([at / 2, -float(at)] * (at % 2), at) for at in each], pa.list_(pa.float32())
            ),
            "fixed": pa.array([[at, -at] for at in each], pa.list_(pa.int16(), 2)),
            "kind": pa.array([f"k{at % 5}" for at in each]).dictionary_encode(),
            "maybe_when": pa.array(
                [maybe(instant + dt.timedelta(seconds=at), at) for at in each],
                pa.timestamp("us", "UTC"),
            ),
            "day": pa.array([dt.date(2026, 1, 1) + dt.timedelta(at) for at in each]),
            "maybe_price": pa.array(
                [maybe(decimal.Decimal(at) / 100, at) for at in each], pa.decimal128(12, 2)
            ),
            "long": pa.array([f"text {at}" for at in each], pa.large_string()),
            "raw": pa.array([bytes([0, 255, at % 256]) for at in each], pa.binary()),
            "maybe_flag": pa.array([maybe(at % 2 == 0, at) for at in each], pa.bool_()),
            "small": pa.array([at % 200 for at in each], pa.uint8()),
            "maybe_count": pa.array([maybe(2**60 + at, at) for at in each], pa.int64()),
            "ratio": pa.array([at / 7 for at in each], pa.float64()),
            "nested": pa.array(
                [maybe({"a": [{"b": at}, None], "raw": b"\xff"}, at) for at in each], deep
            ),
            "empty": pa.nulls(rows, pa.string()),
        }
    )
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog", "cow"], "_type": "ClassLabel"},
    }
    return table.replace_schema_metadata(
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    )


def finished(table: pa.Table, *, domain: str = "web", source: str = "a") -> pa.Table:
    """A table with the columns that curate adds."""
    added = {
        "curate_source": pa.array([source] * table.num_rows),
        "curate_file": pa.array(["x.parquet"] * table.num_rows),
        "curate_row": pa.array(range(table.num_rows), pa.int64()),
        "curate_weight": pa.array([1 + row / 8 for row in range(table.num_rows)], pa.float32()),
        "curate_domain": pa.array([domain] * table.num_rows),
    }
    schema = shard_schema(table.schema)
    return pa.Table.from_arrays([*table.columns, *added.values()], schema=schema)


def write_by_hand(
    name: str,
    root: Path,
    table: pa.Table,
    *,
    shards: int = 1,
    row_groups: int = 2,
    domain: str = "web",
    phase: int = 0,
    settings: Shards | None = None,
    sources: Mapping[str, Source] | None = None,
) -> list[Path]:
    """Write a table in one format below `root`, with the documents beside it.

    Returns:
        The file of each shard.
    """
    layout = open_format(name)
    context = Context(settings or Shards(format="parquet"), sources or {}, None)
    receipts: list[dict[str, Any]] = []
    first = 0
    for number, size in enumerate(split_evenly(table.num_rows, shards)):
        component = Component(phase, domain)
        groups = split_evenly(size, row_groups)
        shard = Shard(component, folder_name(component, domain), number, shards, groups)
        (file,) = layout.files(shard)
        target = root / file
        target.parent.mkdir(parents=True, exist_ok=True)
        sink = layout.open([temporary_for(target)], table.schema, context)
        try:
            for rows in groups:
                part = table.slice(first, rows)
                sink.write(pa.concat_tables([part]).unify_dictionaries().combine_chunks())
                first += rows
            facts = sink.close()
        finally:
            sink.discard()
        publish(temporary_for(target), target)
        receipts.append(
            {
                "file": file,
                "format": name,
                "domain": domain,
                "phase": phase,
                "rows": size,
                "tokens": 0,
                "bytes": target.stat().st_size,
                "digest": digest_file(target),
                "facts": facts,
            }
        )
    for file, text in layout.documents(receipts[::-1]).items():
        (root / file).write_text(text, encoding="utf-8", newline="")
    return [root / receipt["file"] for receipt in receipts]
