"""Which columns of some data look like a label, its classes, and the user's own id."""

from typing import Any

import pyarrow as pa

from curate.data.kinds import is_text

_LABEL_NAMES = ("label", "labels", "class", "target")
_ID_NAMES = ("id", "_id", "uid", "uuid", "doc_id", "example_id")
_DOMAIN_NAMES = ("domain", "source", "subset", "category", "topic", "language", "lang")
_MOST_CLASSES = 1000
_MOST_NAMED_CLASSES = 100


def roles_of(rows: pa.Table) -> dict[str, Any]:
    """`label`, `classes`, `id` and `domain` of a source, as far as the first rows show them.

    A label is a column of a well-known name with whole numbers from 0, or with few different
    texts: these are the `classes`, sorted. An id is a column whose values are all different.
    """
    found: dict[str, Any] = {}
    for name in (name for name in _LABEL_NAMES if name in rows.column_names):
        classes = class_names(rows.column(name))
        if classes or num_classes(rows.column(name)) is not None:
            found |= {"label": name, **({"classes": classes} if classes else {})}
            break
    names = [name for name in _ID_NAMES if name in rows.column_names]
    is_id = next((name for name in names if _is_id(rows.column(name))), None)
    if is_id is not None:
        found["id"] = is_id
    domain = next((name for name in _DOMAIN_NAMES if name in rows.column_names), None)
    return {**found, "domain": domain} if domain is not None else found


def num_classes(column: Any) -> int | None:
    """Number of classes that a column of whole numbers seems to have, or None."""
    if not pa.types.is_integer(column.type) or column.null_count == len(column):
        return None
    numbers = [number for number in column.to_pylist() if number is not None]
    return max(numbers) + 1 if min(numbers) >= 0 and max(numbers) < _MOST_CLASSES else None


def class_names(column: Any) -> list[str]:
    """The different texts of a column, sorted; none where they are too many to be classes."""
    if not is_text(column.type):
        return []
    names = sorted({value for value in column.to_pylist() if isinstance(value, str)})
    most = min(_MOST_NAMED_CLASSES, max(2, len(column) // 2))
    return names if 2 <= len(names) <= most else []


def _is_id(column: Any) -> bool:
    if not (pa.types.is_integer(column.type) or is_text(column.type)):
        return False
    return column.null_count == 0 and len(column.unique()) == len(column) > 0
