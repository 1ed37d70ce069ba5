"""Chats as text by a tokenizer's chat template, without transformers.

Templates are written for the environment that transformers renders them in, so this one is the
same for everything that a chat of roles and contents needs: white space, loop controls,
`{% generation %}`, `raise_exception`, `strftime_now`, and a sandbox, as templates come from others.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any, NoReturn

import pyarrow as pa
from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from curate.data.values import Turns
from curate.errors import ConfigError, CurateError

# Some templates print today's date; what is written must not depend on the day.
_TODAY = datetime(2025, 1, 1)
_DATE = "01 Jan 2025"

Chat = list[dict[str, str]]
"""Messages, each a role and a content."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Two code points that Unicode keeps out of every text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class RefusedError(Exception):
    """A template refuses a chat, and says why."""


class RewrittenError(Exception):
    """A template writes earlier messages otherwise when one is added: its number."""


class ChatTemplate:
    """Renders chats.

    Args:
        template: in Jinja.
        special: `bos_token`, `eos_token` ... -> its text.

    Raises:
        ConfigError: the template cannot be read.
    """

    def __init__(self, template: str, special: Mapping[str, Any]) -> None:
        try:
            self._template = _environment(_Generation).from_string(template)
            self._marked = None
            if _GENERATION.search(template):
                self._marked = _environment(_MarkedGeneration).from_string(template)
        except TemplateError as error:
            raise ConfigError(
                f"the tokenizer's chat template cannot be read: {error}",
                fix="correct tokenizer.chat_template and save the tokenizer again",
            ) from error
        self._given = {"tools": None, "documents": None, **special, "date_string": _DATE}

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a whole chat.

        Args:
            messages: each a role and a content.

        Raises:
            RefusedError: the template has no place for these messages.
        """
        return self._rendered(self._template, messages)

    def spans(self, messages: Sequence[Mapping[str, str]], text: str) -> list[tuple[int, int]]:
        """Where in the text of a chat the assistant speaks, in characters.

        A template that marks it (`{% generation %}`) is believed. For any other, a turn is what
        the template adds to the conversation so far, its header left out.

        Args:
            messages: of the chat.
            text: what `render` made of it.

        Raises:
            RewrittenError: the text of the first messages is not how the whole chat begins.
        """
        if self._marked is not None:
            return _marks(self._rendered(self._marked, messages), text, len(messages))
        found: list[tuple[int, int]] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(self._template, messages[:turn], prompt=True) if turn else ""
            after = self._rendered(self._template, messages[: turn + 1])
            if not (text.startswith(before) and text.startswith(after)):
                raise RewrittenError(turn)
            found.append((len(before), len(after)))
        return found

    def _rendered(
        self, template: Template, messages: Sequence[Mapping[str, str]], *, prompt: bool = False
    ) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=prompt, **self._given)
        except (TemplateError, TypeError, ValueError) as error:
            raise RefusedError(str(error)) from error


def _environment(generation: type[Extension]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[generation, "jinja2.ext.loopcontrols"],
    )
    known: dict[str, Any] = environment.globals  # pyright: ignore[reportAssignmentType]
    known["raise_exception"] = _refuse
    known["strftime_now"] = _TODAY.strftime
    known["namespace"] = _Namespace
    environment.filters["tojson"] = _json
    return environment


def _marks(marked: str, text: str, num_messages: int) -> list[tuple[int, int]]:
    """Spans between marks, which are then taken out."""
    pieces = re.split(f"([{_OPEN}{_CLOSE}])", marked)
    found: list[tuple[int, int]] = []
    at = start = 0
    for piece in pieces:
        if piece == _OPEN:
            start = at
        elif piece == _CLOSE:
            found.append((start, at))
        else:
            at += len(piece)
    if "".join(pieces[::2]) != text:  # it works on what it has marked
        raise RewrittenError(num_messages - 1)
    return found


def rendered(
    turns: Turns, table: pa.Table, *, template: str, special: Mapping[str, Any], marks: bool
) -> tuple[list[Chat], list[str], list[list[tuple[int, int]]]]:
    """The chats of a table: their messages, their text, and where in it the assistant speaks.

    Args:
        turns: the messages of all rows.
        table: the rows, which an error names.
        template: of the tokenizer.
        special: see `ChatTemplate`.
        marks: whether the third is wanted; else it is empty.

    Raises:
        ConfigError: the template cannot be read.
        CurateError: it refuses a row, or it is unclear what the assistant says there.
    """
    compiled = ChatTemplate(template, special)
    chats = list(_messages(turns))
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    for row, chat in enumerate(chats):
        try:
            texts.append(compiled.render(chat))
            spans.append(compiled.spans(chat, texts[-1]) if marks else [])
        except RefusedError as error:
            raise CurateError(
                f"{_place(table, row)}: the tokenizer's chat template refuses the chat: {error}",
                fix="leave such rows out of the plan, or choose another tokenizer in"
                " shards.packing.tokenizer",
            ) from error
        except RewrittenError as error:
            raise CurateError(
                f"{_place(table, row)}: the chat template rewrites earlier messages when"
                f" message {error.args[0]} is added, so the assistant's part is unclear",
                fix="use a template with {% generation %} marks around what the assistant says,"
                " or a format that leaves tokenizing to the trainer, such as parquet",
            ) from error
    return chats, texts, spans


def _messages(turns: Turns) -> Iterator[Chat]:
    """The chat of each row."""
    roles, contents = turns.roles.to_pylist(), turns.contents.to_pylist()
    said = [
        {"role": role, "content": content or ""}
        for role, content in zip(roles, contents, strict=True)
    ]
    for start, stop in pairwise(turns.starts.tolist()):
        yield said[start:stop]


def _place(table: pa.Table, row: int) -> str:
    source, file, number = (
        table[name][row].as_py() for name in ("curate_source", "curate_file", "curate_row")
    )
    return f"{source}, {file}, row {number}"


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks what the assistant says: its text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers: what is set inside is not seen outside.
        return [nodes.Scope(body).set_lineno(line)]


class _MarkedGeneration(_Generation):
    """The same between two marks."""

    def parse(self, parser: Parser) -> list[nodes.Node]:
        (scope,) = super().parse(parser)
        first, last = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE))
        return [first.set_lineno(scope.lineno), scope, last.set_lineno(scope.lineno)]


class _Namespace(Namespace):
    """Refuses names that would reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name in a template
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a template may not set {name!r}")


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
