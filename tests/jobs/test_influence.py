"""The scorer `influence` through a run folder: every metric against the dense computation."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from influence_dense import chances, cross_entropy, damped, gradients, log_odds, over_tasks
from influence_retrain import fit, mean_loss, save
from influence_world import (
    BLOCKS,
    INLINE,
    TOPICS,
    make_world,
    pool,
    rows,
    save_mlp,
    scored,
    settings_of,
    table,
    target,
)

from jobs.score import score_run


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def pairs(world: Path, step: str) -> tuple[np.ndarray, np.ndarray]:
    return gradients(world / step, pool()), gradients(world / step, target())


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_dot_adds_up_the_checkpoints_by_their_learning_rates(world: Path, aggregate: str):
    found = scored(settings_of(world, {"metric": "dot", "aggregate": aggregate}))
    matrix = np.zeros((30, 6))
    for step, rate in (("step-1", 0.4), ("step-2", 0.3)):
        own, other = pairs(world, step)
        matrix += rate * own @ other.T
    wanted = over_tasks(matrix, TOPICS, aggregate)
    np.testing.assert_allclose(found["influence"], wanted, rtol=1e-4, atol=1e-5)
    losses = [-np.log(chances(world / step, pool())) for step in ("step-1", "step-2")]
    np.testing.assert_allclose(found["influence_loss"], np.mean(losses, 0), rtol=1e-5)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_cosine_is_a_mean_of_cosines_weighted_by_learning_rates(world: Path, aggregate: str):
    """Mean within and max over sub-tasks as in LESS, of two and of four queries."""
    found = scored(settings_of(world, {"metric": "cosine", "aggregate": aggregate}))
    matrix = np.zeros((30, 6))
    for step, share in (("step-1", 0.4 / 0.7), ("step-2", 0.3 / 0.7)):
        own, other = pairs(world, step)
        matrix += share * unit(own) @ unit(other).T
    wanted = over_tasks(matrix, TOPICS, aggregate)
    np.testing.assert_allclose(found["influence"], wanted, atol=1e-6)


@pytest.mark.parametrize("curvature", ["blocks", "full"])
@pytest.mark.parametrize("whiten", [False, True])
def test_influence_is_the_product_with_the_damped_inverse(
    world: Path, curvature: str, whiten: bool
):
    options = {"curvature": curvature, "whiten": whiten, "damping": 0.2}
    found = scored(settings_of(world, options))
    own, other = pairs(world, "step-2")
    inverse = np.linalg.inv(damped(own, BLOCKS if curvature == "blocks" else [56], 0.2))
    wanted = over_tasks(own @ inverse @ other.T, TOPICS, "mean")
    np.testing.assert_allclose(found["influence"], wanted, rtol=1e-3, atol=1e-4)
    itself = np.einsum("ik,kl,il->i", own, inverse, own)
    np.testing.assert_allclose(found["influence_self"], itself, rtol=1e-3)
    assert found["influence_std"].null_count() == 30


def test_the_mean_self_influence_is_the_effective_dimension(world: Path):
    settings = settings_of(world, {})
    found = scored(settings)
    own, _ = pairs(world, "step-2")
    whole = damped(own, BLOCKS)
    plain = damped(own, BLOCKS, 0.0)
    wanted = np.trace(np.linalg.inv(whole) @ plain)
    assert found["influence_self"].mean() == pytest.approx(wanted, rel=1e-4)


def test_several_seeds_are_averaged_at_their_last_checkpoints(world: Path):
    save_mlp(world / "step-3", draw=3, seed=1)
    found = scored(settings_of(world, {}))
    each: list[np.ndarray] = []
    for step in ("step-2", "step-3"):
        own, other = pairs(world, step)
        inverse = np.linalg.inv(damped(own, BLOCKS))
        each.append(over_tasks(own @ inverse @ other.T, TOPICS, "mean"))
    np.testing.assert_allclose(found["influence"], np.mean(each, 0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["influence_std"], np.std(each, 0, ddof=1), rtol=1e-3,
                               atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
def test_trak_is_that_of_gradients_of_the_log_odds_over_all_models(world: Path, count: int):
    """f = log(p / (1 - p)) by autograd; kernels and 1 - p are averaged before they meet."""
    for draw in range(2, count):
        save_mlp(world / f"step-{draw + 1}", draw=draw + 1, seed=draw)
    (world / "step-1" / "checkpoint.json").write_text('{"seed": 7}')
    if count == 1:
        (world / "step-1" / "checkpoint.json").write_text('{"seed": 0}')
    settings = settings_of(world, {"metric": "trak", "curvature": "full"})
    found = scored(settings)
    steps = ["step-2"] if count == 1 else ["step-1", "step-2", "step-3"]
    kernels: list[np.ndarray] = []
    doubts: list[np.ndarray] = []
    for step in steps:
        own = gradients(world / step, pool(), log_odds)
        other = gradients(world / step, target(), log_odds)
        kernels.append(own @ np.linalg.inv(30 * damped(own, [56])) @ other.T)
        doubts.append(1 - chances(world / step, pool()))
    matrix = np.mean(kernels, 0) * np.mean(doubts, 0)[:, None]
    wanted = over_tasks(matrix, TOPICS, "mean")
    np.testing.assert_allclose(found["influence"], wanted, rtol=1e-3, atol=1e-5)


def test_a_column_names_the_sub_tasks(world: Path):
    """A number each: with max the best single target example counts."""
    found = scored(settings_of(world, {"metric": "dot", "tasks": "number", "aggregate": "max"}))
    matrix = np.zeros((30, 6))
    for step, rate in (("step-1", 0.4), ("step-2", 0.3)):
        own, other = pairs(world, step)
        matrix += rate * own @ other.T
    np.testing.assert_allclose(found["influence"], matrix.max(1), rtol=1e-4, atol=1e-5)


def test_the_matrix_holds_every_pair_and_the_lists_its_ends(world: Path):
    settings = settings_of(world, {"metric": "dot", "matrix": True, "top": 4})
    scored(settings)
    folder = "influence/dot"
    matrix = np.zeros((30, 6))
    for step, rate in (("step-1", 0.4), ("step-2", 0.3)):
        own, other = pairs(world, step)
        matrix += rate * own @ other.T
    found = table(settings, f"{folder}/matrix")
    np.testing.assert_allclose(found.drop("source", "file", "row").to_numpy(), matrix, rtol=1e-4,
                               atol=1e-5)  # fmt: skip
    targets = pl.read_parquet(world / "run" / folder / "matrix" / "targets.parquet")
    assert targets["task"].to_list() == TOPICS
    assert targets["column"].to_list() == found.columns[3:]
    lists = pl.read_parquet(world / "run" / folder / "top.parquet")
    means = matrix[:, [1, 2, 4, 5]].mean(1)
    order = np.argsort(-means)
    for sign, places in ((1, order[:4]), (-1, order[::-1][:4])):
        own = lists.filter(task="b", sign=sign)
        assert own["row"].to_list() == places.tolist()
        np.testing.assert_allclose(own["score"], means[places], rtol=1e-4)


def test_a_training_row_that_is_the_query_comes_first_under_cosine(world: Path):
    pool()[17:18].with_columns(topic=pl.lit("a")).write_parquet(world / "target.parquet")
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        settings = settings_of(world, {"metric": "cosine", "dtype": dtype, "top": 1})
        found = scored(settings)
        assert found["influence"].arg_max() == 17
        assert found["influence"][17] == pytest.approx(1, abs=1e-6)
        lists = pl.read_parquet(world / "run" / "influence" / "cosine" / "top.parquet")
        assert lists.filter(sign=1)["row"].to_list() == [17]


def test_small_types_of_rows_give_nearly_the_same(world: Path):
    exact = scored(settings_of(world, {}))["influence"].to_numpy()
    for dtype, error in (("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 4e-2)):
        found = scored(settings_of(world, {"dtype": dtype}))["influence"].to_numpy()
        assert np.abs(found - exact).max() <= error * np.abs(exact).max()
        assert not np.array_equal(found, exact)


def test_held_out_rows_are_scored_but_no_part_of_curvature_or_lists(world: Path):
    more = {"index": {"partition_rows": 10, "held_out": 0.3}}
    settings = settings_of(world, {"top": 30}, **more)
    found = scored(settings)
    split = table(settings, "examples")["split"].to_list()
    training = [i for i, own in enumerate(split) if own == "train"]
    assert 0 < len(training) < 30
    own, other = pairs(world, "step-2")
    inverse = np.linalg.inv(damped(own[training], BLOCKS))
    wanted = over_tasks(own @ inverse @ other.T, TOPICS, "mean")
    np.testing.assert_allclose(found["influence"], wanted, rtol=1e-3, atol=1e-4)
    lists = pl.read_parquet(world / "run" / "influence" / "influence" / "top.parquet")
    assert sorted(set(lists["row"])) == training


def test_removing_what_helps_raises_the_targets_loss(tmp_path: Path):
    """Leaving one out of a regression, really: its loss moves by about the score over n."""
    world = make_world(tmp_path)
    frame = rows(150, 5).with_columns(label=pl.Series(np.random.default_rng(6).integers(0, 3, 150)))
    frame.write_parquet(world / "rows.parquet")
    probe = rows(4, 7).with_columns(topic=pl.lit("a"))
    probe.write_parquet(world / "target.parquet")
    for path in world.glob("step-*"):
        (path / "checkpoint.json").unlink()
        (path / "config.json").unlink()
        (path / "model.safetensors").unlink()
        path.rmdir()
    weights = fit(frame)
    save(weights, world / "step-1")
    found = scored(
        settings_of(world, {"damping": 1e-3}, index={"partition_rows": 75, "held_out": 0.0})
    )
    before = mean_loss(weights, probe)
    changes = [mean_loss(fit(frame.with_row_index().filter(pl.col("index") != i)), probe) - before
               for i in range(150)]  # fmt: skip
    guess = found["influence"].to_numpy() / 150
    assert np.corrcoef(guess, changes)[0, 1] > 0.9
    big = np.abs(changes) > np.quantile(np.abs(changes), 0.5)
    assert (np.sign(guess[big]) == np.sign(np.array(changes)[big])).mean() > 0.9
    assert 0.3 < np.polyfit(guess, changes, 1)[0] < 3


def test_missing_learning_rates_count_one_and_are_told(world: Path):
    save_mlp(world / "step-2", draw=2)
    settings = settings_of(world, {"metric": "dot"})
    said = score_run(settings, pool=INLINE)["says"]
    assert any("learning rates" in sentence for sentence in said)
    found = table(settings, "scores/influence")
    matrix = sum(own @ other.T for own, other in (pairs(world, s) for s in ("step-1", "step-2")))
    wanted = over_tasks(np.asarray(matrix), TOPICS, "mean")
    np.testing.assert_allclose(found["influence"], wanted, rtol=1e-4, atol=1e-5)


def test_the_loss_is_of_the_label(world: Path):
    """The oracle itself: a check that its gradients are those of the labels' losses."""
    one = gradients(world / "step-2", pool()[:1])
    other = gradients(world / "step-2", pool()[:1], lambda logits, _: cross_entropy(logits, 1))
    assert not np.allclose(one, other)
