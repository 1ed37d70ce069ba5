import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from curate.data.files import digest_file
from curate.errors import ConfigError, InputError
from curate.plan.mixture import load_mixture
from jobs.mix import budget_tokens, mix_run, plan_mix
from jobs.settings import parse_settings
from tests.jobs.scored_run import POOL, scored_run, tables
from tests.tiny_models import byte_tokenizer


def test_sizes_are_the_training_rows_and_the_default_budget_is_the_share_of_the_tokens(
    tmp_path: Path,
):
    settings = scored_run(tmp_path, mix={"mixer": "natural"}, plan={"keep": 0.5})
    summary = mix_run(settings, pool=POOL)
    training = tables(settings, "examples").filter(pl.col("split") == "train")
    rows = dict(training.group_by("domain").len().iter_rows())
    assert {entry["domain"]: entry["examples"] for entry in summary["domains"]} == rows
    tokens = int(training["num_chars"].sum())
    assert summary["budget_tokens"] == round(0.5 * tokens)
    large = summary["domains"][0]
    assert large["weight"] == pytest.approx(large["tokens"] / tokens)
    assert large["epochs"] == pytest.approx([0.5])


def test_the_file_holds_weights_sizes_budget_and_epochs(tmp_path: Path):
    settings = scored_run(tmp_path, mix={"mixer": "cooldown"}, plan={"keep": {"tokens": 9000}})
    summary = mix_run(settings, pool=POOL)
    path = tmp_path / "run" / "mixtures" / "cooldown" / "mixture.json"
    values = json.loads(path.read_text())
    assert values["budget_tokens"] == 9000
    assert len(load_mixture(path).phases) == len(values["epochs"]) == 2
    small = summary["domains"][2]
    assert small["epochs"][0] > small["epochs"][1]
    assert "small" in summary["notes"][0]


def test_it_is_made_once_and_again_when_budget_options_or_data_change(tmp_path: Path):
    settings = scored_run(tmp_path, mix={"mixer": "unimax"}, plan={"keep": 0.5})
    assert plan_mix(settings).done == 0
    first = mix_run(settings, pool=POOL)
    path = tmp_path / "run" / "mixtures" / "unimax" / "mixture.json"
    written = path.stat().st_mtime_ns
    assert plan_mix(settings).done == 1
    assert mix_run(settings, pool=POOL) == first
    assert path.stat().st_mtime_ns == written
    changed = replace(settings, mix={"mixer": "unimax", "max_epochs": 0.6})
    assert plan_mix(changed).why == ("the mixer, the budget or the data have changed",)
    assert mix_run(changed, pool=POOL)["domains"] != first["domains"]


def test_a_domain_without_training_tokens_is_left_out_and_named(tmp_path: Path):
    byte_tokenizer(merges=False).save_pretrained(tmp_path / "bytes")
    plan = {"tokenizer": str(tmp_path / "bytes")}
    settings = scored_run(tmp_path, mix={"mixer": "uniform"}, plan=plan)
    run = tmp_path / "run"
    mix_run(settings, pool=POOL)
    for path in (run / "lengths").glob("*/*.parquet"):
        table = pl.read_parquet(path)
        if table["file"][0] == "small.parquet":
            table.with_columns(num_tokens=pl.lit(0, pl.Int64)).write_parquet(path)
            mark = path.parent / ".done" / f"{path.name}.json"
            facts = json.loads(mark.read_text())
            facts |= {"size_bytes": path.stat().st_size, "digest": digest_file(path)}
            mark.write_text(json.dumps(facts))
    summary = mix_run(settings, pool=POOL)
    assert [entry["domain"] for entry in summary["domains"]] == ["large", "middle"]
    assert summary["notes"] == ["without training tokens, so left out: small"]


def test_without_a_mix_there_is_nothing_to_do(tmp_path: Path):
    settings = scored_run(tmp_path)
    assert mix_run(settings, pool=POOL) == {"mixer": None}
    assert plan_mix(settings).total == 0
    assert not (tmp_path / "run" / "mixtures").exists()


@pytest.mark.parametrize(
    ("mix", "message", "fix"),
    [
        ({"mixer": "unimx"}, "there is no mixer 'unimx'", "did you mean unimax?"),
        ({"max_epochs": 4}, "mix.mixer is missing", "set it to one of"),
        ({"mixer": "unimax", "max_epoch": 4}, "unknown key mix.max_epoch", "did you mean"),
        ({"mixer": "unimax", "max_epochs": 0}, "max_epochs is 0", "set mix.max_epochs"),
        ({"mixer": "fixed", "weights": {"smal": 1}}, "'smal'", "did you mean small?"),
    ],
)
def test_a_wrong_mixer_or_option_says_so(
    tmp_path: Path, mix: dict[str, Any], message: str, fix: str
):
    with pytest.raises(ConfigError) as caught:
        mix_run(scored_run(tmp_path, mix=mix), pool=POOL)
    assert message in caught.value.what
    assert fix in caught.value.fix


def test_without_an_index_the_user_is_sent_there(tmp_path: Path):
    values = {"run": str(tmp_path / "run"), "sources": {"web": {"path": "x", "text": "t"}}}
    settings = parse_settings({**values, "mix": {"mixer": "natural"}})
    assert plan_mix(settings).why == ("the index has not been made yet",)
    with pytest.raises(InputError) as caught:
        mix_run(settings, pool=POOL)
    assert "curate index" in caught.value.fix


def test_rows_count_as_of_mean_length_in_the_budget():
    from curate.plan.mixture import DomainSize
    from curate.plan.settings import Keep

    sizes = {"a": DomainSize(10, 100), "b": DomainSize(30, 700)}
    assert budget_tokens(Keep(examples=5), sizes) == 100
    assert budget_tokens(Keep(share=0.25), sizes) == 200
    assert budget_tokens(Keep(token_share=0.25), sizes) == 200
    assert budget_tokens(Keep(tokens=123), sizes) == 123
