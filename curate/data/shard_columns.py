"""The columns of the shards: those of the input, then what curate adds."""

import json
import logging
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from curate.errors import InputError

log = logging.getLogger(__name__)

ADDED = pa.schema(
    [
        pa.field("curate_source", pa.string()),
        pa.field("curate_file", pa.string()),
        pa.field("curate_row", pa.int64()),
        pa.field("curate_weight", pa.float32()),
        pa.field("curate_domain", pa.string()),
    ]
)
"""Columns that every shard has behind those of the input."""

_FEATURES = b"huggingface"


def shard_schema(payload: pa.Schema) -> pa.Schema:
    """Schema of the shards: the input's columns, then `ADDED`.

    Columns that an earlier curate run added are replaced. The features that `datasets` keeps in
    the metadata (images, class names) stay and cover the new columns too; pandas' notes on its
    index do not, since they describe the rows that were there before.
    """
    replaced = [name for name in ADDED.names if name in payload.names]
    if replaced:
        log.warning("columns of an earlier curate run are replaced: %s", ", ".join(replaced))
    plain = without_views(payload)
    fields = [field.with_nullable(True) for field in plain if field.name not in ADDED.names]
    metadata = {k: v for k, v in (payload.metadata or {}).items() if k != b"pandas"}
    if _FEATURES in metadata:
        info: dict[str, Any] = json.loads(metadata[_FEATURES]).get("info") or {}
        features: dict[str, Any] = info.get("features") or {}
        for field in ADDED:
            dtype = "float32" if pa.types.is_float32(field.type) else str(field.type)
            features[field.name] = {"dtype": dtype, "_type": "Value"}
        metadata[_FEATURES] = json.dumps({"info": {"features": features}}).encode()
    return pa.schema([*fields, *ADDED], metadata=metadata)


def without_views(schema: pa.Schema) -> pa.Schema:
    """The schema with large texts and bytes in place of views of them.

    Few readers of Arrow know views, and Arrow itself takes no rows of them.
    """
    fields = [field.with_type(_plain(field.type)) for field in schema]
    return pa.schema(fields, metadata=schema.metadata)


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if isinstance(kind, pa.StructType):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if isinstance(kind, pa.ListType | pa.LargeListType):
        inner: pa.Field = kind.value_field
        field = inner.with_type(_plain(inner.type))
        return pa.list_(field) if isinstance(kind, pa.ListType) else pa.large_list(field)
    return kind


def refuse_taken_names(names: Iterable[str], read: Iterable[str], *, where: str) -> None:
    """Refuse data whose own columns would be lost under the names of `ADDED`.

    Shards of an earlier run have all of these columns; they are replaced, and the domain may be
    read from there.

    Args:
        names: columns of a file.
        read: those among them that hold what an example is (content, label, id).
        where: names the file in messages.

    Raises:
        InputError: a column of the user's own has such a name.
    """
    taken = [name for name in ADDED.names if name in set(names)]
    lost = [name for name in taken if name in set(read)]
    if not lost and len(taken) in (0, len(ADDED)):
        return
    column = (lost or taken)[0]
    raise InputError(
        f"{where} has a column {column}, a name that curate gives to a column of its own in every"
        " shard: yours would be lost",
        fix=f"rename the column {column} in the data",
    )
