"""The trained tokenizer: same bytes each time, and every text comes back."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import ConfigError, InputError
from curate.models.settings import CausalLM
from curate.models.tasks.causal_lm import CausalLMTask
from curate.models.tokenizer_training import (
    END_OF_TEXT,
    PADDING,
    save_tokenizer,
    texts_of,
    train_tokenizer,
)
from curate.models.tokens import load_tokenizer, tokenizer_digest

TEXTS = [f"the cat number {i % 7} sat on the mat, {'very ' * (i % 5)}happily" for i in range(300)]

_SCRIPT = """
import sys
from pathlib import Path
from curate.models.settings import CausalLM
from curate.models.tasks.causal_lm import CausalLMTask
from curate.models.tokenizer_training import save_tokenizer, train_tokenizer
import email.message, unittest.mock, asyncio.base_events
texts = [p for m in (email.message, unittest.mock, asyncio.base_events)
         for p in Path(m.__file__).read_text().split("\\n\\n")]
save_tokenizer(train_tokenizer(texts, vocab_size=1500), Path(sys.argv[1]))
"""


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_number_of_threads_does_not_change_a_byte(tmp_path: Path):
    for threads in ("1", "2"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        folder = tmp_path / threads
        subprocess.run([sys.executable, "-c", _SCRIPT, str(folder)], env=environment, check=True)
    first = _contents(tmp_path / "1")
    assert "tokenizer.json" in first
    assert first == _contents(tmp_path / "2")


def test_it_survives_saving_and_loading(tmp_path: Path):
    trained = train_tokenizer(TEXTS, vocab_size=280)
    save_tokenizer(trained, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_digest(loaded) == tokenizer_digest(trained)
    assert loaded.bos_token == loaded.eos_token == END_OF_TEXT
    assert loaded.pad_token == PADDING
    assert loaded("the cat")["input_ids"] == trained("the cat")["input_ids"]
    assert len(loaded) == 280


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(text: str):
    tokenizer = _trained()
    ids = tokenizer(text)["input_ids"]
    assert max(ids, default=0) < len(tokenizer)
    assert tokenizer.decode(ids) == text


def test_common_words_become_one_token():
    tokenizer = _trained()
    assert len(tokenizer(" happily")["input_ids"]) == 1
    assert len(tokenizer(" zyxwvut")["input_ids"]) > 3


def test_all_texts_of_an_example_count():
    pairs = pl.DataFrame({"prompt": ["a", None], "response": ["b", "c"], "label": [1, 2]})
    assert list(texts_of(pairs)) == ["a", "b", "c"]
    chat = pl.DataFrame(
        {"messages": [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]}
    )
    assert list(texts_of(chat)) == ["x", "y"]


def test_a_chat_counts_what_the_assistant_says_and_its_end():
    chat = [
        {"role": "user", "content": "the cat?"},
        {"role": "assistant", "content": "sat on the mat"},
        {"role": "user", "content": "happily?"},
        {"role": "assistant", "content": "very"},
    ]
    tokenizer = _trained()
    encoded = CausalLMTask(CausalLM(), tokenizer).encode(pl.DataFrame({"messages": [chat]}))
    tokens, counted = encoded.arrays["tokens"], encoded.arrays["counted"]
    assert tokenizer.decode(tokens) == (
        "user:\nthe cat?\n\nassistant:\nsat on the mat<|endoftext|>\n\n"
        "user:\nhappily?\n\nassistant:\nvery<|endoftext|>\n\n"
    )
    assert tokenizer.decode(tokens[counted]) == "sat on the mat<|endoftext|>very<|endoftext|>"


def test_no_text_and_too_small_a_vocabulary_are_refused():
    with pytest.raises(InputError, match="no text to train a tokenizer on"):
        train_tokenizer([], vocab_size=300)
    with pytest.raises(ConfigError, match="vocab_size is 100"):
        train_tokenizer(TEXTS, vocab_size=100)


@cache
def _trained() -> Any:
    return train_tokenizer(TEXTS, vocab_size=400)
