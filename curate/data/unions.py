"""One schema for the rows of many files."""

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from curate.errors import InputError


def union_schema(schemas: Iterable[tuple[str, pa.Schema]]) -> pa.Schema | None:
    """All columns of all schemas, each nullable; a type that holds every file's values.

    Args:
        schemas: (file, its schema); the file is named in messages.

    Returns:
        The union, or None of nothing. Metadata that all files share is kept, and what `datasets`
        wrote about the columns is united.

    Raises:
        InputError: a column's types have nothing in common; names it and two files.
    """
    union: pa.Schema | None = None
    origin: dict[str, str] = {}
    metadata: list[dict[bytes, bytes]] = []
    for where, schema in schemas:
        metadata.append(schema.metadata or {})
        bare = pa.schema([field.with_nullable(True) for field in schema.remove_metadata()])
        union = bare if union is None else _joined(union, bare, origin, where)
        origin.update({name: where for name in bare.names if name not in origin})
    return None if union is None else union.with_metadata(_common_metadata(metadata))


def _joined(union: pa.Schema, other: pa.Schema, origin: dict[str, str], where: str) -> pa.Schema:
    for field in other:
        at = union.get_field_index(field.name)
        if at < 0:
            union = union.append(field)
            continue
        pair = [pa.schema([union.field(at)]), pa.schema([field])]
        try:
            joined = pa.unify_schemas(pair, promote_options="permissive").field(0)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(
                f"column {field.name!r} is {union.field(at).type} in {origin[field.name]}"
                f" and {field.type} in {where}",
                fix="convert one of them, so that both can stand in one table",
            ) from error
        union = union.set(at, joined)
    return union


def _common_metadata(metadata: list[dict[bytes, bytes]]) -> dict[bytes, bytes] | None:
    """Entries that all files share, and the union of what `datasets` wrote about the columns."""
    shared = {
        key: value
        for key, value in metadata[0].items()
        if all(entry.get(key) == value for entry in metadata)
    }
    features: dict[str, Any] = {}
    for entry in metadata:
        if b"huggingface" in entry:
            found = json.loads(entry[b"huggingface"]).get("info", {}).get("features", {})
            features = {**found, **features}
    if features and b"huggingface" not in shared:
        shared[b"huggingface"] = json.dumps({"info": {"features": features}}).encode()
    return shared or None
