"""Rows to examples: each kind of content, each reason, hashes, domains, splits."""

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import xxhash

from curate.data.columns import PROBLEM, resolve_columns
from curate.data.example import Source
from curate.data.index import Indexed, Rules, index_rows
from curate.data.tables import REASONS, SCHEMAS
from curate.errors import InputError


def index(
    table: pa.Table,
    *,
    num_classes: int | None = None,
    several: bool = False,
    seed: int = 0,
    first_row: int = 0,
    **settings: Any,
) -> Indexed:
    rules = Rules(seed=seed, held_out=0.3, num_classes=num_classes, several_sources=several)
    source = resolve_columns(Source(path="x", **settings), table.schema)
    return index_rows(table, source, name="s", file="f", first_row=first_row, rules=rules)


def reasons(found: Indexed) -> dict[int, str]:
    assert set(found.quarantine["reason"]) <= set(REASONS)
    return dict(found.quarantine.select("row", "reason").iter_rows())


def kept(found: Indexed) -> list[int]:
    return found.examples["row"].to_list()


TEXT_TYPES = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
    pa.binary_view(), pa.dictionary(pa.int32(), pa.string()),
]  # fmt: skip


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_text_of_every_arrow_type_gives_the_same_examples(kind: pa.DataType) -> None:
    values = ["one é", None, " \n\t", "three", "", "　"]
    array = pa.array(values)
    array = array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind)
    found = index(pa.table({"text": array}), first_row=100)
    assert kept(found) == [100, 103]
    assert reasons(found) == {101: "missing_text", 102: "empty", 104: "empty", 105: "empty"}
    assert found.examples["num_chars"].to_list() == [5, 5]
    assert dict(found.examples.schema) == SCHEMAS["examples"]
    assert dict(found.quarantine.schema) == SCHEMAS["quarantine"]


def test_invalid_utf8_costs_its_row_only() -> None:
    raw = pa.array([b"good", b"bad \xff", b"\xed\xa0\x80", "gut é".encode()], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 4, raw.buffers())})
    found = index(table)
    assert kept(found) == [0, 3]
    assert reasons(found) == {1: "invalid_utf8", 2: "invalid_utf8"}
    assert found.quarantine["detail"][0] == "text: byte 4 is 0xff"


def test_the_content_hash_is_that_of_the_fields_with_their_lengths() -> None:
    found = index(pa.table({"p": ["ab", "a"], "r": ["c", "bc"]}), prompt="p", response="r")
    expected = [
        xxhash.xxh3_64_intdigest(
            len(p).to_bytes(8, "little") + p + len(r).to_bytes(8, "little") + r
        )
        for p, r in ((b"ab", b"c"), (b"a", b"bc"))
    ]
    assert found.examples["content"].to_list() == expected
    assert found.examples["num_chars"].to_list() == [3, 3]


def test_a_missing_prompt_or_an_empty_response_sets_the_row_aside() -> None:
    table = pa.table({"p": ["a", None, "", "a", "a"], "r": ["b", "b", "b", " ", None]})
    found = index(table, prompt="p", response="r")
    assert kept(found) == [0, 2]
    assert reasons(found) == {1: "missing_text", 3: "empty", 4: "missing_text"}


CHATS: list[Any] = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hé"}],
    None,
    [],
    [{"role": "user", "content": " "}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
    [{"role": None, "content": "a"}],
    [{"role": "system", "content": "x"}],
]


def test_chats_are_checked_message_by_message() -> None:
    found = index(pa.table({"messages": CHATS}))
    assert kept(found) == [0, 6]
    assert reasons(found) == {1: "missing_text", 2: "empty", 3: "empty", 4: "missing_text",
                              5: "missing_text"}  # fmt: skip
    assert "message 1: content is null" in found.quarantine.filter(row=4)["detail"][0]
    assert found.examples["num_chars"].to_list() == [4, 1]


def test_both_ways_of_writing_a_chat_have_the_same_content() -> None:
    share = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hé"},
    ]
    ours = index(pa.table({"messages": CHATS[:1]})).examples["content"]
    theirs = index(pa.table({"conversations": [share]})).examples["content"]
    other = index(pa.table({"messages": [CHATS[0][::-1]]})).examples["content"]
    assert ours.to_list() == theirs.to_list() != other.to_list()


def test_features_of_columns_and_of_lists_agree_and_bad_rows_are_named() -> None:
    nan = float("nan")
    columns = pa.table({"x_a": [1, 2, None, 4], "x_b": [0.5, nan, 1.0, 2.0], "y": [0, 1, 0, 1]})
    found = index(columns, features="x_*", label="y", num_classes=2)
    assert kept(found) == [0, 3]
    assert reasons(found) == {1: "wrong_type", 2: "wrong_type"}
    assert found.num_features == 2
    lists = pa.table({"x": [[1.0, 0.5], [4, 2], [1, 2, 3], [None, 1], None], "y": [0, 1, 0, 0, 0]})
    other = index(lists, features="x", label="y", num_classes=2)
    assert kept(other) == [0, 1]
    assert reasons(other) == dict.fromkeys([2, 3, 4], "wrong_type")
    assert other.examples["content"].to_list() == found.examples["content"].to_list()
    fixed = pa.table({"x": pa.array([[1, 0.5], [4, 2]], pa.list_(pa.float32(), 2))})
    assert index(fixed, features="x").examples["content"].to_list() == (
        found.examples["content"].to_list()
    )
    row = np.array([1, 0.5], "<f4").tobytes()
    assert found.examples["content"][0] == xxhash.xxh3_64_intdigest((8).to_bytes(8, "little") + row)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([0, 2, 3, -1, None], pa.int8()),
        pa.array([0, 2, 3, 2**63, None], pa.uint64()),
        pa.array([0.0, 2.0, 3.0, -1.0, None]),
    ],
)
def test_labels_outside_the_classes_and_missing_ones_are_set_aside(values: pa.Array) -> None:
    found = index(pa.table({"text": ["a"] * 5, "y": values}), label="y", num_classes=3)
    assert found.examples["label"].to_list() == [0, 2]
    assert reasons(found) == {2: "label_out_of_range", 3: "label_out_of_range", 4: "wrong_type"}


def test_labels_may_be_names_or_booleans() -> None:
    table = pa.table({"text": ["a"] * 4, "y": ["dog", "cat", "cow", None], "b": [True] * 4})
    found = index(table, label="y", classes=("cat", "dog"), num_classes=2)
    assert found.examples["label"].to_list() == [1, 0]
    assert reasons(found) == {2: "label_out_of_range", 3: "wrong_type"}
    assert found.quarantine["detail"][0] == "'cow' is none of the classes"
    assert index(table, label="b").examples["label"].to_list() == [1] * 4


def test_white_space_is_no_class_name() -> None:
    table = pa.table({"text": ["a", "b", "c", "d"], "y": ["cat", "", "  ", None]})
    found = index(table, label="y", classes=("cat", "dog"), num_classes=2)
    assert reasons(found) == dict.fromkeys((1, 2, 3), "wrong_type")
    assert set(found.quarantine["detail"]) == {"y is null or empty"}
    free = index(table, label="y", classes=("cat", "dog"))
    assert free.examples["label"].to_list() == [0, None, None, None]
    named = index(table, label="y", classes=("", "cat"))
    assert named.examples["label"].to_list() == [1, 0, None]
    assert reasons(named) == {2: "label_out_of_range"}


def test_fractions_are_no_labels_and_without_a_task_a_label_may_be_missing() -> None:
    table = pa.table({"text": ["a"] * 4, "y": [1.0, 0.5, float("inf"), None]})
    found = index(table, label="y")
    assert found.examples["label"].to_list() == [1, None]
    assert reasons(found) == {1: "wrong_type", 2: "wrong_type"}


def test_a_whole_number_column_called_label_is_the_label() -> None:
    assert index(pa.table({"text": ["a"], "label": [3]})).examples["label"].to_list() == [3]
    assert index(pa.table({"text": ["a"], "label": ["x"]})).examples["label"].to_list() == [None]


def test_what_the_conversion_noted_comes_first() -> None:
    notes = [None, "unparsable: line 2", "invalid_utf8: byte 3"]
    found = index(pa.table({"text": ["a", None, None], PROBLEM: notes}))
    assert kept(found) == [0]
    assert list(found.quarantine.select("row", "reason", "detail").iter_rows()) == [
        (1, "unparsable", "line 2"),
        (2, "invalid_utf8", "byte 3"),
    ]


def test_domains_are_values_named_by_source_where_there_are_several() -> None:
    table = pa.table({"text": ["a", "b", "c"], "d": [1, None, 2], "i": [7, 8, 9]})
    found = index(table, domain="d", id="i")
    assert found.examples["domain"].to_list() == ["1", "unknown", "2"]
    assert found.examples["id"].to_list() == ["7", "8", "9"]
    found = index(table, domain="d", several=True)
    assert found.examples["domain"].to_list() == ["s/1", "s/unknown", "s/2"]
    assert index(table, several=True).examples["domain"].to_list() == ["s"] * 3


def test_the_split_follows_the_document_or_the_content_and_the_seed() -> None:
    count = 2000
    table = pa.table(
        {"text": [f"t{i}" for i in range(count)], "doc": [i // 4 for i in range(count)]}
    )
    by_content = index(table).examples
    share = (by_content["split"] == "held_out").mean()
    assert isinstance(share, float)
    assert abs(share - 0.3) < 0.05
    shuffled = index(table.take(pa.array(range(count)[::-1]))).examples
    assert shuffled["split"].to_list() == by_content["split"].to_list()[::-1]
    by_document = index(table, document="doc").examples
    splits = (
        by_document.with_columns(doc=pl.col("row") // 4)
        .group_by("doc")
        .agg(pl.col("split").n_unique())
    )
    assert splits["split"].to_list() == [1] * (count // 4)
    other = index(table, seed=1).examples
    assert other["split"].to_list() != by_content["split"].to_list()


# -- choosing columns -----------------------------------------------------------------------------


def schema(**types: pa.DataType) -> pa.Schema:
    return pa.schema(list(types.items()))


TURN = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


@pytest.mark.parametrize(
    ("types", "taken"),
    [
        ({"text": pa.string(), "n": pa.int64()}, {"text": ("text",)}),
        ({"body": pa.binary(), "content": pa.int64()}, {"text": ("body",)}),
        ({"conversations": TURN}, {"messages": ("conversations",)}),
        ({"instruction": pa.string(), "output": pa.string()},
         {"prompt": ("instruction",), "response": ("output",)}),
    ],
)  # fmt: skip
def test_the_one_well_known_column_is_taken(
    types: dict[str, pa.DataType], taken: dict[str, tuple[str, ...]]
) -> None:
    assert resolve_columns(Source(path="x"), schema(**types)).content_columns == taken


def test_several_candidates_or_none_are_for_the_user_to_decide() -> None:
    both = schema(instruction=pa.string(), input=pa.string(), output=pa.string())
    with pytest.raises(InputError, match=r"instruction \+ output; input \+ output"):
        resolve_columns(Source(path="x"), both)
    with pytest.raises(InputError, match="it has a, b"):
        resolve_columns(Source(path="x"), schema(a=pa.string(), b=pa.int64()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "txet"}, r"f\.parquet has no column 'txet'.*\n.*did you mean text\?"),
        ({"text": "n"}, "'n' is to be the text, but holds int64, not text"),
        ({"text": "text", "label": "text"}, "label column 'text' holds text.*\n.*classes"),
        ({"text": "text", "domain": "turns"}, "'turns' is to be the domain"),
        ({"messages": "text"}, "not a list of {role, content}"),
        ({"features": "text"}, "not numbers"),
        ({"features": "z_*"}, r"no column matches features 'z_\*'"),
    ],
)
def test_a_wrong_column_is_named_with_its_file(settings: dict[str, str], message: str) -> None:
    types = schema(text=pa.string(), n=pa.int64(), turns=TURN)
    with pytest.raises(InputError, match=message):
        resolve_columns(Source(path="x", **settings), types, where="f.parquet")  # pyright: ignore[reportArgumentType]


def test_a_column_that_stands_twice_is_refused_by_name() -> None:
    """Parquet allows it; which of the two is meant nobody knows."""
    types = pa.schema([("text", pa.string()), ("v", pa.int64()), ("v", pa.int64())])
    with pytest.raises(InputError, match=r"f\.parquet has two columns called 'v'"):
        resolve_columns(Source(path="x", text="text"), types, where="f.parquet")
