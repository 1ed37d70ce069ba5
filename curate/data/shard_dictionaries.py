"""Which columns of a Parquet file get a dictionary, and of which the extremes are noted.

A writer would try a dictionary for every column, and hash whole row groups of texts and of numbers
only to give it up once it is a megabyte large: that costs as much as compressing them. And it would
compare all texts, and all numbers of all vectors, for a smallest and a largest one that tell a
reader nothing.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_LOOKED_AT = 4096
"""Values at the start of a column."""


def repeating_columns(table: pa.Table) -> list[str]:
    """Paths of the columns, and of the values inside nested ones, of which few differ.

    Args:
        table: the first rows of a file.

    Returns:
        As `pyarrow.parquet.ParquetWriter` takes them for `use_dictionary`: values of which at most
        half were new among the first thousands.
    """
    return [path for path, values in _first_leaves(table) if _repeat(values)]


def compared_columns(table: pa.Table) -> list[str]:
    """Paths of the columns whose smallest and largest values help a reader to skip row groups.

    Args:
        table: the first rows of a file.

    Returns:
        As `pyarrow.parquet.ParquetWriter` takes them for `write_statistics`: all but those inside
        lists and maps, and texts and bytes that hardly repeat.
    """
    inside = (".list.element", ".key_value.")
    return [
        path
        for path, values in _first_leaves(table)
        if not any(part in path for part in inside) and (_is_short(values.type) or _repeat(values))
    ]


def _first_leaves(table: pa.Table) -> Iterator[tuple[str, Any]]:
    first = table.slice(0, _LOOKED_AT).combine_chunks()
    columns = [
        _leaves(name, column.chunk(0) if column.num_chunks else pa.array([], column.type))
        for name, column in zip(first.column_names, first.columns, strict=True)
    ]
    return chain(*columns)


def _is_short(kind: pa.DataType) -> bool:
    """Whether values have a fixed, small size."""
    return pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_boolean(kind)


def _leaves(path: str, values: Any) -> Iterator[tuple[str, Any]]:
    """The values that Parquet stores in columns of their own, and the paths of these."""
    kind = values.type
    if isinstance(kind, pa.BaseExtensionType):
        yield from _leaves(path, values.storage)
    elif pa.types.is_struct(kind):
        for number, field in enumerate(kind):
            yield from _leaves(f"{path}.{field.name}", values.field(number))
    elif pa.types.is_map(kind):
        yield from _leaves(f"{path}.key_value.key", values.keys)
        yield from _leaves(f"{path}.key_value.value", values.items)
    elif pa.types.is_nested(kind):
        yield from _leaves(f"{path}.list.element", values.flatten())
    else:
        yield path, values


def _repeat(values: Any) -> bool:
    if pa.types.is_dictionary(values.type):
        return True
    values = values.slice(0, _LOOKED_AT).drop_null()
    try:
        different = pc.call_function("count_distinct", [values]).as_py()
    except pa.ArrowNotImplementedError:  # a rare type; what is undecided keeps Parquet's default
        return True
    return 2 * different <= len(values)
