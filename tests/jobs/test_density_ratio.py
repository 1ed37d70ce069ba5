"""The density ratio as part of a run: known densities, stops, restarts, bad input."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import curate
from curate.cli import main
from curate.config import to_yaml
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.models.density import Folds
from jobs.density_ratio_fit import fit_output
from jobs.density_ratio_work import target_output
from tests.jobs import lexical_pool

SHIFT = np.array([1.0, -0.5, 0.0])


def rows(count: int, shift: np.ndarray, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, len(shift))) + shift


def frame_of(values: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame({"x": values.astype(np.float32), "name": np.arange(len(values))})


def write(root: Path, pool: np.ndarray, target: np.ndarray) -> None:
    (root / "data").mkdir(parents=True)
    half = (len(pool) + 1) // 2
    whole = frame_of(pool)
    whole[:half].write_parquet(root / "data" / "one.parquet")
    whole[half:].write_parquet(root / "data" / "two.parquet")
    frame_of(target).write_parquet(root / "target.parquet")


def config_of(root: Path, options: Any, run: str, **changes: Any) -> str:
    values: dict[str, Any] = {
        "run": str(root / run),
        "sources": {"web": {"path": str(root / "data"), "features": "x", "id": "name"}},
        "target": {"path": str(root / "target.parquet"), "features": "x"},
        "index": {"held_out": 0.1, "partition_rows": 400},
        "embed": {"raw": {"kind": "values", "normalize": False}},  # length is part of the density
        "score": {"scorers": [{"density_ratio": options}]},
        **changes,
    }
    path = root / f"{run}.yaml"
    path.write_text(to_yaml(values), encoding="utf-8")
    return str(path)


def scored(root: Path, options: Any, run: str = "run", **changes: Any) -> pl.DataFrame:
    """Scores by the command line, in the order of the pool."""
    assert main(["score", config_of(root, options, run, **changes)]) == 0
    opened = curate.open(root / run)
    examples = opened.examples.select(*KEY, "id", "split")
    joined = opened.scores.join(examples, on=list(KEY)).collect()
    return joined.sort(pl.col("id").cast(pl.Int64))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, pl.DataFrame]:
    root = tmp_path_factory.mktemp("density")
    pool = rows(3000, np.zeros(3), seed=0)
    write(root, pool, rows(800, SHIFT, seed=1))
    return root, pool, scored(root, {})


def test_the_ratio_of_two_gaussians_is_found(world: tuple[Path, np.ndarray, pl.DataFrame]):
    root, pool, scores = world
    truth = pool @ SHIFT - SHIFT @ SHIFT / 2
    found = scores["density_ratio_log"].to_numpy()
    assert np.sqrt(np.mean((found - truth) ** 2)) < 0.15
    probability = 1 / (1 + np.exp(-found))
    np.testing.assert_allclose(scores["density_ratio_probability"], probability, rtol=1e-5)
    train = (scores["split"] == "train").to_numpy()
    assert 200 < (~train).sum() < 400
    ratios = np.exp(found)
    clipped = np.minimum(ratios, np.quantile(ratios[train], 0.99, method="lower"))
    expected = clipped / clipped[train].mean()
    np.testing.assert_allclose(scores["density_ratio"], expected, rtol=1e-4)
    mark = target_output(RunFolder(root / "run")).mark() or {}
    weights = expected[train]
    assert mark["effective"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-4)
    assert mark["rows"] == train.sum()
    # Weighted by it, the pool looks like the target.
    np.testing.assert_allclose(
        np.average(pool[train], axis=0, weights=scores["density_ratio"].to_numpy()[train]),
        SHIFT, atol=0.15,
    )  # fmt: skip


def test_no_example_is_judged_by_a_model_that_saw_it_or_a_copy(tmp_path: Path):
    """200 dimensions and few examples: who had seen a copy would know where it is from."""
    pool, target = rows(300, np.zeros(200), seed=2), rows(60, np.zeros(200), seed=3)
    write(tmp_path, np.concatenate([pool, target]), target)  # the target stands in the pool too
    scores = scored(tmp_path, {"penalty": 1e-3, "force": True}, index={"held_out": 0.0})
    logs = scores["density_ratio_log"].to_numpy()
    copies = logs[300:]
    assert np.abs(copies).max() < 3  # 60 in 360 against 60 in 60: log 6 at the most, if at all
    table = pl.read_parquet(target_output(RunFolder(tmp_path / "run")).path)
    np.testing.assert_allclose(table["log_ratio"], copies, atol=1e-4)


def test_held_out_examples_move_nothing(world: tuple[Path, np.ndarray, pl.DataFrame]):
    root, _, scores = world
    mark = fit_output(RunFolder(root / "run")).mark() or {}
    assert mark["rows"] == (scores["split"] == "train").sum()
    assert mark["target_rows"] == 800
    assert 0.7 < mark["auc"] < 0.85
    held_out = scores.filter(pl.col("split") == "held_out")
    assert held_out["density_ratio"].is_finite().all()


def test_partitions_change_nothing_but_rounding(
    world: tuple[Path, np.ndarray, pl.DataFrame],
):
    root, _, scores = world
    again = scored(root, {}, run="small", index={"held_out": 0.1, "partition_rows": 111})
    np.testing.assert_allclose(
        again["density_ratio"], scores["density_ratio"], rtol=1e-4, atol=1e-5
    )


def test_a_second_run_does_nothing_and_another_clip_fits_nothing_again(
    world: tuple[Path, np.ndarray, pl.DataFrame], monkeypatch: pytest.MonkeyPatch
):
    root, _, scores = world

    def fail(*_: object) -> object:
        raise AssertionError("fitted again")

    monkeypatch.setattr("jobs.density_ratio_fit.fit_ratio", fail)
    assert scored(root, {}).equals(scores)
    other = scored(root, {"clip": 0.5})
    assert (other["density_ratio"].max() or 0) < (scores["density_ratio"].max() or 0)  # pyright: ignore
    assert other["density_ratio_log"].equals(scores["density_ratio_log"])
    scored(root, {})


def test_equal_samples_weigh_one(tmp_path: Path):
    write(tmp_path, rows(1500, np.zeros(4), seed=5), rows(500, np.zeros(4), seed=6))
    scores = scored(tmp_path, {})
    assert np.abs(scores["density_ratio"].to_numpy() - 1).mean() < 0.1


def test_a_target_beyond_the_pool_stops_the_run_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path, rows(600, np.zeros(2), seed=7), rows(100, np.array([7.0, 0.0]), seed=8))
    assert main(["score", config_of(tmp_path, {}, "run")]) == 1
    said = capsys.readouterr().err
    assert "target examples have nothing like them in the pool" in said
    where = "the option `force: true` of the scorer density_ratio under score.scorers"
    assert where in " ".join(said.split())
    scored(tmp_path, {"force": True})
    output = target_output(RunFolder(tmp_path / "run"))
    mark = output.mark() or {}
    assert mark["target_without_support"] > 90
    table = pl.read_parquet(output.path)
    assert (~table["is_supported"]).sum() == mark["target_without_support"]
    assert "are less like the pool than any example of it" in capsys.readouterr().err


def test_weights_on_a_few_of_the_pool_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    far = np.array([5.0, 0.0])
    pool = np.concatenate([rows(1990, np.zeros(2), seed=7), rows(10, far, seed=9)])
    write(tmp_path, pool, rows(200, far, seed=8))
    assert main(["score", config_of(tmp_path, {"clip": 1.0}, "run")]) == 1
    assert "effective examples of" in capsys.readouterr().err
    scores = scored(tmp_path, {"clip": 1.0, "force": True})
    assert (target_output(RunFolder(tmp_path / "run")).mark() or {})["effective_share"] < 0.05
    assert (scores.sort("density_ratio_log")["id"][-9:].cast(pl.Int64) >= 1990).all()


def test_texts_are_told_apart_by_their_words(tmp_path: Path):
    lexical_pool.write_world(tmp_path)
    scores = lexical_pool.scored(tmp_path, [{"density_ratio": {"on": "ngrams"}}])
    assert not (tmp_path / "run" / "vectors").exists()
    best = scores.sort("density_ratio_log", descending=True)[:50]
    assert (best["kind"] == "sea").sum() > 45
    train = scores.filter(pl.col("split") == "train")
    assert train["density_ratio"].cast(pl.Float64).mean() == pytest.approx(1, abs=1e-6)
    plain = lexical_pool.scored(tmp_path, ["density_ratio"], run="vectors")  # hashed n-grams
    best = plain.sort("density_ratio_log", descending=True)[:50]
    assert (best["kind"] == "sea").sum() > 40


def test_the_fit_can_be_drawn_small_and_all_are_judged(
    world: tuple[Path, np.ndarray, pl.DataFrame],
):
    root, pool, _ = world
    scores = scored(root, {"fit_rows": 500}, run="drawn")
    mark = fit_output(RunFolder(root / "drawn")).mark() or {}
    assert 400 < mark["rows"] < 600
    assert 400 < mark["target_rows"] < 600
    truth = pool @ SHIFT - SHIFT @ SHIFT / 2
    assert np.sqrt(np.mean((scores["density_ratio_log"].to_numpy() - truth) ** 2)) < 0.4


def test_rows_without_a_vector_are_null(tmp_path: Path):
    """The vector column of the third row has no direction: embed gives it none."""
    pool = rows(200, np.zeros(3), seed=9)
    write(tmp_path, pool, rows(60, SHIFT, seed=10))
    embed = {"given": {"kind": "column", "column": "v"}}
    path = tmp_path / "data" / "one.parquet"
    for name in (path, tmp_path / "data" / "two.parquet", tmp_path / "target.parquet"):
        frame = pl.read_parquet(name)
        values = frame["x"].to_list()
        if name == path:
            values[2] = None
        frame.with_columns(v=pl.Series(values, dtype=pl.List(pl.Float32))).write_parquet(name)
    scores = scored(tmp_path, {}, embed=embed)
    assert scores["density_ratio"].null_count() == 1
    assert scores["density_ratio"][2] is None


def test_too_small_a_target_or_pool_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = rows(1, SHIFT, seed=11)
    write(tmp_path / "target", rows(50, np.zeros(3), seed=12), np.repeat(one, 20, axis=0))
    assert main(["score", config_of(tmp_path / "target", {}, "run")]) == 3
    assert "the target has 1 different examples" in capsys.readouterr().err
    write(tmp_path / "pool", np.repeat(one, 20, axis=0), rows(50, np.zeros(3), seed=13))
    config = config_of(tmp_path / "pool", {}, "run", index={"held_out": 0.0})
    assert main(["score", config]) == 3
    assert "the pool has 1 different training examples" in capsys.readouterr().err
    narrow = tmp_path / "narrow"
    write(narrow, rows(50, np.zeros(3), seed=14), rows(50, np.zeros(2), seed=15))
    assert main(["score", config_of(narrow, {}, "run")]) == 3
    assert "3 numbers in web/one.parquet and 2 numbers in target" in capsys.readouterr().err
    without = tmp_path / "without"
    write(without, rows(50, np.zeros(3), seed=14), rows(50, np.zeros(3), seed=15))
    assert main(["score", config_of(without, {}, "run", target=None)]) == 2
    assert "scorer density_ratio compares every example" in capsys.readouterr().err


def test_folds_of_a_run_are_those_of_its_seed():
    contents = np.arange(100, dtype=np.uint64)
    one, other = (Folds.of_target(contents, num_folds=5, seed=seed).folds for seed in (1, 2))
    assert (one != other).any()
