"""The examples that are shown: the ends of each score, some at random, some of each reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from curate.errors import CurateError
from curate.report.document import Example, Fact, Mark, Pick, Samples
from jobs.contents import content_text, picture, read_contents
from jobs.report_best import Best, Place
from jobs.report_bins import rounded
from jobs.report_labels import shown_name
from jobs.report_leaks import Leak, leak_facts, leak_marks
from jobs.report_scores import Counted
from jobs.report_survey import Survey
from jobs.report_tables import titles

TEXT_CHARS = 700
"""A text is cut to this length."""
_BEFORE = 120
"""Characters in front of the first mark, where the text does not begin with it."""
_PICTURE_CHARS = 3_000_000
"""Of all pictures together; further ones are left out."""
_LIKELY = "label_issues.likely_label"


@dataclass(slots=True)
class Chosen:
    """Which examples are shown, each once."""

    places: list[Place] = field(default_factory=list[Place])
    _numbers: dict[Place, int] = field(default_factory=dict[Place, int])

    def add(self, found: Sequence[Place]) -> list[int]:
        """Numbers of the examples in the list of all that are shown."""
        for place in found:
            if place not in self._numbers:
                self._numbers[place] = len(self.places)
                self.places.append(place)
        return [self._numbers[place] for place in found]


def choose(survey: Survey, chosen: Chosen) -> list[Pick]:
    """The ends of each score and a random draw, as lists of what is shown."""
    picks: list[Pick] = []
    short = titles(survey.tables.columns)
    for name in survey.highest:
        title = short[name]
        high = chosen.add(survey.highest[name].places())
        low = chosen.add(survey.lowest[name].places())
        if high:
            picks.append(Pick(name=name, which="highest", title=f"highest {title}", examples=high))
            picks.append(Pick(name=name, which="lowest", title=f"lowest {title}", examples=low))
    found = chosen.add(survey.random.places())
    if found:
        picks.append(Pick(name="random", which="random", title="at random", examples=found))
    return picks


def of_reasons(best: Mapping[str, Best], chosen: Chosen) -> dict[str, list[int]]:
    """Reason -> numbers of some examples of it."""
    return {reason: chosen.add(own.places()) for reason, own in sorted(best.items())}


def samples_of(
    counted: Counted, chosen: Chosen, picks: list[Pick], leaks: Sequence[Leak]
) -> Samples:
    """The examples with their content."""
    notes: list[str] = []
    contents = _contents(counted, chosen.places, notes)
    by_place = {leak.place: leak for leak in leaks}
    room = _PICTURE_CHARS
    examples: list[Example] = []
    for place in chosen.places:
        fields = contents.get(place)
        image = None
        if fields is not None and "image" in fields and room > 0:
            image = picture(fields["image"])
            room -= len(image or "")
        examples.append(_example(counted, place, fields, by_place.get(place), image))
    if any("image" in fields for fields in contents.values()):
        missing = sum(example.picture is None for example in examples)
        if missing:
            notes.append(f"{missing:,} of {len(examples):,} examples are shown without their"
                         " picture")  # fmt: skip
    return Samples(examples=examples, picks=picks, notes=notes)


def _contents(
    counted: Counted, places: Sequence[Place], notes: list[str]
) -> dict[Place, dict[str, Any]]:
    """The fields of the examples; partitions whose input cannot be read are left out, and told."""
    tables = counted.survey.tables
    by_part: dict[int, list[Place]] = {}
    for place in places:
        by_part.setdefault(place.part, []).append(place)
    found: dict[Place, dict[str, Any]] = {}
    told: set[str] = set()
    for number, own in sorted(by_part.items()):
        part = tables.parts[number]
        source = tables.settings.sources[part.source]
        try:
            rows = read_contents(tables.run, part, source, [place.place for place in own])
        except (CurateError, pa.ArrowException, OSError) as error:
            why = error.what if isinstance(error, CurateError) else f"{error}".splitlines()[0]
            if (where := f"{part.source}/{part.file}") not in told and len(told) < 3:
                notes.append(f"the content of {where} cannot be read: {why}")
            told.add(where)
            continue
        found.update(zip(own, rows, strict=True))
    return found


def _example(
    counted: Counted,
    place: Place,
    fields: Mapping[str, Any] | None,
    leak: Leak | None,
    image: str | None,
) -> Example:
    tables = counted.survey.tables
    row = counted.rows[place]
    whole = content_text(fields) if fields is not None else ""
    marks = leak_marks(tables, leak, whole)
    text, marks = _cut(whole, marks)
    return Example(
        source=row["source"],
        file=row["file"],
        row=row["row"],
        domain=row["domain"],
        label=_label(counted, row["label"]),
        text=text,
        is_cut=len(whole) > len(text),
        scores={name: rounded(row[name]) for name in tables.columns},
        reason=row.get("reason"),
        weight=rounded(row.get("weight")),
        copies=row.get("copies"),
        num_tokens=row["num_tokens"] if tables.unit == "tokens" else None,
        likely_label=_likely(counted, row),
        marks=marks,
        picture=image,
        facts=[*(leak_facts(leak) if leak else []), *_spreads(counted, row)],
    )


def _label(counted: Counted, label: Any) -> str | None:
    return None if label is None else shown_name(str(int(label)), counted.labels.shown)


def _likely(counted: Counted, row: Mapping[str, Any]) -> str | None:
    """The class that another model finds likelier; None where it is the given one."""
    likely = row.get(_LIKELY)
    if likely is None or row["label"] is None or int(likely) == row["label"]:
        return None
    return _label(counted, likely)


def _spreads(counted: Counted, row: Mapping[str, Any]) -> list[Fact]:
    """How far the seeds disagree about its scores."""
    named = [name for name in counted.survey.tables.beside if name.endswith("_std")]
    return [
        Fact(name=f"spread of {name.partition('.')[2].removesuffix('_std')} over seeds",
             value=f"{row[name]:.3g}")
        for name in named[:3]
        if row[name] is not None
    ]  # fmt: skip


def _cut(text: str, marks: list[Mark]) -> tuple[str, list[Mark]]:
    """Some hundreds of characters around the first mark, or the beginning."""
    start = max(0, marks[0].start - _BEFORE) if marks else 0
    start = 0 if len(text) <= TEXT_CHARS else min(start, len(text) - TEXT_CHARS)
    end = start + TEXT_CHARS
    moved = [
        Mark(start=max(mark.start, start) - start, end=min(mark.end, end) - start, kind=mark.kind)
        for mark in marks
        if mark.start < end and mark.end > start
    ]
    return text[start:end], moved
