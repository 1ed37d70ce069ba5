"""The plan's draws for diversity, from settings to tables, against plain loops over examples."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from killed import curate_command, found, is_killed, run_to_end

from curate.config import plain, to_yaml
from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError
from curate.plan.settings import Plan
from jobs.all_stages import run_stages, stages_for
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.compare_arms import Spec, columns_of
from jobs.compare_settings import ArmSettings
from jobs.diverse import vector_digests
from jobs.plan import plan_plan, plan_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
ROWS = 120


@pytest.fixture
def examples(tmp_path: Path) -> pl.DataFrame:
    """Three domains; texts of 6 to 9 characters; some rows lack a vector, some a score."""
    draw = np.random.default_rng(0)
    vectors = draw.integers(-8, 9, size=(ROWS, 4)).astype(np.float32)
    vectors[[7, 50]] = np.nan
    table = pl.DataFrame(
        {
            "text": [f"{'x' * (row % 4)}text {row % 10}" for row in range(ROWS)],
            "v": vectors,
            "topic": ["abc"[min(2, row // 50)] for row in range(ROWS)],
            "kind": [row % 2 for row in range(ROWS)],
            "quality": [
                None if row % 19 == 18 else (row * 37 % ROWS) / ROWS for row in range(ROWS)
            ],
            "id": [str(row) for row in range(ROWS)],
        }
    )
    (tmp_path / "pool").mkdir()
    table[:70].write_parquet(tmp_path / "pool" / "a.parquet")
    table[70:].write_parquet(tmp_path / "pool" / "b.parquet")
    table.select("id", "quality").write_csv(tmp_path / "quality.csv")
    return table


def settings_of(root: Path, run: str = "run", *, more: Any = None, **plan: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(root / run),
        "sources": {"pool": {"path": str(root / "pool"), "text": "text", "domain": "topic",
                             "label": "kind", "id": "id"}},
        "embed": {"given": {"kind": "column", "column": "v", "normalize": False}},
        "index": {"held_out": 0.1, "partition_rows": 25},
        "score": {"scorers": [{"external": {"rated": {"path": str(root / "quality.csv")}}}]},
        "plan": plan,
        **(more or {}),
    }  # fmt: skip
    return parse_settings(values)


def planned(settings: Settings, pool: Pool = INLINE) -> pl.DataFrame:
    """Index, plan and score of every row, in canonical order."""
    run_stages(settings, stages_for(settings, "plan"), pool=pool)
    run = RunFolder(Path(settings.run))
    tables = [
        pl.concat([pl.read_parquet(run.examples(part).path), pl.read_parquet(run.planned(part).path)
                   .drop("source", "file", "row")], how="horizontal")
        for part in run.partitions()
    ]  # fmt: skip
    return pl.concat(tables).with_columns(pl.int_range(pl.len()).alias("at"))


def farthest(rows: np.ndarray, first: int, count: int) -> list[int]:
    chosen = [first]
    while len(chosen) < count:
        gaps = np.linalg.norm(rows[:, None] - rows[None, chosen], axis=2).min(axis=1)
        gaps[chosen] = -1
        chosen.append(int(gaps.argmax()))
    return chosen


def radius(rows: np.ndarray, chosen: list[int]) -> float:
    return float(np.linalg.norm(rows[:, None] - rows[None, chosen], axis=2).min(axis=1).max())


def vectors_at(examples: pl.DataFrame, rows: pl.DataFrame) -> np.ndarray:
    return examples["v"].to_numpy()[rows["at"].to_numpy()].astype(np.float64)


def test_k_centre_keeps_rows_that_are_far_apart_in_each_domain(
    tmp_path: Path, examples: pl.DataFrame
):
    table = planned(settings_of(tmp_path, draw="k_centre", keep=0.2))
    training = table.filter(pl.col("split") == "train")
    assert table["keep"].sum() == round(0.2 * training.height)
    for (domain,), own in training.group_by("domain"):
        there = own.filter(pl.col("reason") != "unscored").sort("at")
        rows = vectors_at(examples, there)
        kept = np.flatnonzero(there["keep"].to_numpy()).tolist()
        # Which row comes first is drawn: one of those kept leads to just these, up to ties.
        reached = [radius(rows, farthest(rows, first, len(kept))) for first in kept]
        assert any(radius(rows, kept) <= each + 1e-6 for each in reached), domain
    reasons = dict(table["reason"].value_counts().iter_rows())
    assert set(reasons) == {"kept", "held_out", "unscored", "draw"}
    assert reasons["unscored"] == training.filter(pl.col("at").is_in([7, 50])).height


def test_from_one_first_row_the_order_is_the_plain_loops(tmp_path: Path, examples: pl.DataFrame):
    """With a score the best row comes first, so that all is known."""
    settings = settings_of(
        tmp_path,
        draw="k_centre",
        keep={"examples": 14},
        score="quality",
        candidates=3,
        within="all",
    )
    table = planned(settings)
    quality = examples["quality"].to_numpy()
    training = table.filter(pl.col("split") == "train")["at"].to_numpy()
    usable = [row for row in training if np.isfinite(quality[row]) and row not in (7, 50)]
    best = sorted(usable, key=lambda row: -quality[row])[: 3 * 14]
    rows = examples["v"].to_numpy()[best].astype(np.float64)
    wanted = {best[at] for at in farthest(rows, 0, 14)}
    kept = set(table.filter(pl.col("keep"))["at"].to_list())
    assert kept == wanted or radius(rows, [best.index(row) for row in kept]) == pytest.approx(
        radius(rows, farthest(rows, 0, 14))
    )
    reason = dict(zip(table["at"].to_list(), table["reason"].to_list(), strict=True))
    assert {reason[row] for row in best if row not in kept} == {"draw"}
    assert {reason[row] for row in usable if row not in best} == {"score"}
    assert all(reason[row] == "unscored" for row in training if row not in usable)


def test_facility_location_covers_more_than_any_random_choice(
    tmp_path: Path, examples: pl.DataFrame
):
    table = planned(settings_of(tmp_path, draw="facility_location", keep=0.2, within="all"))
    there = table.filter((pl.col("split") == "train") & (pl.col("reason") != "unscored"))
    rows = vectors_at(examples, there)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    similar = np.maximum(unit @ unit.T, 0)
    kept = np.flatnonzero(there["keep"].to_numpy())
    draw = np.random.default_rng(0)
    others = [similar[:, draw.permutation(len(rows))[: len(kept)]].max(axis=1).sum()
              for _ in range(300)]  # fmt: skip
    assert similar[:, kept].max(axis=1).sum() > max(others)


@pytest.mark.parametrize("draw", ["k_centre", "facility_location"])
@pytest.mark.parametrize("within", ["domain", "label", "all"])
def test_a_token_budget_is_gone_through_as_far_as_it_reaches(
    tmp_path: Path, examples: pl.DataFrame, draw: str, within: str
):
    settings = settings_of(tmp_path, draw=draw, within=within, keep={"tokens": 260})
    table = planned(settings)
    summary = plan_run(settings, pool=INLINE)
    lengths = examples["text"].str.len_chars().to_numpy()[table["at"].to_numpy()]
    tokens = int(lengths[table["keep"].to_numpy()].sum())
    assert summary["kept"]["tokens"] == tokens <= 260
    groups = {"domain": 3, "label": 2, "all": 1}[within]
    assert tokens > 260 - groups * 10  # no group leaves room for another row
    assert table["copies"].max() == 1


def test_a_smaller_budget_keeps_a_part_of_what_a_larger_one_keeps(
    tmp_path: Path, examples: pl.DataFrame
):
    few = planned(settings_of(tmp_path, "few", draw="k_centre", keep=0.1, within="all"))
    more = planned(settings_of(tmp_path, "more", draw="k_centre", keep=0.4, within="all"))
    kept = few.filter(pl.col("keep"))["at"]
    assert 5 < len(kept) < more["keep"].sum()
    assert kept.is_in(more.filter(pl.col("keep"))["at"].implode()).all()


def test_a_mixture_repeats_what_is_short_whole_and_then_from_the_front_of_its_order(
    tmp_path: Path, examples: pl.DataFrame
):
    """`c` has 20 rows and is asked for 45: all of it twice, and the first again."""
    more = {"mix": {"mixer": "fixed", "weights": {"a": 0.25, "b": 0.25, "c": 0.5}}}
    settings = settings_of(
        tmp_path, draw="k_centre", keep={"examples": 90}, max_repeats=4, more=more
    )
    table = planned(settings).filter(pl.col("split") == "train")
    own = table.filter((pl.col("domain") == "c") & (pl.col("reason") != "unscored")).sort("at")
    copies = own["copies"].to_numpy()
    total = int(copies.sum())
    assert total > own.height
    full, rest = divmod(total, own.height)
    assert set(copies.tolist()) <= {full, full + 1}
    again = np.flatnonzero(copies == full + 1).tolist()
    assert len(again) == rest
    rows = vectors_at(examples, own)
    if rest:
        reached = [radius(rows, farthest(rows, first, rest)) for first in again]
        assert any(radius(rows, again) <= each + 1e-6 for each in reached)
    assert table.filter(pl.col("domain") == "a")["copies"].max() == 1


def test_everything_is_kept_without_an_order(tmp_path: Path, examples: pl.DataFrame):
    table = planned(settings_of(tmp_path, draw="facility_location", keep=1.0))
    training = table.filter(pl.col("split") == "train")
    assert training["keep"].sum() == (training["reason"] != "unscored").sum()


def test_drop_and_drop_first_come_before_the_draw(tmp_path: Path, examples: pl.DataFrame):
    settings = settings_of(
        tmp_path, draw="k_centre", keep={"examples": 12}, score="quality", drop_first=0.2,
        drop="quality < 0.3", within="all",
    )  # fmt: skip
    table = planned(settings)
    quality = examples["quality"].to_numpy()[table["at"].to_numpy()]
    reason = table["reason"].to_numpy()
    training = (table["split"] == "train").to_numpy()
    assert (reason[training & (quality < 0.3)] == "dropped").all()
    left = training & (quality >= 0.3) & ~np.isin(table["at"].to_numpy(), [7, 50])
    gone = left & (reason == "dropped_extreme")
    assert gone.sum() == round(0.2 * left.sum())
    assert quality[gone].min() > quality[left & ~gone].max()
    assert table["keep"].sum() == 12


def test_the_random_yardstick_is_that_of_any_plan_and_natural_keeps_the_same_order(
    tmp_path: Path, examples: pl.DataFrame
):
    keep = {"examples": 20}
    settings = settings_of(tmp_path, draw="k_centre", keep=keep, within="all")
    planned(settings)
    diverse = plan_run(settings, pool=INLINE)
    plain_settings = settings_of(tmp_path, "plain", keep={"tokens": diverse["kept"]["tokens"]},
                                 within="all")  # fmt: skip
    planned(plain_settings)
    random = plan_run(plain_settings, pool=INLINE)["yardsticks"]["random"]
    own = diverse["yardsticks"]["random"]
    assert (own["rows"], own["tokens"], own["domains"]) == (
        random["rows"], random["tokens"], random["domains"]
    )  # fmt: skip
    assert diverse["yardsticks"]["natural"]["overlap"] > 0.6 > own["overlap"]


def test_what_the_score_cannot_decide_is_said(tmp_path: Path, examples: pl.DataFrame):
    settings = settings_of(tmp_path, draw="k_centre", keep=0.5, score="quality")
    planned(settings)
    notes = plan_run(settings, pool=INLINE)["notes"]
    assert any("plan.candidates 3 is all there is in 3 of 3 groups" in note for note in notes)
    fewer = replace(settings, plan=replace(settings.plan, candidates=1.2))
    assert not any("candidates" in note for note in plan_run(fewer, pool=INLINE)["notes"])


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"candidates is 0\.5"):
        Plan(draw="k_centre", candidates=0.5)
    with pytest.raises(ConfigError, match="order is middle"):
        Plan(draw="facility_location", order="middle", score="el2n")
    settings = settings_of(tmp_path, draw="k_centre", vectors="other")
    with pytest.raises(ConfigError, match="no representation 'other'"):
        vector_digests(settings)


def test_an_arm_of_compare_cannot_draw_for_diversity_by_itself(tmp_path: Path):
    settings = settings_of(tmp_path)
    own = ArmSettings(name="far", rules=Plan(draw="k_centre"))
    spec = Spec(name="far", what="rows that are far apart", own=own)
    with pytest.raises(ConfigError, match="the arm far draws by k_centre"):
        columns_of(spec, settings, RunFolder(Path(settings.run)))


def test_what_is_done_stays_and_what_changed_is_made_anew(tmp_path: Path, examples: pl.DataFrame):
    settings = settings_of(tmp_path, draw="k_centre", keep=0.2)
    assert plan_plan(settings).total == 0
    planned(settings)
    places = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/diverse/part*.npy")}
    assert len(places) == 5
    assert plan_run(settings, pool=INLINE)["done"] == 0
    assert plan_plan(settings).done == 5
    weighed = replace(settings, plan=replace(settings.plan, force=True))
    plan_run(weighed, pool=INLINE)
    assert all(path.stat().st_mtime_ns == time for path, time in places.items())
    other = replace(settings, plan=replace(settings.plan, keep=0.3))
    assert plan_plan(other).done == 0
    plan_run(other, pool=INLINE)
    assert not any(path.stat().st_mtime_ns == time for path, time in places.items())
    for path in tmp_path.glob("run/vectors/given/*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(InputError, match="vectors are missing"):
        plan_run(settings, pool=INLINE)


def bytes_below(run: Path) -> dict[str, bytes]:
    paths = [*run.glob("plan/*.*"), *run.glob("diverse/*.*")]
    files = [path for path in paths if path.is_file()]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one_process(tmp_path: Path, examples: pl.DataFrame):
    plan: dict[str, Any] = {"draw": "facility_location", "keep": 0.3, "within": "label"}
    planned(settings_of(tmp_path, **plan))
    with open_pool(Cluster(kind="local", workers=2)) as workers:
        planned(settings_of(tmp_path, "dask", **plan), workers)
    assert bytes_below(tmp_path / "run") == bytes_below(tmp_path / "dask")
    assert len(bytes_below(tmp_path / "run")) > 12


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["candidates.safetensors", "part*.npy"])
def test_a_run_that_is_killed_and_started_again_gives_the_same_bytes(
    tmp_path: Path, examples: pl.DataFrame, moment: str
):
    plan: dict[str, Any] = {"draw": "k_centre", "keep": 0.3, "score": "quality"}
    more = {"index": {"partition_rows": 2}}
    settings = settings_of(tmp_path, "whole", more=more, **plan)
    planned(settings)
    killed = tmp_path / "killed"
    config = tmp_path / "killed.yaml"
    config.write_text(to_yaml(plain(replace(settings, run=str(killed)))))
    command = curate_command("run", config)
    assert is_killed(command, lambda: found(killed, f"diverse/{moment}") > 0)
    assert not (killed / "plan" / "summary.json").exists()
    run_to_end(command)
    assert bytes_below(killed) == bytes_below(tmp_path / "whole")
    shards = pl.concat([pl.read_parquet(path) for path in killed.glob("shards/**/*.parquet")])
    assert shards.height == math.floor(0.5 + 0.3 * _training(settings))


def _training(settings: Settings) -> int:
    run = RunFolder(Path(settings.run))
    tables = [pl.read_parquet(run.examples(part).path) for part in run.partitions()]
    return int((pl.concat(tables)["split"] == "train").sum())
