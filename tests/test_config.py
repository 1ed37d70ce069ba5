"""Settings from YAML, environment and overrides; messages name the key, its place and the fix."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from curate.config import (
    STRICT,
    gather,
    json_schema,
    nearest,
    parse,
    plain,
    read_yaml,
    resolve,
    to_yaml,
)
from curate.errors import ConfigError, InputError
from mixers.temperature import Temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    __pydantic_config__: ClassVar = STRICT

    epochs: float = 1.0
    """Passes."""
    kind: Literal["fast", "slow"] = "fast"

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ConfigError(f"epochs is {self.epochs}", fix="raise it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Middle:
    __pydantic_config__: ClassVar = STRICT

    train: Inner | None = None
    keep: float | Inner = 1.0
    path: str | tuple[str, ...] = "a"
    many: tuple[str | dict[str, Inner], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    __pydantic_config__: ClassVar = STRICT

    run: str
    middle: Middle = field(default_factory=Middle)
    named: dict[str, Inner] = field(default_factory=dict[str, Inner])


def message(values: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, values, **options)
    return f"{caught.value.what} | {caught.value.fix}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e9", 2e9),
        ("5e-5", 5e-5),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("100_000", 100_000),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
        ("true", True),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'2e9'", "2e9"),
    ],
)
def test_scalars_are_read_by_the_rules_of_yaml_1_2(text: str, value: Any):
    read = read_yaml(f"x: {text}", where="test")["x"]
    assert read == value
    assert type(read) is type(value)


def test_a_key_that_stands_twice_is_refused_with_its_line():
    with pytest.raises(ConfigError, match=r"a\.yaml, line 3: lr is set twice"):
        read_yaml("train:\n  lr: 1\n  lr: 2\n", where="a.yaml")


def test_a_merged_key_may_be_overridden_but_not_repeated():
    text = "outer:\n  a: &a {x: 1, y: 1}\n  b: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\n"
    assert read_yaml(text, where="t")["c"] == {"x": 2, "y": 3}


def test_a_file_that_is_not_yaml_is_named():
    with pytest.raises(ConfigError, match=r"a\.yaml, line 2, is not valid YAML: expected"):
        read_yaml("a: [1, 2\nb: 3", where="a.yaml")


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
words = st.sampled_from(["2e9", "no", "010", "1:30", "null", "0x1f", "~", ".5", "2026-01-31"])


@given(st.dictionaries(st.text(min_size=1) | words, scalars | words | st.lists(scalars | words)))
def test_written_yaml_reads_back_to_the_same_values(values: dict[str, Any]):
    read = read_yaml(to_yaml(values), where="test")
    assert read == values
    assert [type(value) for value in read.values()] == [type(v) for v in values.values()]


def test_other_readers_of_yaml_see_the_same_words():
    values = {"a": "no", "b": "1:30", "c": "2026-01-31", "d": "010"}
    assert yaml.safe_load(to_yaml(values)) == values


def test_settings_survive_being_written_out():
    settings = Outer(
        run="r", middle=Middle(train=Inner(epochs=2), path=("a", "b"), many=("x", {"y": Inner()}))
    )
    text = to_yaml(plain(settings))
    assert parse(Outer, read_yaml(text, where="t")) == settings
    assert "kind: fast" in text, "defaults are written out"


def test_later_places_win_and_each_value_knows_its_origin(tmp_path: Path):
    base, site = tmp_path / "base.yaml", tmp_path / "site.yaml"
    base.write_text("run: a\nmiddle: {train: {epochs: 1, kind: slow}, path: p}\n")
    site.write_text("middle: {train: {epochs: 2}}\nnamed: {n: {epochs: 3}}\n")
    raw = gather(
        [base, site],
        environment={"CURATE__MIDDLE__PATH": "[q, r]", "CURATE_DATA": "x", "HOME": "/"},
        overrides=["named.n.epochs=4"],
        options={"run": "b"},
    )
    settings = parse(Outer, raw.values)
    assert settings == Outer(
        run="b",
        middle=Middle(train=Inner(epochs=2, kind="slow"), path=("q", "r")),
        named={"n": Inner(epochs=4)},
    )
    assert raw.origins == {
        "run": "option",
        "middle.train.epochs": str(site),
        "middle.train.kind": str(base),
        "middle.path": "environment CURATE__MIDDLE__PATH",
        "named.n.epochs": "--set",
    }


def test_a_replaced_mapping_forgets_the_origins_of_its_old_keys():
    raw = gather([], overrides=["a.b=1", "a.c=2", "a={d: 3}"])
    assert raw.values == {"a": {"d": 3}}
    assert raw.origins == {"a.d": "--set"}


@pytest.mark.parametrize("override", ["run", "=3"])
def test_an_override_without_a_value_or_key_is_refused(override: str):
    with pytest.raises(ConfigError, match="--set"):
        gather([], overrides=[override])


def test_a_missing_settings_file_is_missing_input(tmp_path: Path):
    with pytest.raises(InputError, match=r"there is no settings file .*absent\.yaml"):
        gather([tmp_path / "absent.yaml"])


def test_a_settings_file_in_another_encoding_is_named(tmp_path: Path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("run: \xe9t\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8 text \(byte 5\)"):
        gather([path])


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
def test_settings_are_finite_as_json_carries_them_to_the_workers(number: str):
    values = read_yaml(f"tau: {number}", where="test")
    with pytest.raises(ConfigError, match=r"mix\.tau .*finite number"):
        parse(Temperature, values, where="mix")


def test_a_settings_file_must_be_a_mapping(tmp_path: Path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="is not a mapping"):
        gather([path])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"runn": "a"}, "unknown key runn | did you mean run?"),
        ({"run": "a", "middle": {"trian": {}}}, "unknown key middle.trian | did you mean train?"),
        (
            {"run": "a", "middle": {"train": {"epoch": 1}}},
            "unknown key middle.train.epoch | did you mean epochs?",
        ),
        (
            {"run": "a", "middle": {"train": {"zzz": 1}}},
            "unknown key middle.train.zzz | known keys: epochs, kind",
        ),
        (
            {"run": "a", "middle": {"keep": {"epoch": 1}}},
            "unknown key middle.keep.epoch | did you mean epochs?",
        ),
        (
            {"run": "a", "middle": {"many": ["x", {"y": {"knd": 1}}]}},
            "unknown key middle.many.1.y.knd | did you mean kind?",
        ),
        (
            {"run": "a", "named": {"news": {"epoch": 1}}},
            "unknown key named.news.epoch | did you mean epochs?",
        ),
        ({}, "run is missing | set run"),
        (
            {"run": "a", "middle": {"keep": "much"}},
            "middle.keep ('much'): input should be a valid number, unable to parse string as a"
            " number | correct middle.keep",
        ),
        (
            {"run": "a", "middle": {"path": ["x", 1]}},
            "middle.path.1 (1): input should be a valid string | correct middle.path.1",
        ),
        (
            {"run": "a", "middle": {"train": {"kind": "quick"}}},
            "middle.train.kind ('quick'): input should be 'fast' or 'slow'"
            " | correct middle.train.kind",
        ),
    ],
)
def test_a_mistake_is_told_in_the_keys_that_the_user_wrote(values: Any, expected: str):
    assert message(values) == expected


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"train": {"epochs": 0}}, "middle.train"),
        ({"keep": {"epochs": 0}}, "middle.keep"),
        ({"many": ["x", {"y": {"epochs": 0}}]}, "middle.many.1.y"),
    ],
)
def test_a_check_of_the_class_itself_gets_its_path(values: Any, path: str):
    assert message({"run": "a", "middle": values}) == f"{path}: epochs is 0.0 | raise it"


def test_the_message_names_the_place_that_set_the_value():
    assert message({"run": "a", "midle": 1}, origins={"midle": "site.yaml"}).startswith(
        "unknown key midle, set by site.yaml"
    )
    assert "set by --set" in message(
        {"run": "a", "middle": {"many": [1]}}, origins={"middle.many": "--set"}
    )


def test_where_stands_before_the_key():
    with pytest.raises(ConfigError, match=r"unknown key task\.epoch\n") as caught:
        parse(Inner, {"epoch": 1}, where="task")
    assert caught.value.fix == "did you mean epochs?"


def test_the_schema_describes_every_key():
    schema = json_schema(Outer)
    inner = schema["$defs"]["Inner"]["properties"]
    assert inner["epochs"]["description"] == "Passes."
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["run"]


def test_resolve_finds_catalog_names_and_addresses():
    catalog = {"join": "os.path:join"}
    assert resolve(catalog, "join", what="thing").__name__ == "join"
    assert resolve(catalog, "json:dumps", what="thing").__name__ == "dumps"


def test_resolve_names_what_is_missing():
    with pytest.raises(ConfigError, match="there is no thing 'jion'") as caught:
        resolve({"join": "os.path:join"}, "jion", what="thing")
    assert caught.value.fix == "did you mean join?"
    with pytest.raises(ConfigError, match="'json:nothing' cannot be imported"):
        resolve({}, "json:nothing", what="thing")


def test_nothing_near_is_no_suggestion():
    assert nearest("zzz", ["epochs"]) is None
