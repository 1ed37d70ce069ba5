import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from curate.data.layout import RunFolder
from curate.errors import ConfigError, CurateError, InputError
from curate.plan.settings import Keep, Plan, Weights
from jobs.cluster import Cluster, open_pool
from jobs.compare_arms import Spec, columns_of
from jobs.mix import mix_run
from jobs.plan import plan_plan, plan_run
from jobs.settings import Settings
from tests.jobs.scored_run import POOL, SIZES, bytes_of, scored_run, tables, write_scores


def with_plan(settings: Settings, **plan: Any) -> Settings:
    return replace(settings, plan=Plan(**plan))


def test_the_tables_have_every_row_in_order_and_the_summary_agrees_with_them(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"score": "el2n", "keep": 0.5})
    summary = plan_run(settings, pool=POOL)
    examples, plan = tables(settings, "examples"), tables(settings, "plan")
    assert plan.select("source", "file", "row").equals(examples.select("source", "file", "row"))
    assert plan.columns[3:] == ["keep", "weight", "copies", "reason"]
    training = examples["split"] == "train"
    assert summary["asked"] == round(0.5 * int(training.sum())) == plan["copies"].sum()
    assert summary["kept"]["rows"] == plan["keep"].sum()
    assert summary["kept"]["tokens"] == examples.filter(plan["keep"])["num_chars"].sum()
    reasons = dict(plan["reason"].value_counts().iter_rows())
    assert {name: count for name, count in summary["reasons"].items() if count} == reasons
    assert reasons["held_out"] == (~training).sum()
    for domain in SIZES:
        own = plan.filter(examples["domain"] == domain)
        entry = summary["domains"][domain]
        assert entry["kept_rows"] == own["keep"].sum()
        assert entry["rows"] == (own["reason"] != "held_out").sum()
    kept = tables(settings, "scores/el2n").filter(plan["keep"])["el2n"]
    assert summary["means"]["el2n.el2n"]["kept"] == pytest.approx(kept.mean())
    assert summary["means"]["loss.loss"]["dropped"] is not None
    assert summary["weights"]["effective_share"] == 1
    assert summary["notes"] == []


def test_what_a_condition_drops_is_gone_before_anything_is_chosen(tmp_path: Path):
    settings = scored_run(
        tmp_path, plan={"drop": "el2n < 0.1 or loss > 1.9", "keep": 0.5, "within": "all"}
    )
    summary = plan_run(settings, pool=POOL)
    examples, plan = tables(settings, "examples"), tables(settings, "plan")
    scores = tables(settings, "scores/el2n"), tables(settings, "scores/loss")
    condition = (scores[0]["el2n"] < 0.1) | (scores[1]["loss"] > 1.9)
    dropped = condition.fill_null(False) & (examples["split"] == "train")
    assert (plan["reason"] == "dropped").to_list() == dropped.to_list()
    left = int((examples["split"] == "train").sum()) - int(dropped.sum())
    assert summary["dropped"]["rows"] == dropped.sum() > 50
    assert summary["asked"] == plan["copies"].sum() == round(0.5 * left)
    assert summary["training"]["rows"] == (examples["split"] == "train").sum()
    for domain in SIZES:
        own = examples["domain"] == domain
        assert summary["domains"][domain]["rows"] == (own & (examples["split"] == "train")).sum()
    before = bytes_of(Path(settings.run) / "plan")
    assert plan_run(settings, pool=POOL)["done"] == 0
    assert bytes_of(Path(settings.run) / "plan") == before
    other = with_plan(settings, drop="el2n < 0.05", keep=0.5, within="all")
    assert plan_plan(other).done == 0
    assert plan_run(other, pool=POOL)["dropped"]["rows"] < summary["dropped"]["rows"]


def test_the_arms_of_a_comparison_that_drop_rows_read_what_tells_them(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"drop": "loss > 1", "score": "el2n"})
    run = RunFolder(Path(settings.run))
    read = {
        name: columns_of(Spec(name=name, what=""), settings, run)
        for name in ("natural", "shuffled", "random", "everything")
    }
    assert read["natural"] == ("el2n.el2n", "loss.loss")
    assert read["shuffled"] == ("loss.loss",)
    assert read["random"] == read["everything"] == ()


def test_yardsticks_stand_beside_the_plan_at_its_tokens(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"score": "el2n", "keep": 0.3, "within": "all"})
    summary = plan_run(settings, pool=POOL)
    tokens, found = summary["kept"]["tokens"], summary["yardsticks"]
    assert set(found) == {"random", "longest", "natural"}
    for entry in found.values():
        assert tokens - 30 * len(SIZES) <= entry["tokens"] <= tokens
        assert sum(domain["tokens"] for domain in entry["domains"].values()) == entry["tokens"]
    assert found["longest"]["mean_tokens"] > found["random"]["mean_tokens"]
    assert found["longest"]["rows"] < found["random"]["rows"]
    best = summary["means"]["plan.score"]["kept"]
    assert best > found["natural"]["mean_score"] > found["random"]["mean_score"]
    assert 0.1 < found["random"]["overlap"] < found["natural"]["overlap"] < 1


def test_a_domain_that_a_score_nearly_wipes_out_is_named(tmp_path: Path):
    """el2n rises from `large` over `middle` to `small`: the lowest are all of `large`."""
    settings = scored_run(
        tmp_path, plan={"score": "el2n", "keep": 0.4, "within": "all", "order": "easiest"}
    )
    (note,) = plan_run(settings, pool=POOL)["notes"]
    assert "is kept of middle (0 %), small (0 %)" in note
    assert "plan.within" in note


def test_scores_and_index_columns_mix_in_an_expression_and_ranks_reach_the_workers(
    tmp_path: Path,
):
    settings = scored_run(tmp_path, plan={"score": "rank(el2n) - 0*num_tokens", "keep": 0.2})
    plan_run(settings, pool=POOL)
    by_rank = tables(settings, "plan")
    assert (tmp_path / "run" / "plan" / "ranks.npy").exists()
    plan_run(with_plan(settings, score="el2n", keep=0.2), pool=POOL)
    assert tables(settings, "plan").equals(by_rank)
    assert not (tmp_path / "run" / "plan" / "ranks.npy").exists()


def test_other_values_of_the_same_ranks_are_not_taken_for_the_old_ones(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"score": "rank(el2n)", "keep": 0.2})
    first = plan_run(settings, pool=POOL)
    before = tables(settings, "plan")
    write_scores(settings, "el2n", lambda row, start: None if row % 17 == 16 else start + row)
    assert plan_run(settings, pool=POOL)["done"] == first["done"]
    assert tables(settings, "plan").equals(before)


def test_a_mixture_is_realised_in_phases_with_copies(tmp_path: Path):
    settings = scored_run(
        tmp_path,
        mix={"mixer": "cooldown", "max_epochs": 100},
        plan={"score": "el2n", "keep": {"tokens": 6000}, "max_repeats": 50},
    )
    mix_run(settings, pool=POOL)
    summary = plan_run(settings, pool=POOL)
    plan = tables(settings, "plan")
    assert plan["phases"].dtype == pl.List(pl.UInt16)
    assert (plan["phases"].list.sum() == plan["copies"]).all()
    examples = tables(settings, "examples")
    mixture = json.loads((tmp_path / "run/mixtures/cooldown/mixture.json").read_text())
    for phase in (0, 1):
        copies = plan["phases"].list.get(phase)
        tokens = (copies * examples["num_chars"]).to_numpy()
        for domain in SIZES:
            asked = 3000 * mixture["phases"][phase]["weights"][domain]
            own = tokens[(examples["domain"] == domain).to_numpy()].sum()
            assert abs(own - asked) <= 30
    assert plan["copies"].max() > 1  # pyright: ignore[reportOperatorIssue]
    assert summary["mixer"] == "cooldown"
    assert summary["domains"]["small"]["token_share"] == pytest.approx(
        mixture["mean"]["small"], abs=0.01
    )


def test_more_than_repeats_allow_is_a_shortfall_that_is_said(tmp_path: Path):
    settings = scored_run(
        tmp_path,
        mix={"mixer": "uniform"},
        plan={"score": "el2n", "keep": {"tokens": 30_000}, "max_repeats": 2},
    )
    mix_run(settings, pool=POOL)
    summary = plan_run(settings, pool=POOL)
    assert summary["asked"] == 30_000
    assert summary["shortfall"] == 30_000 - 2 * sum(
        num_chars
        for num_chars, reason in zip(
            tables(settings, "examples")["num_chars"],
            tables(settings, "plan")["reason"],
            strict=True,
        )
        if reason == "kept"
    )
    assert "30,000 tokens were asked for" in summary["notes"][0]
    assert "2 repeats" in summary["notes"][0]


def test_a_rerun_does_nothing_and_a_changed_setting_says_so(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"score": "el2n", "keep": 0.5})
    assert plan_plan(settings).done == 0
    first = plan_run(settings, pool=POOL)
    before = bytes_of(tmp_path / "run" / "plan")
    again = plan_run(settings, pool=POOL)
    assert (again["done"], again["skipped"]) == (0, first["done"])
    assert again | {"done": 0, "skipped": 0} == first | {"done": 0, "skipped": 0}
    assert bytes_of(tmp_path / "run" / "plan") == before
    assert plan_plan(settings).done == plan_plan(settings).total == first["done"]
    changed = plan_plan(with_plan(settings, score="el2n", keep=0.4))
    assert changed.done == 0
    assert "have changed" in changed.why[0]
    write_scores(settings, "el2n", lambda row, _: float(row))
    assert "have changed" in plan_plan(settings).why[0]


def test_a_run_that_was_cut_short_goes_on_and_ends_with_the_same_bytes(tmp_path: Path):
    plan = {
        "score": "rank(el2n) + zscore(loss)",
        "keep": 0.5,
        "draw": "sample",
        "weights": {"score": "loss"},
    }
    settings = scored_run(tmp_path, plan=plan)
    total = plan_run(settings, pool=POOL)["done"]
    folder = tmp_path / "run" / "plan"
    whole = bytes_of(folder)
    parts = [name for name in whole if name.startswith("part-")]
    for lost in (["summary.json"], parts[:3], ["thresholds.json"], ["ranks.npy"], list(whole)):
        for name in lost:
            (folder / name).unlink()
        assert plan_run(settings, pool=POOL)["done"] == len([n for n in lost if n in parts])
        assert bytes_of(folder) == whole
    assert total == len(parts)


def test_two_workers_write_the_same_bytes(tmp_path: Path):
    plan = {"score": "rank(el2n) + loss", "keep": 0.5, "weights": {"score": "loss"}}
    settings = scored_run(tmp_path, mix={"mixer": "unimax"}, plan=plan)
    mix_run(settings, pool=POOL)
    plan_run(settings, pool=POOL)
    folder = tmp_path / "run" / "plan"
    inline = bytes_of(folder)
    for name in inline:
        (folder / name).unlink()
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        plan_run(settings, pool=pool)
    assert bytes_of(folder) == inline


def test_a_removed_file_takes_its_plan_with_it(tmp_path: Path):
    from jobs.index import index_run

    settings = scored_run(tmp_path, plan={"score": "el2n", "keep": 0.5})
    plan_run(settings, pool=POOL)
    (tmp_path / "data" / "middle.parquet").unlink()
    index_run(settings, pool=POOL)
    plan_run(settings, pool=POOL)
    names = {part.name for part in RunFolder(tmp_path / "run").partitions()}
    assert {path.stem for path in (tmp_path / "run" / "plan").glob("part-*.parquet")} == names
    assert "middle" not in set(tables(settings, "examples")["domain"])


def test_an_unknown_column_is_refused_with_the_nearest_one(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"score": "el2m", "keep": 0.5})
    with pytest.raises(ConfigError) as caught:
        plan_run(settings, pool=POOL)
    assert "there is no score column el2m" in caught.value.what
    assert caught.value.fix == "did you mean el2n?"


def test_without_scores_the_user_is_sent_to_score_and_a_random_plan_works(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"score": "el2n", "keep": 0.5})
    for path in sorted((tmp_path / "run" / "scores").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(InputError) as caught:
        plan_run(settings, pool=POOL)
    assert "curate score" in caught.value.fix
    assert "nothing was scored yet" in plan_plan(settings).why[0]
    assert plan_run(with_plan(settings, keep=0.5), pool=POOL)["kept"]["rows"] > 0


def test_scores_that_stopped_half_way_are_refused_by_name(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"score": "el2n", "keep": 0.5})
    run = RunFolder(tmp_path / "run")
    run.scores(run.partitions()[2], "el2n").remove()
    with pytest.raises(InputError, match=r"el2n has no scores for web/large\.parquet from row 53"):
        plan_run(settings, pool=POOL)
    # A score that is not used may be incomplete; the summary leaves it out.
    summary = plan_run(with_plan(settings, score="loss", keep=0.5), pool=POOL)
    assert "el2n.el2n" not in summary["means"]


def test_scores_of_other_examples_are_refused(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"score": "el2n", "keep": 0.5})
    run = RunFolder(tmp_path / "run")
    output = run.scores(run.partitions()[0], "el2n")
    turned = pl.read_parquet(output.path).reverse()
    output.write(turned.write_parquet, "by hand")
    with pytest.raises(CurateError, match="two tables of one partition differ"):
        plan_run(settings, pool=POOL)


def test_a_mixture_that_is_missing_or_old_is_refused(tmp_path: Path):
    settings = scored_run(tmp_path, mix={"mixer": "unimax"}, plan={"keep": 0.5})
    with pytest.raises(InputError, match="the mixture unimax is missing") as caught:
        plan_run(settings, pool=POOL)
    assert "curate mix" in caught.value.fix
    mix_run(settings, pool=POOL)
    plan_run(settings, pool=POOL)
    with pytest.raises(InputError, match="was made from other data or settings"):
        plan_run(with_plan(settings, keep=0.25), pool=POOL)


def test_weights_reach_the_tables_and_a_collapse_is_refused_before_anything_is_written(
    tmp_path: Path,
):
    settings = scored_run(tmp_path, plan={"keep": 0.5, "weights": {"score": "el2n"}})
    summary = plan_run(settings, pool=POOL)
    kept = tables(settings, "plan").filter("keep")["weight"].to_numpy()
    assert kept.mean() == pytest.approx(1, abs=1e-5)
    assert summary["weights"]["min"] == pytest.approx(kept.min(), rel=1e-6)
    assert summary["weights"]["max"] == pytest.approx(kept.max(), rel=1e-6)
    effective = kept.sum() ** 2 / np.square(kept).sum()
    assert summary["weights"]["effective_size"] == pytest.approx(effective, rel=1e-5)
    before = bytes_of(tmp_path / "run" / "plan")
    write_scores(settings, "el2n", lambda row, _: 1e6 if row == 3 else 1e-6)
    narrow = Weights(score="el2n", clip=(0.0, 1e9))
    with pytest.raises(CurateError, match="effective examples"):
        plan_run(with_plan(settings, keep=Keep(share=1.0), weights=narrow), pool=POOL)
    assert bytes_of(tmp_path / "run" / "plan") == before
