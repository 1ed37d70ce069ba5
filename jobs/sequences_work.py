"""What a worker does for `jobs.sequences`: the sequences of one partition, or of the target.

Shapes: N examples of a partition.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.example import TRAIN
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples
from curate.errors import ConfigError, InputError
from curate.models.packing import pack
from curate.models.sequence_files import check_layout, write_sequences
from curate.models.sequences import PARTS, half_of
from curate.models.tasks import Encoded, Task, build_task
from curate.models.tokens import padding_id
from curate.models.training_data import join
from jobs.fields import example_fields
from jobs.run import Receipt
from jobs.sequences import How, sequences_output, target_output
from jobs.settings import task_settings
from jobs.target import target_folder, target_settings, target_task, target_work
from jobs.training_work import Workshop, open_workshop

log = logging.getLogger(__name__)

_UNCUT = 1 << 30
_TRAIN_HALVES = ("reference", "proxy")
_TARGET_HALVES = ("target", "target_held_out")


def make_sequences(payload: dict[str, Any]) -> Receipt:
    """Write the sequences of one partition.

    Raises:
        ConfigError: the task's arrays cannot be cut into sequences.
        InputError: the partition's file has changed, or the target was not indexed.
    """
    shop, how = open_workshop(payload), How(**payload["how"])
    part = Partition(**payload["partition"])
    examples = read_examples(shop.run, part, ["domain", "split", "content"])
    is_train = (examples["split"] == TRAIN).to_numpy()
    parts = _parts(examples["content"], shop.settings.seed, _TRAIN_HALVES)
    parts = np.where(is_train, parts, PARTS.index("held_out")).astype(np.uint8)
    is_copy = np.zeros(len(parts), dtype=np.bool_)
    if how.exclude_target:
        is_copy = examples["content"].is_in(_target_contents(shop).to_list()).to_numpy()
        if is_copy.any():
            log.info("%d examples of %s stand in the target too; no proxy reads them",
                     int(is_copy.sum()), part.name)  # fmt: skip
    encoded = _task_of(shop, how).encode(example_fields(shop.settings, shop.run, part))
    found = _cut(shop, how, encoded, examples["domain"], parts, ~is_copy)
    facts = _facts(examples["domain"], encoded, is_copy)
    return _write(found, sequences_output(shop.run, payload["key"], part), payload, facts)


def make_target(payload: dict[str, Any]) -> Receipt:
    """Index the target where that is due, and write its sequences.

    Raises:
        InputError: nothing in the target counts.
        ConfigError: the target lacks a column that the task reads.
    """
    shop, how = open_workshop(payload), How(**payload["how"])
    index = target_task(shop.settings)
    if not index.is_done():
        target_work(index.payload)
    folder, own = target_folder(shop.run), target_settings(shop.settings)
    task = _task_of(shop, how)
    tables = [read_examples(folder, p, ["domain", "content"]) for p in folder.partitions()]
    try:
        encoded = join([task.encode(example_fields(own, folder, p)) for p in folder.partitions()])
    except ConfigError as error:
        raise ConfigError(
            f"target: {error.what}", fix=error.fix.replace("sources.NAME", "target")
        ) from error
    if not encoded.num_scored.any():
        raise InputError(
            "the target has no example in which anything counts",
            fix="check target: its path and the columns of text or label",
        )
    examples = pl.concat(tables)
    halves = _parts(examples["content"], shop.settings.seed, _TARGET_HALVES)
    every = np.ones(len(halves), dtype=np.bool_)
    found = _cut(shop, how, encoded, examples["domain"], halves, every)
    facts = _facts(examples["domain"], encoded, ~every)
    return _write(found, target_output(shop.run, payload["key"]), payload, facts)


def _task_of(shop: Workshop, how: How) -> Task:
    """The task that encodes: with its own length, and whatever the run's model reads."""
    kind = task_settings(shop.settings)
    if how.length is None:
        return shop.task
    # Texts to be packed are read whole: what does not fit goes on in the next window.
    return build_task(replace(kind, max_tokens=_UNCUT if how.packed else how.length),
                      shop.tokenizer)  # fmt: skip


def _parts(content: pl.Series, seed: int, halves: tuple[str, str]) -> npt.NDArray[np.uint8]:
    """(N,) number of the half that each example falls into."""
    found = [PARTS.index(half_of(own, seed=seed, halves=halves)) for own in content.to_list()]
    return np.array(found, dtype=np.uint8)


def _target_contents(shop: Workshop) -> pl.Series:
    """Content hashes of the target's examples; their labels are no part of it."""
    folder = target_folder(shop.run)
    parts = folder.partitions()
    if not parts:
        raise InputError("the target has not been indexed", fix="run the same command again")
    return pl.concat([read_examples(folder, p, ["content"])["content"] for p in parts]).unique()


@dataclass(frozen=True, slots=True)
class _Cut:
    """Sequences, and what `write_sequences` is told of them."""

    encoded: Encoded
    domain: npt.NDArray[np.int32]
    part: npt.NDArray[np.uint8]
    names: list[str]


def _cut(
    shop: Workshop,
    how: How,
    encoded: Encoded,
    domains: pl.Series,
    parts: npt.NDArray[np.uint8],
    wanted: npt.NDArray[np.bool_],
) -> _Cut:
    """The wanted examples as sequences."""
    check_layout(encoded, task_settings(shop.settings).kind)
    names = sorted(domains.unique().to_list())
    place = {name: number for number, name in enumerate(names)}
    codes = np.array([place[name] for name in domains.to_list()], dtype=np.int64)
    if not how.packed:
        encoded = replace(encoded, num_scored=np.where(wanted, encoded.num_scored, 0))
        return _Cut(encoded, codes.astype(np.int32), parts, names)
    assert how.length is not None
    groups = np.where(wanted, codes * len(PARTS) + parts, -1)
    padding = padding_id(shop.tokenizer, needed=False)
    packed = pack(encoded, groups, length=how.length, padding=padding)
    domain, part = np.divmod(packed.groups, len(PARTS))
    return _Cut(packed.encoded, domain.astype(np.int32), part.astype(np.uint8), names)


def _facts(domains: pl.Series, encoded: Encoded, is_copy: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """What the mark says beside the counts."""
    if encoded.problems:
        first = min(encoded.problems)
        log.warning("%d examples become no sequence; the first: %s",
                    len(encoded.problems), encoded.problems[first])  # fmt: skip
    excluded = domains.filter(pl.Series(is_copy)).value_counts(sort=False)
    return {
        "rows": len(domains),
        "unscored": int((encoded.num_scored == 0).sum()),
        "truncated": int(encoded.truncated.sum()),
        "excluded": dict(sorted(excluded.iter_rows())),
    }


def _write(found: _Cut, output: Output, payload: dict[str, Any], facts: dict[str, Any]) -> Receipt:
    scored = found.encoded.num_scored
    facts |= {"sequences": int((scored > 0).sum()), "tokens": int(scored.sum())}

    def write(path: Path) -> None:
        write_sequences(
            path, found.encoded, domain=found.domain, part=found.part, names=found.names
        )

    output.write(write, payload["fingerprint"], **facts)
    return facts
