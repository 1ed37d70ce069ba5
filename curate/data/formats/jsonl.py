"""JSON Lines: one object a line; blank lines do not count as rows.

The file is read twice: the first pass finds a type for every column that holds all its values
(whole numbers and fractions become float64, objects may gain fields), the second converts. Dates
stay text. Where a column holds values of different kinds, such as text and numbers, the kind of
most rows wins and the other rows are problems.
"""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.json

from curate.data.columns import PROBLEM
from curate.data.example import Source
from curate.data.sources import InputFile
from curate.data.storage import open_stream
from curate.errors import InputError

_BLOCK_BYTES = 1 << 22
_DETAIL_CHARS = 160


def read(file: InputFile, source: Source) -> Iterator[pa.RecordBatch]:
    """The rows of a file.

    Raises:
        InputError: it holds one JSON array, not lines.
    """
    del source
    shape = _Shape()
    for lines in _blocks(file.address):
        _observe(lines, shape)
    schema = pa.schema(shape.fields())
    for lines in _blocks(file.address):
        yield from _convert(lines, schema)


@dataclass(slots=True)
class _Shape:
    """What has been seen at one place of the objects."""

    kinds: Counter[str] = field(default_factory=Counter[str])
    """Kind of value -> number of rows."""
    members: dict[str, "_Shape"] = field(default_factory=dict[str, "_Shape"])
    """Of objects, by field; of lists, under the empty name."""

    def add(self, kind: pa.DataType, rows: int) -> None:
        if pa.types.is_struct(kind):
            self.kinds["object"] += rows
            for member in kind:
                self.members.setdefault(member.name, _Shape()).add(member.type, rows)
        elif pa.types.is_list(kind):
            self.kinds["list"] += rows
            self.members.setdefault("", _Shape()).add(kind.value_type, rows)
        elif not pa.types.is_null(kind):
            self.kinds[_scalar_kind(kind)] += rows

    def type(self) -> pa.DataType:
        kinds = Counter(self.kinds)
        if kinds["int"] and kinds["float"]:
            kinds["float"] += kinds.pop("int")
        kind = max(kinds, key=lambda name: (kinds[name], name), default="null")
        if kind == "object":
            # Parquet has no struct without fields.
            return pa.struct(self.fields() or [pa.field("empty", pa.null())])
        if kind == "list":
            return pa.list_(self.members[""].type())
        return _SCALARS[kind]

    def fields(self) -> list[pa.Field]:
        return [pa.field(name, shape.type()) for name, shape in self.members.items() if name != ""]


_SCALARS: dict[str, pa.DataType] = {
    "null": pa.null(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "text": pa.string(),
}


def _scalar_kind(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "int"
    if pa.types.is_floating(kind):
        return "float"
    # Arrow takes texts that look like dates for dates.
    return "bool" if pa.types.is_boolean(kind) else "text"


def _observe(lines: list[bytes], shape: _Shape) -> None:
    """Add the types of a block; lines that cannot be parsed say nothing."""
    try:
        table = _parse(lines)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        if len(lines) > 1:
            _observe(lines[: len(lines) // 2], shape)
            _observe(lines[len(lines) // 2 :], shape)
        return
    for member in table.schema:
        rows = len(lines) - table.column(member.name).null_count
        shape.members.setdefault(member.name, _Shape()).add(member.type, rows)


def _convert(lines: list[bytes], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of a block in the schema of the file; a failing block is halved down to the line."""
    problem = None
    try:
        table = _parse(lines, schema)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        if len(lines) > 1:
            yield from _convert(lines[: len(lines) // 2], schema)
            yield from _convert(lines[len(lines) // 2 :], schema)
            return
        problem = _problem(lines[0], error)
        table = pa.table([pa.nulls(1, member.type) for member in schema], schema=schema)
    column = pa.array([problem] * len(lines), pa.string())
    arrays = [_whole(table.column(member.name)) for member in schema]
    yield pa.record_batch([*arrays, column], schema=schema.append(pa.field(PROBLEM, pa.string())))


def _parse(lines: list[bytes], schema: pa.Schema | None = None) -> pa.Table:
    for line in lines:
        # Two objects on a line, or one on two lines, would shift all rows that follow.
        if not (line.startswith(b"{") and line.endswith(b"}")):
            raise pa.ArrowInvalid("not a JSON object")
    block = b"\n".join(lines)
    if not block.isascii():
        block.decode()
    table = pyarrow.json.read_json(
        io.BytesIO(block),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 64),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=schema,
            unexpected_field_behavior="infer" if schema is None else "error",
        ),
    )
    if table.num_rows != len(lines):
        raise pa.ArrowInvalid("several JSON objects on one line")
    return table


def _problem(line: bytes, error: Exception) -> str:
    """What is wrong with a line that does not fit the schema of the file."""
    if isinstance(error, UnicodeDecodeError):
        return f"invalid_utf8: byte {error.start} is {line[error.start]:#04x}"
    detail = str(error).replace(" in row 0", "").replace("\n", " ")[:_DETAIL_CHARS]
    try:
        _parse([line])
    except pa.ArrowInvalid:
        return f"unparsable: {detail}"
    return f"wrong_type: {detail}, unlike most rows of the file"


def _blocks(address: str) -> Iterator[list[bytes]]:
    """The file's lines without blank ones, some mebibytes at a time."""
    rest, first = b"", True
    with open_stream(address) as stream:
        while chunk := stream.read(_BLOCK_BYTES):
            if first:
                chunk, first = chunk.removeprefix(b"\xef\xbb\xbf"), False
                _refuse_array(chunk, address)
            head, newline, tail = chunk.rpartition(b"\n")
            if not newline:
                rest += chunk
                continue
            lines = _split(rest + head)
            rest = tail
            if lines:
                yield lines
    lines = _split(rest)
    if lines:
        yield lines


def _split(block: bytes) -> list[bytes]:
    return [line for raw in block.split(b"\n") if (line := raw.strip())]


def _refuse_array(chunk: bytes, address: str) -> None:
    if chunk.lstrip().startswith(b"["):
        raise InputError(
            f"{address} is one JSON array, not one object a line",
            fix="convert it: jq -c '.[]' data.json > data.jsonl",
        )


def _whole(column: Any) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
