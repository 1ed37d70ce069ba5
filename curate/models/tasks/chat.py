"""Chat messages as tokens by the tokenizer's own chat template, with the assistant's marked."""

import re
from typing import Any, Literal

import numpy as np
import polars as pl
import xxhash

from curate.errors import ConfigError, CurateError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates print today's date unless they are given one; scores must not depend on the day.
_DATE = {"date_string": "01 Jan 2025"}


class ChatEncoder:
    """Encodes chats and marks which tokens count.

    A template that marks what the assistant says (`{% generation %}`) is believed. For any other,
    a turn is what the template adds to the conversation so far, its header left out.

    Args:
        tokenizer: of transformers.
        turns: whether all assistant turns count or only the last.
    """

    def __init__(self, tokenizer: Any, turns: Literal["all", "last"]) -> None:
        self._tokenizer = tokenizer
        self._turns = turns
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):  # several named templates
            template = template.get("default")
        self._template: str | None = template

    @property
    def digest(self) -> str | None:
        """16 hexadecimal digits of the chat template; None where there is none."""
        return self._template and xxhash.xxh3_64_hexdigest(self._template.encode())

    def encode(
        self, fields: pl.DataFrame
    ) -> tuple[list[np.ndarray], list[np.ndarray], dict[int, str]]:
        """Tokens, marks of those that count, and example -> why it could not be encoded.

        Raises:
            ConfigError: the tokenizer has no chat template.
            CurateError: the template changes what came before when a message is added, so that
                the assistant's tokens cannot be told; names the row.
        """
        if self._template is None:
            raise ConfigError(
                "the examples are chats, but the tokenizer has no chat template",
                fix="choose a chat model, or set tokenizer.chat_template and save it again",
            )
        from jinja2 import TemplateError

        ids: list[np.ndarray] = []
        counted: list[np.ndarray] = []
        problems: dict[int, str] = {}
        for index, messages in enumerate(fields["messages"].to_list()):
            tokens, marks = list[int](), list[bool]()
            try:
                tokens, marks = self._chat(messages or [])
            except (TemplateError, TypeError, ValueError) as error:
                problems[index] = f"the chat template refuses it: {error}"
            except _NoPrefixError as error:
                raise CurateError(
                    f"{_place(fields, index)}: the chat template rewrites earlier messages when"
                    f" message {error.args[0]} is added, so the assistant's part is unclear",
                    fix="use a template with {% generation %} marks around what the assistant"
                    " says, or set task.turns to last",
                ) from error
            ids.append(np.array(tokens, dtype=np.int32))
            counted.append(np.array(marks, dtype=np.bool_))
        return ids, counted, problems

    def _chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            return [], []
        if self._turns == "last":
            # What follows the last assistant turn is not needed to predict it.
            messages, turns = messages[: turns[-1] + 1], turns[-1:]
        if _GENERATION.search(self._template or ""):
            return self._marked(messages)
        tokens = self._render(messages)
        marks = [False] * len(tokens)
        for turn in turns:
            before = self._render(messages[:turn], add_generation_prompt=True) if turn else []
            after = self._render(messages[: turn + 1])
            if tokens[: len(before)] != before or tokens[: len(after)] != after:
                raise _NoPrefixError(turn)
            marks[len(before) : len(after)] = [True] * (len(after) - len(before))
        marks[:1] = [False]
        return tokens, marks

    def _marked(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        found = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **_DATE
        )
        marks = [bool(mark) for mark in found["assistant_masks"]]
        if self._turns == "last" and any(marks):
            last = len(marks) - 1 - marks[::-1].index(True)
            first = last
            while first and marks[first - 1]:
                first -= 1
            marks[:first] = [False] * first
        marks[:1] = [False]
        return list(found["input_ids"]), marks

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        found = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **options, **_DATE
        )
        return list(found["input_ids"])


class _NoPrefixError(Exception):
    """The tokens of the first messages are not how the whole chat begins."""


def _place(fields: pl.DataFrame, index: int) -> str:
    """The example as the user knows it."""
    if {"source", "file", "row"} <= set(fields.columns):
        row = fields.row(index, named=True)
        return f"{row['source']}, {row['file']}, row {row['row']}"
    return f"example {index}"
