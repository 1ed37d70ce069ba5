"""The figures of the method's page, and the means over steps, against counting."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from curate.config import parse
from curate.errors import ConfigError
from scorers.dvgs import (
    DVGS,
    SIMILARITIES,
    Running,
    Turn,
    grid_of,
    percentile_ranks,
    similarities,
    takes_turn,
    turns,
)

# Softmax regression with zero weights: the gradients can be written down.
TARGET = np.array([-0.5, -0.25, 0.5, 0.25])
SOURCE = np.array([[-0.5, 0, 0.5, 0], [0.5, 0, -0.5, 0], [0, -0.5, 0, 0.5], [-0.5, -0.5, 0.5, 0.5]])
WANTED = {
    "cosine": [0.894427, -0.894427, 0.447214, 0.948683],
    "dot": [0.5, -0.5, 0.25, 0.75],
    "projection": [0.632456, -0.632456, 0.316228, 0.948683],
    "distance": [-0.353553, -1.457738, -0.790569, -0.353553],
}


def of(source: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    dot, square = torch.from_numpy(source @ target), torch.from_numpy((source**2).sum(1))
    found = similarities(dot, square, float(target @ target))
    return {name: values.numpy() for name, values in found.items()}


@pytest.mark.parametrize("name", SIMILARITIES)
def test_the_similarities_of_gradients_that_are_known(name: str):
    np.testing.assert_allclose(of(SOURCE, TARGET)[name], WANTED[name], atol=5e-7)


def test_a_gradient_of_zero_has_the_cosine_zero_on_either_side():
    nothing = np.zeros_like(TARGET)
    assert of(nothing[None], TARGET)["cosine"] == 0
    against = of(SOURCE, nothing)
    for name in ("cosine", "dot", "projection"):
        assert (against[name] == 0).all()
    np.testing.assert_allclose(against["distance"], -np.linalg.norm(SOURCE, axis=1))


def test_ten_times_the_loss_keeps_the_cosine_and_makes_ten_times_the_dot():
    plain, more = of(SOURCE, TARGET), of(10 * SOURCE, TARGET)
    np.testing.assert_allclose(more["cosine"], plain["cosine"])
    np.testing.assert_allclose(more["dot"], 10 * plain["dot"])
    np.testing.assert_allclose(more["projection"], 10 * plain["projection"])


def test_a_gradient_that_is_not_finite_stays_so():
    found = of(np.array([[np.nan, 0, 0, 0]]), TARGET)
    assert all(np.isnan(values).all() for values in found.values())


@pytest.mark.parametrize("subsample", [1, 2, 3, 4, 7])
def test_the_expectation_over_all_draws_is_the_full_average(subsample: int):
    """Every choice of one step in each block, each as likely as any other."""
    num_steps = 7
    values = torch.linspace(-1, 2, num_steps, dtype=torch.float64) ** 3
    weights = [0.5, 2.0, 1.0, 3.0, 0.1, 1.0, 0.7]
    places = list(turns(num_steps, subsample))
    sizes = [turn.size for turn in places if turn.place == 0]
    found: list[float] = []
    for draw in product(*[range(size) for size in sizes]):
        running = Running(("v",), 1)
        for value, weight, turn in zip(values, weights, places, strict=True):
            rows = torch.tensor([0] if draw[turn.block] == turn.place else [], dtype=torch.long)
            taken = value.expand(len(rows))
            running.add(rows, {"v": taken}, weight=weight, stands_for=turn.size)
        found.append(float(running.means()["v"]))
    assert np.mean(found) == pytest.approx(np.average(values, weights=weights), abs=1e-12)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**64 - 1))
def test_an_example_is_evaluated_once_in_every_block(num_steps: int, subsample: int, draw: int):
    draws = np.array([draw], dtype=np.uint64)
    taken = [turn.block for turn in turns(num_steps, subsample) if takes_turn(draws, turn)[0]]
    assert taken == list(range(-(-num_steps // subsample)))


def test_each_step_of_a_block_gets_an_equal_share_and_blocks_are_independent():
    draws = np.random.default_rng(0).integers(0, 2**64, 40_000, dtype=np.uint64)
    first, second = (
        [takes_turn(draws, Turn(block, place, 4)) for place in range(4)] for block in (0, 1)
    )
    for one in first:
        assert one.mean() == pytest.approx(0.25, abs=0.01)
        for other in second:
            assert (one & other).mean() == pytest.approx(1 / 16, abs=0.006)


def test_a_mean_of_no_weight_is_zero():
    running = Running(("v",), 2)
    rows, values = torch.arange(2), {"v": torch.ones(2, dtype=torch.float64)}
    running.add(rows, values, weight=0.0, stands_for=1)
    assert running.means()["v"].tolist() == [0, 0]


def test_ranks_are_those_of_counting_ties_in_half():
    values = np.random.default_rng(0).integers(0, 30, 200).astype(np.float64)
    wanted = (rankdata(values) - 0.5) / 200
    np.testing.assert_allclose(percentile_ranks(values, grid_of(values, 1000)), wanted)


def test_ranks_in_a_large_pool_are_right_to_a_stretch_of_the_grid():
    values = np.random.default_rng(0).normal(size=5003)
    found = percentile_ranks(values, grid_of(values, 250))
    assert np.abs(found - (rankdata(values) - 0.5) / 5003).max() <= 1 / 250


@pytest.mark.parametrize(
    "options",
    [{"seeds": []}, {"seeds": [1, 1]}, {"epochs": 0}, {"every": 0}, {"lr": -1}, {"subsample": 0},
     {"batch_size": 0}, {"parameters": "("}, {"similarity": "angle"}, {"copies": "maybe"}],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, object]):
    with pytest.raises(ConfigError):
        parse(DVGS, options)


def test_the_column_is_the_chosen_similarity_or_its_rank():
    values = {name: torch.tensor([float(i)]) for i, name in enumerate(SIMILARITIES)}
    values |= {"target_loss": torch.tensor([9.0]), "rank": torch.tensor([0.25])}
    for name in SIMILARITIES:
        scorer = parse(DVGS, {"similarity": name})
        assert "rank" not in scorer.needs
        assert scorer.score(values)["dvgs"] == values[name]
    ranked = parse(DVGS, {"aggregate": "rank"})
    assert "rank" in ranked.needs
    assert ranked.score(values)["dvgs"] == 0.25
    assert ranked.score(values).keys() == ranked.columns.keys()
