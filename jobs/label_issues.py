"""`label_issues`: models fitted on folds of the whole pool, and what they say of each label.

    run/label_issues/fit.safetensors      features, one model a fold, the fold of every example
    run/label_issues/probabilities/       of each class, by the model that did not see the example
    run/label_issues/joint.safetensors    thresholds, confident joint, cut-offs
    run/quantities/label_issues/          the quantities, a table for each partition

With `probabilities` from outside there is no fit.
"""

from collections.abc import Generator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from curate.config import plain
from curate.data.example import KEY, TRAIN
from curate.data.files import digest_file, fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition, remove_strays
from curate.data.reading import read_fields
from curate.data.tables import meet, read_examples, read_table, write_table
from curate.errors import InputError
from curate.evaluate.confident import (
    ClassSums,
    Largest,
    calibrated_joint,
    class_sums,
    confident_joint,
    judge,
    thresholds,
)
from curate.models.out_of_fold import NOT_JUDGED, Classifiers, Features, Labels
from curate.models.plain_inputs import finite_rows, plain_inputs
from jobs.label_issues_fit import NAME, Work, fit_output, fit_work, open_work
from jobs.lengths import content_settings
from jobs.own_passes import OwnPasses, Phase
from jobs.run import Task
from jobs.settings import Settings, task_settings
from jobs.tokenizer import training_digests
from scorers.external import External
from scorers.label_issues import LabelIssues
from scorers.protocol import Scorer

VERSION = 1
"""Raised when the same data and settings would give other numbers."""


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """Fit, probabilities of each partition, thresholds over all, judgement of each partition.

    Raises:
        InputError: the index has not finished, or the table of probabilities is missing.
    """
    check(settings, scorer)
    options = cast(LabelIssues, scorer)
    run = RunFolder(Path(settings.run))
    stamp = fingerprint(
        stage=NAME,
        version=VERSION,
        options=plain(options),
        seed=settings.seed,
        threads=settings.cluster.threads,
        task=plain(task_settings(settings)) if settings.task else None,
        sources={name: content_settings(source) for name, source in settings.sources.items()},
        pool=training_digests(run),
        table=digest_file(Path(options.probabilities).expanduser())
        if options.probabilities
        else None,
    )
    payload = {"settings": plain(settings), "options": plain(options), "fingerprint": stamp}
    parts = run.partitions()
    each = [payload | {"partition": asdict(part), "index": i} for i, part in enumerate(parts)]
    probabilities = [
        Task(part.name, entry, probabilities_output(run, part), stamp)
        for part, entry in zip(parts, each, strict=True)
    ]
    judged = [
        Task(part.name, entry, run.quantities(part, NAME), stamp)
        for part, entry in zip(parts, each, strict=True)
    ]
    fit = [Task("the whole pool", payload, fit_output(run), stamp)]
    joint = [Task("the whole pool", payload, joint_output(run), stamp)]
    phases = (
        Phase(f"{NAME}: fit", fit if options.probabilities is None else [], fit_work),
        Phase(f"{NAME}: probabilities", probabilities, probabilities_work),
        Phase(f"{NAME}: thresholds", joint, joint_work),
        Phase(f"{NAME}: judging", judged, judge_work),
    )
    return OwnPasses(phases, ((NAME, 0),))


def check(_: Settings, scorer: Scorer) -> None:
    """Read the head of a table of probabilities, before anything is indexed.

    Raises:
        InputError: it is missing.
    """
    options = cast(LabelIssues, scorer)
    if options.probabilities is not None:
        _table(options).scan()


def probabilities_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / NAME / "probabilities" / f"{part.name}.parquet")


def joint_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "joint.safetensors")


def probabilities_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Out-of-fold probabilities of one partition; null where an example is not judged."""
    work = open_work(payload)
    part = Partition(**payload["partition"])
    examples = read_examples(work.run, part, [*KEY, "id", "label"])
    if work.options.probabilities is None:
        found = _predicted(work, part, int(payload["index"]))
    else:
        found = _given(work, examples)
    num_classes = found.shape[1]
    column = pl.Series("probabilities", found.astype(np.float32), pl.Array(pl.Float32, num_classes))
    missing = pl.Series(np.isnan(found).any(axis=1) | examples["label"].is_null().to_numpy())
    table = examples.select(KEY).with_columns(
        pl.when(~missing).then(column).otherwise(None).alias("probabilities")
    )
    probabilities_output(work.run, part).write(
        lambda path: write_table(table, path), work.stamp, rows=table.height
    )
    return {"rows": table.height}


def _predicted(work: Work, part: Partition, index: int) -> npt.NDArray[np.float64]:
    """(N, C) by the fitted models."""
    output = fit_output(work.run)
    fit = _load(output.path, digest=(output.mark() or {}).get("digest", ""))
    features = Features.from_arrays(fit, work.options.words)
    models = Classifiers(fit["weights"], fit["biases"])
    folds = fit["folds"][fit["starts"][index] : fit["starts"][index + 1]]
    values = plain_inputs(
        read_fields(work.run, part, work.settings.sources[part.source]), work.task
    )
    folds = np.where(finite_rows(values), folds, np.int8(NOT_JUDGED))
    if isinstance(values, np.ndarray):
        values = np.nan_to_num(values, posinf=0, neginf=0)
    return models.probabilities(features.apply(values), folds)


@lru_cache(maxsize=1)
def _load(path: Path, *, digest: str) -> dict[str, npt.NDArray[Any]]:
    """The fit, once per process; `digest` tells one from the next."""
    return load_file(path)


def _table(options: LabelIssues) -> External:
    assert options.probabilities is not None
    return External(path=options.probabilities)


def _given(work: Work, examples: pl.DataFrame) -> npt.NDArray[np.float64]:
    """(N, C) from the user's table; NaN where it says nothing."""
    table = _table(work.options)
    joined = table.join(examples, single_source=len(work.settings.sources) == 1)
    names = table.measurements()
    found = joined.select(pl.col(names).cast(pl.Float64).fill_null(np.nan)).to_numpy()
    wanted = getattr(work.task, "num_classes", None)
    if wanted is not None and wanted != len(names):
        raise InputError(
            f"{table.path} has {len(names)} number columns, but there are {wanted} classes",
            fix="give one column of probabilities for each class, in their order",
        )
    highest = cast(int, examples["label"].fill_null(0).max() or 0)
    if highest >= len(names):
        raise InputError(
            f"{table.path} has probabilities of {len(names)} classes; there is a label {highest}",
            fix="give one column of probabilities for each class, in their order",
        )
    wrong = (found < -1e-6).any(axis=1) | (np.abs(found.sum(axis=1) - 1) > 1e-3)
    if wrong.any():
        first = int(wrong.argmax())
        raise InputError(
            f"{table.path}: the numbers of {examples.select(KEY).row(first)} are no probabilities:"
            f" {found[first].tolist()[:5]} ...",
            fix="give numbers from 0 to 1 that sum to 1",
        )
    return found


def joint_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Thresholds, confident joint and cut-offs over all training examples."""
    work = open_work(payload)
    sums: ClassSums | None = None
    for probabilities, labels in _judged(work):
        piece = class_sums(probabilities, labels)
        sums = piece if sums is None else sums.plus(piece)
    if sums is None:
        raise InputError(
            "label_issues: no example has a label and probabilities",
            fix="check sources.NAME.label, and the keys of the table of probabilities",
        )
    limits = thresholds(sums)
    joint = np.zeros((len(limits), len(limits)), dtype=np.int64)
    for probabilities, labels in _judged(work):
        joint += confident_joint(probabilities, labels, limits)
    calibrated = calibrated_joint(joint, sums.counts)
    largest = Largest(np.rint(calibrated).astype(np.int64))
    for probabilities, labels in _judged(work):
        largest.add(probabilities, labels)
    arrays = {
        "thresholds": limits,
        "counts": sums.counts,
        "joint": joint,
        "calibrated": calibrated,
        "cutoffs": largest.cutoffs(),
    }
    expected = float(calibrated.sum() - np.trace(calibrated))
    joint_output(work.run).write(
        lambda path: save_file(arrays, path), work.stamp, expected_issues=round(expected, 3)
    )
    names = {part.name for part in work.run.partitions()}
    remove_strays(work.run.root / NAME / "probabilities", names)
    return {"expected_issues": round(expected, 3)}


def _judged(work: Work) -> Generator[tuple[npt.NDArray[np.float64], Labels]]:
    """Probabilities and labels of the training examples that have both, partition by partition."""
    for part in work.run.partitions():
        examples = read_examples(work.run, part, [*KEY, "label", "split"])
        table = _probabilities(work, part, examples)
        usable = table.is_not_null() & (examples["split"] == TRAIN)
        if usable.any():
            labels = examples["label"].filter(usable).to_numpy()
            yield table.filter(usable).to_numpy().astype(np.float64), labels


def _probabilities(work: Work, part: Partition, examples: pl.DataFrame) -> pl.Series:
    table = read_table(probabilities_output(work.run, part).path)
    meet(examples, table)
    return table["probabilities"]


def judge_work(payload: dict[str, Any]) -> dict[str, Any]:
    """The quantities of one partition; null where an example is not judged."""
    work = open_work(payload)
    part = Partition(**payload["partition"])
    joint = load_file(joint_output(work.run).path)
    examples = read_examples(work.run, part, [*KEY, "label"])
    probabilities = _probabilities(work, part, examples)
    usable = probabilities.is_not_null()
    rows = usable.arg_true()
    found = judge(
        probabilities.filter(usable).to_numpy().astype(np.float64).reshape(len(rows), -1),
        examples["label"].filter(usable).to_numpy(),
        joint["thresholds"],
        joint["cutoffs"],
    ) if len(rows) else None  # fmt: skip
    values = {
        "self_confidence": found.self_confidence if found else [],
        "label_issue_margin": found.margin if found else [],
        "label_issue": found.is_issue if found else [],
        "off_diagonal": found.is_off_diagonal if found else [],
        "likely_label": found.likely if found else [],
    }
    columns: list[pl.Series] = []
    for name, numbers in values.items():
        whole = np.full(examples.height, np.nan, dtype=np.float32)
        whole[rows.to_numpy()] = numbers
        columns.append(pl.Series(name, whole).fill_nan(None))
    table = examples.select(KEY).hstack(columns)
    num_issues = int(table["label_issue"].sum())
    not_judged = examples.height - len(rows)
    work.run.quantities(part, NAME).write(
        lambda path: write_table(table, path), work.stamp, rows=table.height,
        num_issues=num_issues, unscored=not_judged,
    )  # fmt: skip
    return {"rows": table.height, "num_issues": num_issues, "unscored": not_judged}
