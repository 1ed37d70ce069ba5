"""Card, mixture and manifest as functions of what was written."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from curate.data.card import card
from curate.data.card_configs import configs, load_lines
from curate.data.recipe import Asked, Written, manifest, mixture
from curate.data.shard_layout import Component


def shard(domain: str, number: int = 0, *, phase: int = 0, **facts: Any) -> dict[str, Any]:
    folder = f"phase-{phase}/{domain}" if phase else domain
    return {
        "file": f"data/{folder}/train-{number:05d}-of-00002.parquet",
        "domain": domain,
        "phase": phase,
        "rows": 100,
        "tokens": 1000,
        "bytes": 5000,
        "digest": "0" * 32,
        **facts,
    }


WRITTEN = Written(
    shards=[shard("code", tokens=9000), shard("web", 0), shard("web", 1, rows=50, tokens=500)],
    examples={Component(0, "code"): 25, Component(0, "web"): 150},
    names={"code": "code", "web": "web", "all": "all"},
    sources={"all": ["code", "web"]},
    columns={"": {"text": "string"}},
    mixer="unimax",
    asked=[Asked(1.0, {"code": 0.5, "web": 0.5})],
    tokenizer="abc",
    others=[],
    formats=["parquet"],
)


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_mixture_counts_by_hand():
    found = mixture(WRITTEN)
    (phase,) = found["phases"]
    assert (found["rows"], found["tokens"], found["unit"]) == (250, 10_500, "tokens")
    code, web = phase["domains"]["code"], phase["domains"]["web"]
    assert (code["rows"], code["tokens"], code["examples"]) == (100, 9000, 25)
    assert (web["rows"], web["tokens"], web["examples"]) == (150, 1500, 150)
    assert code["realised"] == pytest.approx(9000 / 10_500)
    assert code["row_probability"] == pytest.approx(0.4)
    assert web["row_probability"] == pytest.approx(0.6)
    # Rows of code hold 90 tokens, rows of web 10.
    tokens = {"code": 0.4 * 90, "web": 0.6 * 10}
    assert code["realised"] == pytest.approx(tokens["code"] / sum(tokens.values()))
    assert code["repeat"] == web["repeat"] == pytest.approx(1)


def test_without_an_asked_mixture_rows_are_drawn_as_they_lie():
    (phase,) = mixture(replace(WRITTEN, mixer=None, asked=[]))["phases"]
    assert phase["domains"]["code"]["asked"] is None
    assert phase["domains"]["code"]["row_probability"] == pytest.approx(100 / 250)


def test_characters_that_stand_for_tokens_are_called_characters():
    counted = replace(WRITTEN, tokenizer="characters")
    assert mixture(counted)["unit"] == "characters"
    assert "10,500 characters" in card(counted)
    assert "token" not in card(counted).split("## Mixture")[1].split("##")[0]


def test_a_domain_of_which_nothing_was_kept_is_shown_and_has_no_probability():
    asked = [Asked(1.0, {"code": 0.25, "web": 0.25, "law": 0.5})]
    (phase,) = mixture(replace(WRITTEN, asked=asked))["phases"]
    assert phase["domains"]["law"]["asked"] == 0.5
    assert phase["domains"]["law"]["rows"] == 0
    assert sum(entry["row_probability"] for entry in phase["domains"].values()) == pytest.approx(1)
    assert "| law | nothing kept |" in card(replace(WRITTEN, asked=asked))


def test_configurations_are_a_default_and_one_for_each_domain():
    assert configs(WRITTEN) == {
        "default": ["data/*/train-*.parquet"],
        "code": ["data/code/train-*.parquet"],
        "web": ["data/web/train-*.parquet"],
    }
    front = front_matter(card(WRITTEN))
    assert [entry["config_name"] for entry in front["configs"]] == ["default", "code", "web"]
    assert front["configs"][0]["data_files"] == [
        {"split": "train", "path": ["data/*/train-*.parquet"]}
    ]


def test_phases_have_configurations_in_order_and_for_each_domain():
    shards = [shard("web", phase=1), shard("code", phase=2), shard("web", phase=2)]
    examples = {Component(1, "web"): 1, Component(2, "code"): 1, Component(2, "web"): 1}
    asked = [Asked(0.5, {"web": 1.0}), Asked(0.5, {"web": 0.5, "code": 0.5})]
    phased = replace(WRITTEN, shards=shards, examples=examples, asked=asked)
    found = configs(phased)
    assert found["default"] == ["data/phase-1/*/train-*.parquet", "data/phase-2/*/train-*.parquet"]
    assert found["phase-2"] == ["data/phase-2/*/train-*.parquet"]
    assert found["web"] == [
        "data/phase-1/web/train-*.parquet",
        "data/phase-2/web/train-*.parquet",
    ]
    assert found["phase-2-code"] == ["data/phase-2/code/train-*.parquet"]
    assert "train on `phase-1`, then `phase-2`" in card(phased)
    assert [phase["asked"] for phase in mixture(phased)["phases"]] == [0.5, 0.5]


def test_names_that_yaml_reads_as_something_else_stay_names():
    named = replace(
        WRITTEN,
        shards=[shard("null"), shard("2e9"), shard("on")],
        examples={Component(0, name): 1 for name in ("null", "2e9", "on")},
        names={name: name for name in ("null", "2e9", "on", "all")},
        asked=[],
        mixer=None,
    )
    front = front_matter(card(named))
    assert {entry["config_name"] for entry in front["configs"]} == {"default", "null", "2e9", "on"}


def test_domain_names_have_no_effect_in_the_page():
    evil = "<script>alert(1)</script> | `x` \n# heading [l](http://x)"
    named = replace(
        WRITTEN,
        shards=[shard(evil)],
        examples={Component(0, evil): 1},
        names={evil: "safe", "all": "all"},
        asked=[],
        mixer=None,
    )
    text = card(named)
    assert "<script>" not in text
    assert "\n# heading" not in text
    (line,) = [line for line in text.splitlines() if "alert" in line]
    assert line.count("|") == 8
    assert "[l]" not in line


def test_a_long_table_is_cut_and_says_so():
    names = [f"d{i:03d}" for i in range(230)]
    many = replace(
        WRITTEN,
        shards=[shard(name) for name in names],
        examples={Component(0, name): 1 for name in names},
        names={name: name for name in [*names, "all"]},
        asked=[],
        mixer=None,
    )
    text = card(many)
    assert "30 more domains are in `mixture.json`" in text
    assert "| d199 |" in text
    assert "| d200 |" not in text


def test_load_lines_name_the_largest_domain():
    assert load_lines(WRITTEN, '"run/shards"') == [
        "from datasets import load_dataset",
        'everything = load_dataset("run/shards", split="train")',
        'one_domain = load_dataset("run/shards", "web", split="train")',
    ]


def test_the_manifest_maps_domains_to_folders_and_lists_every_shard():
    found = manifest(WRITTEN, files={"mixture.json": "1" * 32})
    assert found["domains"] == {"code": "code", "web": "web"}
    assert found["rows"] == 250
    assert found["bytes"] == 15_000
    assert [entry["file"] for entry in found["shards"]] == [s["file"] for s in WRITTEN.shards]
    assert found["schema_version"] == 2


def test_a_card_tells_of_evaluation_sets_whatever_they_are_called():
    kept = {"rows": 1200, "exact_rows": 3, "examples": 5, "exact_examples": 2, "share": 0.0125}
    found = {"examples": 400, "short": 0, "template": 0, "kept": kept, "left_out": {"rows": 7}}
    told = card(replace(WRITTEN, leakage={"found_from": 0.5, "sets": {"a|b": found}}))
    assert "| a&#124;b | 400 | 5 (1.2 %) | 2 | 1,200 | 7 |" in told
    assert "at least 50 % of its words" in told
    assert "Too short" not in told
    assert "Evaluation sets" not in card(WRITTEN)
