"""Tokenizers: loading them, naming them by digest, counting with them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from curate.errors import ConfigError, InputError

_CHUNK = 1000
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model",
          "spiece.model", "sentencepiece.bpe.model")  # fmt: skip


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer in a folder or on the hub.

    Raises:
        InputError: it is missing, or its files cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).exists() for file in _FILES):
            raise InputError(
                f"{folder} holds no tokenizer",
                fix=f"save it there with tokenizer.save_pretrained({str(folder)!r}),"
                " or set model.tokenizer",
            )
    elif looks_like_path(str(name)):
        raise InputError(f"there is no tokenizer folder {name}", fix="check the path")
    try:
        if _is_plain(folder):
            return PreTrainedTokenizerFast.from_pretrained(str(name))
        return AutoTokenizer.from_pretrained(str(name), revision=revision, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain ones for a damaged file
        file = folder / "tokenizer.json"
        place = file if type(error) is Exception and file.is_file() else name
        raise InputError(
            f"the tokenizer {place} cannot be loaded: {_first_line(error)}",
            fix="check the name, or save the tokenizer to a folder with save_pretrained",
        ) from error


def looks_like_path(name: str) -> bool:
    """Whether a name that is no folder was meant as one: hub ids are `name` or `owner/name`."""
    return name.startswith(("/", ".", "~")) or name.count("/") != 1 or Path(name).parent.is_dir()


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hexadecimal digits for how a tokenizer cuts text; its chat template has a digest apart."""
    if getattr(tokenizer, "is_fast", False):
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        # Both change with the last call of the tokenizer and say nothing about it.
        model.pop("truncation", None)
        model.pop("padding", None)
    else:
        model = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    text = json.dumps([model, special], sort_keys=True, ensure_ascii=True)
    return xxhash.xxh3_64_hexdigest(text.encode())


def token_ids(
    tokenizer: Any, texts: Sequence[str], *, special: bool = False, limit: int | None = None
) -> list[np.ndarray]:
    """Token numbers of each text, int32.

    Args:
        tokenizer: of transformers.
        texts: any number of them; passed on in chunks, so that memory stays bounded.
        special: whether the tokenizer's special tokens are put around each.
        limit: of a longer text the first `limit` + 1 are kept, which shows that it is longer.
    """
    stop = None if limit is None else limit + 1
    found: list[np.ndarray] = []
    for start in range(0, len(texts), _CHUNK):
        encoded = tokenizer(
            list(texts[start : start + _CHUNK]),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        found += [np.array(ids[:stop], dtype=np.int32) for ids in encoded["input_ids"]]
    return found


def count_tokens(fields: pl.DataFrame, tokenizer: Any | None) -> np.ndarray:
    """(N,) int64 tokens of the whole example: nothing cut, no special tokens.

    A prompt and its response or responses are added up, and so are the messages of a chat, without
    what a chat template puts around them. A row of numbers counts as 1.

    Args:
        fields: columns as `curate.data.reading.read_fields` gives them.
        tokenizer: of transformers; None counts characters instead.
    """
    columns = text_columns(fields)
    if not columns:
        return np.ones(fields.height, dtype=np.int64)
    total = np.zeros(fields.height, dtype=np.int64)
    for column in columns:
        if isinstance(fields[column].dtype, pl.List):  # messages
            pieces = fields.select(pl.col(column).list.eval(pl.element().struct.field("content")))
            lists: list[list[str | None] | None] = pieces[column].to_list()
            flat = [text or "" for texts in lists for text in texts or []]
            owner = np.repeat(np.arange(len(lists)), [len(texts or []) for texts in lists])
            np.add.at(total, owner, _lengths(flat, tokenizer))
        else:
            total += _lengths(fields[column].fill_null("").to_list(), tokenizer)
    return total


def text_columns(fields: pl.DataFrame) -> list[str]:
    """The columns of a table of examples that hold their text, plain or as messages."""
    if "messages" in fields.columns:
        return ["messages"]
    names = ("text", "prompt", "response", "chosen", "rejected")
    return [name for name in names if name in fields.columns]


def _is_plain(folder: Path) -> bool:
    """Whether the files say that they need no class of their own.

    `AutoTokenizer` believes the model's `config.json` more, and a class that it takes from there
    may add tokens that the model has never seen.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    named = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    return named in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _lengths(texts: list[str], tokenizer: Any | None) -> np.ndarray:
    if tokenizer is None:
        return np.array([len(text) for text in texts], dtype=np.int64)
    found = [
        len(ids)
        for start in range(0, len(texts), _CHUNK)
        for ids in token_ids(tokenizer, texts[start : start + _CHUNK])
    ]
    return np.array(found, dtype=np.int64)


def padding_id(tokenizer: Any, *, needed: bool) -> int:
    """Token that fills short rows of a batch; it is masked, so that its choice changes nothing.

    Args:
        tokenizer: of transformers.
        needed: whether the model looks for this token to find the end of the text.

    Raises:
        ConfigError: the model needs one and the tokenizer has neither padding nor end token.
    """
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    if needed:
        raise ConfigError(
            "the tokenizer has neither a padding token nor an end-of-text token",
            fix="set tokenizer.pad_token to one of its tokens and save it again",
        )
    return 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
