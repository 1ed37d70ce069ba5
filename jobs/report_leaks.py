"""What of the evaluation sets stands in the training data, and where."""

import heapq
from dataclasses import dataclass

import polars as pl

from curate.data.example import TRAIN
from curate.data.tables import read_examples, read_table
from curate.errors import CurateError
from curate.report.document import Fact, Leakage, LeakedSet, Mark
from jobs.contents import content_text, read_contents
from jobs.evaluation import LEAKAGE, evaluation_folder, matches_output
from jobs.leakage_report import read_report
from jobs.report_best import Place
from jobs.report_marks import shared_marks
from jobs.report_tables import Tables

_NGRAMS = 13
"""Of the scorer, where the settings do not say."""


@dataclass(frozen=True, slots=True)
class Leak:
    """A training row, and the evaluation example that stands in it most."""

    place: Place
    evaluation: str
    example: int
    """Its place in the set."""
    share: float
    """Of the evaluation example's words."""
    exact: bool


def find_leaks(tables: Tables, *, count: int) -> list[Leak]:
    """The training rows that hold most of an evaluation example, the most first."""
    best: list[tuple[float, int, int, Leak]] = []
    for number, part in enumerate(tables.parts):
        output = matches_output(tables.run, part)
        mark = output.mark()
        if mark is None or not count:
            continue
        matches = read_table(output.path).filter(pl.col("share") >= float(mark["found_from"]))
        if not matches.height:
            continue
        index = read_examples(tables.run, part, ["row", "split"]).with_row_index("place")
        matches = matches.join(index, on="row").filter(pl.col("split") == TRAIN)
        matches = matches.sort("share", "exact", descending=True).unique("row", keep="first")
        for found in matches.top_k(count, by="share").sort("place").iter_rows(named=True):
            place = Place(number, found["place"])
            leak = Leak(place, found["evaluation"], found["example"], found["share"],
                        found["exact"])  # fmt: skip
            heapq.heappush(best, (leak.share, -number, -place.place, leak))
            if len(best) > count:
                heapq.heappop(best)
    return [leak for *_, leak in sorted(best, key=lambda entry: entry[:3], reverse=True)]


def leakage_of(tables: Tables, examples: list[int]) -> Leakage | None:
    """What of each set is kept and what was left out; None where nothing was compared.

    Args:
        tables: of the run.
        examples: numbers of the examples of `find_leaks` among those that are shown.
    """
    report = read_report(tables.run) if tables.has_plan else None
    if report is not None:
        sets = [
            LeakedSet(
                name=name,
                examples=entry["examples"],
                found_kept=entry["kept"]["examples"],
                found_left_out=entry["left_out"]["examples"],
                rows_kept=entry["kept"]["rows"],
                rows_left_out=entry["left_out"]["rows"],
                exact_kept=entry["kept"]["exact_examples"],
                short=entry["short"],
            )
            for name, entry in report["sets"].items()
        ]
        return Leakage(sets=sets, found_from=report["found_from"], examples=examples)
    return _without_plan(tables, examples)


def _without_plan(tables: Tables, examples: list[int]) -> Leakage | None:
    """Everything that was found counts as left out, as nothing is kept yet."""
    marks = [matches_output(tables.run, part).mark() for part in tables.parts]
    if not marks or not all(marks):
        return None
    found_from = float((marks[0] or {})["found_from"])
    rows: dict[str, int] = dict.fromkeys(tables.settings.evaluation, 0)
    hit: dict[str, set[int]] = {name: set() for name in rows}
    for part in tables.parts:
        matches = read_table(matches_output(tables.run, part).path)
        matches = matches.filter(pl.col("share") >= found_from)
        for (name,), own in matches.group_by("evaluation"):
            rows[str(name)] = rows.get(str(name), 0) + own["row"].n_unique()
            hit.setdefault(str(name), set()).update(own["example"].unique().to_list())
    sets = [
        LeakedSet(
            name=name, examples=_size(tables, name), found_kept=0, found_left_out=len(hit[name]),
            rows_kept=0, rows_left_out=rows[name], exact_kept=0, short=0,
        )
        for name in rows
    ]  # fmt: skip
    return Leakage(sets=sets, found_from=found_from, examples=examples)


def leak_facts(leak: Leak) -> list[Fact]:
    """What is said of a row beside its text."""
    whole = ", word for word from beginning to end" if leak.exact else ""
    return [
        Fact(
            name=f"evaluation set {leak.evaluation}",
            value=f"{100 * leak.share:.0f} % of the words of its example {leak.example}{whole}",
        )
    ]


def leak_marks(tables: Tables, leak: Leak | None, text: str) -> list[Mark]:
    """The words of a training text that stand in the evaluation example."""
    if leak is None or not text:
        return []
    other = _evaluation_text(tables, leak)
    options = tables.settings.score.named.get(LEAKAGE, {})
    words = int(options.get("ngrams", _NGRAMS))
    return shared_marks(text, other, words=words, kind=LEAKAGE) if other else []


def _size(tables: Tables, name: str) -> int:
    folder = evaluation_folder(tables.run, name)
    marks = [folder.examples(part).mark() or {} for part in folder.partitions()]
    return sum(int(mark.get("rows", 0)) for mark in marks)


def _evaluation_text(tables: Tables, leak: Leak) -> str:
    """The text of an evaluation example; empty where it cannot be read any more."""
    folder = evaluation_folder(tables.run, leak.evaluation)
    source = tables.settings.evaluation.get(leak.evaluation)
    at = leak.example
    for part in folder.partitions():
        rows = int((folder.examples(part).mark() or {}).get("rows", 0))
        if at < rows and source is not None:
            try:
                return content_text(read_contents(folder, part, source, [at])[0])
            except (CurateError, OSError):
                return ""
        at -= rows
    return ""
