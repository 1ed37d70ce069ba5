"""Reads settings: YAML files, environment, overrides, into the frozen dataclasses of their owners.

This module knows no setting by name. Precedence, lowest first: the dataclass' defaults, files in
order, environment (`CURATE__SCORE__BATCH_TOKENS=8192`), `--set score.batch_tokens=8192`, options.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from curate.errors import ConfigError, CurateError, InputError

T = TypeVar("T")

STRICT = {"extra": "forbid", "use_attribute_docstrings": True}
"""`__pydantic_config__` of every settings class: unknown keys are errors, docstrings help."""

_ENVIRONMENT_PREFIX = "CURATE__"


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers and booleans (`2e9` is a number, `no` is a word); a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            if isinstance(key, str) and key != "<<":
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(f"line {line}: {key} is set twice", fix="remove one of them")
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9_]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.inf|\.Inf|\.INF|\.nan|\.NaN|\.NAN)$|^-\.(?:inf|Inf|INF)$"
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


@dataclass(frozen=True, slots=True)
class Raw:
    """Settings as plain values, with the origin of each."""

    values: dict[str, Any]
    origins: dict[str, str]
    """Dotted key -> where it was set: a file, `environment`, `--set` or `option`."""


def read_yaml(text: str, *, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: the text is not YAML, or a key stands twice; names `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}", fix="correct the line") from error
    except ConfigError as error:
        raise ConfigError(f"{where}, {error.what}", fix=error.fix) from error


def gather(
    paths: Sequence[Path],
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Raw:
    """Merge settings from all places, later ones over earlier ones.

    Args:
        paths: YAML files; mappings merge key by key, anything else is replaced.
        environment: read for `CURATE__A__B` names.
        overrides: `a.b=value` texts, the value read as YAML.
        options: dotted key -> value, from command-line flags.

    Raises:
        InputError: a file is missing.
        ConfigError: a file or an override is malformed.
    """
    raw = Raw({}, {})
    for path in paths:
        if not path.is_file():
            raise InputError(f"there is no settings file {path}", fix="check the path")
        values = read_yaml(path.read_text(encoding="utf-8"), where=str(path))
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} is not a mapping", fix="write `key: value` lines")
        _merge(raw, values, str(path))
    for name, text in sorted((environment or {}).items()):
        if name.startswith(_ENVIRONMENT_PREFIX):
            key = name.removeprefix(_ENVIRONMENT_PREFIX).lower().replace("__", ".")
            _set(raw, key, read_yaml(text, where=name), f"environment {name}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {override} has no value", fix="write --set score.batch_tokens=8192"
            )
        _set(raw, key.strip(), read_yaml(text, where=f"--set {key}"), "--set")
    for key, value in (options or {}).items():
        _set(raw, key, value, "option")
    return raw


def parse(kind: type[T], values: Any, *, where: str = "", origin: str = "") -> T:
    """Check plain values against a settings class.

    Args:
        kind: a frozen dataclass whose `__pydantic_config__` is `STRICT`.
        values: what YAML gave.
        where: dotted key of `values`, put before the key in messages.
        origin: named in messages, such as the settings file.

    Raises:
        ConfigError: names the key, what is wrong with it and, for an unknown key, the nearest one.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise _explain(error.errors()[0], kind, where, origin) from error
    except ConfigError as error:  # raised by a __post_init__, which knows no path
        prefix = f"{where}: " if where and where not in error.what else ""
        raise ConfigError(prefix + error.what, fix=error.fix) from error


def plain(value: Any) -> Any:
    """Settings as values that YAML and JSON can hold, every default written out."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to the same values."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def resolve(catalog: Mapping[str, str], name: str, *, what: str) -> Any:
    """Import what a name stands for: a catalog entry, or the user's own `package.module:Name`.

    Args:
        catalog: name -> `module:attribute`; imported only now.
        name: a key of the catalog or an address of the same form.
        what: "scorer", "mixer" ... for the message.

    Raises:
        ConfigError: neither a known name nor importable.
    """
    address = catalog.get(name, name)
    module, colon, attribute = address.partition(":")
    if not colon:
        raise ConfigError(
            f"there is no {what} {name!r}",
            fix=nearest(name, catalog) or f"use one of {', '.join(sorted(catalog))}",
        )
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in catalog:
            raise
        raise ConfigError(
            f"{what} {name!r} cannot be imported: {error}",
            fix="check the spelling and that the module is on PYTHONPATH",
        ) from error


def nearest(name: str, known: Iterable[str]) -> str | None:
    """`did you mean X?` for the known name most like `name`, or None."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {matches[0]}?" if matches else None


def _merge(raw: Raw, values: Mapping[str, Any], origin: str, prefix: str = "") -> None:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value and isinstance(_get(raw.values, dotted), dict):
            _merge(raw, value, origin, f"{dotted}.")
        else:
            _set(raw, dotted, value, origin)


def _get(values: Mapping[str, Any], dotted: str) -> Any:
    current: Any = values
    for key in dotted.split("."):
        if not isinstance(current, Mapping) or key not in current:
            return None
        current = current[key]  # pyright: ignore[reportUnknownVariableType]
    return current  # pyright: ignore[reportUnknownVariableType]


def _set(raw: Raw, dotted: str, value: Any, origin: str) -> None:
    *parents, last = dotted.split(".")
    current = raw.values
    for key in parents:
        following = current.get(key)
        if not isinstance(following, dict):
            following = current[key] = {}
        current = following
    current[last] = value
    for known in [key for key in raw.origins if key == dotted or key.startswith(f"{dotted}.")]:
        del raw.origins[known]
    leaves = _leaves(value, dotted) if isinstance(value, dict) and value else [dotted]
    raw.origins.update(dict.fromkeys(leaves, origin))


def _leaves(values: Mapping[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        dotted = f"{prefix}.{key}"
        found += _leaves(value, dotted) if isinstance(value, dict) and value else [dotted]
    return found


def _explain(error: ErrorDetails, kind: type[Any], where: str, origin: str) -> CurateError:
    path = [str(part) for part in error["loc"]]
    # Pydantic adds the names of types and union members to the path; the user knows keys only.
    path = [part for part in path if not re.search(r"[\[(A-Z]", part) or part.isupper()]
    key = ".".join([where, *path] if where else path)
    place = f" in {origin}" if origin else ""
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(kind, error["loc"][:-1])
        hint = nearest(str(error["loc"][-1]), known) or f"known keys: {', '.join(sorted(known))}"
        return ConfigError(f"unknown key {key}{place}", fix=hint)
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return ConfigError(f"{key} is missing{place}", fix=f"set {key}")
    given = error.get("input")
    shown = f" ({given!r})" if isinstance(given, str | int | float | bool) else ""
    message = error["msg"][0].lower() + error["msg"][1:]
    return ConfigError(f"{key}{shown}{place}: {message}", fix=f"correct {key}")


def _known_keys(kind: Any, path: Sequence[str | int]) -> list[str]:
    """Keys of the settings class that stands at `path` below `kind`."""
    found = [kind]
    for part in path:
        following: list[Any] = []
        for candidate in found:
            following += _children(candidate, part)
        found = following
    return sorted({field.name for entry in found if is_dataclass(entry) for field in fields(entry)})


def _children(kind: Any, part: str | int) -> list[Any]:
    """Types that a step of a pydantic path can lead to: a field, an item, a union member."""
    import types
    import typing

    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        members = typing.get_args(kind)
        members = members[:1] if origin is typing.Annotated else members
        named = [member for member in members if getattr(member, "__name__", None) == part]
        return named or [child for member in members for child in _children(member, part)]
    if is_dataclass(kind):
        if getattr(kind, "__name__", None) == part:
            return [kind]
        hints = typing.get_type_hints(kind, include_extras=True)
        return [hints[part]] if part in hints else []
    if origin is not None:  # dict[str, X], list[X], tuple[X, ...]
        return list(typing.get_args(kind)[-2:])
    return []
