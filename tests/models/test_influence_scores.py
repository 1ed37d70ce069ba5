"""Influence against closed forms: regressions of the textbook, rotations, log odds by autograd."""

import numpy as np
import pytest
import torch
from torch import Tensor

from curate.errors import InputError
from curate.models.curvature import Sums, curvature_of
from curate.models.index_rows import Block, Header
from curate.models.influence_scores import (
    OverTasks,
    TaskSums,
    odds_factors,
    unit_factors,
    unlikeliness,
)
from curate.models.scan import ScanPart, score_blocks


def header(width: int, num_rows: int) -> Header:
    return Header(
        dtype="float32", num_rows=num_rows, first_row=0, blocks=(Block("w", 1, width),),
        projection={}, model="m", tokenizer=None, reduction="mean",
    )  # fmt: skip


def products(rows: Tensor, query: Tensor) -> np.ndarray:
    """What the scan gives for one query."""
    stored = rows.float().numpy()
    part = ScanPart(stored, header(stored.shape[1], len(stored)))
    return np.concatenate([scores for _, scores in score_blocks([part], query[None])], 1)[0]


def removal(features: Tensor, gradients: Tensor, query: Tensor, penalty: float) -> np.ndarray:
    """g_i^T (sum of x x^T + penalty I)^-1 g_q from the curvature of a mean, divided by n."""
    n, k = features.shape
    sums = Sums.empty({"w": slice(0, k)}, "blocks").add(features)
    found = curvature_of(sums, damping=penalty / n)
    return products(gradients, found.precondition(query[None])[0]) / n


def test_ridge_regression_by_its_closed_form():
    """Leaving a row out that helps raises the query's loss: the signs of a real retraining."""
    x = torch.tensor([[1.0, 0], [1, 1], [1, 2], [1, 4]]).double()
    y = torch.tensor([1.0, 2, 2, 5]).double()
    hessian = x.T @ x + 0.5 * torch.eye(2)
    weights = torch.linalg.solve(hessian, x.T @ y)
    gradients = (x @ weights - y)[:, None] * x
    asked, answer = torch.tensor([1.0, 3]).double(), 4.0
    query = (asked @ weights - answer) * asked
    found = removal(x, gradients, query, 0.5)
    np.testing.assert_allclose(found, [0.001152, 0.016942, -0.066401, 0.073447], atol=1e-6)
    changes: list[float] = []
    for i in range(4):
        rest = [j for j in range(4) if j != i]
        own = torch.linalg.solve(x[rest].T @ x[rest] + 0.5 * torch.eye(2), x[rest].T @ y[rest])
        changes.append(float(((asked @ own - answer) ** 2 - (asked @ weights - answer) ** 2) / 2))
    np.testing.assert_allclose(changes, [0.002112, 0.024648, -0.057287, 0.803965], atol=1e-6)
    assert (np.sign(found) == np.sign(changes)).all()
    itself = [removal(x, gradients, g, 0.5)[i] for i, g in enumerate(gradients)]
    np.testing.assert_allclose(itself, [0.042964, 0.026480, 0.104809, 0.108520], atol=1e-6)


def test_logistic_regression_by_its_closed_form():
    v = torch.tensor([-2.0, -1, -0.5, 0.5, 1, 2]).double()
    y = torch.tensor([0.0, 0, 1, 0, 1, 1]).double()
    x = torch.stack([torch.ones(6).double(), v], 1)
    weights = torch.tensor([0.0, 1.225747]).double()
    share = torch.sigmoid(x @ weights)
    gradients = (share - y)[:, None] * x
    assert float((gradients.sum(0) + 0.1 * weights).abs().max()) < 1e-5
    asked = torch.tensor([1.0, 0.25]).double()
    query = (torch.sigmoid(asked @ weights) - 1) * asked
    found = removal(x * (share * (1 - share)).sqrt()[:, None], gradients, query, 0.1)
    wanted = [-0.017313, -0.070458, 0.231296, -0.291124, 0.112323, 0.046583]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    retrained = [-0.024580, -0.087876, 0.593022, -0.403045, 0.158148, 0.068547]
    assert (np.argsort(found) == np.argsort(retrained)).all()


def test_a_rotation_of_both_sides_changes_no_score():
    """Two-sided projection with square orthogonal sides; the worked example of a narrow one."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(20, 3, 4, generator=draw).double()
    left, _ = torch.linalg.qr(torch.randn(3, 3, generator=draw).double())
    right, _ = torch.linalg.qr(torch.randn(4, 4, generator=draw).double())
    turned = left.T @ whole @ right
    results: list[np.ndarray] = []
    for rows in (whole.flatten(1), turned.flatten(1)):
        sums = Sums.empty({"w": slice(0, 12)}, "blocks").add(rows)
        curvature = curvature_of(sums, share=0.1)
        cosines = products(rows, rows[3] * unit_factors(rows[3:4])[0]) * unit_factors(rows)
        results.append(np.stack([
            products(rows, rows[3]), cosines, products(rows, curvature.precondition(rows[3:4])[0])
        ]))  # fmt: skip
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert results[0][1].argmax() == 3
    assert results[0][1].max() == pytest.approx(1)
    g = torch.tensor([[1.0, 4], [-3, 2], [2, -3]])
    narrow = torch.tensor([[1.0, 1], [1, -1], [-1, 1]]).T @ g @ torch.tensor([[1.0, -1], [1, 1]])
    assert (narrow / 2).tolist() == [[2.5, 6.5], [2.5, -3.5]]


def test_log_odds_have_the_losses_gradient_over_one_less_the_probability():
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 4, generator=draw).double()
    for row, label in zip(logits, [0, 1, 2, 3, 0, 1, 2, 3, 0], strict=True):
        one = row.clone().requires_grad_()
        share = one.softmax(0)[label]
        odds = torch.autograd.grad(torch.log(share / (1 - share)), one)[0]
        two = row.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(two[None], torch.tensor([label]))
        plain = torch.autograd.grad(loss, two)[0]
        losses = np.array([float(loss.detach())])
        torch.testing.assert_close(odds, -plain * float(odds_factors(losses)[0]))
        assert unlikeliness(losses)[0] == pytest.approx(1 - float(share.detach()))


def test_what_is_all_but_certain_has_no_infinite_gradient():
    factors = odds_factors(np.array([0.0, 1e-12, 1e-3, 50.0]))
    np.testing.assert_allclose(factors, [1e6, 1e6, 1 / (1 - np.exp(-1e-3)), 1.0])
    assert unlikeliness(np.array([1e-12]))[0] == pytest.approx(1e-12, rel=1e-9)


def test_rows_of_zeros_are_like_nothing():
    assert unit_factors(torch.tensor([[3.0, 4], [0, 0]])).tolist() == [0.2, 0.0]
    assert unit_factors(torch.tensor([[3e-30, 4e-30]])).tolist() == pytest.approx([2e29])


def test_sub_tasks_of_unequal_size_have_means_of_their_own():
    sums = TaskSums(["a", "b"], 2)
    sums.add(torch.tensor([[1.0, 0], [0, 1], [0, 3]]), np.array([0, 1, 1]))
    sums.add(torch.tensor([[0.0, 5]]), np.array([1]))
    assert sums.means().tolist() == [[1, 0], [0, 3]]
    assert sums.counts.tolist() == [1, 3]
    empty = TaskSums(["a", "b"], 2)
    empty.add(torch.ones(1, 2), np.array([1]))
    with pytest.raises(InputError, match="no target example of 'a' has a gradient"):
        empty.means()


def test_mean_and_max_over_sub_tasks_take_them_a_few_at_a_time():
    scores = np.array([[1.0, -4, np.nan], [3, -2, 1], [-1, -9, 1]])
    for how, wanted in (("mean", [1, -5, np.nan]), ("max", [3, -2, np.nan])):
        over = OverTasks(how, 3)  # pyright: ignore[reportArgumentType]
        over.add(scores[:2])
        over.add(scores[2:])
        np.testing.assert_array_equal(over.value(), wanted)
