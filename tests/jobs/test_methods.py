"""The table of methods and the schema say what the code says."""

import json
from typing import Any

import pytest

from curate.config import json_schema
from curate.errors import ConfigError
from curate.models.settings import TASKS
from jobs.methods import all_methods, find_method
from jobs.own_passes import OWN
from jobs.schema import settings_schema
from mixers.catalog import MIXERS
from scorers.catalog import SCORERS


def test_every_entry_of_every_catalog_is_listed():
    assert [method.name for method in all_methods()] == [*TASKS, *SCORERS, *MIXERS]


@pytest.mark.parametrize("name", [*TASKS, *SCORERS, *MIXERS])
def test_every_method_says_what_it_does_and_where_it_is(name: str):
    method = find_method(name)
    assert method.measures
    assert not method.measures.startswith(f"{name}:")
    assert ":" in method.address
    if method.kind == "scorer":
        assert method.cost
        assert method.source
    if method.kind == "scorer" and name != "external":
        assert method.columns
        assert method.needs


def test_a_scorer_shows_its_columns_quantities_and_paper():
    method = find_method("el2n")
    assert "error_norms" in method.needs
    assert "0 to sqrt(2)" in method.columns["el2n"]
    assert "Deep Learning on a Data Diet" in method.source
    assert "one forward pass" in method.cost


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("gio", "a target, vectors"),
        ("bm25", "a target, the examples themselves"),
        ("density_ratio", "a target, vectors"),
        ("dvgs", "a model, a target"),
        ("label_issues", "labels"),
        ("aum_threshold", "a model, labels"),
        ("duplicates", "the examples themselves"),
        ("spread", "a model, vectors"),
    ],
)
def test_a_scorer_with_passes_of_its_own_needs_what_it_reads(name: str, reads: str):
    assert ", ".join(find_method(name).needs) == reads


@pytest.mark.parametrize("name", OWN)
def test_no_scorer_needs_what_it_gives(name: str):
    method = find_method(name)
    assert not set(method.needs) & {word for key in method.columns for word in (key, key[4:])}


def test_options_are_shown_with_their_defaults():
    assert find_method("unimax").options["max_epochs"] == "4.0"
    assert find_method("text-classification").options["num_classes"] == "required"


def test_an_unknown_method_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match="no method 'unimix'") as caught:
        find_method("unimix")
    assert caught.value.fix == "did you mean unimax?"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return settings_schema()


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set[str]()
        return own.union(*map(references, value.values()))
    if isinstance(value, list):
        return set[str]().union(*map(references, value))
    return set()


def test_the_schema_holds_together(schema: dict[str, Any]):
    json.dumps(schema)
    for reference in references(schema):
        assert reference.removeprefix("#/$defs/") in schema["$defs"], reference


def test_the_schema_has_the_options_of_every_method(schema: dict[str, Any]):
    tasks = schema["properties"]["task"]["anyOf"]
    kinds = {task["properties"]["kind"]["const"] for task in tasks if "properties" in task}
    assert kinds == set(TASKS)
    mixers = schema["properties"]["mix"]["anyOf"]
    by_name = {m["properties"]["mixer"]["const"]: m for m in mixers if "properties" in m}
    assert set(by_name) == set(MIXERS)
    assert "max_epochs" in by_name["unimax"]["properties"]
    items = schema["$defs"]["Score"]["properties"]["scorers"]["items"]["anyOf"]
    assert items[0]["enum"] == list(SCORERS)


def test_every_key_of_the_schema_is_described(schema: dict[str, Any]):
    for name, definition in schema["$defs"].items():
        for key, value in definition.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key}"
    assert all("description" in value for value in schema["properties"].values())


def test_a_settings_class_alone_has_a_schema_too():
    from curate.plan.settings import Plan

    assert json_schema(Plan)["properties"]["order"]["enum"] == ["hardest", "easiest", "middle"]
