"""Self-influence in the metric of projected gradients: the dense computation, a shared index."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from influence_dense import damped, gradients
from influence_world import BLOCKS, INLINE, make_world, pool, save_mlp, table, values_of

from curate.data.layout import RunFolder
from curate.errors import ConfigError
from jobs.index import index_run
from jobs.influence_curvature import load_curvature
from jobs.score import score_run
from jobs.score_check import check_scores
from jobs.settings import Settings, parse_settings

WHITE = {"metric": "whitened"}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def settings_of(world: Path, *scorers: dict[str, Any], **more: Any) -> Settings:
    values = values_of(world, {}, **more)
    values["score"]["scorers"] = list(scorers)
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    return settings


def scored(settings: Settings) -> pl.DataFrame:
    score_run(settings, pool=INLINE)
    return table(settings, "scores/self_influence")


def test_it_is_the_squared_length_of_whitened_gradients_over_the_training_rows(world: Path):
    """At the last checkpoint of each seed; half a per mille of it is float16."""
    save_mlp(world / "step-3", draw=3, seed=4)
    more = {"index": {"partition_rows": 10, "held_out": 0.3}}
    settings = settings_of(world, {"self_influence": {**WHITE, "damping": 0.2}}, **more)
    found = scored(settings)
    split = table(settings, "examples")["split"].to_numpy()
    each: list[np.ndarray] = []
    for step in ("step-2", "step-3"):
        own = gradients(world / step, pool())
        inverse = np.linalg.inv(damped(own[split == "train"], BLOCKS, 0.2))
        each.append(np.einsum("ik,kl,il->i", own, inverse, own))
    np.testing.assert_allclose(found["self_influence"], np.mean(each, 0), rtol=3e-3)
    np.testing.assert_allclose(found["self_influence_std"], np.std(each, 0, ddof=1), rtol=5e-2,
                               atol=1e-2)  # fmt: skip
    logs = [np.log(np.maximum(own, 1e-30)) for own in each]  # no unit of one example is on
    rest = [own - own[(split == "train") & (own > -69)].mean() for own in logs]
    np.testing.assert_allclose(found["self_influence_residual"], np.mean(rest, 0), atol=3e-3)


def test_its_mean_over_the_training_rows_is_the_effective_dimension(world: Path):
    more = {"index": {"partition_rows": 10, "held_out": 0.3}}
    settings = settings_of(world, {"self_influence": WHITE}, **more)
    found = scored(settings)
    training = table(settings, "examples")["split"].to_numpy() == "train"
    curvature = load_curvature(RunFolder(world / "run"), "step-2")
    assert 5 < curvature.effective_dimension < 56
    mean = found["self_influence"].to_numpy()[training].mean()
    assert mean == pytest.approx(curvature.effective_dimension, rel=1e-6)


def test_influence_and_self_influence_share_one_index(world: Path):
    settings = settings_of(world, {"influence": {}}, {"self_influence": WHITE})
    check_scores(settings)
    done = score_run(settings, pool=INLINE)["done"]
    marks = list((world / "run" / "influence" / "step-2").glob("part-*.vectors"))
    assert len(marks) == 3
    # Of 3 partitions: target 2, rows 3, sums 3, factor 1, queries 1, scores 3, lists 1; then
    # measured 3, line 1, tables 3.
    assert done == 14 + 7
    both = table(settings, "scores/influence").join(
        table(settings, "scores/self_influence"), on=["source", "file", "row"]
    )
    np.testing.assert_allclose(both["influence_self"], both["self_influence"], rtol=1e-6)
    assert score_run(settings, pool=INLINE)["done"] == 0


@pytest.mark.parametrize(
    ("influence", "what"),
    [
        ({"dim": 4}, "projection"),
        ({"dtype": "int8"}, "dtype"),
        ({"damping": 0.3}, "damping"),
        ({"curvature": "full"}, "curvature"),
        ({"metric": "cosine", "reduction": "sum"}, "reduction"),
    ],
)
def test_two_scorers_that_would_write_over_each_others_index_are_refused(
    world: Path, influence: dict[str, Any], what: str
):
    settings = settings_of(world, {"influence": influence}, {"self_influence": WHITE})
    with pytest.raises(ConfigError, match=f"ask for different ones: {what}"):
        check_scores(settings)
    check_scores(settings_of(world, {"influence": influence}, {"self_influence": {}}))


def test_another_damping_redoes_factors_and_values_alone(world: Path):
    scored(settings_of(world, {"self_influence": WHITE}))
    vectors = {p: p.stat().st_mtime_ns for p in (world / "run").rglob("*.vectors")}
    settings = settings_of(world, {"self_influence": {**WHITE, "damping": 0.5}})
    assert score_run(settings, pool=INLINE)["done"] == 1 + 7
    assert {p: p.stat().st_mtime_ns for p in (world / "run").rglob("*.vectors")} == vectors
