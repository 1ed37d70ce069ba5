"""The texts of rows as token ids, for formats that hold tokens in place of texts.

A document is what the task causal-lm reads of the same row, uncut: the tokenizer's beginning token
where it has one, then the text; or the prompt and the response, tokenized apart; or the chat as its
template says. Behind it comes the tokenizer's end token, unless the document ends with it already.

The tokenizer is a folder of two files, which `jobs/write_tokenizer.py` makes: `tokenizer.json` as
the tokenizers library reads it, and `special.json` for the rest.

Shapes: N documents, T tokens of all of them, K pieces of a document that are tokenized apart.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from curate.data.columns import resolve_columns
from curate.data.example import Source
from curate.data.shard_formats.sink import Context
from curate.data.values import Turns, field_values
from curate.errors import ConfigError

# The functions are made at import time, unseen by type checkers.
pc: Any = pyarrow.compute

TOKENIZER = "tokenizer.json"
SPECIAL = "special.json"

_CHUNK_CHARS = 1 << 20
"""Texts that are tokenized at once: what the library keeps of a token is many times its size."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Tokens of N rows."""

    ids: npt.NDArray[np.int32]
    """(T,)"""
    counted: npt.NDArray[np.bool_]
    """(T,) what the loss is taken of: not the first token of a document, no prompt, and of chats
    what the assistant says."""
    starts: npt.NDArray[np.int64]
    """(N + 1,)"""


@dataclass(frozen=True, slots=True)
class Special:
    """What `tokenizer.json` does not say."""

    beginning: int | None
    """Token before a text."""
    end: int
    """Token behind every document."""
    padding: int
    """Token that fills up; may be the end token."""
    vocabulary: int
    """Largest token id + 1."""
    template: str | None
    """Of chats."""
    tokens: Mapping[str, Any]
    """`bos_token`, `eos_token` ... -> its text, for the template."""


def check(sources: Mapping[str, Source], *, has_template: bool) -> None:
    """Refuse what has no tokens, before anything is written.

    Args:
        sources: with their columns resolved; one that names none is passed over.
        has_template: whether the tokenizer knows how to write a chat.

    Raises:
        ConfigError: names the source.
    """
    for name, source in sources.items():
        fields = source.content_columns
        if not fields or {"text", "response"} & fields.keys():
            continue
        if "messages" not in fields:
            what = "pairs of answers" if "chosen" in fields else " and ".join(fields)
            raise ConfigError(
                f"the formats packed and megatron hold tokens, but source {name} has {what}",
                fix="choose other formats in shards.format, such as parquet",
            )
        if not has_template:
            raise ConfigError(
                f"the examples of source {name} are chats, but the tokenizer has no chat template",
                fix="set shards.packing.tokenizer to that of a chat model, or set"
                " tokenizer.chat_template and save the tokenizer again",
            )


def encoder_of(context: Context) -> "Encoder":
    """The encoder of a task; a process loads it once."""
    assert context.tokenizer is not None, "a format of tokens was asked for without a tokenizer"
    return _encoder(context.tokenizer)


class Encoder:
    """Makes documents of rows.

    Args:
        folder: holds `TOKENIZER` and `SPECIAL`.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._core = Tokenizer.from_file(str(folder / TOKENIZER))
        self._core.no_truncation()
        self._core.no_padding()
        self.special = Special(**json.loads((folder / SPECIAL).read_text(encoding="utf-8")))

    def encode(self, table: pa.Table, sources: Mapping[str, Source], *, marks: bool) -> Documents:
        """The documents of a table's rows, in their order.

        Args:
            table: rows of shards.
            sources: name -> what its columns mean.
            marks: whether it matters what is counted in chats, which takes rendering them twice.

        Raises:
            CurateError: a chat template refuses a row, or it is unclear what the assistant says
                in it; names it.
        """
        owners = table.column("curate_source").combine_chunks().dictionary_encode()
        names: list[str] = owners.dictionary.to_pylist()
        if len(names) == 1:
            return self._of_source(table, names[0], sources[names[0]], marks)
        codes = owners.indices.to_numpy()
        rows = [np.flatnonzero(codes == code) for code in range(len(names))]
        parts = [
            self._of_source(table.take(pa.array(mine)), name, sources[name], marks)
            for name, mine in zip(names, rows, strict=True)
        ]
        return _in_order(parts, np.concatenate(rows) if rows else np.zeros(0, np.int64))

    def _of_source(self, table: pa.Table, name: str, source: Source, marks: bool) -> Documents:
        if not source.content_columns:
            # Columns that only other sources have are empty here.
            own = [n for n in table.column_names if table[n].null_count < table.num_rows]
            source = resolve_columns(source, table.select(own).schema)
        check({name: source}, has_template=self.special.template is not None)
        # Pictures beside a text are not looked at.
        fields = field_values(table, replace(source, image=None, features=None), {})
        if "messages" in fields:
            messages = fields["messages"]
            assert isinstance(messages, Turns)
            return self._chats(messages, table, marks)
        columns = ("prompt", "response") if "response" in fields else ("text",)
        lists = [pc.fill_null(fields[column], "").to_pylist() for column in columns]
        texts = list(chain.from_iterable(zip(*lists, strict=True)))
        ids, lengths = self._ids(texts)
        pieces = lengths.reshape(-1, len(columns))  # (N, K)
        return self._framed(ids, pieces.sum(axis=1), pieces[:, :-1].sum(axis=1))

    def _framed(
        self, ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64],
        given: npt.NDArray[np.int64]
    ) -> Documents:  # fmt: skip
        """Beginning and end tokens around documents; `given` tokens of each are its prompt."""
        first = self.special.beginning
        num_first = int(first is not None)
        ends = lengths.cumsum()
        last = np.full(len(lengths), -1, dtype=np.int64)
        last[lengths > 0] = ids[ends[lengths > 0] - 1]
        is_open = last != self.special.end
        starts = _starts(lengths + num_first + is_open)
        found = np.empty(starts[-1], dtype=np.int32)
        is_text = np.ones(len(found), dtype=np.bool_)
        if first is not None:
            found[starts[:-1]] = first
            is_text[starts[:-1]] = False
        closing = starts[1:][is_open] - 1
        found[closing] = self.special.end
        is_text[closing] = False
        found[is_text] = ids
        return Documents(found, _counted(starts, given + num_first), starts)

    def _chats(self, turns: Turns, table: pa.Table, marks: bool) -> Documents:
        """A template says itself how a chat begins, and mostly how it ends."""
        try:
            from curate.data.shard_formats.chats import rendered
        except ImportError as error:
            raise ConfigError(
                "chats need jinja2 to be written as tokens", fix="pip install 'jinja2>=3.1.6'"
            ) from error
        special = self.special
        chats, texts, spans = rendered(
            turns, table, template=special.template or "", special=special.tokens, marks=marks
        )
        if marks:
            ids, lengths, said = self._marked_ids(texts, spans)
        else:
            ids, lengths = self._ids(texts)
            said = np.ones(len(ids), dtype=np.bool_)
        end = special.tokens.get("eos_token") or "\0"
        is_open = np.array([not text.rstrip().endswith(end) for text in texts], dtype=np.bool_)
        starts = _starts(lengths + is_open)
        found = np.full(starts[-1], special.end, dtype=np.int32)
        counted = np.ones(len(found), dtype=np.bool_)
        closing = starts[1:][is_open] - 1
        is_text = np.ones(len(found), dtype=np.bool_)
        is_text[closing] = False
        found[is_text], counted[is_text] = ids, said
        if marks:  # to end where the assistant is to speak is nothing to learn
            answered = [bool(chat) and chat[-1]["role"] == "assistant" for chat in chats]
            counted[closing] = np.array(answered, dtype=np.bool_)[is_open]
        counted &= _counted(starts, np.zeros(len(texts), np.int64))
        return Documents(found, counted, starts)

    def _marked_ids(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """`_ids`, and which tokens lie in the spans of their text."""
        ids, lengths = [np.zeros(0, np.int32)], list[int]()
        said = [np.zeros(0, np.bool_)]
        for start, stop in _chunks(texts):
            encoded = self._core.encode_batch(texts[start:stop], add_special_tokens=False)
            for entry, own in zip(encoded, spans[start:stop], strict=True):
                ids.append(np.array(entry.ids, dtype=np.int32))
                places = np.array(entry.offsets, dtype=np.int64).reshape(-1, 2)
                mine = np.zeros(len(places), dtype=np.bool_)
                for first, last in own:
                    mine |= (places[:, 0] < last) & (places[:, 1] > first)
                said.append(mine)
                lengths.append(len(places))
        return np.concatenate(ids), np.array(lengths, dtype=np.int64), np.concatenate(said)

    def _ids(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Tokens of all texts behind each other, and how many each has."""
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for start, stop in _chunks(texts):
            # Without offsets, and without a post-processor's special tokens.
            encoded = self._core.encode_batch_fast(texts[start:stop], add_special_tokens=False)
            rows = [entry.ids for entry in encoded]
            sizes = np.fromiter(map(len, rows), np.int64, len(rows))
            ids.append(np.fromiter(chain.from_iterable(rows), np.int32, int(sizes.sum())))
            lengths.append(sizes)
        return np.concatenate(ids), np.concatenate(lengths)


def num_weighted(table: pa.Table) -> int:
    """Rows whose loss weight is not 1, which tokens cannot carry."""
    return int(pc.sum(pc.not_equal(table["curate_weight"], 1.0)).as_py() or 0)


@lru_cache(maxsize=1)
def _encoder(folder: str) -> Encoder:
    return Encoder(Path(folder))


def _chunks(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Borders of stretches of about `_CHUNK_CHARS`; one text is never cut."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    borders = [0]
    while borders[-1] < len(texts):
        done = int(ends[borders[-1] - 1]) if borders[-1] else 0
        stop = int(np.searchsorted(ends, done + _CHUNK_CHARS, side="right"))
        borders.append(max(stop, borders[-1] + 1))
    return list(pairwise(borders))


def _starts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])


def _counted(starts: npt.NDArray[np.int64], given: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(T,) False for the first `given` tokens of each document, at least one."""
    counted = np.ones(int(starts[-1]), dtype=np.bool_)
    sizes = np.minimum(np.maximum(given, 1), np.diff(starts))
    counted[_ranges(starts[:-1], sizes)] = False
    return counted


def _ranges(firsts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """first, first + 1 ... of each range, all behind each other."""
    shift = firsts - _starts(lengths)[:-1]
    return np.repeat(shift, lengths) + np.arange(int(lengths.sum()))


def _in_order(parts: Sequence[Documents], rows: npt.NDArray[np.int64]) -> Documents:
    """Documents of several sources, put where their rows stand."""
    lengths = np.concatenate([np.diff(part.starts) for part in parts])
    order = np.argsort(rows)
    index = _ranges(_starts(lengths)[:-1][order], lengths[order])
    ids = np.concatenate([part.ids for part in parts])[index]
    counted = np.concatenate([part.counted for part in parts])[index]
    return Documents(ids, counted, _starts(lengths[order]))
