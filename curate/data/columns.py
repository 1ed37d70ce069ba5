"""Which columns of an input a source uses: those it names, or the one that is well known."""

import fnmatch
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa

from curate.config import nearest
from curate.data.example import Source
from curate.data.image_values import is_file, is_image, list_depth
from curate.data.kinds import is_number, is_simple, is_text, item_kind, turn_columns
from curate.errors import InputError

PROBLEM = "curate_problem"
"""Column of converted files: `reason: detail` of rows that could not be read, else null."""

_TEXT_NAMES = ("text", "content", "body")
_MESSAGE_NAMES = ("messages", "conversations")
_IMAGE_NAMES = ("image", "img")
_PAIR_NAMES = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)


def resolve_columns(source: Source, schema: pa.Schema, *, where: str = "the input") -> Source:
    """The source with the columns that a file of this schema has for it.

    A column of content that the settings name is checked; where they name none, the one
    well-known column (or pair) is taken. A whole-number column called `label` is the label unless
    the settings name another. `features` may hold globs, such as `pixel_*`.

    Args:
        source: as the user set it.
        schema: of the Parquet file that holds the rows.
        where: the file, for messages.

    Raises:
        InputError: a column is missing, stands twice, is of a type that cannot be used, or none
            can be chosen.
    """
    types = {field.name: field.type for field in schema if field.name != PROBLEM}
    names: list[str] = schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"{where} has two columns called {twice!r}", fix="rename one of them, or leave it out"
        )
    if not source.content_columns:
        source = replace(source, **_well_known(types, where))
    if source.features is not None:
        source = replace(source, features=_expand_features(source, types, where))
    if source.label is None and "label" in types and pa.types.is_integer(types["label"]):
        source = replace(source, label="label")
    for column in source.columns:
        if column not in types:
            raise InputError(
                f"{where} has no column {column!r}; it has {_listed(types)}",
                fix=nearest(column, types) or "correct the column's name in the settings",
            )
    for field, columns in source.content_columns.items():
        for column in columns:
            _check_type(field, column, types[column], source, where)
    _check_pair(source, types, where)
    _check_image(source, types, where)
    for field in ("label", "domain", "id", "document"):
        column: str | None = getattr(source, field)
        if column is not None:
            _check_type(field, column, types[column], source, where)
    if source.label is not None and is_text(types[source.label]) and not source.classes:
        raise InputError(
            f"{where}: the label column {source.label!r} holds text",
            fix="list the class names in label order: classes: [first, second]",
        )
    return source


def _well_known(types: dict[str, pa.DataType], where: str) -> dict[str, str]:
    """Settings for the one column, or pair, whose name says that it is the content."""
    found: list[dict[str, str]] = [
        {"text": name} for name in _TEXT_NAMES if name in types and is_text(types[name])
    ]
    found += [
        {"messages": name}
        for name in _MESSAGE_NAMES
        if name in types and turn_columns(types[name]) is not None
    ]
    found += [
        {"prompt": prompt, "response": response}
        for prompt, response in _PAIR_NAMES
        if prompt in types and response in types
        if is_text(types[prompt]) and is_text(types[response])
    ]
    if {"chosen", "rejected"} <= types.keys() and _is_said(types["chosen"]):
        # A text beside messages repeats the prompt that they hold.
        alike = "prompt" in types and is_text(types["prompt"]) == is_text(types["chosen"])
        found.append({n: n for n in (*(("prompt",) if alike else ()), "chosen", "rejected")})
    if not found:  # beside a text a picture is left alone
        found = [
            {"image": name} for name in _IMAGE_NAMES if name in types and _is_images(types[name])
        ]
    if not found and is_number(item_kind(types.get("features", pa.null()))):
        found = [{"features": "features"}]
    if len(found) == 1:
        return found[0]
    if found:
        choices = "; ".join(" + ".join(choice.values()) for choice in found)
        what = f"{where} has several columns that could be the content: {choices}"
    else:
        what = f"{where}: no column is known to be the content; it has {_listed(types)}"
    raise InputError(
        what,
        fix="name it in the source: text, prompt and response, messages, chosen and rejected,"
        " features, or image",
    )


def _expand_features(source: Source, types: dict[str, pa.DataType], where: str) -> tuple[str, ...]:
    assert source.features is not None
    named = (source.features,) if isinstance(source.features, str) else source.features
    others = {source.label, source.domain, source.id, source.document}
    found: list[str] = []
    for entry in named:
        if entry in types or not any(sign in entry for sign in "*?["):
            found.append(entry)
            continue
        matching = [c for c in types if fnmatch.fnmatchcase(c, entry) and c not in others]
        if not matching:
            raise InputError(
                f"{where}: no column matches features {entry!r}; it has {_listed(types)}",
                fix="correct features in the settings",
            )
        found += matching
    return tuple(dict.fromkeys(found))


def _is_said(kind: pa.DataType) -> bool:
    return is_text(kind) or turn_columns(kind) is not None


def _check_pair(source: Source, types: dict[str, pa.DataType], where: str) -> None:
    """Both answers, and their prompt where there is one, are texts or all are messages."""
    names = [c for c in (source.prompt, source.chosen, source.rejected) if c is not None]
    kinds = {name: types[name] for name in names if not pa.types.is_null(types[name])}
    if source.chosen is not None and len({is_text(kind) for kind in kinds.values()}) > 1:
        raise InputError(
            f"{where}: {', '.join(names)} are to be texts, or messages all of them",
            fix="leave out prompt where the answers hold it, or convert the columns",
        )


def _is_images(kind: pa.DataType) -> bool:
    """Surely images: files, or lists that say their shape."""
    return is_file(kind) or (list_depth(kind) or 0) > 1


def _check_image(source: Source, types: dict[str, pa.DataType], where: str) -> None:
    """Numbers in one list need a shape; more than three lists in each other are no image."""
    if source.image is None:
        return
    kind = types[source.image]
    depth = list_depth(kind)
    if depth == 1 and source.shape is None:
        raise InputError(
            f"{where}: column {source.image!r} holds images as one list of numbers ({kind})",
            fix="set shape in the source, such as [28, 28] or [32, 32, 3]",
        )
    if depth is not None and depth > 3 and source.shape is None:
        raise InputError(
            f"{where}: column {source.image!r} holds {kind}: {depth} lists in each other",
            fix="images have height, width and channels: set shape in the source",
        )


def _check_type(field: str, column: str, kind: pa.DataType, source: Source, where: str) -> None:
    suits: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
        "text": (is_text, "text"),
        "prompt": (is_text if source.chosen is None else _is_said, "text"),
        "response": (is_text, "text"),
        "messages": (lambda k: turn_columns(k) is not None, "a list of {role, content}"),
        "chosen": (_is_said, "text or a list of {role, content}"),
        "rejected": (_is_said, "text or a list of {role, content}"),
        "features": (lambda k: is_number(k) or is_number(item_kind(k)), "numbers"),
        "image": (is_image, "images: structs of bytes and path, bytes, paths or pixels"),
        "label": (lambda k: is_number(k) or is_text(k), "integers or class names"),
    }
    fits, wanted = suits.get(field, (lambda k: is_text(k) or is_simple(k), "text or numbers"))
    if not pa.types.is_null(kind) and not fits(kind):
        raise InputError(
            f"{where}: column {column!r} is to be the {field}, but holds {kind}, not {wanted}",
            fix=f"name another column for {field}, or convert this one",
        )


def _listed(types: dict[str, Any]) -> str:
    names = list(types)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
