"""What of the evaluation sets stands in what the plan keeps: `plan/leakage.json`."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.files import fingerprint, read_document
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.data.tables import read_table
from jobs.evaluation import LEAKAGE, matches_output, sought_output
from jobs.settings import Settings

log = logging.getLogger(__name__)

VERSION = 1
SCHEMA_VERSION = 1

_SIDES = ("kept", "left_out")


@dataclass(slots=True)
class _Count:
    """Of one set, on one side of the plan."""

    found: npt.NDArray[np.bool_]
    """(E,) examples of the set."""
    equal: npt.NDArray[np.bool_]
    """(E,)"""
    rows: int = 0
    exact_rows: int = 0

    def add(self, matches: pl.DataFrame) -> None:
        """Count the matches of a partition."""
        exact = matches.filter("exact")
        self.rows += matches["row"].n_unique()
        self.exact_rows += exact["row"].n_unique()
        self.found[matches["example"].to_numpy()] = True
        self.equal[exact["example"].to_numpy()] = True

    def values(self) -> dict[str, int]:
        return {
            "rows": self.rows,
            "exact_rows": self.exact_rows,
            "examples": int(self.found.sum()),
            "exact_examples": int(self.equal.sum()),
        }


@dataclass(slots=True)
class _Set:
    """One evaluation set."""

    mark: Mapping[str, Any]
    sides: dict[str, _Count] = field(default_factory=dict[str, _Count])

    def __post_init__(self) -> None:
        size = int(self.mark["examples"])
        for side in _SIDES:
            self.sides[side] = _Count(np.zeros(size, np.bool_), np.zeros(size, np.bool_))

    def values(self) -> dict[str, Any]:
        kept = self.sides["kept"].values()
        size = int(self.mark["examples"])
        return {
            "examples": size,
            "short": int(self.mark["short"]),
            "template": int(self.mark["template"]),
            "kept": {**kept, "share": kept["examples"] / size},
            "left_out": self.sides["left_out"].values(),
        }


def report_output(run: RunFolder) -> Output:
    return Output(run.plan / "leakage.json")


def read_report(run: RunFolder) -> dict[str, Any] | None:
    """What `plan/leakage.json` says; None where nothing was compared.

    Raises:
        InputError: it is damaged.
    """
    return read_document(report_output(run).path, sets=dict, found_from=float)


def report_is_due(settings: Settings, plan: str) -> bool:
    """Whether `write_report` would write or remove something.

    Args:
        settings: of the run.
        plan: fingerprint of the plan.
    """
    run = RunFolder(Path(settings.run))
    stamp = _stamp(run, settings, plan)
    if stamp is None:
        return report_output(run).path.exists()
    return not report_output(run).is_done(stamp)


def write_report(settings: Settings, plan: str) -> bool:
    """Count what of each evaluation set is kept and what was left out; returns whether it was due.

    Where the scorer `leakage` was not asked for, or has not looked at all partitions, an older
    report is removed.

    Args:
        settings: of the run.
        plan: fingerprint of the plan.
    """
    if not report_is_due(settings, plan):
        return False
    run = RunFolder(Path(settings.run))
    output, stamp = report_output(run), _stamp(run, settings, plan)
    if stamp is None:
        output.remove()
        return True
    found_from = 0.0
    sets = {name: _Set(sought_output(run, name).mark() or {}) for name in settings.evaluation}
    for part in run.partitions():
        found_from = float((matches_output(run, part).mark() or {})["found_from"])
        matches = read_table(matches_output(run, part).path).filter(pl.col("share") >= found_from)
        if not matches.height:
            continue
        planned = read_table(run.planned(part).path, ["source", "file", "row", "keep", "reason"])
        told = matches.join(planned, on=["source", "file", "row"], how="left").filter(
            pl.col("reason") != "held_out"
        )
        for (name, keep), own in told.group_by("evaluation", "keep"):
            sets[str(name)].sides["kept" if keep else "left_out"].add(own)
    values = {
        "schema_version": SCHEMA_VERSION,
        "found_from": found_from,
        "sets": {name: each.values() for name, each in sets.items()},
    }
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    output.write(lambda path: path.write_text(text, encoding="utf-8"), stamp)
    return True


def _stamp(run: RunFolder, settings: Settings, plan: str) -> str | None:
    """Of all that the report is made from; None where there is nothing to report."""
    if LEAKAGE not in settings.score.named or not settings.evaluation:
        return None
    sets = {name: sought_output(run, name).mark() for name in settings.evaluation}
    digests = {name: mark["digest"] for name, mark in sets.items() if mark}
    marks = [matches_output(run, part).mark() for part in run.partitions()]
    if not all(mark and mark.get("sets") == digests for mark in marks) or len(digests) < len(sets):
        log.warning("plan: the evaluation sets have not been looked for in all data, so nothing is"
                    " said of leakage; run `curate score %s`", run.root)  # fmt: skip
        return None
    return fingerprint(
        stage="leakage report",
        version=VERSION,
        plan=plan,
        inputs=[mark["digest"] for mark in marks if mark],
        sets=digests,
    )
