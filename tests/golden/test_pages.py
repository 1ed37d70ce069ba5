"""The documents say what the code does: every key, option, column, method and exit code."""

import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer

from curate.cli.app import app
from curate.config import json_schema
from curate.data.tables import REASONS, SCHEMAS
from curate.models.quantities import FORWARD
from curate.models.settings import TASKS
from curate.plan.plan import REASONS as PLAN_REASONS
from jobs.all_stages import load
from jobs.settings import Settings
from mixers.catalog import MIXERS
from scorers.catalog import SCORERS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "config.md"
BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->\n"


def reference() -> str:
    """The tables of docs/config.md, from the classes and the texts below their fields."""
    lines = _section("", Settings, "The run")
    for name, address in TASKS.items():
        lines += _section("task", load(address), f"task, kind {name}")
    for name, address in MIXERS.items():
        head = [f"| `mix.mixer` | `{name}` | {_first_line(load(address))} |"]
        lines += _section("mix", load(address), f"mix, mixer {name}", head=head)
    return "\n".join(lines) + "\n"


def _section(prefix: str, kind: Any, title: str, *, head: Sequence[str] = ()) -> list[str]:
    schema = json_schema(kind)
    lines = [f"### {title}", "", "| key | default | |", "| --- | --- | --- |", *head]
    below: list[str] = []
    hints = get_type_hints(kind)
    for field in fields(kind):
        key = f"{prefix}.{field.name}" if prefix else field.name
        entry = schema["properties"][field.name]
        text = " ".join(entry.get("description", "").split())
        if choices := _choices(entry):
            text = f"{text} One of {', '.join(f'`{choice}`' for choice in choices)}.".strip()
        lines.append(f"| `{key}` | {_default(field)} | {text} |")
        owner, place = _owner(hints[field.name], key)
        if owner is not None:
            below += _section(place, owner, place)
    return [*lines, "", *below]


def _choices(entry: dict[str, Any]) -> list[str]:
    """The words that a key may be set to, where there are several and no others."""
    members: list[dict[str, Any]] = entry.get("anyOf", [entry])
    if any("enum" not in m and "const" not in m and m.get("type") != "null" for m in members):
        return []
    found = [word for m in members for word in m.get("enum", [m[k] for k in ("const",) if k in m])]
    return found if len(found) > 1 else []


def _first_line(kind: Any) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _owner(hint: Any, key: str) -> tuple[Any, str]:
    """The settings class that stands under a key, and how its keys are written."""
    if is_dataclass(hint):
        return hint, key
    inner = [member for member in getattr(hint, "__args__", ()) if is_dataclass(member)]
    if not inner or key in ("target", "evaluation"):
        return None, key
    return inner[0], f"{key}.NAME" if getattr(hint, "__origin__", None) is dict else key


def _default(field: Any) -> str:
    value: Any = MISSING
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    if value is MISSING:
        return "required"
    if is_dataclass(value) or value in ({}, (), None):
        return ""
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{json.dumps(value)}`"


def test_the_page_of_settings_lists_every_key_with_its_default():
    """If this fails, run this file with python: it writes the page anew."""
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0] == reference()


def test_the_page_of_settings_names_the_words_that_a_key_may_be_set_to():
    page = PAGE.read_text()
    assert re.search(
        r"`plan\.draw` \| `top` \|.* One of `top`, `sample`, `k_centre`, `facility_location`\.",
        page,
    )
    assert re.search(r"`compare\.better` \|.* One of `higher`, `lower`\.", page)
    for mixer in MIXERS:
        assert f"### mix, mixer {mixer}\n" in page
    assert "`mix.max_epochs`" in page


def _command(name: str) -> Any:
    return typer.main.get_command(app).commands[name]  # pyright: ignore[reportAttributeAccessIssue]


COMMANDS = sorted(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_commands_has_every_command_and_option(name: str):
    page = (ROOT / "docs" / "cli.md").read_text()
    assert f"curate {name}" in page
    for parameter in _command(name).params:
        for option in parameter.opts:
            if option.startswith("-") and option not in ("--help", "-h"):
                assert f"`{option}`" in page or f"`{option} " in page, option


def test_the_page_of_commands_names_no_option_that_is_not_there():
    known = {
        option
        for name in COMMANDS
        for parameter in _command(name).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help", "-h", "--version"}
    for option in re.findall(r"`(--?[a-z][a-z-]*)", (ROOT / "docs" / "cli.md").read_text()):
        assert option in known, option


def test_the_page_of_commands_has_every_exit_code():
    from curate import errors

    page = (ROOT / "docs" / "cli.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.CurateError)}
    for code in codes | {0, 130, 143, 141}:
        assert f"| {code} |" in page


def test_the_page_of_tables_has_every_column_and_reason():
    page = (ROOT / "docs" / "tables.md").read_text()
    for table, schema in SCHEMAS.items():
        assert f"## {table}" in page
        for column in schema:
            assert f"| `{column}` |" in page
    for reason in (*REASONS, *PLAN_REASONS):
        assert f"`{reason}`" in page
    for quantity in FORWARD:
        assert f"| `{quantity}` |" in page


def test_every_method_has_a_page_and_a_line_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    index = (ROOT / "docs" / "index.md").read_text()
    for room, catalog in (("scorers", SCORERS), ("mixers", MIXERS)):
        for name in catalog:
            assert (ROOT / "docs" / room / f"{name}.md").is_file()
            assert f"({room}/{name}.md)" in index
            assert f"(docs/{room}/{name}.md)" in readme


def test_every_link_between_documents_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_every_file_that_a_room_names_is_there():
    """A README of a room lists its files in a table."""
    rooms = [*ROOT.glob("*/README.md"), *ROOT.glob("curate/*/README.md")]
    for readme in rooms:
        for row in re.findall(r"^\| (`[^|]+) \|", readme.read_text(), re.MULTILINE):
            for name in re.findall(r"`([\w/]+\.(?:py|yaml|md))`", row):
                assert (readme.parent / name).exists(), f"{readme.relative_to(ROOT)}: {name}"


if __name__ == "__main__":
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(head + BEGIN + reference() + END + rest.split(END)[1])
