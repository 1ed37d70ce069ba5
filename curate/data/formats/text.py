"""Text files of any kind, cut into passages at paragraph borders.

A passage is a run of whole paragraphs of about `passage_chars` characters, just as it stands in
the file, without the blank lines around it. A paragraph longer than one and a half times that is
cut between lines, and a line that is too long wherever the length is reached. Columns: `text`, and
`line`, the number of the passage's first line, from 1.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from curate.data.columns import PROBLEM
from curate.data.example import Source
from curate.data.sources import InputFile
from curate.data.storage import open_stream

SCHEMA = pa.schema([("text", pa.large_string()), ("line", pa.int64()), (PROBLEM, pa.string())])

_LONGEST_LINE_BYTES = 1 << 20
_BATCH_CHARS = 1 << 22
_TOLERANCE = 1.5


@dataclass(slots=True)
class _Passage:
    """Lines that are being gathered."""

    line: int = 0
    text: list[str] = field(default_factory=list[str])
    length: int = 0
    gap: str = ""
    """Blank lines after the text: part of it only if more follows."""


def read(file: InputFile, source: Source) -> Iterator[pa.RecordBatch]:
    """The passages of a file; those with bytes that are not UTF-8 are problems."""
    texts: list[str] = []
    lines: list[int] = []
    size = 0
    with open_stream(file.address) as stream:
        for line, text in passages(_lines(stream), source.passage_chars):
            texts.append(text)
            lines.append(line)
            size += len(text)
            if size >= _BATCH_CHARS:
                yield _batch(texts, lines)
                texts, lines, size = [], [], 0
    if texts:
        yield _batch(texts, lines)


def passages(lines: Iterator[tuple[int, str]], target: int) -> Iterator[tuple[int, str]]:
    """Join lines into passages.

    Args:
        lines: (number, text with its line break); a number may repeat where a line came in pieces.
        target: wanted length in characters.

    Yields:
        (number of the first line, text), the text never blank and at most 1.5 * target long.
    """
    passage = _Passage()
    for unit_line, unit, gap in _units(lines, target):
        together = passage.length + len(passage.gap) + len(unit)
        if passage.text and together > target:
            yield passage.line, "".join(passage.text).rstrip("\n")
            passage = _Passage()
        if not passage.text:
            passage.line = unit_line
        else:
            unit = passage.gap + unit
        passage.text.append(unit)
        passage.length += len(unit)
        passage.gap = gap
    if passage.text:
        yield passage.line, "".join(passage.text).rstrip("\n")


def _units(lines: Iterator[tuple[int, str]], target: int) -> Iterator[tuple[int, str, str]]:
    """Paragraphs, or parts of long ones: (first line, text, blank lines that follow)."""
    limit = int(_TOLERANCE * target)
    pending: list[tuple[int, str]] = []
    length = 0
    gap = ""
    for number, line in lines:
        if not line.strip():
            gap += line if pending and len(gap) < limit else ""
            continue
        if pending and (gap or length + len(line) > limit):
            yield from _cut(pending, length, target, gap)
            pending, length, gap = [], 0, ""
        pending.append((number, line))
        length += len(line)
    if pending:
        yield from _cut(pending, length, target, gap)


def _cut(
    pending: list[tuple[int, str]], length: int, target: int, gap: str
) -> Iterator[tuple[int, str, str]]:
    """One unit; or, where a single line is too long, pieces of it."""
    text = "".join(line for _, line in pending)
    if length <= int(_TOLERANCE * target):
        yield pending[0][0], text, gap
        return
    for at in range(0, length, target):
        piece = text[at : at + target]
        if piece.strip():
            yield pending[0][0], piece, gap if at + target >= length else ""


def _lines(stream: Any) -> Iterator[tuple[int, str]]:
    """Numbered lines with their breaks; bytes that are not UTF-8 become lone surrogates.

    A line longer than a mebibyte comes in pieces, so that memory stays bounded.
    """
    reader = io.BufferedReader(_Raw(stream), 1 << 20)
    number, rest = 1, b""
    while chunk := reader.readline(_LONGEST_LINE_BYTES):
        chunk = rest + chunk
        rest = b""
        if number == 1 and chunk.startswith(b"\xef\xbb\xbf"):
            chunk = chunk[3:]
        ends = chunk.endswith(b"\n")
        if not ends:
            chunk, rest = _whole_signs(chunk)
        yield number, _decoded(chunk)
        number += ends
    if rest:
        yield number, _decoded(rest)


def _decoded(line: bytes) -> str:
    text = line.decode("utf-8", "surrogateescape")
    return f"{text[:-2]}\n" if text.endswith("\r\n") else text


def _whole_signs(chunk: bytes) -> tuple[bytes, bytes]:
    """Split off a UTF-8 sign that the end of the chunk cut in two."""
    for back in range(1, min(4, len(chunk)) + 1):
        byte = chunk[-back]
        if byte & 0xC0 == 0x80:
            continue
        width = (
            2 if byte >> 5 == 0b110 else 3 if byte >> 4 == 0b1110 else 4 if byte >> 3 == 30 else 1
        )
        return (chunk[:-back], chunk[-back:]) if width > back else (chunk, b"")
    return chunk, b""


def _batch(texts: list[str], lines: list[int]) -> pa.RecordBatch:
    problems: list[str | None] = [None] * len(texts)
    values: list[str | None] = list(texts)
    for row, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            byte = ord(text[error.start]) - 0xDC00
            line = lines[row] + text.count("\n", 0, error.start)
            values[row], problems[row] = None, f"invalid_utf8: line {line}: byte {byte:#04x}"
    return pa.record_batch(
        [pa.array(values, pa.large_string()), pa.array(lines, pa.int64()),
         pa.array(problems, pa.string())],
        schema=SCHEMA,
    )  # fmt: skip


class _Raw(io.RawIOBase):
    """What `io.BufferedReader` needs of a stream that can only `read(n)`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
