"""Reads settings: YAML files, environment, overrides, into the frozen dataclasses of their owners.

This module knows no setting by name. Precedence, lowest first: the dataclass' defaults, files in
order, environment (`CURATE__SCORE__BATCH_TOKENS=8192`), `--set score.batch_tokens=8192`, options.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from curate.errors import ConfigError, CurateError, InputError

T = TypeVar("T")

STRICT = {"extra": "forbid", "use_attribute_docstrings": True, "allow_inf_nan": False}
"""`__pydantic_config__` of every settings class: unknown keys are errors, docstrings help, and
numbers are finite, as tasks carry settings as JSON."""

_ENVIRONMENT_PREFIX = "CURATE__"
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


class _Loader(yaml.SafeLoader):
    """YAML 1.2: `2e9` is a number, `no`, `1:30` and `2026-01-31` are words; a key stands once."""

    def compose_mapping_node(self, anchor: dict[Any, Any]) -> yaml.MappingNode:
        # Here and not in construct_mapping, where `<<` has already been merged into some nodes.
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(
                        f"line {line}: {key.value} is set twice", fix="remove one of them"
                    )
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every word that YAML 1.1 or 1.2 would read as something else."""


def _integer(_: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value).replace("_", "").lower()
    return int(text, 0) if text.startswith(("0x", "0o")) else int(text)


_PATTERNS = {
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7_]+|0x[0-9a-fA-F_]+", "-+0123456789"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rsplit(":", 1)[1] in ("null", "merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Dumper.yaml_implicit_resolvers = {
    first: list(pairs) for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        # Line breaks of all kinds are escaped: unquoted, some of them read back as spaces.
        "tag:yaml.org,2002:str",
        text,
        style=None if text.isprintable() else '"',
    ),
)


@dataclass(frozen=True, slots=True)
class Raw:
    """Settings as plain values, with the origin of each."""

    values: dict[str, Any]
    origins: dict[str, str]
    """Dotted key -> where it was set: a file, `environment X`, `--set`, `option` or `guess`."""


def read_yaml(text: str, *, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: the text is not YAML, or a key stands twice; names `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"{where}{line}, is not valid YAML: {reason}", fix="correct that line or the one above"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{where}, {error.what}", fix=error.fix) from error


def read_yaml_file(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        ConfigError: it is not UTF-8, or as `read_yaml`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start:,})", fix="save it again as UTF-8"
        ) from error
    return read_yaml(text, where=str(path))


def gather(
    paths: Sequence[Path],
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    guesses: Mapping[str, Any] | None = None,
) -> Raw:
    """Merge settings from all places, later ones over earlier ones.

    Args:
        paths: YAML files; mappings merge key by key, anything else is replaced.
        environment: read for `CURATE__A__B` names.
        overrides: `a.b=value` texts, the value read as YAML.
        options: dotted key -> value, from command-line flags.
        guesses: values below all others, found by looking at the data.

    Raises:
        InputError: a file is missing.
        ConfigError: a file or an override is malformed.
    """
    raw = Raw({}, {})
    _merge(raw, guesses or {}, "guess")
    for path in paths:
        if not path.is_file():
            raise InputError(f"there is no settings file {path}", fix="check the path")
        values = read_yaml_file(path)
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} is not a mapping", fix="write `key: value` lines")
        _merge(raw, values, str(path))
    for name, text in sorted((environment or {}).items()):
        if name.startswith(_ENVIRONMENT_PREFIX):
            key = name.removeprefix(_ENVIRONMENT_PREFIX).lower().replace("__", ".")
            put(raw, key, read_yaml(text, where=name), f"environment {name}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {override} has no value",
                fix=f"write --set {override.strip() or 'KEY'}=VALUE",
            )
        put(raw, key.strip(), read_yaml(text, where=f"--set {key}"), "--set")
    for key, value in (options or {}).items():
        put(raw, key, value, "option")
    return raw


def put(raw: Raw, dotted: str, value: Any, origin: str) -> None:
    """Set one value in `raw`, over what stood there and below it."""
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


def parse(
    kind: type[T], values: Any, *, where: str = "", origins: Mapping[str, str] | None = None
) -> T:
    """Check plain values against a settings class.

    Args:
        kind: a frozen dataclass whose `__pydantic_config__` is `STRICT`.
        values: what YAML gave.
        where: dotted key of `values`, put before the key in messages.
        origins: of `Raw`; messages name the place that set the value.

    Raises:
        ConfigError: names the key, what is wrong with it and, for an unknown key, the nearest one.
    """
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise _explain(error.errors(), kind, where, origins or {}) from error


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """JSON Schema of a settings class; the text below each field is its description."""
    return _adapter(kind).json_schema()


def plain(value: Any) -> Any:
    """Settings as values that YAML and JSON can hold, every default written out."""
    return _adapter(type(value)).dump_python(value, mode="json")


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to the same values."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


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


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    """Building one reads source files for the docstrings; every task parses its settings."""
    return TypeAdapter(kind)


def _merge(raw: Raw, values: Mapping[str, Any], origin: str, prefix: str = "") -> None:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value and isinstance(_get(raw.values, dotted), dict):
            _merge(raw, value, origin, f"{dotted}.")
        else:
            put(raw, dotted, value, origin)


def _get(values: Mapping[str, Any], dotted: str) -> Any:
    current: Any = values
    for key in dotted.split("."):
        if not isinstance(current, Mapping) or key not in current:
            return None
        current = current[key]  # pyright: ignore[reportUnknownVariableType]
    return current  # pyright: ignore[reportUnknownVariableType]


def _leaves(values: Mapping[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        dotted = f"{prefix}.{key}"
        found += _leaves(value, dotted) if isinstance(value, dict) and value else [dotted]
    return found


def _explain(
    errors: Sequence[ErrorDetails], kind: Any, where: str, origins: Mapping[str, str]
) -> ConfigError:
    """One message for what pydantic found: the first error, told as precisely as it can be."""
    # A mistyped key comes first: it also explains why another is missing.
    ordered = sorted(errors, key=lambda error: error["type"] not in _UNKNOWN)
    located = [(*_locate(kind, error["loc"], where), error) for error in ordered]
    first = located[0][0]
    # For `float | Keep` pydantic reports both members; the deeper error is what the user meant.
    below = [entry for entry in located if entry[0] == first or entry[0].startswith(f"{first}.")]
    structured = [e for e in below if e[2]["type"] == "value_error"]
    key, known, error = max(structured or below, key=lambda entry: entry[0].count("."))
    own = error.get("ctx", {}).get("error")
    if isinstance(own, CurateError):  # from a __post_init__, which does not know where it stands
        prefix = f"{key}: " if key and key not in own.what else ""
        named = [f"{key}.{word}" if key else word for word in re.findall(r"\w+", own.what)]
        origin = next((origins[name] for name in named if name in origins), "")
        return ConfigError(f"{prefix}{own.what}{_by(origin)}", fix=own.fix)
    place = _by(_origin(key, origins))
    if error["type"] in _UNKNOWN:
        hint = nearest(str(error["loc"][-1]), known) or f"known keys: {', '.join(sorted(known))}"
        return ConfigError(f"unknown key {key}{place}", fix=hint)
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return ConfigError(f"{key} is missing", fix=f"set {key}")
    given = error.get("input")
    shown = f" ({given!r})" if isinstance(given, str | int | float | bool) else ""
    message = error["msg"][0].lower() + error["msg"][1:]
    return ConfigError(f"{key}{shown}: {message}{place}", fix=f"correct {key}")


def _by(origin: str) -> str:
    return f", set by {origin}" if origin else ""


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Who set `key`: itself, the nearest key above it, or the first one below it."""
    parts = key.split(".")
    above = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    below = [name for name in origins if name.startswith(f"{key}.")]
    return next((origins[name] for name in [*above, *below] if name in origins), "")


def _locate(kind: Any, steps: Sequence[str | int], where: str) -> tuple[str, list[str]]:
    """The user's key for a pydantic path, and the keys known beside its last part.

    Pydantic puts the label of the union member it tried into the path; the user knows keys only.
    """
    keys, known = [where] if where else [], list[str]()
    for step in steps:
        members = _members(kind)
        if len(members) > 1:  # this step is a label such as `float`, `Keep` or `tuple[str, ...]`
            named = [m for m in members if _label(m) == str(step).split("[")[0]]
            kind = named[0] if named else None
            continue
        kind = members[0] if members else None
        keys.append(str(step))
        known = [field.name for field in fields(kind)] if is_dataclass(kind) else []
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(str(step))
        else:  # dict[str, X], list[X], tuple[X, ...]
            items = [argument for argument in get_args(kind) if argument is not ...]
            kind = items[-1] if items else None
    return ".".join(keys), known


def _members(kind: Any) -> list[Any]:
    """Members of a union, None left out; else the type itself."""
    if get_origin(kind) in (Union, UnionType):
        return [member for member in get_args(kind) if member is not type(None)]
    return [kind]


def _label(kind: Any) -> str:
    """What pydantic calls a union member, without its arguments."""
    name = getattr(get_origin(kind) or kind, "__name__", str(kind))
    return name.lower() if get_origin(kind) is Literal else name
