"""A tokenizer made from the run's own text: byte-level byte-pair encoding.

Every byte has a token of its own, so that any text can be written and read back exactly.
`<|endoftext|>` serves as beginning and end; padding has a token of its own, since trainers that
leave padding out of the loss would leave the end of each text out with it. The same text in the
same order gives the same bytes, whatever the number of threads.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import polars as pl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from curate.errors import ConfigError, InputError
from curate.models.checkpoints import native_errors
from curate.models.tokens import text_columns

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""The plainest that marks what the assistant says, its end included."""

_SMALLEST = 258
"""256 bytes and the special tokens."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Any:
    """A fast tokenizer of transformers, trained on `texts`.

    Args:
        texts: read once, in order; memory grows with the number of different words only.
        vocab_size: tokens, the 256 bytes and the special tokens included; fewer where the text has
            nothing left to merge.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes.
        InputError: there is no text.
    """
    if vocab_size < _SMALLEST:
        raise ConfigError(
            f"vocab_size is {vocab_size}, too few for 256 bytes, {END_OF_TEXT} and {PADDING}",
            fix="set model.tokenizer.vocab_size to 258 or more, 8192 for instance",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        # The library hands the alphabet over in no fixed order.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_present(texts), trainer=trainer)
    return _wrapped(tokenizer)


def texts_of(fields: pl.DataFrame) -> Iterator[str]:
    """All text of some examples: the text, or prompt and answers, or every message.

    Args:
        fields: columns as `curate.data.reading.read_fields` gives them.
    """
    for row in fields.select(text_columns(fields)).iter_rows():
        for value in row:
            if isinstance(value, list):
                messages = cast(list[dict[str, str | None]], value)
                yield from (text for message in messages if (text := message["content"]))
            elif value:
                yield value


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write what `curate.models.tokens.load_tokenizer` reads."""
    with native_errors():
        tokenizer.save_pretrained(str(folder))


def _wrapped(tokenizer: Tokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _present(texts: Iterable[str]) -> Iterator[str]:
    """The texts, or an error where there is none: the library would go on with nothing."""
    found = False
    for text in texts:
        found = True
        yield text
    if not found:
        raise InputError(
            "there is no text to train a tokenizer on",
            fix="check that the sources have training rows, or name a tokenizer in model.tokenizer",
        )
