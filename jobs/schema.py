"""JSON Schema of the settings, with the options of every task, scorer and mixer."""

from dataclasses import is_dataclass
from typing import Any

from curate.config import json_schema
from curate.models.settings import TASKS
from jobs.all_stages import load
from jobs.settings import Settings


def settings_schema() -> dict[str, Any]:
    """The schema of `config.yaml`; scorers are imported to learn their options."""
    from mixers.catalog import MIXERS
    from scorers.catalog import EXTERNAL, SCORERS

    schema = json_schema(Settings)
    definitions = schema.setdefault("$defs", {})
    tasks = [_options(load(address), definitions) for address in TASKS.values()]
    mixers = [
        _options(load(address), definitions, key="mixer", name=name)
        for name, address in MIXERS.items()
    ]
    options = {name: _options(load(address), definitions) for name, address in SCORERS.items()}
    # The options of `external` are tables by name, each a path or the table's settings.
    options[EXTERNAL] = {
        "type": "object",
        "additionalProperties": {"anyOf": [{"type": "string"}, options[EXTERNAL]]},
    }
    scorers = [
        {
            "type": "object",
            "properties": {name: found},
            "required": [name],
            "additionalProperties": False,
        }
        for name, found in options.items()
    ]
    own = {"type": "string", "pattern": ":", "description": "your own, as package.module:Name"}
    properties = schema["properties"]
    properties["task"] |= {"anyOf": [{"type": "object", "maxProperties": 0}, *tasks]}
    properties["mix"] |= {"anyOf": [{"type": "object", "maxProperties": 0}, *mixers]}
    definitions["Score"]["properties"]["scorers"] |= {
        "items": {"anyOf": [{"enum": list(SCORERS)}, own, *scorers]}
    }
    for name in ("task", "mix"):
        properties[name].pop("additionalProperties", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of curate",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _options(
    kind: type[Any], definitions: dict[str, Any], *, key: str = "", name: str = ""
) -> dict[str, Any]:
    """Schema of one method's options; what it refers to moves to the shared definitions."""
    found: dict[str, Any] = json_schema(kind) if is_dataclass(kind) else {"type": "object"}
    definitions.update(found.pop("$defs", {}))
    found["additionalProperties"] = False
    if key:
        found["properties"] = {key: {"const": name}, **found.get("properties", {})}
        found["required"] = [key, *found.get("required", [])]
    return found
