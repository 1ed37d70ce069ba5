"""The fit of `label_issues`: folds over the whole pool, and one model for each of them.

Memory: 17 bytes for each example of the pool, and the examples that are fitted on.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import save_file

from curate.data.example import TRAIN
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.data.reading import read_fields
from curate.data.tables import read_examples
from curate.errors import InputError
from curate.models.epochs import random_seed
from curate.models.out_of_fold import (
    NOT_JUDGED,
    Classifiers,
    Features,
    Labels,
    Split,
    fit_folds,
    split_folds,
)
from curate.models.plain_inputs import finite_rows, plain_inputs
from jobs.settings import Settings, parse_settings, task_settings
from scorers.label_issues import LabelIssues

log = logging.getLogger(__name__)

NAME = "label_issues"
_MAX_NUMBERS = 100_000_000
"""Of a matrix of given numbers that is fitted on; fewer examples are drawn where they are wide."""
_PENALTY = {"texts": 1.0, "numbers": 10.0}


def fit_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "fit.safetensors")


class Work(NamedTuple):
    """What every task of the scorer has at hand."""

    settings: Settings
    run: RunFolder
    options: LabelIssues
    stamp: str
    task: Any
    """Settings of the task, or None."""


def open_work(payload: dict[str, Any]) -> Work:
    settings = parse_settings(payload["settings"])
    task = task_settings(settings) if settings.task else None
    options = LabelIssues(**payload["options"])
    run = RunFolder(Path(settings.run))
    return Work(settings, run, options, payload["fingerprint"], task)


def fit_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Draw folds over the whole pool and fit one model for each.

    Raises:
        InputError: there are no labels, or fewer than two classes with enough examples.
        ConfigError: the examples hold nothing that a simple model reads.
    """
    work = open_work(payload)
    parts = work.run.partitions()
    tables = [read_examples(work.run, part, ["content", "label", "split"]) for part in parts]
    sizes = [table.height for table in tables]
    pool = pl.concat(tables)
    labels = pool["label"].fill_null(-1).to_numpy()
    split = split_folds(
        labels,
        pool["content"].to_numpy(),
        (pool["split"] == TRAIN).to_numpy(),
        num_folds=work.options.folds,
        fit_rows=_fit_rows(work),
        seed=random_seed(work.settings.seed, NAME),
    )
    _check_classes(split, labels, work.options.folds)
    values, rows = _drawn(work, split, sizes)
    features, matrix = _features(work, values, labels)
    num_classes = _num_classes(work, labels)
    penalty = work.options.penalty
    models = fit_folds(
        matrix,
        labels[rows],
        split.folds[rows],
        num_folds=work.options.folds,
        num_classes=num_classes,
        penalty=_PENALTY["texts" if isinstance(values, list) else "numbers"]
        if penalty is None
        else penalty,
    )
    folds = _without_unseen(split, labels, models)
    facts = {"num_fitted": len(rows), "small_classes": {str(k): n for k, n in split.small.items()}}
    arrays = {
        **features.arrays(),
        "weights": models.weights,
        "biases": models.biases,
        "folds": folds,
        "starts": np.cumsum([0, *sizes]),
    }
    fit_output(work.run).write(lambda path: save_file(arrays, path), work.stamp, **facts)
    return {"rows": len(rows)}


def _check_classes(split: Split, labels: Labels, num_folds: int) -> None:
    """Say which classes are too small, and refuse to go on where nothing can be compared."""
    if split.small:
        log.warning(
            "%s: %d classes have fewer than %d different examples and are not judged: %s",
            NAME, len(split.small), num_folds,
            ", ".join(f"{label} ({count})" for label, count in sorted(split.small.items())[:10]),
        )  # fmt: skip
    if len(np.unique(labels[split.is_fitted])) < 2:
        raise InputError(
            "label_issues needs two classes or more, each with examples for every fold:"
            f" {int((labels >= 0).sum())} of {len(labels)} examples have a label",
            fix="set sources.NAME.label to the column of the class, or lower folds",
        )


def _fit_rows(work: Work) -> int:
    """`fit_rows`, or fewer where each has many numbers."""
    marks = (work.run.examples(part).mark() or {} for part in work.run.partitions())
    width = max((mark.get("num_features") or 1 for mark in marks), default=1)
    return max(1, min(work.options.fit_rows, _MAX_NUMBERS // width))


def _num_classes(work: Work, labels: Labels) -> int:
    return int(getattr(work.task, "num_classes", None) or labels.max() + 1)


def _drawn(
    work: Work, split: Split, sizes: list[int]
) -> tuple[list[str] | npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The examples that are fitted on, and their places in the pool."""
    texts: list[str] = []
    numbers: list[npt.NDArray[np.float32]] = []
    places: list[npt.NDArray[np.int64]] = []
    start = 0
    for part, size in zip(work.run.partitions(), sizes, strict=True):
        chosen = np.flatnonzero(split.is_fitted[start : start + size])
        if len(chosen):
            fields = read_fields(work.run, part, work.settings.sources[part.source])
            values = plain_inputs(fields[chosen], work.task)
            good = np.flatnonzero(finite_rows(values))
            if isinstance(values, list):
                texts += values
            else:
                numbers.append(values[good])
            places.append(start + chosen[good])
        start += size
    if texts and numbers:
        raise InputError(
            "label_issues: some sources hold texts and others numbers",
            fix="make a run of each kind",
        )
    return texts or np.concatenate(numbers), np.concatenate(places)


def _features(
    work: Work, values: list[str] | npt.NDArray[np.float32], labels: Labels
) -> tuple[Features, Any]:
    if isinstance(values, np.ndarray):
        return Features.of_numbers(values)
    num_models = work.options.folds * _num_classes(work, labels)
    return Features.of_texts(values, num_models=num_models, words=work.options.words)


def _without_unseen(split: Split, labels: Labels, models: Classifiers) -> npt.NDArray[np.int8]:
    """Folds, without examples of a class that the fold's model never saw."""
    folds = split.folds.copy()
    unseen = np.isneginf(models.biases)  # (K, C)
    lost = (folds >= 0) & unseen[np.maximum(folds, 0), np.maximum(labels, 0)]
    if lost.any():
        log.warning("%s: %d examples are not judged, since all others of their class are copies"
                    " of what is in their fold", NAME, int(lost.sum()))  # fmt: skip
    folds[lost] = NOT_JUDGED
    return folds
