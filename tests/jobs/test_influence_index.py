"""Many questions to a run's gradients at once, by every search, against one plain product."""

import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from influence_dense import gradients
from influence_world import make_world, pool, rows, scored, settings_of

import curate
from curate.errors import ConfigError, InputError
from curate.models.mlp import MLP
from jobs.influence_index import GradientIndex, How


def opened(world: Path, *, whitened: bool = False, **options: object) -> GradientIndex:
    settings = settings_of(world, {"metric": "influence", **options})
    scored(settings)
    run = curate.open(settings.run)
    (checkpoint,) = run.gradient_checkpoints
    return run.gradients(checkpoint, whitened=whitened)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def test_rows_are_the_gradients_in_the_order_of_the_keys(world: Path):
    index = opened(world)
    wanted = gradients(world / "step-2", pool())
    assert index.num_rows == 30
    assert index.keys["row"].to_list() == list(range(30))
    # No side is projected by more than a rotation.
    one, two = index.values(range(30)).double().numpy(), wanted
    np.testing.assert_allclose(one @ one.T, two @ two.T, rtol=1e-4, atol=1e-6)
    some = index.values([25, 3, 12])
    torch.testing.assert_close(some, index.values(range(30))[[25, 3, 12]])


@pytest.mark.parametrize("how", ["exact", "approximate", "faiss", "cells"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_search_finds_the_largest_products(
    world: Path, how: How, dtype: str, caplog: pytest.LogCaptureFixture
):
    index = opened(world, dtype=dtype)
    values = index.values(range(30)).double()
    queries = values[[4, 17, 20]] + 0.1 * values[[1]]
    products = (queries @ values.T).numpy()
    with caplog.at_level(logging.WARNING):
        found, recall = index.search(queries, num_best=5, how=how, cells=4, probes=4)
    order = np.argsort(-products, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found.positions, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(products, order, 1), rtol=1e-5)
    assert recall == 1
    assert ("recall 1.0000 of the 5 best, by 3 queries" in caplog.text) == (how != "exact")


def test_what_cells_miss_is_measured(world: Path, caplog: pytest.LogCaptureFixture):
    rows(400, 5).write_parquet(world / "rows.parquet")
    index = opened(world)
    queries = index.values(range(0, 400, 10))
    exact, _ = index.search(queries, num_best=20)
    with caplog.at_level(logging.WARNING):
        found, recall = index.search(queries, num_best=20, how="cells", cells=32, probes=1)
    hits = [len(set(one) & set(two)) / 20 for one, two in zip(found.positions, exact.positions,
                                                            strict=True)]  # fmt: skip
    assert recall == pytest.approx(np.mean(hits), abs=1e-3)
    assert recall < 0.9
    assert f"cells search of gradients: recall {recall:.4f}" in caplog.text


def test_whitened_rows_answer_as_influence_does(world: Path):
    index = opened(world, whitened=True, whiten=True, damping=0.2)
    white = index.values(range(30)).double().numpy()
    plain = gradients(world / "step-2", pool())
    # The effective dimension is the mean of squared lengths, whatever the sides are.
    blocks = [plain[:, :32], plain[:, 32:]]
    wanted = 0.0
    for block in blocks:
        matrix = block.T @ block / 30
        damping = 0.2 * np.trace(matrix) / len(matrix)
        wanted += np.trace(np.linalg.solve(matrix + damping * np.eye(len(matrix)), matrix))
    assert np.square(white).sum(1).mean() == pytest.approx(wanted, rel=1e-4)
    found = index.search(torch.from_numpy(white[:2]), num_best=30).found
    np.testing.assert_allclose(np.sort(found.scores, 1), np.sort(white[:2] @ white.T, 1), rtol=1e-5)


def test_examples_without_a_gradient_are_never_found(world: Path):
    for folder in world.glob("step-*"):
        model = MLP.from_pretrained(folder)
        with torch.no_grad():
            next(model.parameters()).mul_(10)
        model.save_pretrained(folder)
    numbers = pool()["x"].to_numpy().copy()
    numbers[4] = 3e38  # beyond float32 in the first layer
    pool().with_columns(x=pl.Series(numbers)).write_parquet(world / "rows.parquet")
    index = opened(world)
    assert index.num_rows == 30
    missing = index.keys["row"].to_list().index(4)
    for how in ("exact", "approximate", "faiss"):
        found, _ = index.search(index.values([0, 1]), num_best=30, how=how)
        assert missing not in found.positions
        assert (found.positions[:, -1] == -1).all()
        assert np.isnan(found.scores[:, -1]).all()


def test_what_is_not_there_is_refused(world: Path):
    index = opened(world)
    run = curate.open(world / "run")
    with pytest.raises(InputError, match="no index of gradients with 'other'"):
        run.gradients("other")
    with pytest.raises(ConfigError, match="how is 'fast'"):
        index.search(index.values([0]), how="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="not finite"):
        index.search(torch.full((1, 56), torch.nan), how="faiss")
