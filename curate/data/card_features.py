"""Types of the columns of JSON Lines, as `datasets` reads them from a card.

Without them `datasets` guesses by the first rows: a column that only some source has is null in the
others, guessed as null, and everything together does not load.
"""

from typing import Any

import pyarrow as pa

from curate.data.kinds import item_kind


def json_features(schema: pa.Schema) -> list[dict[str, Any]]:
    """`features` of `dataset_info` for rows of a schema that were written as JSON.

    Dates, decimals and binary values are texts there, maps are lists of key and value.
    """
    return [{"name": field.name, **_feature(field.type)} for field in schema]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if isinstance(kind, pa.BaseExtensionType):
        return _feature(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _feature(kind.value_type)
    if pa.types.is_map(kind):
        entry = pa.struct([("key", kind.key_type), ("value", kind.item_type)])
        return {"list": _feature(entry)["struct"]}
    inner = item_kind(kind)
    if inner is not None:
        item = _feature(inner)
        # A value or a struct stands for itself; lists of lists keep their word.
        return {"list": item.get("dtype") or item.get("struct") or item}
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return {"struct": [{"name": field.name, **_feature(field.type)} for field in fields]}
    return {"dtype": _value(kind)}


def _value(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return str(kind)
    if pa.types.is_floating(kind):
        return {"halffloat": "float16", "float": "float32", "double": "float64"}[str(kind)]
    return "null" if pa.types.is_null(kind) else "string"
