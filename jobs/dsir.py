"""The passes of the scorer `dsir`: count the n-grams of the pool, make the two models, weigh.

    run/dsir/counts/part-….safetensors   n-grams of each bucket in a partition
    run/dsir/model.safetensors           their sum, that of the target, the log ratio of each bucket
    run/quantities/dsir/                 a table for each partition

The folder `dsir` can be removed once the scores are there; new data then costs the counts again.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import xxhash
from safetensors.numpy import load_file, save_file

from curate.config import plain
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples, write_table
from curate.errors import InputError
from curate.models.text_ngrams import buckets_of, ngram_blocks
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
from scorers.dsir import DSIR, Counts, Floats, compare, gumbel, log_weights
from scorers.protocol import Scorer

log = logging.getLogger(__name__)

NAME = "dsir"
VERSION = 1
"""Raised when the same data and settings would give other numbers."""

_FEW_NGRAMS = 200
_UNSEEN = 0.5


def check(settings: Settings, _: Scorer) -> None:
    """Refuse settings without a target, before anything is indexed.

    Raises:
        ConfigError: there is none.
        InputError: its files are missing.
    """
    check_target(settings, NAME)


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """Count each partition, fit once, weigh each partition.

    Raises:
        ConfigError: there is no target.
        InputError: it has not been indexed.
    """
    check(settings, scorer)
    options = cast(DSIR, scorer)
    run = RunFolder(Path(settings.run))
    payload = {"settings": plain(settings), "options": plain(options)}
    counted = {"buckets": options.buckets, "ngrams": options.ngrams, "words": options.words}
    counting: list[Task] = []
    for part in run.partitions():
        stamp = fingerprint(
            stage="dsir counts", version=VERSION, **counted, **pool_stamp(settings, part)
        )
        entry = payload | {"partition": asdict(part), "fingerprint": stamp}
        counting.append(Task(part.name, entry, counts_output(run, part), stamp))
    stamp = fingerprint(
        stage="dsir model",
        version=VERSION,
        counts=[task.fingerprint for task in counting],
        target=target_digest(settings),
        smoothing=options.smoothing,
        prior=options.prior,
    )
    fit = Task("the whole pool", payload | {"fingerprint": stamp}, model_output(run), stamp)
    weighing: list[Task] = []
    for task in counting:
        part = Partition(**task.payload["partition"])
        mark = fingerprint(
            stage=NAME, model=stamp, counts=task.fingerprint, part=part.name, seed=settings.seed
        )
        entry = task.payload | {"fingerprint": mark}
        weighing.append(Task(part.name, entry, run.quantities(part, NAME), mark))
    phases = (
        Phase("dsir: counting n-grams", counting, count_work),
        Phase("dsir: the two models", [fit], fit_work),
        Phase("dsir: weighing", weighing, weigh_work),
    )
    if all(task.is_done() for task in weighing):
        # Nothing reads what stands in the folder `dsir`, which may have been removed.
        phases = phases[-1:]
    return OwnPasses(phases, ((NAME, 0),))


def counts_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "counts" / f"{part.name}.safetensors")


def model_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "model.safetensors")


def count_work(payload: dict[str, Any]) -> Receipt:
    """Count the n-grams of the training examples of a partition."""
    settings, options = parse_settings(payload["settings"]), DSIR(**payload["options"])
    part = Partition(**payload["partition"])
    texts = pool_texts(settings, part, scorer=NAME)
    counts = _counts(
        [text for text, own in zip(texts, is_train(settings, part), strict=True) if own], options
    )
    output = counts_output(RunFolder(Path(settings.run)), part)
    num_ngrams = int(counts.sum())
    output.write(
        lambda path: save_file({"counts": counts}, path), payload["fingerprint"], ngrams=num_ngrams
    )
    return {"rows": len(texts), "ngrams": num_ngrams}


def _counts(texts: Sequence[str], options: DSIR) -> Counts:
    """(B,) n-grams of all texts together."""
    found = np.zeros(options.buckets, dtype=np.int64)
    for block in ngram_blocks(texts, ngrams=options.ngrams, unit=options.words):
        found += np.bincount(buckets_of(block.hashes, options.buckets), minlength=len(found))
    return found


def fit_work(payload: dict[str, Any]) -> Receipt:
    """Sum the counts of the pool, count the target, and compare.

    Raises:
        InputError: the pool or the target has no n-gram.
    """
    settings, options = parse_settings(payload["settings"]), DSIR(**payload["options"])
    run = RunFolder(Path(settings.run))
    pool = np.zeros(options.buckets, dtype=np.int64)
    for part in run.partitions():
        pool += load_file(counts_output(run, part).path)["counts"]
    target = np.zeros(options.buckets, dtype=np.int64)
    for part in target_parts(settings):
        target += _counts(target_texts(settings, part, scorer=NAME), options)
    facts = _facts(target, pool)
    models = compare(target, pool, smoothing=options.smoothing, prior=options.prior)
    facts["smoothing"] = round(models.strength / options.buckets, 6)
    arrays = {"target": target, "pool": pool, "log_ratios": models.log_ratios}
    model_output(run).write(lambda path: save_file(arrays, path), payload["fingerprint"], **facts)
    remove_stray_counts(run, NAME)
    return facts


def _facts(target: Counts, pool: Counts) -> dict[str, Any]:
    for counts, whose in ((target, "the target"), (pool, "the pool")):
        if not counts.any():
            raise InputError(
                f"dsir: {whose} has no n-grams: no text in it has a word",
                fix="check the column of the text, and dsir.ngrams",
            )
    unseen = float(target[pool == 0].sum() / target.sum())
    if target.sum() < _FEW_NGRAMS:
        log.warning("dsir: the target has %d n-grams; from so few little can be learned of its"
                    " words", int(target.sum()))  # fmt: skip
    if unseen > _UNSEEN:
        log.warning("dsir: %d %% of the target's n-grams stand nowhere in the pool, which may hold"
                    " nothing of the kind", round(100 * unseen))  # fmt: skip
    return {
        "target_ngrams": int(target.sum()),
        "pool_ngrams": int(pool.sum()),
        "target_unseen_share": round(unseen, 6),
    }


def weigh_work(payload: dict[str, Any]) -> Receipt:
    """Weights and keys of one partition; null where a text has no n-gram."""
    settings, options = parse_settings(payload["settings"]), DSIR(**payload["options"])
    part = Partition(**payload["partition"])
    run = RunFolder(Path(settings.run))
    output = model_output(run)
    ratios = _ratios(output.path, digest=(output.mark() or {}).get("digest", ""))
    examples = read_examples(run, part, KEY)
    weights, sizes = _weigh(pool_texts(settings, part, scorer=NAME), ratios, options)
    name = f"{settings.seed}\0{NAME}\0{part.source}\0{part.file}"
    draws = gumbel(examples["row"].to_numpy(), stream=xxhash.xxh3_64_intdigest(name.encode()))
    values = {
        "dsir_log_weight": weights,
        "dsir_key": weights + draws,
        "dsir_per_ngram": weights / np.maximum(sizes, 1),
        "dsir_num_ngrams": sizes,
    }
    missing = pl.Series(sizes == 0)
    columns = pl.DataFrame(values).select(
        pl.when(~missing).then(pl.col(column)).cast(pl.Float32) for column in values
    )
    table = examples.hstack(columns)
    unscored = int(missing.sum())
    run.quantities(part, NAME).write(
        lambda path: write_table(table, path), payload["fingerprint"],
        rows=table.height, unscored=unscored,
    )  # fmt: skip
    return {"rows": table.height, "unscored": unscored}


def _weigh(texts: Sequence[str], ratios: Floats, options: DSIR) -> tuple[Floats, Counts]:
    """(N,) log weights, and how many n-grams each text has."""
    weights, sizes = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    for block in ngram_blocks(texts, ngrams=options.ngrams, unit=options.words):
        own = slice(block.first, block.first + block.num_texts)
        buckets = buckets_of(block.hashes, options.buckets)
        weights[own] = log_weights(block.texts, buckets, ratios, num_texts=block.num_texts)
        sizes[own] = np.bincount(block.texts, minlength=block.num_texts)
    return weights, sizes


@lru_cache(maxsize=1)
def _ratios(path: Path, *, digest: str) -> Floats:
    """The log ratios, once per process; `digest` tells one model from the next."""
    return load_file(path)["log_ratios"]
