"""GIO as part of a run: columns, starts, budgets, odd rows, restarts, and a plan made of it."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from killed import curate_command, is_killed, run_to_end
from safetensors.numpy import load_file
from sklearn.decomposition import PCA

import curate
from curate.config import plain, to_yaml
from curate.errors import ConfigError, CurateError, InputError
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.plan import plan_run
from jobs.score import plan_score, score_run
from jobs.score_check import check_scores
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
DIM = 8
CENTRES = np.random.default_rng(7).normal(size=(4, DIM)) * 3


def around(kinds: Any, seed: int) -> np.ndarray:
    """Points of four groups."""
    draw = np.random.default_rng(seed)
    return (CENTRES[np.asarray(kinds)] + draw.normal(size=(len(kinds), DIM))).astype(np.float32)


def write_rows(path: Path, vectors: np.ndarray, *, name: str = "row", **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{name} {number}" for number in range(len(vectors))]
    pl.DataFrame({"text": texts, "v": vectors, **columns}).write_parquet(path)


@pytest.fixture
def kinds(tmp_path: Path) -> np.ndarray:
    """600 rows of four groups in two files; the target has three quarters of group 0, a quarter
    of group 1."""
    kinds = np.random.default_rng(0).integers(0, 4, 600)
    vectors = around(kinds, 1)
    vectors[[3, 400]] = np.nan
    topics = [f"t{kind}" for kind in kinds]
    write_rows(tmp_path / "pool" / "a.parquet", vectors[:250], topic=topics[:250])
    write_rows(tmp_path / "pool" / "b.parquet", vectors[250:], name="line", topic=topics[250:])
    write_rows(tmp_path / "target.parquet", around(np.repeat([0, 1], [60, 20]), 2), name="goal")
    return kinds


def settings_of(root: Path, run: str = "run", *, more: Any = None, **options: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(root / run),
        "sources": {"pool": {"path": str(root / "pool"), "text": "text", "domain": "topic"}},
        "target": {"path": str(root / "target.parquet"), "text": "text"},
        "embed": {"given": {"kind": "column", "column": "v", "normalize": False}},
        "index": {"held_out": 0.1, "partition_rows": 100},
        "score": {"scorers": [{"gio": options}]},
        **(more or {}),
    }
    return parse_settings(values)


def scored(settings: Settings, pool: Pool = INLINE) -> pl.DataFrame:
    """Scores beside the index, in canonical order."""
    index_run(settings, pool=pool)
    embed_run(settings, pool=pool)
    score_run(settings, pool=pool)
    opened = curate.open(settings.run)
    both = opened.scores.join(
        opened.examples.select("source", "file", "row", "split", "domain"),
        on=["source", "file", "row"],
    )
    return both.sort("source", "file", "row").collect()


def report_of(settings: Settings) -> dict[str, Any]:
    return json.loads((Path(settings.run) / "gio" / "report.json").read_text())


def steps_of(settings: Settings) -> pl.DataFrame:
    return pl.read_parquet(Path(settings.run) / "gio" / "steps.parquet")


def test_the_choice_is_of_the_targets_groups_and_weights_have_their_proportions(
    tmp_path: Path, kinds: np.ndarray
):
    settings = settings_of(tmp_path, dims=None)
    found = scored(settings)
    chosen = found.filter(pl.col("gio").is_not_null()).sort("gio")
    assert chosen["gio"].to_list() == list(range(chosen.height))
    assert chosen.height > 40
    assert set(chosen["split"]) == {"train"}
    assert set(chosen["domain"]) <= {"t0", "t1"}
    weight = chosen.group_by("domain").agg(pl.col("gio_weight").sum()).sort("domain")
    share = weight["gio_weight"].to_numpy() / chosen["gio_weight"].sum()
    np.testing.assert_allclose(share, [0.75, 0.25], atol=0.02)
    assert chosen["gio_step"].is_sorted()
    assert chosen["gio_kl"].is_sorted(descending=True)
    report = report_of(settings)
    for name in ("total_variation", "mmd"):
        assert report[name]["weighted"] <= report[name]["chosen"] < 0.7 * report[name]["pool"]
    assert report["examples"]["chosen"] == chosen.height


def test_the_columns_are_those_of_a_separate_computation(tmp_path: Path, kinds: np.ndarray):
    settings = settings_of(tmp_path, dims=None, max_share=None)
    found = scored(settings)
    target = pl.read_parquet(tmp_path / "target.parquet")["v"].to_numpy().astype(np.float64)
    pool = np.concatenate([pl.read_parquet(tmp_path / "pool" / f"{name}.parquet")["v"].to_numpy()
                           for name in "ab"]).astype(np.float64)  # fmt: skip
    far = np.linalg.norm(pool[:, None] - target[None], axis=2).min(axis=1)
    may = (found["split"] == "train").to_numpy() & np.isfinite(far)
    assert found["gio_distance"].is_null().to_list() == (~may).tolist()
    np.testing.assert_allclose(found["gio_distance"].to_numpy()[may], far[may], rtol=1e-5)
    centroids = np.load(tmp_path / "run" / "gio" / "centroids.npy").astype(np.float64)
    nearest = np.linalg.norm(pool[:, None] - centroids[None], axis=2).argmin(axis=1)
    assert found["gio_cluster"].to_numpy()[may].tolist() == nearest[may].tolist()
    # Every step's cluster whole, the nearest of it first.
    steps = steps_of(settings)
    expected: list[int] = []
    for cluster in steps["candidate"][1:]:
        members = np.flatnonzero(may & (nearest == cluster))
        expected += sorted(members.tolist(), key=lambda row: far[row])
    chosen = found.with_row_index().filter(pl.col("gio").is_not_null()).sort("gio")
    assert chosen["index"].to_list() == expected
    # The divergence by its formula, over all distances of the centroids that were taken.
    own = np.sort(np.linalg.norm(target[:, None] - target[None], axis=2), axis=1)[:, 5]
    prepared = load_file(tmp_path / "run" / "gio" / "prepared.safetensors")
    assert len(prepared["target"]) == 80
    best = min(  # the start is one row of the pool, which row the seed says
        abs(_by_hand(target, own, np.vstack([pool[row], centroids[steps["candidate"][1:]]]))
            - steps["divergence"][-1])
        for row in np.flatnonzero(may)
    )  # fmt: skip
    assert best < 1e-4


def _by_hand(target: np.ndarray, own: np.ndarray, chosen: np.ndarray) -> float:
    near = np.linalg.norm(target[:, None] - chosen[None], axis=2).min(axis=1)
    n, d = target.shape
    return float(d * np.log(near / own).mean() + np.log(5 * len(chosen) / (n - 1)))


def test_fewer_dimensions_are_the_principal_components_of_target_and_pool(
    tmp_path: Path, kinds: np.ndarray
):
    found = scored(settings_of(tmp_path, dims=3))
    target = pl.read_parquet(tmp_path / "target.parquet")["v"].to_numpy().astype(np.float64)
    pool = np.concatenate([pl.read_parquet(tmp_path / "pool" / f"{name}.parquet")["v"].to_numpy()
                           for name in "ab"]).astype(np.float64)  # fmt: skip
    may = (found["split"] == "train").to_numpy() & np.isfinite(pool[:, 0])
    model = PCA(3).fit(np.concatenate([target, pool[may]]))
    projected = model.transform(pool[may])
    far = np.linalg.norm(projected[:, None] - model.transform(target)[None], axis=2).min(axis=1)
    np.testing.assert_allclose(found["gio_distance"].to_numpy()[may], far, rtol=1e-4)


def test_a_second_run_does_nothing_and_another_budget_searches_anew(
    tmp_path: Path, kinds: np.ndarray
):
    settings = settings_of(tmp_path)
    first = scored(settings)
    assert score_run(settings, pool=INLINE)["done"] == 0
    other = settings_of(tmp_path, budget={"examples": 30})
    state = plan_score(other)
    assert state.total - state.done == 1 + 1 + 7 + 7  # search, report, tables, columns
    assert score_run(other, pool=INLINE)["done"] == 1 + 1 + 7
    again = curate.open(other.run).scores.sort("gio", nulls_last=True).collect()
    assert again["gio"].drop_nulls().len() == 30
    for path in (tmp_path / "run" / "gio").rglob("*.npy"):
        path.unlink()  # the folder may be removed once the scores are there
    assert score_run(other, pool=INLINE)["done"] == 0
    assert scored(settings).equals(first)


def test_a_budget_in_tokens_or_shares_is_met_to_the_last_example(tmp_path: Path, kinds: np.ndarray):
    found = scored(settings_of(tmp_path, budget={"share": 0.05}))
    may = found["split"].to_list().count("train")
    assert int(0.05 * may) - 1 <= found["gio"].count() <= 0.05 * may
    found = scored(settings_of(tmp_path, budget={"tokens": 200}))
    chosen = found.filter(pl.col("gio").is_not_null())
    letters = [len(f"{'row' if file == 'a.parquet' else 'line'} {row}")
               for file, row in chosen.select("file", "row").iter_rows()]  # fmt: skip
    assert 190 <= sum(letters) <= 200  # no tokenizer: characters


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "points"},
        {"start": "random"},
        {"start": "uniform"},
        {"estimator": "avg"},
        {"estimator": "avg", "optimizer": "gradient", "start": "uniform"},
        {"own_k": 2, "start": "random"},
        {"max_target": 50, "clusters": 30},
        {"dims": 3},
        {"patience": 3, "max_steps": 4},
    ],
)
def test_every_option_chooses_from_the_targets_groups(
    tmp_path: Path, kinds: np.ndarray, options: dict[str, Any]
):
    settings = settings_of(tmp_path, **options)
    found = scored(settings)
    chosen = found.filter(pl.col("gio_step") > 0)
    assert chosen.height >= 10 or options.get("max_steps")
    assert np.mean(chosen["domain"].is_in(["t0", "t1"]).to_numpy()) > 0.9
    started = found.filter(pl.col("gio_step") == 0)
    assert started.height == (20 if options.get("start") == "random" else 0)
    if options == {"estimator": "avg"}:
        assert set(chosen["domain"]) == {"t0"}  # one mode before any other
    if "max_steps" in options:
        assert chosen["gio_step"].max() == 4
    if options.get("mode") == "points":
        assert found["gio_cluster"].null_count() == found.height


def test_a_source_that_is_selected_already_comes_first_and_leaves_what_is_missing(
    tmp_path: Path, kinds: np.ndarray
):
    write_rows(tmp_path / "given.parquet", around([0] * 120, 5), name="given")
    sources = {
        "pool": {"path": str(tmp_path / "pool"), "text": "text", "domain": "topic"},
        "given": {"path": str(tmp_path / "given.parquet"), "text": "text"},
    }
    found = scored(settings_of(tmp_path, more={"sources": sources}, start_source="given"))
    given = found.filter(pl.col("source") == "given", pl.col("split") == "train").sort("gio")
    assert given["gio"].to_list() == list(range(given.height))
    assert set(given["gio_step"]) == {0}
    first = found.filter(pl.col("gio_step") == 1)
    assert set(first["domain"]) == {"pool/t1"}  # of group 0 there is enough
    held = found.filter(pl.col("source") == "given", pl.col("split") == "held_out")
    assert held["gio"].count() == 0


def test_what_is_missing_is_said_before_anything_is_made(tmp_path: Path, kinds: np.ndarray):
    settings = settings_of(tmp_path)
    with pytest.raises(ConfigError, match="gio compares every example with a target"):
        check_scores(replace(settings, target=None))
    with pytest.raises(ConfigError, match="'other', which is no source"):
        check_scores(settings_of(tmp_path, start_source="other"))
    with pytest.raises(ConfigError, match="the only source"):
        check_scores(settings_of(tmp_path, start_source="pool"))
    with pytest.raises(ConfigError, match="no representation 'other'"):
        check_scores(settings_of(tmp_path, vectors="other"))
    index_run(settings, pool=INLINE)
    assert "vectors" in plan_score(settings).why[0]
    with pytest.raises(InputError, match="vectors"):
        score_run(settings, pool=INLINE)


def test_a_target_far_outside_the_pool_chooses_nothing_and_says_so(
    tmp_path: Path, kinds: np.ndarray, caplog: pytest.LogCaptureFixture
):
    write_rows(tmp_path / "target.parquet", around([0] * 80, 2) + 5000, name="goal")
    settings = settings_of(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = scored(settings)
    assert "nothing is chosen" in caplog.text
    assert "no nearer" not in caplog.text
    for name in ("gio", "gio_step", "gio_kl", "gio_weight"):
        assert found[name].null_count() == found.height
    assert found["gio_distance"].count() > 500
    assert report_of(settings)["examples"]["chosen"] == 0


@pytest.mark.parametrize(("shift", "warns"), [(0, False), (20, True)])
def test_a_choice_that_is_no_nearer_to_the_target_than_the_pool_is_warned_of(
    tmp_path: Path, kinds: np.ndarray, caplog: pytest.LogCaptureFixture, shift: int, warns: bool
):
    """A target beyond the pool: the edge of the pool is nearer than the start, and is taken."""
    write_rows(tmp_path / "target.parquet", around([0] * 80, 2) + shift, name="goal")
    settings = settings_of(tmp_path, dims=None)
    with caplog.at_level(logging.WARNING):
        scored(settings)
    report = report_of(settings)
    assert report["examples"]["chosen"] > 0
    told = "what was chosen is no nearer to the target than the pool: squared MMD"
    assert (told in caplog.text) is warns
    assert (report["mmd"]["chosen"] > report["mmd"]["pool"]) is warns
    assert (report["total_variation"]["chosen"] > 0.9995) is warns


def test_zero_vectors_and_repeated_target_rows_are_counted_and_left_out(
    tmp_path: Path, kinds: np.ndarray, caplog: pytest.LogCaptureFixture
):
    pool = pl.read_parquet(tmp_path / "pool" / "a.parquet")
    vectors = pool["v"].to_numpy().copy()
    vectors[[10, 11]] = 0
    pool.with_columns(pl.Series("v", vectors)).write_parquet(tmp_path / "pool" / "a.parquet")
    rows = around(np.repeat([0, 1], [60, 20]), 2)
    rows[5], rows[6], rows[7] = rows[4], rows[4], 0
    write_rows(tmp_path / "target.parquet", rows, name="goal")
    with caplog.at_level(logging.WARNING):
        found = scored(settings_of(tmp_path, more={"index": {"held_out": 0.0}}))
    assert "of 80 target rows 1 have no vector and 2 repeat another" in caplog.text
    assert "2 examples of part" in caplog.text
    assert found["gio_distance"].is_null().arg_true().to_list() == [3, 10, 11, 400]
    assert found["gio"].count() > 0


def test_one_example_is_a_pool_and_one_target_row_is_refused(tmp_path: Path):
    more = {"index": {"held_out": 0.0}}
    write_rows(tmp_path / "pool" / "a.parquet", around([0], 1), topic=["t0"])
    write_rows(tmp_path / "target.parquet", around([0] * 9, 2), name="goal")
    found = scored(settings_of(tmp_path, more=more))
    assert found["gio_cluster"].to_list() == [0]
    assert found["gio_distance"].count() == 1
    write_rows(tmp_path / "target.parquet", around([0], 2), name="goal")
    settings = settings_of(tmp_path, more=more)
    index_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    with pytest.raises(CurateError, match="1 different target point among 1 target row"):
        score_run(settings, pool=INLINE)


def test_two_target_rows_are_enough_and_clusters_are_never_more_than_rows(
    tmp_path: Path, kinds: np.ndarray, caplog: pytest.LogCaptureFixture
):
    write_rows(tmp_path / "target.parquet", around([0, 0], 2), name="goal")
    with caplog.at_level(logging.INFO):
        found = scored(settings_of(tmp_path, clusters=100_000))
    assert "clusters in place of 100000" in caplog.text
    assert "k is lowered from 5 to 1, as there are 2 different target points" in caplog.text
    assert set(found.filter(pl.col("gio").is_not_null())["domain"]) == {"t0"}


def test_a_pool_without_vectors_is_refused(tmp_path: Path):
    write_rows(tmp_path / "pool" / "a.parquet", np.full((5, DIM), np.nan, np.float32), topic="t")
    write_rows(tmp_path / "target.parquet", around([0] * 9, 2), name="goal")
    settings = settings_of(tmp_path)
    index_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    with pytest.raises(CurateError, match="no training example of the pool has a vector"):
        score_run(settings, pool=INLINE)


def test_a_target_that_is_the_pool_does_not_choose_each_example_for_itself(
    tmp_path: Path, kinds: np.ndarray
):
    for name in ("a", "b"):
        frame = pl.read_parquet(tmp_path / "pool" / f"{name}.parquet")
        rows = np.flatnonzero(np.isfinite(frame["v"].to_numpy()).all(axis=1))
        frame[rows.tolist()].write_parquet(tmp_path / "pool" / f"{name}.parquet")
    pool = [pl.read_parquet(tmp_path / "pool" / f"{name}.parquet") for name in "ab"]
    pl.concat(pool).drop("topic").write_parquet(tmp_path / "target.parquet")
    more = {"index": {"held_out": 0.0}}
    apart = settings_of(tmp_path, "apart", more=more, mode="points")
    scored(apart)
    counted = settings_of(tmp_path, "counted", more=more, mode="points", copies="keep")
    scored(counted)
    # Distances of zero would pull the divergence down by 8 * ln(1e-5) in the end.
    assert steps_of(counted)["divergence"].to_numpy().min() < -50
    assert abs(steps_of(apart)["divergence"].to_numpy().min()) < 5
    assert steps_of(apart).height < steps_of(counted).height


def test_a_plan_takes_what_was_chosen_first_and_its_weights(tmp_path: Path, kinds: np.ndarray):
    plan = {
        "score": "gio", "order": "easiest", "within": "all", "keep": {"examples": 40},
        "weights": {"score": "gio_weight"},
    }  # fmt: skip
    settings = settings_of(tmp_path, more={"plan": plan})
    found = scored(settings)
    plan_run(settings, pool=INLINE)
    tables = [pl.read_parquet(path) for path in (tmp_path / "run" / "plan").glob("*.parquet")]
    kept = pl.concat(tables).filter(pl.col("keep")).sort("source", "file", "row")
    first = found.filter(pl.col("gio") < 40).sort("source", "file", "row")
    assert kept.select("file", "row").equals(first.select("file", "row"))
    assert kept["weight"].mean() == pytest.approx(1, abs=1e-5)
    assert set(pl.concat(tables).filter(~pl.col("keep"))["reason"]) <= {
        "score", "held_out", "unscored",
    }  # fmt: skip


def bytes_below(run: Path) -> dict[str, bytes]:
    paths = [*run.glob("scores/gio/*.parquet"), *run.glob("quantities/gio/*.parquet"),
             *(path for path in run.glob("gio/**/*.*") if ".done" not in path.parts)]  # fmt: skip
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one_process(tmp_path: Path, kinds: np.ndarray):
    scored(settings_of(tmp_path))
    settings = settings_of(tmp_path, "dask")
    with open_pool(Cluster(kind="local", workers=2)) as workers:
        scored(settings, workers)
    assert bytes_below(tmp_path / "dask") == bytes_below(tmp_path / "run")
    assert len(bytes_below(tmp_path / "run")) == 4 * 7 + 5


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["points", "assigned", "places.npy"])
def test_a_run_that_is_killed_and_started_again_gives_the_same_bytes(
    tmp_path: Path, kinds: np.ndarray, moment: str
):
    settings = settings_of(tmp_path, "whole", more={"index": {"partition_rows": 20}})
    scored(settings)
    config, killed = tmp_path / "killed.yaml", tmp_path / "killed"
    config.write_text(to_yaml(plain(replace(settings, run=str(killed)))))
    command = curate_command("score", config)
    assert is_killed(command, (killed / "gio" / moment).exists)
    assert not list(killed.glob("scores/gio/*.parquet"))
    run_to_end(command)
    assert bytes_below(killed) == bytes_below(tmp_path / "whole")


def test_the_command_line_finds_the_rows_of_the_targets_kinds(tmp_path: Path):
    """Texts of four kinds, hashed words, no model: the plan holds the target's kinds."""
    words = {
        "cook": ["pan", "salt", "oven", "bread"],
        "sea": ["ship", "wave", "sail", "port"],
        "law": ["court", "judge", "act", "clause"],
        "sky": ["star", "moon", "sun", "orbit"],
    }
    draw = np.random.default_rng(0)
    rows = [(" ".join(draw.choice(words[kind], 8)), kind) for _ in range(60) for kind in words]
    pl.DataFrame(rows, schema=["text", "kind"], orient="row").write_parquet(tmp_path / "p.parquet")
    target = [" ".join(draw.choice(words[kind], 8)) for kind in ["sea"] * 12 + ["law"] * 12]
    pl.DataFrame({"text": target}).write_parquet(tmp_path / "t.parquet")
    config = tmp_path / "c.yaml"
    values = {
        "run": str(tmp_path / "run"),
        "sources": {"p": {"path": str(tmp_path / "p.parquet"), "text": "text", "domain": "kind"}},
        "target": {"path": str(tmp_path / "t.parquet"), "text": "text"},
        "score": {"scorers": [{"gio": {"dims": 8}}]},
        "plan": {"score": "gio", "order": "easiest", "within": "all", "keep": {"examples": 30}},
    }
    config.write_text(to_yaml(values))
    command = [sys.executable, "-m", "curate", "run", str(config)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ})
    shards = pl.concat([pl.read_parquet(p) for p in tmp_path.glob("run/shards/**/*.parquet")])
    assert shards.height == 30
    seen = set(" ".join(shards["text"]).split())
    assert seen <= {*words["sea"], *words["law"]}
    assert seen & set(words["sea"])
    assert seen & set(words["law"])
