"""CSV and TSV files.

The file is read twice: the first pass finds a type for every column that holds all its values,
the second converts. Types are int64, float64, bool and text; numbers with leading zeros and dates
stay text. In columns that are not text, empty cells and the usual words (NA, null, ...) are null.
A line with another number of fields than the first is a problem. Fields stand between commas, in
files called .tsv between tabs, or between whatever `separator` says; the text is UTF-8.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from curate.data.columns import PROBLEM
from curate.data.example import Source
from curate.data.sources import InputFile
from curate.data.storage import open_stream
from curate.errors import InputError

pc: Any = pyarrow.compute

_BLOCK_BYTES = 1 << 22
_LONGEST_ROW_BYTES = 1 << 29
_NULLS = (b"", b"#N/A", b"N/A", b"NA", b"NULL", b"NaN", b"n/a", b"nan", b"null")
_CANDIDATES = (pa.int64(), pa.float64(), pa.bool_())
_DETAIL_CHARS = 80


def read(file: InputFile, source: Source) -> Iterator[pa.RecordBatch]:
    """The rows of a file, the line of column names not being one.

    Raises:
        InputError: two columns have one name, or the separator is another.
    """
    separator = source.separator or default_separator(file.address)
    layout = _survey(file.address, source.header, separator)
    if layout is None:
        return
    if layout.has_header:
        refuse_other_separator(file, source, layout.names)
    schema = pa.schema(
        [*zip(layout.names, (guess.type for guess in layout.guesses), strict=True),
         (PROBLEM, pa.string())]
    )  # fmt: skip
    for cells, problems in _chunks(file.address, layout):
        good, problems = _checked(cells, problems)
        arrays = [_cast(c, g) for c, g in zip(good, layout.guesses, strict=True)]
        yield pa.record_batch([*arrays, pa.array(problems, pa.string())], schema=schema)


def default_separator(address: str) -> str:
    """What stands between the fields of a file of this name."""
    return "\t" if ".tsv" in address.lower().rsplit("/", 1)[-1] else ","


def other_separator(names: Sequence[str]) -> str | None:
    """The sign that seems to stand between the fields, where all names were read as one."""
    if len(names) != 1:
        return None
    return next((sign for sign in "\t;|," if sign in names[0].strip()), None)


def refuse_other_separator(file: InputFile, source: Source, names: Sequence[str]) -> None:
    """Say so where all names of a header were read as one, and the settings do not ask for it.

    Raises:
        InputError: another separator stands in the only name.
    """
    sign = other_separator(names)
    if sign is not None and source.separator is None:
        given = default_separator(file.address)
        raise InputError(
            f"{file.address} has one column, called {names[0]!r}: its fields seem to be"
            f" separated by {'tabs' if sign == chr(9) else repr(sign)}",
            fix=f"set sources.{file.source}.separator to {json.dumps(sign)}; to"
            f" {json.dumps(given)} if it is one column indeed",
        )


@dataclass(slots=True)
class _Guess:
    """The narrowest type that holds all cells of a column seen so far."""

    at: int = 0
    seen: bool = False

    @property
    def type(self) -> pa.DataType:
        if not self.seen and self.at == 0:
            return pa.null()
        return _CANDIDATES[self.at] if self.at < len(_CANDIDATES) else pa.large_string()

    def observe(self, cells: pa.Array) -> None:
        if self.at == len(_CANDIDATES):
            return
        cells = cells.filter(pc.invert(pc.is_in(cells, pa.array(_NULLS, pa.binary())))).drop_null()
        if not len(cells):
            return
        self.seen = True
        texts = cells.cast(pa.string(), safe=False)
        while self.at < len(_CANDIDATES) and not _holds(_CANDIDATES[self.at], texts):
            self.at += 1


@dataclass(slots=True)
class _Layout:
    """What the first pass found."""

    names: list[str]
    has_header: bool
    separator: str
    block_bytes: int
    guesses: list[_Guess] = field(default_factory=list[_Guess])


def _holds(kind: pa.DataType, texts: pa.Array) -> bool:
    """Whether all texts are values of the type, and would be written the same way again."""
    if not pa.types.is_boolean(kind):
        # An id such as 007 is no number.
        if pc.any(pc.match_substring_regex(texts, r"^\s*[+-]?0[0-9]")).as_py():
            return False
    elif not pc.all(pc.is_in(texts, pa.array(["true", "false", "True", "False"]))).as_py():
        return False
    # Beyond 15 digits a whole number would lose its last ones.
    long = r"^\s*[+-]?[0-9]{16,}\s*$"
    if pa.types.is_floating(kind) and pc.any(pc.match_substring_regex(texts, long)).as_py():
        return False
    try:
        texts.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _survey(address: str, header: bool | None, separator: str) -> _Layout | None:
    """First pass: names, types, and a block size that the longest row fits into."""
    block_bytes = _BLOCK_BYTES
    while True:
        try:
            return _survey_blocks(address, header, separator, block_bytes)
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error) or block_bytes >= _LONGEST_ROW_BYTES:
                raise
            block_bytes *= 8


def _survey_blocks(
    address: str, header: bool | None, separator: str, block_bytes: int
) -> _Layout | None:
    first = _first_row(address, separator, block_bytes)
    if first is None:
        return None
    numbers = all(_is_number(cell) for cell in first)
    has_header = not numbers if header is None else header
    names = [f"column_{at}" for at in range(len(first))]
    if has_header:
        given = [cell.decode("utf-8", "replace").strip() for cell in first]
        names = [text or name for text, name in zip(given, names, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"{address} has two columns called {name!r}",
                fix="rename one of them in the file's first line",
            )
    layout = _Layout(names, has_header, separator, block_bytes, [_Guess() for _ in names])
    for cells, _ in _chunks(address, layout):
        for column, guess in zip(cells, layout.guesses, strict=True):
            guess.observe(column)
    return layout


def _is_number(cell: bytes) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _first_row(address: str, separator: str, block_bytes: int) -> list[bytes] | None:
    with open_stream(address) as stream:
        if not stream.read(1):
            return None
    with open_stream(address) as stream:
        reader = pyarrow.csv.open_csv(stream, **_options(separator, block_bytes, 0))
        num_columns = len(reader.schema)
    with open_stream(address) as stream:
        for batch in pyarrow.csv.open_csv(stream, **_options(separator, block_bytes, num_columns)):
            if batch.num_rows:
                return [column[0].as_py() for column in batch.columns]
    return None


def _chunks(address: str, layout: _Layout) -> Iterator[tuple[list[pa.Array], list[str | None]]]:
    """Columns of raw cells with the problems of their rows; bad lines stand where they stood."""
    bad: deque[tuple[int, str]] = deque()

    def note(row: Any) -> str:
        shown = row.text if len(row.text) <= _DETAIL_CHARS else row.text[:_DETAIL_CHARS] + "…"
        expected = f"{row.actual_columns} fields, not {row.expected_columns}"
        bad.append((row.number - 1 - layout.has_header, f"unparsable: {expected}: {shown}"))
        return "skip"

    tail = _Tail()
    last = None
    row = 0
    skip = int(layout.has_header)
    with open_stream(address) as stream:
        options = _options(layout.separator, layout.block_bytes, len(layout.names), note)
        for batch in pyarrow.csv.open_csv(tail.watch(stream), **options):
            batch = batch.slice(min(skip, batch.num_rows))
            skip = 0 if batch.num_rows else skip
            problems: list[str | None] = []
            index: list[int | None] = []
            for good in range(batch.num_rows):
                while bad and bad[0][0] == row:
                    index.append(None)
                    problems.append(bad.popleft()[1])
                    row += 1
                index.append(good)
                problems.append(None)
                row += 1
            positions = pa.array(index, pa.int64())
            yield [column.take(positions) for column in batch.columns], problems
            last = batch if batch.num_rows else last
    if bad:
        empty = [pa.nulls(len(bad), pa.binary()) for _ in layout.names]
        yield empty, [detail for _, detail in bad]
    tail.refuse_open_quote(last)


def _options(
    separator: str, block_bytes: int, num_columns: int, note: Any = None
) -> dict[str, Any]:
    binary = {f"f{at}": pa.binary() for at in range(num_columns)}
    return {
        "read_options": pyarrow.csv.ReadOptions(
            use_threads=False, block_size=block_bytes, autogenerate_column_names=True
        ),
        "parse_options": pyarrow.csv.ParseOptions(
            delimiter=separator, newlines_in_values=True, invalid_row_handler=note or _skip
        ),
        "convert_options": pyarrow.csv.ConvertOptions(column_types=binary),
    }


def _skip(_: Any) -> str:
    return "skip"


def _checked(
    cells: list[pa.Array], problems: list[str | None]
) -> tuple[list[pa.Array], list[str | None]]:
    """Cells as text; a row with bytes that are not UTF-8 is a problem and null as a whole."""
    try:
        return [column.cast(pa.large_string()) for column in cells], problems
    except pa.ArrowInvalid:
        problems = list(problems)
    for column in cells:
        for row, value in enumerate(column.to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                byte = (value or b"")[error.start]
                problems[row] = problems[row] or f"invalid_utf8: byte {byte:#04x}"
    bad = pa.array([problem is not None for problem in problems])
    blank = pa.scalar(None, pa.binary())
    return [pc.if_else(bad, blank, c).cast(pa.large_string()) for c in cells], problems


def _cast(texts: pa.Array, guess: _Guess) -> pa.Array:
    kind = guess.type
    if pa.types.is_large_string(kind):
        return texts
    if pa.types.is_null(kind):
        return pa.nulls(len(texts))
    nothing = pc.is_in(texts, pa.array(_NULLS, pa.binary()).cast(pa.large_string()))
    return pc.if_else(nothing, pa.scalar(None, pa.large_string()), texts).cast(kind)


class _Tail:
    """Passes a stream on and remembers how it ended."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._end = b""
        self.closed = False

    def watch(self, stream: Any) -> "_Tail":
        self._stream = stream
        return self

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self._end = (self._end + data)[-8:] if data else self._end
        return data

    def refuse_open_quote(self, last: pa.RecordBatch | None) -> None:
        """A quote that nothing closes swallows the rest of the file as one cell.

        Raises:
            pa.ArrowInvalid: the last cell runs over a line break, but no quote ends the file.
        """
        if last is None:
            return
        cell: bytes = last.column(last.num_columns - 1)[last.num_rows - 1].as_py() or b""
        if b"\n" in cell and not self._end.rstrip(b"\r\n").endswith(b'"'):
            shown = cell[:_DETAIL_CHARS].decode("utf-8", "replace")
            raise pa.ArrowInvalid(f"a quote is never closed; its cell begins with {shown!r}")
