"""Rows as JSON, a line each: the same for all formats that hold some.

Dates and times are texts in ISO 8601, decimals are texts, binary values are base64; maps are lists
of key and value. Values that are no numbers (NaN, infinity) are null: JSON has none.
"""

import io
from collections.abc import Callable

import numpy as np
import polars as pl
import pyarrow as pa

from curate.data.kinds import item_kind, unwrapped


def json_text(table: pa.Table) -> bytes:
    """All rows as objects, each on a line of its own that ends in a line feed."""
    columns = [_ready(table.column(i).combine_chunks()) for i in range(table.num_columns)]
    frame = pl.DataFrame(pa.table(columns, names=table.column_names))
    buffer = io.BytesIO()
    frame.write_ndjson(buffer)
    return buffer.getvalue()


def json_lines(table: pa.Table) -> list[bytes]:
    """Each row as an object."""
    return json_text(table).split(b"\n")[:-1]


def json_cells(array: pa.Array) -> list[bytes]:
    """Each value of a column; `null` where there is none."""
    lines = json_lines(pa.table({"v": array}))
    return [line[len('{"v":') : -1] for line in lines]


def _ready(array: pa.Array) -> pa.Array:
    """The same values in types that polars writes as JSON."""
    array = unwrapped(array)
    kind = array.type
    if pa.types.is_map(kind):
        entries = pa.StructArray.from_arrays([array.keys, array.items], names=["key", "value"])
        return _relisted(array, lambda: _ready(entries))
    if item_kind(kind) is not None:
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            array = array.cast(pa.large_list(kind.value_type))
        return _relisted(array, lambda: _ready(array.values))
    if pa.types.is_struct(kind):
        parts = [_ready(array.field(i)) for i in range(kind.num_fields)]
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return pa.StructArray.from_arrays(parts, names=names, mask=array.is_null())
    if pa.types.is_decimal(kind):
        return array.cast(pa.large_string())
    if "binary" in str(kind):
        series = pl.Series(array.cast(pa.large_binary()))
        return series.bin.encode("base64").to_arrow()
    return array


def _relisted(array: pa.Array, values: Callable[[], pa.Array]) -> pa.Array:
    """Lists of other values, as many in each row as before."""
    # A copy, since a mask cannot stand beside offsets that are a slice.
    offsets = pa.array(np.array(array.offsets, dtype=np.int64))
    return pa.LargeListArray.from_arrays(offsets, values(), mask=array.is_null())
