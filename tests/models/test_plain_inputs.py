"""What a simple model reads of examples of each kind."""

import numpy as np
import polars as pl
import pytest

from curate.errors import ConfigError
from curate.models.plain_inputs import MAX_CHARS, finite_rows, is_cut, plain_inputs
from curate.models.settings import ImageClassification


def test_texts_are_read_up_to_a_limit():
    fields = pl.DataFrame({"text": ["short", "x" * (MAX_CHARS + 5), None]})
    found = plain_inputs(fields, None)
    assert [len(text) for text in found] == [5, MAX_CHARS, 0]
    assert finite_rows(found).all()
    assert is_cut(fields).tolist() == [False, True, False]
    assert not is_cut(pl.DataFrame({"label": [0, 1]})).any()


def test_prompt_and_response_and_the_messages_of_a_chat_are_one_text():
    both = pl.DataFrame({"prompt": ["why", None], "response": ["so", "yes"]})
    assert plain_inputs(both, None) == ["why\nso", "\nyes"]
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    assert plain_inputs(pl.DataFrame({"messages": [turns]}), None) == ["hello\nhi"]


def test_numbers_stay_as_they_are_and_say_where_they_are_not_finite():
    rows = np.array([[1, 2], [np.nan, 3], [4, np.inf]], dtype=np.float32)
    fields = pl.DataFrame({"features": pl.Series(rows, dtype=pl.Array(pl.Float32, 2))})
    found = plain_inputs(fields, None)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, rows)
    assert finite_rows(found).tolist() == [True, False, False]


def test_images_become_means_of_their_pixels():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 64, 64, 1)).astype(np.uint8)
    fields = pl.DataFrame(
        {
            "image": pl.Series(pixels, dtype=pl.Array(pl.UInt8, (64, 64, 1))),
            "label": pl.Series([0, 1, 0], dtype=pl.Int64),
        }
    )
    task = ImageClassification(num_classes=2, channels=1, mean=0.0, std=1.0)
    found = plain_inputs(fields, task)
    assert isinstance(found, np.ndarray)
    wanted = pixels.reshape(3, 32, 2, 32, 2).mean(axis=(2, 4)).reshape(3, -1) / 255
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_examples_that_hold_nothing_to_read_are_refused():
    fields = pl.DataFrame({"chosen": ["a"], "rejected": ["b"]})
    with pytest.raises(
        ConfigError, match="no text and no numbers to read: the examples have chosen"
    ):
        plain_inputs(fields, None)
