"""Spreading scores: against plain loops, and where the answer is known."""

import math

import numpy as np
import pytest

from curate.evaluate.agreement import rank_correlation
from curate.vectors.spreading import PENALTIES, by_neighbours, fit_ridge, unit

DRAW = np.random.default_rng(0)


def rows(count: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32))


def looped(query: list[float], core: list[list[float]], scores: list[float], k: int, tau: float):
    """The formula of the method, one row after the other."""
    cosines = []
    for place, row in enumerate(core):
        dot = sum(a * b for a, b in zip(query, row, strict=True))
        norms = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(a * a for a in row))
        cosines.append((-dot / norms, place))
    near = sorted(cosines)[:k]
    kappa = [math.exp(-cosine / tau) for cosine, _ in near]
    return sum(w * scores[place] for w, (_, place) in zip(kappa, near, strict=True)) / sum(kappa)


@pytest.mark.parametrize(("k", "tau"), [(1, 0.05), (3, 0.05), (8, 1.0), (20, 0.2)])
def test_a_spread_score_is_the_weighted_mean_of_the_neighbours(k: int, tau: float):
    queries, core = rows(15, seed=1), rows(20, seed=2)
    scores = np.random.default_rng(3).normal(size=(20, 2))
    found = by_neighbours(queries, core, scores, k=k, temperature=tau)
    for i, query in enumerate(queries.tolist()):
        for column in range(2):
            wanted = looped(query, core.tolist(), scores[:, column].tolist(), k, tau)
            assert found[i, column] == pytest.approx(wanted, rel=2e-5, abs=1e-6)


def test_one_neighbour_among_all_rows_is_the_row_itself():
    core = rows(50)
    scores = np.random.default_rng(1).normal(size=(50, 3))
    np.testing.assert_array_equal(by_neighbours(core, core, scores, k=1, temperature=0.05), scores)


def test_a_row_without_a_vector_has_no_score_and_small_temperatures_do_not_overflow():
    queries = rows(4)
    queries[2] = np.nan
    found = by_neighbours(queries, rows(9, seed=5), np.ones((9, 1)), k=3, temperature=1e-4)
    assert np.isnan(found[2]).all()
    assert found[[0, 1, 3]] == pytest.approx(1.0)


def test_more_neighbours_than_rows_are_all_rows():
    queries, core = rows(5, seed=1), rows(3, seed=2)
    scores = np.arange(3.0)[:, None]
    np.testing.assert_array_equal(
        by_neighbours(queries, core, scores, k=8, temperature=0.1),
        by_neighbours(queries, core, scores, k=3, temperature=0.1),
    )


def test_zero_has_no_direction():
    found = unit(np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0]], dtype=np.float32))
    np.testing.assert_allclose(found[0], [0.6, 0.8], rtol=1e-6)
    assert np.isnan(found[1:]).any(axis=1).all()


def test_ridge_recovers_a_linear_score():
    vectors = rows(400, dim=30)
    true = vectors @ np.random.default_rng(4).normal(size=(30, 1)) + 2.0
    fit = fit_ridge(vectors[:100], true[:100].astype(np.float64))
    rho = rank_correlation(true[100:, 0].tolist(), fit.predict(vectors[100:])[:, 0].tolist())
    assert rho > 0.99


@pytest.mark.parametrize("dim", [5, 40])
def test_ridge_solves_the_normal_equations_with_the_penalty_that_leaves_the_least_error(dim: int):
    vectors = rows(25, dim=dim)
    draw = np.random.default_rng(6)
    scores = np.stack([vectors[:, 0] + draw.normal(size=25), draw.normal(size=25)], axis=1)
    fit = fit_ridge(vectors, scores)
    wide = vectors.astype(np.float64)

    def solved(kept: list[int], column: int, penalty: float) -> tuple[np.ndarray, float]:
        """By least squares with extra rows, the intercept not penalised."""
        x = np.hstack([wide[kept], np.ones((len(kept), 1))])
        extra = np.hstack([np.sqrt(penalty) * np.eye(dim), np.zeros((dim, 1))])
        y = np.concatenate([scores[kept, column], np.zeros(dim)])
        found = np.linalg.lstsq(np.vstack([x, extra]), y, rcond=None)[0]
        return found[:dim], float(found[dim])

    centred = wide - wide.mean(axis=0)
    scale = np.trace(centred.T @ centred) / dim
    everyone = list(range(25))
    for column in range(2):
        errors = []
        for multiple in PENALTIES:
            total = 0.0
            for out in everyone:
                kept = [i for i in everyone if i != out]
                weights, intercept = solved(kept, column, multiple * scale)
                total += (scores[out, column] - wide[out] @ weights - intercept) ** 2
            errors.append(total)
        best = PENALTIES[int(np.argmin(errors))]
        assert fit.penalties[column] == best
        weights, intercept = solved(everyone, column, best * scale)
        wanted = wide @ weights + intercept
        np.testing.assert_allclose(fit.predict(vectors)[:, column], wanted, rtol=1e-6, atol=1e-8)


def test_ridge_bears_more_dimensions_than_rows_and_equal_rows():
    wide = fit_ridge(rows(10, dim=40), DRAW.normal(size=(10, 1)))
    assert np.isfinite(wide.predict(rows(5, dim=40, seed=1))).all()
    equal = fit_ridge(np.ones((10, 4), dtype=np.float32), np.arange(10.0)[:, None])
    np.testing.assert_allclose(equal.predict(np.ones((2, 4), dtype=np.float32)), 4.5)
