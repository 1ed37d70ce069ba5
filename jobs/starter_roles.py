"""Which columns of some data look like a label, its classes, and the user's own id."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa

from curate.data.kinds import is_simple, is_text

LABEL_NAMES = ("label", "labels", "class", "target", "intent", "sentiment", "category")
"""Names of a label column; the first that suits is taken."""
_ID_NAMES = ("id", "_id", "uid", "uuid", "doc_id", "example_id")
DOMAIN_NAMES = ("domain", "source", "subset", "category", "topic", "language", "lang")
_ROW_NUMBERS = re.compile(r"__index_level_\d+__|Unnamed: \d+")
"""What pandas calls its index in Parquet, and one that it has read from CSV as a column."""
_NAMELESS = "column_0"
"""A first column whose name is left out, as pandas leaves out that of its index in CSV."""
_MOST_CLASSES = 1000


def roles_of(
    rows: pa.Table, labels: pa.Table | None = None, names: Sequence[str] = LABEL_NAMES
) -> dict[str, Any]:
    """`label`, `classes`, `id` and `domain` of a source, as far as the rows show them.

    A label is a column of a well-known name with whole numbers from 0, or with texts that repeat:
    these are the `classes`, sorted. An id is a column whose values are all different, a domain one
    whose values repeat.

    Args:
        rows: the first ones.
        labels: more rows of the columns that may be the label.
        names: of these.
    """
    table = rows if labels is None else labels
    found: dict[str, Any] = {}
    for name in (name for name in names if name in table.column_names):
        column = table.column(name)
        if not _why_no_label(column):
            classes = class_names(column)
            found |= {"label": name, **({"classes": classes} if classes else {})}
            break
    names = [name for name in _ID_NAMES if name in rows.column_names]
    is_id = next((name for name in names if _is_id(rows.column(name))), None)
    if is_id is not None:
        found["id"] = is_id
    others = [name for name in DOMAIN_NAMES if name in rows.column_names]
    others = [name for name in others if name != found.get("label")]
    domain = next((name for name in others if not _why_no_domain(rows.column(name))), None)
    return {**found, "domain": domain} if domain is not None else found


def refused_domains(rows: pa.Table, used: Collection[str]) -> dict[str, str]:
    """Columns named like a domain that no use was found for, and why they are none.

    Args:
        rows: the first ones.
        used: columns that are something else.
    """
    names = [name for name in DOMAIN_NAMES if name in rows.column_names and name not in used]
    found = {name: _why_no_domain(rows.column(name)) for name in names}
    return {name: why for name, why in found.items() if why}


def refused_labels(rows: pa.Table, labels: pa.Table, used: Collection[str]) -> dict[str, str]:
    """Columns named like a label that no use was found for, and why they are none.

    Args:
        rows: the first ones.
        labels: more rows of some columns.
        used: columns that are something else.
    """
    names = [name for name in LABEL_NAMES if name in rows.column_names and name not in used]
    tables = [labels if name in labels.column_names else rows for name in names]
    found = {n: _why_no_label(t.column(n)) for n, t in zip(names, tables, strict=True)}
    return {name: why for name, why in found.items() if why}


def row_numbers(rows: pa.Table) -> list[str]:
    """Names of the columns that hold the index which pandas writes beside the data."""

    def counts(name: str) -> bool:
        return rows.column(name).to_pylist() == list(range(rows.num_rows))

    return [
        name
        for name in rows.column_names
        if _ROW_NUMBERS.fullmatch(name) or (name == _NAMELESS and counts(name))
    ]


def num_classes(column: Any) -> int | None:
    """Number of classes that a column of whole numbers seems to have, or None."""
    if not pa.types.is_integer(column.type) or column.null_count == len(column):
        return None
    numbers = [number for number in column.to_pylist() if number is not None]
    return max(numbers) + 1 if min(numbers) >= 0 and max(numbers) < _MOST_CLASSES else None


def class_names(column: Any) -> list[str]:
    """The different texts of a column, sorted; white space is no name."""
    return sorted(set(_named(column))) if is_text(column.type) else []


def num_missing(column: Any) -> int:
    """Rows that have no label."""
    if is_text(column.type):
        return len(column) - len(_named(column))
    return column.null_count


def _why_no_label(column: Any) -> str:
    """Why a column can be no label, or "" where it can."""
    if not is_text(column.type):
        return _why_no_numbers(column)
    named = _named(column)
    kinds = len(set(named))
    rows = f"{len(named):,} row{'s' * (len(named) != 1)}"
    if not kinds:
        return "it has no values"
    if kinds == 1:
        return f"it has one value only in {rows}"
    if kinds > _MOST_CLASSES:
        most = f"{_MOST_CLASSES:,} are the most"
        return f"it has {kinds:,} different values in {rows}, and of classes {most}"
    if kinds > max(2, len(named) // 2):
        return f"it has {kinds:,} different values in {rows}, too few rows for so many classes"
    return ""


def _why_no_domain(column: Any) -> str:
    """Why a column can be no domain, or "" where it can."""
    if not is_simple(column.type):
        return f"it holds {column.type}, neither text nor numbers"
    if column.null_count == len(column):
        return "it has no values"
    kinds = len(column.unique())
    if kinds > min(_MOST_CLASSES, max(2, len(column) // 2)):
        return f"it has {kinds:,} different values in {len(column):,} rows"
    return ""


def _why_no_numbers(column: Any) -> str:
    if column.null_count == len(column):
        return "it has no values"
    if not pa.types.is_integer(column.type):
        return f"it holds {column.type}, neither whole numbers nor names"
    if num_classes(column) is None:
        return f"its numbers are not all from 0 to {_MOST_CLASSES - 1}"
    return "" if len(column.drop_null().unique()) > 1 else "it has one value only"


def _named(column: Any) -> list[str]:
    """The texts of a column that are no mere white space."""
    return [text for text in column.to_pylist() if isinstance(text, str) and text.strip()]


def _is_id(column: Any) -> bool:
    if not (pa.types.is_integer(column.type) or is_text(column.type)):
        return False
    return column.null_count == 0 and len(column.unique()) == len(column) > 0
