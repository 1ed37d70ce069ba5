"""Chats as text by a tokenizer's chat template, without transformers.

Templates are written for the environment that transformers renders them in, so this one is the
same for everything that a chat of roles and contents needs: white space, loop controls,
`{% generation %}`, `raise_exception`, `strftime_now`, and a sandbox, as templates come from others.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from curate.errors import ConfigError

# Some templates print today's date; what is written must not depend on the day.
_TODAY = datetime(2025, 1, 1)
_DATE = "01 Jan 2025"


class RefusedError(Exception):
    """A template refuses a chat, and says why."""


class ChatTemplate:
    """Renders chats.

    Args:
        template: in Jinja.
        special: `bos_token`, `eos_token` ... -> its text.

    Raises:
        ConfigError: the template cannot be read.
    """

    def __init__(self, template: str, special: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        known: dict[str, Any] = environment.globals  # pyright: ignore[reportAssignmentType]
        known["raise_exception"] = _refuse
        known["strftime_now"] = _TODAY.strftime
        known["namespace"] = _Namespace
        environment.filters["tojson"] = _json
        try:
            self._template = environment.from_string(template)
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
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=False, **self._given
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RefusedError(str(error)) from error


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks what the assistant says: its text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers: what is set inside is not seen outside.
        return [nodes.Scope(body).set_lineno(line)]


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
