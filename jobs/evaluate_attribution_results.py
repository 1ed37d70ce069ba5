"""What `curate evaluate-attribution` makes of the losses: predictions, agreement, tables.

    run/attribution/table.parquet      measure, method, value, low, high, ceiling, num, missing
    run/attribution/evaluation.json    the same, and how it was found

A method's prediction for a subset and query is the sum of its scores over the subset; the output
that it foretells is minus the query's loss, as a positive score lowers it. A score column has one
number for an example and foretells minus the mean loss of the queries.

Shapes: S subsets, N examples of a partition, Q queries, r models.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.files import replace
from curate.data.layout import RunFolder
from curate.data.tables import write_table
from curate.errors import counted
from curate.evaluate.attribution import (
    FEWEST_SUBSETS,
    Mean,
    auc_interval,
    ceiling,
    mean_over_queries,
    one_query,
    predictions,
    rank_agreement,
)
from jobs.evaluate_attribution_inputs import (
    Matrix,
    Scores,
    Tested,
)
from jobs.evaluate_attribution_training import (
    FOLDER,
    losses_output,
    pool_lengths,
    queries_output,
    subset_members,
)
from jobs.run import Task
from jobs.settings import Settings

Floats = npt.NDArray[np.float64]

LDS, MEAN, AUC = "lds", "lds of the mean loss", "auc of wrong labels"

_SCHEMA = pl.Schema(
    {
        "measure": pl.String(),
        "method": pl.String(),
        "value": pl.Float64(),
        "low": pl.Float64(),
        "high": pl.Float64(),
        "ceiling": pl.Float64(),
        "num": pl.Int64(),
        "missing": pl.Int64(),
    }
)


class Measured(NamedTuple):
    """What the trained models made of the queries."""

    outputs: list[Floats]
    """r times (S, Q) minus the loss, NaN where a model diverged."""
    members: list[list[npt.NDArray[np.bool_]]]
    """S times, of each partition, (N,) the rows of the subset."""
    places: npt.NDArray[np.int64]
    """(Q,) places of the queries among all target examples."""
    diverged: list[str]

    @property
    def mean(self) -> Floats:
        """(S, Q) over the models."""
        return np.mean(self.outputs, axis=0)


def judge(
    settings: Settings, tested: Tested, tasks: Sequence[Task]
) -> tuple[dict[str, Any], pl.DataFrame]:
    """The value of `evaluation.json` and the table.

    Args:
        settings: of the run.
        tested: what is compared.
        tasks: the trainings, all done; none where only labels are looked at.

    Raises:
        InputError: a table is damaged.
    """
    run, own = RunFolder(Path(settings.run)), settings.attribution
    rows: list[dict[str, Any]] = []
    notes = list(tested.notes)
    value: dict[str, Any] = {
        "schema_version": 1,
        "subsets": own.subsets if tasks else 0,
        "share": own.share,
        "models": own.models,
        "ceiling": None,
        "reachable": None,
    }
    if tasks:
        measured = read_measured(settings, run)
        notes += _trouble(measured)
        top, top_of_mean = _ceilings(settings, measured)
        value["ceiling"] = _shown(top)
        value["reachable"] = None if top is None else _finite(math.sqrt(max(0.0, top.value)))
        rows += [_of_matrix(settings, measured, matrix, top) for matrix in tested.matrices]
        rows += [_of_scores(settings, measured, each, top_of_mean) for each in tested.scores]
        if not rows:
            notes.append(
                "there is no matrix and no score to be tested: score with influence and"
                " matrix: true, or name one in attribution.matrices"
            )
    if tested.labels is not None:
        found, said = _of_labels(settings, tested, *tested.labels)
        rows += found
        notes += said
    value |= {"rows": rows, "notes": notes}
    return value, pl.DataFrame(rows, schema=_SCHEMA)


def write_evaluation(run: RunFolder, value: dict[str, Any], table: pl.DataFrame) -> None:
    """Write both files."""
    folder = run.root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "table.parquet", lambda path: write_table(table, path))
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    replace(folder / "evaluation.json", lambda path: path.write_text(text, encoding="utf-8"))


def read_measured(settings: Settings, run: RunFolder) -> Measured:
    """The losses of all trainings, and what each subset holds."""
    from curate.data.tables import read_examples, read_table
    from jobs.target import target_folder

    own = settings.attribution
    lengths = pool_lengths(run)
    queries = read_table(queries_output(run).path)
    starts: dict[str, int] = {}
    total = 0
    target = target_folder(run)
    for part in target.partitions():
        starts[part.name] = total
        total += read_examples(target, part, ["row"]).height
    own_places = queries.select("partition", "position")
    places = [starts[name] + place for name, place in own_places.iter_rows()]
    outputs: list[Floats] = []
    diverged: list[str] = []
    for model in range(own.models):
        losses: list[Floats] = []
        for subset in range(own.subsets):
            output = losses_output(run, subset, model)
            losses.append(read_table(output.path)["loss"].cast(pl.Float64).to_numpy())
            if (output.mark() or {}).get("diverged"):
                diverged.append(f"subset {subset}, model {model}")
        outputs.append(-np.stack(losses).astype(np.float64))
    members = [subset_members(settings, lengths, subset) for subset in range(own.subsets)]
    return Measured(outputs, members, np.array(places, dtype=np.int64), diverged)


def _ceilings(settings: Settings, measured: Measured) -> tuple[Mean | None, Mean | None]:
    """Of single queries, and of their mean."""
    if len(measured.outputs) < 2:
        return None, None
    seed = settings.attribution.seed
    means = [each.mean(1, keepdims=True) for each in measured.outputs]
    return ceiling(measured.outputs, seed=seed), ceiling(means, seed=seed)


def _of_matrix(
    settings: Settings, measured: Measured, matrix: Matrix, top: Mean | None
) -> dict[str, Any]:
    predicted = np.zeros((len(measured.members), len(measured.places)))
    missing = 0
    for number, part in enumerate(matrix.partitions):
        members = np.stack([own[number] for own in measured.members])
        scores = matrix.read(part)[:, measured.places]
        used = members.any(0)
        missing += int((used & ~np.isfinite(scores).any(1)).sum())
        predicted += predictions(scores, members)
    values = rank_agreement(predicted, measured.mean)
    found = mean_over_queries(values, seed=settings.attribution.seed)
    return _row(LDS, matrix.name, found, top, missing=missing)


def _of_scores(
    settings: Settings, measured: Measured, scores: Scores, top: Mean | None
) -> dict[str, Any]:
    predicted = np.zeros(len(measured.members))
    missing = 0
    for number, part in enumerate(scores.partitions):
        members = np.stack([own[number] for own in measured.members])
        values = scores.read(part)
        missing += int((members.any(0) & ~np.isfinite(values)).sum())
        predicted += predictions(values[:, None], members)[:, 0]
    output = _mean_of_finite(measured.mean)
    found = one_query(predicted, output, seed=settings.attribution.seed)
    return _row(MEAN, scores.name, found, top, missing=missing)


def _of_labels(
    settings: Settings,
    tested: Tested,
    wrong: npt.NDArray[np.bool_],
    known: npt.NDArray[np.bool_],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Areas under the curve, over the training examples."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    count = int(wrong[known].sum())
    if not 0 < count < int(known.sum()):
        notes.append(f"{count} of {int(known.sum())} labels are wrong: there is no area to measure")
        return rows, notes
    if not tested.scores:
        notes.append("there are no scores to look for wrong labels with")
    for each in tested.scores:
        values = np.concatenate([each.read(part) for part in each.partitions])[known]
        try:
            found, missing = auc_interval(values, wrong[known], seed=settings.attribution.seed,
                                          draws=1000)  # fmt: skip
        except ValueError:
            notes.append(f"{each.name} has no score for one of the kinds, wrong or right")
            continue
        mean = Mean(found.value, found.low, found.high, count)
        rows.append(_row(AUC, each.name, mean, None, missing=missing))
    rows.sort(key=lambda row: -abs(row["value"] - 0.5))
    return rows, notes


def _mean_of_finite(outputs: Floats) -> Floats:
    """(S,) mean over the queries that every subset has an output for; NaN where there is none."""
    kept = np.isfinite(outputs).any(0)
    return outputs[:, kept].mean(1) if kept.any() else np.full(len(outputs), np.nan)


def _trouble(measured: Measured) -> list[str]:
    notes: list[str] = []
    if measured.diverged:
        notes.append(
            f"{counted(len(measured.diverged), 'training has', 'trainings have')} diverged and"
            f" is left out: {', '.join(measured.diverged[:5])}"
        )
    usable = np.isfinite(measured.mean).sum(0)
    lost = int((usable < FEWEST_SUBSETS).sum())
    if lost:
        notes.append(f"{counted(lost, 'query has', 'queries have')} no loss and cannot judge")
    return notes


def _row(
    measure: str, method: str, found: Mean, top: Mean | None, *, missing: int
) -> dict[str, Any]:
    return {
        "measure": measure,
        "method": method,
        "value": _finite(found.value),
        "low": _finite(found.low),
        "high": _finite(found.high),
        "ceiling": None if top is None else _finite(top.value),
        "num": found.num,
        "missing": missing,
    }


def _shown(mean: Mean | None) -> dict[str, Any] | None:
    if mean is None:
        return None
    return {key: _finite(value) for key, value in mean._asdict().items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
