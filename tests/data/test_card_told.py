"""What a card tells of the run: counts of the plan, licences, settings; and how it stays usable
with very many domains."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from curate.data.card import card
from curate.data.card_configs import configs, load_lines
from curate.data.card_told import REASON_TEXTS, Told, license_front
from curate.data.recipe import Written
from curate.data.shard_layout import Component
from curate.plan.rules import REASONS

HOSTILE = "a|b`*[x](y)<script>\n# head"


def shard(domain: str, form: str = "parquet", phase: int = 0) -> dict[str, Any]:
    return {
        "file": f"data/{domain}/train-00000-of-00001.parquet", "format": form, "domain": domain,
        "phase": phase, "rows": 10, "tokens": 100, "bytes": 500, "digest": "0" * 32,
    }  # fmt: skip


def written(*domains: str, formats: tuple[str, ...] = ("parquet",), **more: Any) -> Written:
    shards = [shard(domain, formats[0]) for domain in domains]
    return Written(
        shards=shards,
        others=[],
        formats=formats,
        examples={Component(0, domain): 10 for domain in domains},
        names={domain: f"slug-{n}" for n, domain in enumerate(domains)} | {"all": "all"},
        sources={"all": list(domains)},
        columns={"": {"text": "string"}},
        mixer=None,
        asked=[],
        tokenizer="abc",
        **more,
    )


def domain(rows: int, kept: int, tokens: int) -> dict[str, Any]:
    return {
        "rows": rows, "tokens": tokens, "kept_rows": kept, "copies": kept + 3,
        "kept_tokens": kept * 10, "token_share_asked": 0.25, "token_share": 0.75, "epochs": 1.5,
    }  # fmt: skip


TOLD = Told(
    version="9.9",
    settings={"sources": {"web": {"path": "web.parquet"}}, "score": {"scorers": ["el2n"]}},
    plan={"score": "el2n", "order": "hardest", "draw": "top", "within": "domain",
          "drop": f"loss > 3 or {HOSTILE}", "drop_first": 0.05, "max_repeats": 4.0,
          "weights": {"score": "1/loss"}},
    summary={
        "tokenizer": "abc", "mixer": "doremi", "unit": "tokens", "notes": [f"mind {HOSTILE}"],
        "training": {"rows": 4000, "tokens": 80_000}, "dropped": {"rows": 123, "tokens": 999},
        "kept": {"rows": 1000, "copies": 1006, "tokens": 20_000, "row_share": 0.25,
                 "token_share": 0.25},
        "repeats": {"rows": 6, "most_copies": 3},
        "reasons": {"kept": 1000, "held_out": 77, "dropped": 123, "score": 2800, "draw": 0},
        "weights": {"min": 0.5, "max": 2.0, "mean": 1.0, "effective_size": 812.0},
        "means": {"el2n.el2n": {"kept": 0.9, "dropped": 0.4}, "x": {"kept": None,
                                                                     "dropped": None}},
        "domains": {"web": domain(3000, 800, 60_000), HOSTILE: domain(1000, 200, 20_000)},
    },
    licenses={"web": "CC-BY-4.0", "forum": None},
)  # fmt: skip


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_in_words_and_numbers_what_was_done():
    text = card(written("web", HOSTILE), TOLD)
    for sentence in (
        "Of 4,000 training examples, 1,000 are kept (25.0 %), with 20,000 of 80,000 tokens",
        "Measured: `el2n`.",
        "Left out first: the 123 examples for which `loss > 3",
        "The first 5 % of each group",
        "Within each domain those with the highest `el2n` are kept.",
        "by the mixer `doremi`; no domain is gone through more than 4 times",
        "6 examples are used more than once, at most 3 times",
        "Examples weigh 0.5 to 2 in the loss, by `1/loss`; they are worth 812 examples",
        "| `score` | others came first by score | 2,800 |",
        "| web | 3,000 | 800 | 26.7 % | 803 | 0.7500 | 0.7500 | 0.2500 | 1.50 |",
        "| `el2n.el2n` | 0.9 | 0.4 |",
        "Made by curate 9.9.",
    ):
        assert sentence in text
    assert "| `draw` |" not in text
    assert "| `x` |" not in text


def test_names_of_the_data_have_no_effect_in_the_card():
    text = card(written("web", HOSTILE), TOLD)
    assert "<script>" not in text.replace("`loss > 3 or a\\|b'*[x](y)<script> # head`", "")
    assert "\n# head" not in text
    for line in text.splitlines():
        if line.startswith("| a&#124;b"):
            assert line.count(" | ") in (6, 8)


def test_every_reason_of_the_plan_is_explained():
    assert set(REASONS) <= set(REASON_TEXTS)


def test_a_plan_made_by_hand_leaves_its_sections_out():
    text = card(written("web"), replace(TOLD, summary={"tokenizer": None, "mixer": None}))
    assert "## What was done" not in text
    assert "## Before and after" not in text
    assert "## How to reproduce" in text


@pytest.mark.parametrize(
    ("licenses", "front"),
    [
        ({"a": "MIT"}, {"license": "mit"}),
        ({"a": None}, {"license": "unknown"}),
        ({"a": "mit", "b": " mit "}, {"license": "mit"}),
        ({"a": "mit", "b": "cc0-1.0", "c": None}, {"license": ["cc0-1.0", "mit", "unknown"]}),
        ({"a": "My Own, v2"}, {"license": "other", "license_name": "my-own-v2"}),
        ({"a": "My Own", "b": "mit"}, {"license": ["mit", "other"]}),
        ({}, {}),
    ],
)
def test_licences_stand_in_the_front_matter_in_words_that_the_hub_knows(
    licenses: dict[str, str | None], front: dict[str, Any]
):
    assert license_front(licenses) == front
    assert (
        front.items()
        <= front_matter(card(written("web"), replace(TOLD, licenses=licenses))).items()
    )


def test_an_unknown_licence_is_called_unknown():
    text = card(written("web"), TOLD)
    assert "| forum | **unknown** |" in text
    assert "name no licence for 1 source " in text
    assert "| web | CC-BY-4.0 |" in text


def test_ten_thousand_domains_leave_the_card_small_and_usable():
    many = written(*(f"domain {n}" for n in range(10_000)))
    text = card(many, TOLD)
    assert len(text) < 60_000
    assert list(configs(many)) == ["default"]
    assert "9,800 more domains are in `mixture.json`" in text
    assert "Of so many domains none has a configuration" in text
    lines = load_lines(many, "folder")
    assert lines[-1] == (
        'one_domain = load_dataset(folder, data_files=["data/slug-9999/train-*.parquet"],'
        ' split="train")'
    )
    few = written(*(f"domain {n}" for n in range(1000)))
    assert len(configs(few)) == 1001


def test_configurations_are_of_the_first_format_that_datasets_reads_by_patterns():
    assert configs(written("web", formats=("mds", "jsonl"))) == {
        "default": ["jsonl/*/train-*.jsonl.zst"], "slug-0": ["jsonl/slug-0/train-*.jsonl.zst"],
    }  # fmt: skip
    assert configs(written("web", formats=("packed",)))["slug-0"] == [
        "packed/slug-0/train-*.parquet"
    ]
    for formats in (("mds",), ("arrow",), ("webdataset", "megatron")):
        made = written("web", formats=formats)
        text = card(made)
        assert configs(made) == {}
        assert "configs" not in front_matter(text)
        assert "interleave_datasets" not in text
    assert 'load_from_disk(str(Path(folder, "arrow/slug-0")))' in "\n".join(
        load_lines(written("web", formats=("arrow",)), "folder")
    )


def test_the_column_of_weights_means_what_the_way_of_weights_says():
    for way, said in (
        ("column", "the mean over the examples kept is 1"),
        ("copies", "`curate_weight`: 1: what the plan gives"),
        ("domains", "the mean over each domain is 1"),
    ):
        worth = {Component(0, "web"): 10.0}
        assert said in card(written("web", weights=way, worth=worth))


def test_packed_sequences_are_not_drawn_by_probabilities_of_rows():
    text = card(written("web", formats=("packed",)))
    assert "interleave_datasets" not in text
    assert "recipes/packed_interleave.py" in text
    assert "interleave_datasets" in card(written("web", formats=("parquet", "packed")))


def test_the_card_says_which_formats_have_weights():
    """By hand: 7 of the rows weigh other than 1, in both formats of tokens."""
    tokens = [shard("web", form) | {"facts": {"weighted": 7}} for form in ("packed", "megatron")]
    made = replace(written("web", formats=("packed", "megatron")), shards=tokens[:1])
    made = replace(made, others=tokens[1:])
    text = card(made)
    assert "the 7 rows that do not weigh 1 are lost" in text
    assert "curate_weight" not in text
    assert "- `input_ids`" in text
    both = replace(made, formats=("parquet", *made.formats), shards=[shard("web")], others=tokens)
    text = card(both)
    assert "`curate_weight` (in `parquet`) is for the loss" in text
    assert "the 7 rows that do not weigh 1 are lost" in text
    copied = card(replace(made, weights="copies"))
    assert "lost" not in copied
    assert "curate_weight" not in copied


@pytest.mark.parametrize(
    ("form", "call"),
    [
        ("mds", 'StreamingDataset(local=str(Path(folder, "mds/slug-0"))'),
        ("webdataset", "wds.WebDataset(archives"),
        ("megatron", "IndexedDataset(prefix)"),
    ],
)
def test_every_format_alone_has_lines_that_load_it(form: str, call: str):
    page = card(written("web", formats=(form,)))
    text = page.split("```python\n")[1].split("```")[0]
    compile(text, form, "exec")
    assert call in text
    assert text.index("import") < text.rindex("import ") < text.index('folder = "shards"')


def test_means_are_of_measurements_not_of_numbers_of_rows():
    entry = {"kept": 0.25, "dropped": 0.5}
    means = dict.fromkeys(("leakage", "leakage_row", "leakage_set"), entry)
    told = Told(version="1", settings={}, plan={}, summary={"means": means})
    text = card(written("web"), told)
    assert "`leakage`" in text
    assert "leakage_row" not in text
    assert "leakage_set" not in text


def test_packed_sequences_are_one_table_whatever_the_columns_of_the_sources():
    columns = {"a": {"more": "int64"}, "b": {"more": "string"}}
    made = replace(written("web", formats=("packed",)), columns=columns)
    assert "default" in configs(made)
    assert "There is no default" not in card(made)
    assert "There is no default" in card(replace(made, formats=("parquet", "packed")))
