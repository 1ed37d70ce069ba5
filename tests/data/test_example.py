"""Sources, content hashes and splits."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from curate.data.example import Index, Source, content_hash, split_of
from curate.errors import ConfigError


def test_prompt_and_response_belong_together() -> None:
    with pytest.raises(ConfigError, match="prompt and response belong together"):
        Source(path="x", prompt="p")


def test_columns_are_listed_once_and_in_order() -> None:
    source = Source(path="x", prompt="p", response="r", label="l", domain="p", id="i")
    assert source.content_columns == {"prompt": ("p",), "response": ("r",)}
    assert source.columns == ("p", "r", "l", "i")


@pytest.mark.parametrize(
    "setting", [{"held_out": 1.5}, {"max_bad_rows": -1}, {"partition_rows": 0}]
)
def test_index_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Index(**setting)  # pyright: ignore[reportArgumentType]


@given(st.lists(st.binary(max_size=20), max_size=4))
def test_the_hash_is_xxh3_of_fields_with_their_lengths(fields: list[bytes]) -> None:
    data = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    assert content_hash(fields) == xxhash.xxh3_64_intdigest(data)


def test_the_split_is_the_same_for_ever() -> None:
    """A change of this list would move examples of old runs across the split."""
    drawn = [split_of(b"%d" % i, seed=7, held_out=0.5) for i in range(12)]
    expected = [
        xxhash.xxh3_64_intdigest(b"split%d" % i, seed=7) < 2**63 for i in range(12)
    ]  # fmt: skip
    assert [name == "held_out" for name in drawn] == expected
    assert {split_of(b"x", seed=s, held_out=0.0) for s in range(20)} == {"train"}
    assert {split_of(b"x", seed=s, held_out=1.0) for s in range(20)} == {"held_out"}
