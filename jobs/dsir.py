"""The passes of the scorer `dsir`: the target's n-grams, those of the pool, two models, weights.

    run/dsir/target.safetensors          each n-gram of the target, and how often it stands there
    run/dsir/counts/part-….safetensors   n-grams of each bucket in a partition, and which of the
                                         target's are among them
    run/dsir/model.safetensors           their sum, that of the target, the log ratio of each bucket
    run/quantities/dsir/                 a table for each partition
    run/dsir/largest.safetensors         the largest log weight, leaving the sign aside

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
from curate.models.text_ngrams import Hashes, buckets_of, ngram_blocks
from jobs.lexical import (
    is_train,
    note_found,
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
from scorers.dsir import DSIR, Counts, Flags, Floats, compare, gumbel, log_weights
from scorers.protocol import Scorer

log = logging.getLogger(__name__)

NAME = "dsir"
VERSION = 2
"""Raised when the same data and settings would give other numbers."""

_FEW_NGRAMS = 200
_UNSEEN = 0.5
_FLAT = 0.01
"""Largest log weight, leaving the sign aside, up to which weights tell nothing."""


def check(settings: Settings, _: Scorer) -> None:
    """Refuse settings without a target, before anything is indexed.

    Raises:
        ConfigError: there is none.
        InputError: its files are missing.
    """
    check_target(settings, NAME)


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """Count the target and each partition, fit once, weigh each partition, look at the largest.

    Raises:
        ConfigError: there is no target.
        InputError: it has not been indexed.
    """
    check(settings, scorer)
    options = cast(DSIR, scorer)
    run = RunFolder(Path(settings.run))
    payload = {"settings": plain(settings), "options": plain(options)}
    read = {"ngrams": options.ngrams, "words": options.words}
    stamp = fingerprint(
        stage="dsir target", version=VERSION, target=target_digest(settings), **read
    )
    target = Task("the target", payload | {"fingerprint": stamp}, grams_output(run), stamp)
    counted = {"buckets": options.buckets, "target": stamp}
    counting: list[Task] = []
    for part in run.partitions():
        stamp = fingerprint(stage="dsir counts", **counted, **pool_stamp(settings, part))
        entry = payload | {"partition": asdict(part), "fingerprint": stamp}
        counting.append(Task(part.name, entry, counts_output(run, part), stamp))
    stamp = fingerprint(
        stage="dsir model",
        counts=[task.fingerprint for task in counting],
        target=target.fingerprint,
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
    stamp = fingerprint(stage="dsir largest", weights=[task.fingerprint for task in weighing])
    last = Task("the whole pool", payload | {"fingerprint": stamp}, largest_output(run), stamp)
    phases = (
        Phase("dsir: the target's n-grams", [target], target_work),
        Phase("dsir: counting n-grams", counting, count_work),
        Phase("dsir: the two models", [fit], fit_work),
        Phase("dsir: weighing", weighing, weigh_work),
        Phase("dsir: the largest weight", [last], largest_work),
    )
    if all(task.is_done() for task in weighing):
        # No score needs what stands in the folder `dsir`, which may have been removed.
        phases = phases[3:] if fit.is_done() else phases[3:4]
    return OwnPasses(phases, ((NAME, 0),))


def grams_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "target.safetensors")


def counts_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "counts" / f"{part.name}.safetensors")


def model_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "model.safetensors")


def largest_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "largest.safetensors")


def target_work(payload: dict[str, Any]) -> Receipt:
    """Count the different n-grams of the target.

    Raises:
        InputError: it has none.
    """
    settings, options = parse_settings(payload["settings"]), DSIR(**payload["options"])
    found = [np.zeros(0, dtype=np.uint64)]
    for part in target_parts(settings):
        texts = target_texts(settings, part, scorer=NAME)
        blocks = ngram_blocks(texts, ngrams=options.ngrams, unit=options.words)
        found += [block.hashes for block in blocks]
    grams, times = np.unique(np.concatenate(found), return_counts=True)
    _check_any(times, "the target")
    facts = {"different": len(grams), "ngrams": int(times.sum())}
    arrays = {"grams": grams, "times": times.astype(np.int64)}
    grams_output(RunFolder(Path(settings.run))).write(
        lambda path: save_file(arrays, path), payload["fingerprint"], **facts
    )
    return facts


def count_work(payload: dict[str, Any]) -> Receipt:
    """Count the n-grams of the training examples of a partition; which are the target's."""
    settings, options = parse_settings(payload["settings"]), DSIR(**payload["options"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    texts = pool_texts(settings, part, scorer=NAME)
    counts, is_found = _counts(
        [text for text, own in zip(texts, is_train(settings, part), strict=True) if own],
        load_file(grams_output(run).path)["grams"],
        options,
    )
    num_ngrams = int(counts.sum())
    arrays = {"counts": counts, "is_found": np.packbits(is_found)}
    counts_output(run, part).write(
        lambda path: save_file(arrays, path), payload["fingerprint"], ngrams=num_ngrams
    )
    return {"rows": len(texts), "ngrams": num_ngrams}


def _counts(texts: Sequence[str], grams: Hashes, options: DSIR) -> tuple[Counts, Flags]:
    """(B,) n-grams of all texts together, and (T,) which of the target's stand in any of them."""
    found = np.zeros(options.buckets, dtype=np.int64)
    is_found = np.zeros(len(grams), dtype=np.bool_)
    for block in ngram_blocks(texts, ngrams=options.ngrams, unit=options.words):
        found += np.bincount(buckets_of(block.hashes, options.buckets), minlength=len(found))
        note_found(block.hashes, grams, is_found)
    return found, is_found


def fit_work(payload: dict[str, Any]) -> Receipt:
    """Sum the counts of the pool, and compare those of the target.

    Raises:
        InputError: the pool has no n-gram.
    """
    settings, options = parse_settings(payload["settings"]), DSIR(**payload["options"])
    run = RunFolder(Path(settings.run))
    found = load_file(grams_output(run).path)
    grams, times = found["grams"], found["times"]
    pool = np.zeros(options.buckets, dtype=np.int64)
    bits = np.zeros((len(grams) + 7) // 8, dtype=np.uint8)
    for part in run.partitions():
        counted = load_file(counts_output(run, part).path)
        pool += counted["counts"]
        bits |= counted["is_found"]
    is_found = np.unpackbits(bits, count=len(grams)).astype(np.bool_)
    target = np.zeros(options.buckets, dtype=np.int64)
    np.add.at(target, buckets_of(grams, options.buckets), times)
    facts = _facts(times, is_found, pool)
    models = compare(target, pool, smoothing=options.smoothing, prior=options.prior)
    facts["smoothing"] = round(models.strength / options.buckets, 6)
    arrays = {"target": target, "pool": pool, "log_ratios": models.log_ratios}
    model_output(run).write(lambda path: save_file(arrays, path), payload["fingerprint"], **facts)
    remove_stray_counts(run, NAME)
    return facts


def _check_any(counts: Counts, whose: str) -> None:
    if not counts.any():
        raise InputError(
            f"dsir: {whose} has no n-grams: no text in it has a word",
            fix="check the column of the text, and the option `ngrams` of the scorer dsir under"
            " score.scorers",
        )


def _facts(times: Counts, is_found: Flags, pool: Counts) -> dict[str, Any]:
    _check_any(pool, "the pool")
    total = int(times.sum())
    unseen = float(times[~is_found].sum() / total)
    if total < _FEW_NGRAMS:
        log.warning("dsir: the target has %d n-grams; from so few little can be learned of its"
                    " words", total)  # fmt: skip
    if unseen > _UNSEEN:
        log.warning("dsir: %d %% of the target's n-grams stand nowhere in the pool, which may hold"
                    " nothing of the kind", round(100 * unseen))  # fmt: skip
    return {
        "target_ngrams": total,
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
        rows=table.height, unscored=unscored, largest=float(np.abs(weights).max(initial=0.0)),
    )  # fmt: skip
    return {"rows": table.height, "unscored": unscored}


def largest_work(payload: dict[str, Any]) -> Receipt:
    """Tell where the weights of all examples are alike."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    marks = [run.quantities(part, NAME).mark() or {} for part in run.partitions()]
    largest = max(mark["largest"] for mark in marks)
    if largest <= _FLAT:
        log.warning("dsir: the weights of all examples are within 1 % of 1: the target is too"
                    " small, or too like the pool, to tell anything")  # fmt: skip
    facts = {"rows": sum(mark["rows"] for mark in marks), "largest": largest}
    arrays = {"largest": np.array([largest])}
    largest_output(run).write(lambda path: save_file(arrays, path), payload["fingerprint"], **facts)
    return facts


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
