"""Preference data: two answers to one prompt, as texts or as messages, in their columns."""

from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from curate.data.columns import resolve_columns
from curate.data.example import Source, content_hash
from curate.data.index import Indexed, Rules, index_rows, source_settings
from curate.data.reading import field_frame
from curate.errors import ConfigError, InputError
from curate.models.tokenizer_training import texts_of
from curate.models.tokens import count_tokens

ASKED = [{"role": "user", "content": "which?"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def index(table: pa.Table, **settings: Any) -> tuple[Indexed, Source]:
    rules = Rules(seed=0, held_out=0.3, num_classes=None, several_sources=False)
    source = resolve_columns(Source(path="x", **settings), table.schema)
    found = index_rows(table, source, name="s", file="f", first_row=0, rules=rules)
    return found, source


def test_the_usual_columns_are_taken_as_texts():
    table = pa.table({"prompt": ["p", "q"], "chosen": ["yes", "a"], "rejected": ["no", "b"]})
    found, source = index(table)
    assert (source.prompt, source.chosen, source.rejected) == ("prompt", "chosen", "rejected")
    assert found.examples["num_chars"].to_list() == [6, 3]
    assert found.examples["content"][0] == content_hash([b"p", b"yes", b"no"])
    fields = field_frame(table, source)
    assert fields.columns == ["prompt", "chosen", "rejected"]
    assert count_tokens(fields, None).tolist() == [6, 3]
    assert list(texts_of(fields)) == ["p", "yes", "no", "q", "a", "b"]


def test_messages_and_a_prompt_of_messages_are_taken_too():
    table = pa.table({"prompt": [ASKED], "chosen": [said("this")], "rejected": [said("that one")]})
    found, source = index(table)
    fields = field_frame(table, source)
    assert fields["chosen"].to_list() == [said("this")]
    assert fields["prompt"].to_list() == [ASKED]
    assert found.examples["num_chars"].to_list() == [6 + 4 + 8]
    assert count_tokens(fields, None).tolist() == [18]
    assert list(texts_of(fields)) == ["which?", "this", "that one"]


def test_a_text_prompt_beside_messages_repeats_what_they_hold_and_is_left_out():
    columns = {"prompt": ["which?"], "chosen": [ASKED + said("a")], "rejected": [ASKED + said("b")]}
    _, source = index(pa.table(columns))
    assert source.prompt is None
    with pytest.raises(InputError, match=r"prompt, chosen, rejected are to be texts, or messages"):
        index(pa.table(columns), prompt="prompt", chosen="chosen", rejected="rejected")


def test_without_a_prompt_both_answers_hold_it():
    table = pa.table({"good": ["p yes"], "bad": ["p no"]})
    found, source = index(table, chosen="good", rejected="bad")
    assert field_frame(table, source).columns == ["chosen", "rejected"]
    assert found.examples["num_chars"].to_list() == [9]


def test_an_empty_answer_is_set_aside_and_a_missing_one_too():
    table = pa.table({"chosen": ["a", " ", "a", "a"], "rejected": ["b", "b", None, ""]})
    found, _ = index(table)
    assert found.examples["row"].to_list() == [0]
    reasons = dict(found.quarantine.select("row", "reason").iter_rows())
    assert reasons == {1: "empty", 2: "missing_text", 3: "empty"}


def test_one_answer_alone_and_a_prompt_alone_are_refused():
    with pytest.raises(ConfigError, match="chosen and rejected belong together"):
        Source(path="x", chosen="a")
    with pytest.raises(ConfigError, match="prompt and response belong together"):
        Source(path="x", prompt="a")
    assert Source(path="x", prompt="a", chosen="b", rejected="c").columns == ("a", "b", "c")


def test_the_settings_of_other_sources_read_as_before():
    assert "chosen" not in source_settings(Source(path="x", text="text"))
    assert source_settings(Source(path="x", chosen="a", rejected="b"))["rejected"] == "b"


def test_several_kinds_of_content_are_for_the_user_to_decide():
    table = pa.table({"text": ["x"], "chosen": ["a"], "rejected": ["b"]})
    with pytest.raises(InputError, match=r"several columns.*chosen \+ rejected"):
        resolve_columns(Source(path="x"), table.schema)
    frame = pl.DataFrame({"chosen": [1], "rejected": [2]})
    with pytest.raises(InputError, match="is to be the chosen, but holds int64"):
        resolve_columns(Source(path="x", chosen="chosen", rejected="rejected"),
                        frame.to_arrow().schema)  # fmt: skip
