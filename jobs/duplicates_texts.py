"""What `duplicates` reads of the texts, and which rows are equal."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import xxhash
from safetensors.numpy import load_file, save_file

from curate.config import parse
from curate.data.example import KEY, TRAIN
from curate.data.layout import RunFolder
from curate.data.partitions import Partition, remove_strays
from curate.data.reading import read_fields
from curate.data.tables import meet, read_examples, read_table
from curate.errors import ConfigError
from curate.models.text_ngrams import ngram_blocks
from curate.plan.expression import INDEX_COLUMNS, Statistic, Values, evaluate
from curate.vectors.minhash import NOTHING, NUM_MINIMA, Minima, minima
from jobs.duplicates import NAME, firsts_output, keep_expression, num_rows, texts_output
from jobs.plan_tables import score_columns
from jobs.settings import Settings, parse_settings
from scorers.duplicates import CENTRAL, FAR, FIRST, Duplicates, Positions, leaders, ranks_by

_MARKS = r"[^\w]+"


class Opened(NamedTuple):
    """What every task has at hand."""

    settings: Settings
    run: RunFolder
    options: Duplicates
    stamp: str


class Firsts(NamedTuple):
    """What is known of all rows once equal ones have been found; (N,) each."""

    leaders: Positions
    """The first row of the same content and split, by precedence."""
    ranks: Positions
    """Place in the order of precedence, from 0; of positions, where cells give the order."""
    is_train: npt.NDArray[np.bool_]
    is_leaked: npt.NDArray[np.bool_]
    """Rows whose content stands in the other split too."""

    @property
    def is_first(self) -> npt.NDArray[np.bool_]:
        return self.leaders == np.arange(len(self.leaders))


def open_task(payload: dict[str, Any]) -> Opened:
    settings = parse_settings(payload["settings"])
    options = parse(Duplicates, payload["options"])
    return Opened(settings, RunFolder(Path(settings.run)), options, payload["fingerprint"])


def open_firsts(run: RunFolder) -> Firsts:
    arrays = load_file(firsts_output(run).path)
    return Firsts(
        arrays["leaders"],
        arrays["ranks"],
        arrays["is_train"].astype(np.bool_),
        arrays["is_leaked"].astype(np.bool_),
    )


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    with path.open("wb") as file:  # a name without .npy would get one
        np.save(file, array, allow_pickle=False)


def texts_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Hashes of the normalised texts of one partition (N, 2), or their minima (N, K)."""
    work = open_task(payload)
    part = Partition(**payload["partition"])
    fields = read_fields(work.run, part, work.settings.sources[part.source]).drop("label")
    if work.options.method == "near":
        found = _minima(fields, work.options)
        facts = {"without": int((found == NOTHING).all(axis=1).sum())}
    else:
        found, facts = normalised_hashes(fields), dict[str, int]()
    texts_output(work.run, part).write(
        lambda path: save_array(path, found), work.stamp, rows=len(found), **facts
    )
    return {"rows": len(found), **facts}


def normalised_hashes(fields: pl.DataFrame) -> npt.NDArray[np.uint64]:
    """(N, 2) 128 bits of each example: equal where all fields have the same words in order.

    Args:
        fields: texts or chats, one column a field.
    """
    columns = [_texts(fields[name]) for name in fields.columns]
    plain = [
        column.str.normalize("NFKC").str.to_lowercase().str.replace_all(_MARKS, " ")
        .str.strip_chars().to_list()
        for column in columns
    ]  # fmt: skip
    raw = [column.to_list() for column in columns]
    found = np.empty((fields.height, 2), dtype=np.uint64)
    for row, values in enumerate(zip(*plain, strict=True)):
        # Where there is no word at all, "!" and "?" are not the same.
        own = values if any(values) else ("\0", *(column[row] for column in raw))
        state = xxhash.xxh3_128()
        for value in own:
            encoded = value.encode()
            state.update(len(encoded).to_bytes(8, "little"))
            state.update(encoded)
        digest = state.intdigest()
        found[row] = digest >> 64, digest & ((1 << 64) - 1)
    return found


def _minima(fields: pl.DataFrame, options: Duplicates) -> Minima:
    """(N, K) of the n-grams of all fields together; of the words where there are too few."""
    columns = [_texts(fields[name]) for name in fields.columns]
    texts = pl.select(pl.concat_str(columns, separator="\n")).to_series().to_list()
    found = _minima_of(texts, options.ngrams, options)
    short = np.flatnonzero((found == NOTHING).all(axis=1))
    if len(short) and options.ngrams > 1:
        found[short] = _minima_of([texts[row] for row in short.tolist()], 1, options)
    return found


def _minima_of(texts: list[str], ngrams: int, options: Duplicates) -> Minima:
    found = [
        minima(block.texts, block.hashes, block.num_texts)
        for block in ngram_blocks(
            texts, ngrams=(ngrams, ngrams), unit=options.words, punctuation=False
        )
    ]
    return np.concatenate(found) if found else np.zeros((0, NUM_MINIMA), dtype=np.uint32)


def _texts(field: pl.Series) -> pl.Series:
    """The texts of a field, of a chat all it says."""
    if field.dtype == pl.String:
        return field.fill_null("")
    if not isinstance(field.dtype, pl.List):
        raise ConfigError(
            f"duplicates reads texts, and {field.name} holds {field.dtype}",
            fix="use method: exact without normalize",
        )
    said = pl.concat_str(
        pl.element().struct.field("role"), pl.element().struct.field("content").fill_null(""),
        separator="\x1f", ignore_nulls=True,
    )  # fmt: skip
    chats = field.to_frame().select(pl.col(field.name).list.eval(said).list.join("\x1e"))
    return chats.to_series().fill_null("")


def firsts_work(payload: dict[str, Any]) -> dict[str, Any]:
    """The order of precedence, and the first row of each content."""
    work = open_task(payload)
    parts = work.run.partitions()
    index = pl.concat([_index(work.run, part) for part in parts])
    if work.options.normalize:
        keys = np.concatenate([np.load(texts_output(work.run, part).path) for part in parts])
    else:
        # 64 bits of the content and, for nothing, its length: the more contents differ.
        keys = index.select(pl.col("content"), pl.col("num_chars").cast(pl.UInt64)).to_numpy()
        keys = keys.astype(np.uint64)
    is_train = index["is_train"].to_numpy()
    values = _values(work, index["num_chars"])
    ranks = ranks_by(values, index.height)
    found = leaders(keys, ~is_train, ranks)
    anywhere = leaders(keys, np.zeros(len(keys), dtype=np.bool_), ranks)
    both = np.zeros((2, len(keys)), dtype=np.bool_)
    both[is_train.astype(np.int64), anywhere] = True
    arrays = {
        "leaders": found,
        "ranks": ranks,
        "is_train": is_train.astype(np.uint8),
        "is_leaked": (both[0] & both[1])[anywhere].astype(np.uint8),
    }
    firsts_output(work.run).write(
        lambda path: save_file(arrays, path), work.stamp, rows=len(found),
        without_value=0 if values is None else int(np.isnan(values).sum()),
    )  # fmt: skip
    remove_strays(work.run.root / NAME / "groups", {part.name for part in parts})
    return {"rows": len(found)}


def _index(run: RunFolder, part: Partition) -> pl.DataFrame:
    """What 17 bytes a row hold."""
    table = read_examples(run, part, ["content", "num_chars", "split"])
    return table.select("content", "num_chars", is_train=pl.col("split") == TRAIN)


def _values(work: Opened, num_chars: pl.Series) -> npt.NDArray[np.float64] | None:
    """(N,) what `keep_by` says of each row, NaN where it says nothing; None for positions."""
    if work.options.order in (FIRST, FAR, CENTRAL):
        return None
    expression = keep_expression(work.options, score_columns(work.run))
    columns = {"num_chars": num_chars.cast(pl.Float64).to_numpy()}
    for name in expression.columns:
        if name not in INDEX_COLUMNS:
            columns[name] = _column(work.run, *name.split(".", 1))
    found = evaluate(expression.root, columns.__getitem__, _statistic)
    return np.where(np.isfinite(found), found, np.nan)


def _column(run: RunFolder, scorer: str, column: str) -> npt.NDArray[np.float64]:
    """(N,) a column of a score, NaN where it has none."""
    pieces: list[pl.Series] = []
    for part in run.partitions():
        table = read_table(run.scores(part, scorer).path, [*KEY, column])
        meet(read_examples(run, part, KEY), table)
        assert table.height == num_rows(run, part)
        pieces.append(table[column].cast(pl.Float64).fill_null(float("nan")))
    return pl.concat(pieces).to_numpy()


def _statistic(node: Statistic, values: Values) -> Values:
    """Ranks and z-scores over all rows, whatever their domain."""
    found = np.full(len(values), np.nan)
    finite = np.asarray(np.isfinite(values))
    own = values[finite]
    if node.kind == "zscore":
        spread = own.std() if len(own) else 0.0
        found[finite] = (own - own.mean()) / spread if spread > 0 else 0.0
        return found
    ordered = np.sort(own)
    low, high = (np.searchsorted(ordered, own, side) for side in ("left", "right"))
    found[finite] = (low + high - 1) / 2 / max(len(own) - 1, 1) if len(own) > 1 else 0.5
    return found
