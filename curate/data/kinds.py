"""What an Arrow type is to curate: text, number, list, chat; whatever it is wrapped in."""

import pyarrow as pa

Problems = dict[int, tuple[str, str]]
"""Row of a table -> (reason, detail); the first that is found stands."""


def plain_kind(kind: pa.DataType | None) -> pa.DataType | None:
    """The type of the values: without dictionary and extension around it."""
    if isinstance(kind, pa.BaseExtensionType):
        storage: pa.DataType = kind.storage_type  # pyright: ignore[reportOptionalMemberAccess]
        return plain_kind(storage)
    if kind is not None and pa.types.is_dictionary(kind):
        return plain_kind(kind.value_type)
    return kind


def unwrapped(array: pa.Array) -> pa.Array:
    """The values of an array: without dictionary and extension around them."""
    if isinstance(array.type, pa.BaseExtensionType):
        return unwrapped(array.storage)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def is_text(kind: pa.DataType | None) -> bool:
    kind = plain_kind(kind)
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view",
              "fixed_size_binary")  # fmt: skip
    return kind is not None and any(getattr(pa.types, f"is_{check}")(kind) for check in checks)


def is_number(kind: pa.DataType | None) -> bool:
    kind = plain_kind(kind)
    return kind is not None and (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def is_simple(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(plain_kind(kind))


def item_kind(kind: pa.DataType) -> pa.DataType | None:
    kind = plain_kind(kind)
    lists = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    if any(getattr(pa.types, f"is_{check}")(kind) for check in lists):
        return kind.value_type
    return None


def turn_columns(kind: pa.DataType) -> tuple[str, str] | None:
    """Names of a turn's two parts: role and content, or ShareGPT's from and value."""
    turn = plain_kind(item_kind(kind))
    if turn is None or not pa.types.is_struct(turn):
        return None
    names = {turn.field(i).name for i in range(turn.num_fields)}
    for role, content in (("role", "content"), ("from", "value")):
        if {role, content} <= names and is_text(turn.field(role).type):
            return (role, content) if is_text(turn.field(content).type) else None
    return None
