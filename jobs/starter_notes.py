"""What a look at some data leaves to the user: lines for `curate init`."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from curate.data.columns import PROBLEM
from curate.errors import counted
from jobs.starter_look import Look, is_classifiable
from jobs.starter_roles import num_missing, refused_domains, refused_labels

_FEW = 0.01
"""Share of rows that may be set aside: the default of `index.max_bad_rows`."""


def notes_on(look: Look, where: str, task: Mapping[str, Any]) -> Iterator[str]:
    """What to look at, and what is still to do.

    Args:
        look: with roles.
        where: its place in the settings.
        task: its settings.
    """
    if look.source.separator is not None:
        yield f"taking separator: {look.source.separator!r}"
    if look.trouble:
        yield f"still to do: name the content column ({look.trouble})"
    yield from _on_encoding(look)
    if look.source.label is None:
        refused = list(_on_refused(look, where))
        yield from refused
        if "num_classes" in task and not refused:
            yield f"still to do: set {where}.label to the column of the class, and task.num_classes"
    elif "num_classes" not in task:
        yield f"the label {look.source.label} is left out: the task, {task['kind']}, reads none"
    else:
        yield from _on_label(look)


def domain_notes(look: Look) -> Iterator[str]:
    """Why the rows have no domain, where a column is named like one."""
    if look.source.domain is None:
        for column, why in refused_domains(look.rows, _used(look)).items():
            yield f"{column} is not taken as the domain: {why}"


def _used(look: Look) -> set[str]:
    """Columns that have a role."""
    source = look.source
    used = {column for group in source.content_columns.values() for column in group}
    return used | {c for c in (source.label, source.domain, source.id) if c is not None}


def _on_encoding(look: Look) -> Iterator[str]:
    if PROBLEM in look.rows.column_names:
        problems = look.rows.column(PROBLEM).to_pylist()
        bad = sum((problem or "").startswith("invalid_utf8") for problem in problems)
    else:
        bad = 0
    if bad or any("\ufffd" in column for column in look.rows.column_names):
        where = f"{counted(bad, 'row')} of {_rows(look)}" if bad else look.files[0].file
        yield f"still to do: save the file as UTF-8 ({where} {'are' if bad > 1 else 'is'} not)"


def _on_refused(look: Look, where: str) -> Iterator[str]:
    if not (look.trouble or is_classifiable(look.source)):
        return
    for column, why in refused_labels(look.rows, look.labels, _used(look)).items():
        yield (
            f"still to do: {column} is not taken as a label: {why}; to classify all the same, set"
            f" {where}.label, classes where they are names, and the task"
        )


def _on_label(look: Look) -> Iterator[str]:
    source = look.source
    known = source.label in look.labels.column_names
    column = (look.labels if known else look.rows).column(source.label)
    has_all = known and look.has_all_labels
    if source.classes:
        yield f"taking label: {source.label} ({counted(len(source.classes), 'class', 'classes')})"
        if not has_all:
            yield f"look at the classes: they are those of {_rows(look)}"
    missing = num_missing(column)
    if missing:
        share = missing / len(column)
        of = f"{len(column):,} rows" if has_all else _rows(look)
        said = f"{missing:,} of {of} have no label and will be set aside"
        least = math.ceil(share * 100) / 100
        yield (
            f"still to do: {said}: leave them out, or set index.max_bad_rows to {least:g}"
            if share > _FEW
            else said
        )


def _rows(look: Look) -> str:
    return f"the first {look.rows.num_rows:,} rows of {look.files[0].file}"
