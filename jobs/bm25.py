"""The passes of the scorer `bm25`: the target's words, how many examples hold each, the scores.

    run/bm25/queries.safetensors          the target's words, how often each stands there, and
                                          those of each of its rows
    run/bm25/counts/part-….safetensors    training examples of a partition that hold each word
    run/bm25/weights.safetensors          idf of each word, mean length
    run/quantities/bm25/                  a table for each partition

The folder `bm25` can be removed once the scores are there; new data then costs the counts again.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file

from curate.config import plain
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples, write_table
from curate.errors import InputError
from curate.models.text_ngrams import Block, Hashes, ngram_blocks
from jobs.lexical import (
    is_train,
    pool_stamp,
    pool_texts,
    remove_stray_counts,
    target_digest,
    target_parts,
    target_texts,
)
from jobs.own_passes import OwnPasses, Phase
from jobs.run import Receipt, Task
from jobs.settings import Settings, parse_settings
from jobs.target import check_target
from scorers.bm25 import BM25, Counts, Floats, best_match, inverse_frequencies, query_weights
from scorers.bm25 import saturated as saturated_counts
from scorers.protocol import Scorer

log = logging.getLogger(__name__)

NAME = "bm25"
VERSION = 2
"""Raised when the same data and settings would give other numbers."""

MANY_QUERIES = 10_000
"""From here on the log says what the maximum over the rows of the target costs."""

_UNSEEN = 0.5


class Weights(NamedTuple):
    """What scores a row."""

    words: Hashes
    """(V,) ascending."""
    queries: Any
    """(Q, V) sparse."""
    rows: Counts
    """(Q,) place in the target of each query."""
    mean: Floats
    """(V,) of all queries."""
    mean_length: float


def check(settings: Settings, _: Scorer) -> None:
    """Refuse settings without a target, before anything is indexed.

    Raises:
        ConfigError: there is none.
        InputError: its files are missing.
    """
    check_target(settings, NAME)


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """The target's words, counts of each partition, weights, scores of each partition.

    Raises:
        ConfigError: there is no target.
        InputError: it has not been indexed.
    """
    check(settings, scorer)
    options = cast(BM25, scorer)
    run = RunFolder(Path(settings.run))
    payload = {"settings": plain(settings), "options": plain(options)}
    stamp = fingerprint(
        stage="bm25 queries",
        version=VERSION,
        target=target_digest(settings),
        ngrams=options.ngrams,
        words=options.words,
    )
    target = Task("the target", payload | {"fingerprint": stamp}, queries_output(run), stamp)
    counting: list[Task] = []
    for part in run.partitions():
        mark = fingerprint(stage="bm25 counts", queries=stamp, **pool_stamp(settings, part))
        entry = payload | {"partition": asdict(part), "fingerprint": mark}
        counting.append(Task(part.name, entry, counts_output(run, part), mark))
    stamp = fingerprint(stage="bm25 weights", counts=[task.fingerprint for task in counting])
    weights = Task("the whole pool", payload | {"fingerprint": stamp}, weights_output(run), stamp)
    scoring: list[Task] = []
    for task in counting:
        part = Partition(**task.payload["partition"])
        mark = fingerprint(
            stage=NAME,
            weights=stamp,
            counts=task.fingerprint,
            part=part.name,
            options=[options.combine, options.k1, options.b],
        )
        entry = task.payload | {"fingerprint": mark}
        scoring.append(Task(part.name, entry, run.quantities(part, NAME), mark))
    phases = (
        Phase("bm25: the target's words", [target], queries_work),
        Phase("bm25: counting examples", counting, count_work),
        Phase("bm25: weights", [weights], weights_work),
        Phase("bm25: scoring", scoring, score_work),
    )
    if all(task.is_done() for task in scoring):
        # Nothing reads what stands in the folder `bm25`, which may have been removed.
        phases = phases[-1:]
    return OwnPasses(phases, ((NAME, 0),))


def queries_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "queries.safetensors")


def counts_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "counts" / f"{part.name}.safetensors")


def weights_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "weights.safetensors")


def queries_work(payload: dict[str, Any]) -> Receipt:
    """The distinct words of each row of the target.

    Raises:
        InputError: it has no words.
    """
    settings, options = parse_settings(payload["settings"]), BM25(**payload["options"])
    pairs: list[np.ndarray] = []  # row and word, each pair once
    often: list[np.ndarray] = []  # how often the word stands in the row
    num_rows = 0
    for part in target_parts(settings):
        texts = target_texts(settings, part, scorer=NAME)
        for block in _blocks(texts, options):
            rows = (block.texts + (num_rows + block.first)).astype(np.uint64)
            both, times = np.unique(np.stack([rows, block.hashes]), axis=1, return_counts=True)
            pairs.append(both)
            often.append(times)
        num_rows += len(texts)
    rows, hashes = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.uint64)
    if not len(rows):
        raise InputError(
            "bm25: the target has no words",
            fix="check the column of its text, and the option `ngrams` of the scorer bm25 under"
            " score.scorers",
        )
    words, places = np.unique(hashes, return_inverse=True)
    own, sizes = np.unique(rows, return_counts=True)
    times = np.zeros(len(words), dtype=np.int64)
    np.add.at(times, places, np.concatenate(often))
    arrays = {
        "words": words,
        "times": times,
        "places": places.astype(np.int64),
        "starts": np.concatenate([[0], np.cumsum(sizes)]),
        "rows": own.astype(np.int64),
    }
    facts = {"words": len(words), "rows": len(own), "without_words": num_rows - len(own)}
    run = RunFolder(Path(settings.run))
    queries_output(run).write(lambda path: save_file(arrays, path), payload["fingerprint"], **facts)
    return facts


def _blocks(texts: Sequence[str], options: BM25) -> Iterator[Block]:
    return ngram_blocks(texts, ngrams=options.ngrams, unit=options.words, punctuation=False)


def count_work(payload: dict[str, Any]) -> Receipt:
    """How many training examples of a partition hold each word of the target."""
    settings, options = parse_settings(payload["settings"]), BM25(**payload["options"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    words = load_file(queries_output(run).path)["words"]
    texts = pool_texts(settings, part, scorer=NAME)
    own = is_train(settings, part)
    texts = [text for text, is_own in zip(texts, own, strict=True) if is_own]
    found_in, length = np.zeros(len(words), dtype=np.int64), 0
    for counts, lengths in _counts(texts, words, options):
        found_in += np.bincount(counts.indices, minlength=len(words))
        length += int(lengths.sum())
    totals = np.array([len(texts), length])
    counts_output(run, part).write(
        lambda path: save_file({"found_in": found_in, "totals": totals}, path),
        payload["fingerprint"],
    )
    return {"rows": len(own)}


def _counts(texts: Sequence[str], words: Hashes, options: BM25) -> Iterator[tuple[Any, Counts]]:
    """(n, V) sparse counts of the target's words and (n,) lengths, of some texts at a time."""
    from scipy.sparse import csr_array

    for block in _blocks(texts, options):
        columns = np.minimum(np.searchsorted(words, block.hashes), len(words) - 1)
        known = words[columns] == block.hashes
        places = (block.texts[known], columns[known])
        counts = csr_array((np.ones(len(places[0])), places), shape=(block.num_texts, len(words)))
        counts.sum_duplicates()
        yield counts, np.bincount(block.texts, minlength=block.num_texts)


def weights_work(payload: dict[str, Any]) -> Receipt:
    """Sum the counts; what a word weighs.

    Raises:
        InputError: no word of the target stands in the pool.
    """
    settings = parse_settings(payload["settings"])
    options = BM25(**payload["options"])
    run = RunFolder(Path(settings.run))
    queries = load_file(queries_output(run).path)
    found_in, totals = np.zeros(len(queries["words"]), dtype=np.int64), np.zeros(2, np.int64)
    for part in run.partitions():
        counted = load_file(counts_output(run, part).path)
        found_in += counted["found_in"]
        totals += counted["totals"]
    if not found_in.any():
        raise InputError(
            "bm25: no word of the target stands in the pool",
            fix="check the columns of the texts, or use vectors: rds, gio",
        )
    unknown = np.add.reduceat(found_in[queries["places"]] > 0, queries["starts"][:-1]) == 0
    times = queries["times"]
    share = float(times[found_in == 0].sum() / times.sum())
    if share > _UNSEEN:
        log.warning("bm25: %d %% of the target's words stand nowhere in the pool",
                    round(100 * share))  # fmt: skip
    if options.combine == "max" and len(queries["rows"]) >= MANY_QUERIES:
        log.warning("bm25: the maximum over %d target rows takes time in proportion; combine: mean"
                    " does not", len(queries["rows"]))  # fmt: skip
    arrays = {
        "idf": inverse_frequencies(found_in, int(totals[0])),
        "mean_length": np.array([totals[1] / max(1, totals[0])]),
    }
    facts = {
        "rows": int(totals[0]),
        "unseen_words_share": round(share, 6),
        "target_rows_without_match": int(unknown.sum()),
    }
    weights_output(run).write(lambda path: save_file(arrays, path), payload["fingerprint"], **facts)
    remove_stray_counts(run, NAME)
    return facts


def score_work(payload: dict[str, Any]) -> Receipt:
    """Scores of one partition; null where a text has no word."""
    settings, options = parse_settings(payload["settings"]), BM25(**payload["options"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    mark = weights_output(run).mark() or {}
    weights = _weights(run.root, digest=mark.get("digest", ""))
    texts = pool_texts(settings, part, scorer=NAME)
    scores, nearest = np.zeros(len(texts)), np.full(len(texts), np.nan)
    sizes = np.zeros(len(texts), dtype=np.int64)
    first = 0
    for counts, lengths in _counts(texts, weights.words, options):
        own = slice(first, first + len(lengths))
        rows = saturated_counts(
            counts, lengths, mean_length=weights.mean_length, k1=options.k1, b=options.b
        )
        if options.combine == "max":
            scores[own], which = best_match(rows, weights.queries)
            nearest[own] = np.where(scores[own] > 0, weights.rows[which], np.nan)
        else:
            scores[own] = rows @ weights.mean
        sizes[own] = lengths
        first = own.stop
    missing = sizes == 0
    scores[missing] = np.nan
    table = read_examples(run, part, KEY).hstack(
        pl.DataFrame({"bm25": scores, "bm25_row": nearest}).fill_nan(None).cast(pl.Float32)
    )
    unscored = int(missing.sum())
    run.quantities(part, NAME).write(
        lambda path: write_table(table, path), payload["fingerprint"],
        rows=table.height, unscored=unscored,
    )  # fmt: skip
    return {"rows": table.height, "unscored": unscored}


@lru_cache(maxsize=1)
def _weights(root: Path, *, digest: str) -> Weights:
    """The weights, once per process; `digest` tells one from the next."""
    from scipy.sparse import csr_array

    run = RunFolder(root)
    found, queries = load_file(weights_output(run).path), load_file(queries_output(run).path)
    places, starts = queries["places"], queries["starts"]
    shape = (len(starts) - 1, len(queries["words"]))
    matrix = query_weights(csr_array((np.ones(len(places)), places, starts), shape=shape),
                           found["idf"])  # fmt: skip
    mean = np.asarray(matrix.sum(axis=0)).ravel() / shape[0]
    return Weights(queries["words"], matrix, queries["rows"], mean, float(found["mean_length"][0]))
