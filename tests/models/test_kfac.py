"""EK-FAC's algebra against dense matrices, and the closed forms of influence it stands on."""

import numpy as np
import pytest
import torch
from torch import Tensor

from curate.models.kfac import Basis, Sums, basis_of, damped, kfac_eigenvalues, low_rank, turned

X = torch.tensor([[1.0, 0], [1, 1], [1, 2], [1, 4]], dtype=torch.float64)
V = torch.tensor([[1.0, 2], [3, -1]], dtype=torch.float64)
SOLVED = torch.tensor([[0.486636, 0.206452], [4.350230, -1.548387]], dtype=torch.float64)


def sums_of(inputs: Tensor, outputs: Tensor) -> Sums:
    count = torch.tensor(float(len(inputs)), dtype=torch.float64)
    return Sums(inputs.T @ inputs, outputs.T @ outputs, count)


def dense_inverse(fisher: Tensor, damping: float, vector: Tensor) -> Tensor:
    """Rows of the matrix one after the other: vec G = g (x) x."""
    full = fisher + damping * torch.eye(len(fisher), dtype=torch.float64)
    return torch.linalg.solve(full, vector.flatten()).reshape(vector.shape)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def test_a_linear_regression_with_unit_noise_has_the_inverse_of_the_dense_solve():
    basis = basis_of(sums_of(X, 2 * torch.eye(4, dtype=torch.float64)[:, :2]))
    # S = I for the analytic factor.
    basis = basis._replace(
        left=torch.eye(2, dtype=torch.float64), left_values=torch.ones(2, dtype=torch.float64)
    )
    eigenvalues = kfac_eigenvalues(basis, 1.0)
    torch.testing.assert_close(
        basis.right_values, torch.tensor([0.372161, 5.877839]).double(), atol=1e-6, rtol=0
    )
    found = damped(basis, eigenvalues).inverse(V)
    fisher = torch.kron(torch.eye(2, dtype=torch.float64), X.T @ X / 4)
    torch.testing.assert_close(found, SOLVED, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, dense_inverse(fisher, 0.3125, V))


def test_sampled_noise_comes_as_near_as_the_root_of_its_number():
    def error(count: int, seed: int) -> float:
        noise = drawn(count, 2, seed=seed)  # y - W x of a unit Gaussian is the gradient
        inputs = X.repeat(count // 4, 1)
        basis = basis_of(sums_of(inputs, noise))
        each = turned(noise[:, :, None] * inputs[:, None, :], basis).square().mean(0)
        return float((damped(basis, each).inverse(V) - SOLVED).norm() / SOLVED.norm())

    small = np.mean([error(400, seed) for seed in range(8)])
    large = np.mean([error(40_000, seed) for seed in range(8)])
    assert large < 0.02
    assert 4 < small / large < 25  # 10 is the root of 100


def test_where_inputs_and_errors_are_independent_nothing_is_lost():
    inputs, errors = drawn(5, 3), drawn(7, 4, seed=1)
    gradients = (errors[:, None, :, None] * inputs[None, :, None, :]).flatten(0, 1)  # all pairs
    fisher = torch.einsum("bij,bkl->ijkl", gradients, gradients).reshape(12, 12) / 35
    basis = basis_of(sums_of(inputs, errors)._replace(num_tokens=torch.tensor(1.0).double()))
    basis = Basis(basis.left, basis.right, basis.left_values / 7, basis.right_values / 5)
    measured = turned(gradients, basis).square().mean(0)
    torch.testing.assert_close(measured, kfac_eigenvalues(basis, 1.0))
    vector = drawn(4, 3, seed=2)
    wanted = dense_inverse(fisher, 0.1 * float(measured.mean()), vector)
    torch.testing.assert_close(damped(basis, measured).inverse(vector), wanted)


def test_measured_eigenvalues_are_the_best_diagonal_in_that_basis():
    gradients = drawn(50, 4, 3) * drawn(50, 1, 1, seed=1)
    basis = basis_of(sums_of(gradients.flatten(0, 1), gradients.mT.flatten(0, 1)))
    fisher = torch.einsum("bij,bkl->ijkl", gradients, gradients).reshape(12, 12) / 50
    axes = torch.kron(basis.left, basis.right)
    within = axes.T @ fisher @ axes
    measured = turned(gradients, basis).square().mean(0).flatten()
    torch.testing.assert_close(within.diagonal(), measured)


def test_inverse_and_product_undo_each_other_and_take_many_at_once():
    basis = basis_of(sums_of(drawn(9, 3), drawn(9, 4, seed=1)))
    curvature = damped(basis, kfac_eigenvalues(basis, 2.0))
    many = drawn(5, 4, 3, seed=2)
    torch.testing.assert_close(curvature.product(curvature.inverse(many)), many)
    torch.testing.assert_close(curvature.inverse(many)[3], curvature.inverse(many[3]))


def test_the_damping_is_a_share_of_the_mean_eigenvalue_of_the_layer():
    basis = basis_of(sums_of(drawn(9, 3), drawn(9, 4, seed=1)))
    values = kfac_eigenvalues(basis, 1.0)
    added = damped(basis, values, share=0.25).damped - values
    torch.testing.assert_close(added, torch.full_like(added, 0.25 * float(values.mean())))


def test_a_layer_that_no_example_reaches_gives_finite_numbers():
    nothing = Sums(*(torch.zeros(shape).double() for shape in ((3, 3), (4, 4), ())))
    curvature = damped(basis_of(nothing), torch.zeros(4, 3, dtype=torch.float64))
    assert torch.equal(curvature.inverse(torch.zeros(4, 3).double()), torch.zeros(4, 3).double())
    assert bool(curvature.inverse(drawn(4, 3)).isfinite().all())


def test_sums_of_two_parts_are_those_of_the_whole():
    inputs, outputs = drawn(10, 3), drawn(10, 4, seed=1)
    parts = sums_of(inputs[:4], outputs[:4]).plus(sums_of(inputs[4:], outputs[4:]))
    for one, two in zip(parts, sums_of(inputs, outputs), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_low_rank_matrix_is_the_nearest_one(rank: int):
    matrix = drawn(6, 4)
    sides, kept = low_rank(matrix, rank)
    rest = np.linalg.svd(matrix.numpy())[1][rank:]
    distance = float((matrix - sides.left @ sides.right.T).norm())
    assert distance == pytest.approx(float(np.sqrt((rest**2).sum())), abs=1e-12)
    assert kept == pytest.approx(1 - float((rest**2).sum() / matrix.square().sum()))


def test_ridge_regression_has_the_influence_and_the_removal_of_the_page():
    target = torch.tensor([1.0, 2, 2, 5], dtype=torch.float64)
    hessian = X.T @ X + 0.5 * torch.eye(2, dtype=torch.float64)
    weights = torch.linalg.solve(hessian, X.T @ target)
    rest = X @ weights - target
    gradients = rest[:, None] * X
    query = torch.tensor([1.0, 3], dtype=torch.float64)
    asked = (query @ weights - 4) * query
    # One output: S = 1, so that Q_S [..] Q_A^T is the dense inverse of the sum's Hessian.
    values, vectors = torch.linalg.eigh(hessian)
    one = torch.ones(1, 1, dtype=torch.float64)
    basis = Basis(one, vectors, torch.ones(1).double(), values)
    curvature = damped(basis, kfac_eigenvalues(basis, 1.0), share=1e-15)
    influence = gradients @ curvature.inverse(asked[None])[0]
    wanted = torch.tensor([0.001152, 0.016942, -0.066401, 0.073447]).double()
    torch.testing.assert_close(influence, wanted, atol=1e-6, rtol=0)
    solved = curvature.inverse(gradients[:, None, :])[:, 0]
    own = torch.tensor([0.042964, 0.026480, 0.104809, 0.108520]).double()
    torch.testing.assert_close((gradients * solved).sum(1), own, atol=1e-6, rtol=0)
    leverage = (X * torch.linalg.solve(hessian, X.T).T).sum(1)
    removal: list[float] = []
    for i in range(4):
        kept = [j for j in range(4) if j != i]
        left = X[kept].T @ X[kept] + 0.5 * torch.eye(2, dtype=torch.float64)
        again = torch.linalg.solve(left, X[kept].T @ target[kept])
        closed = weights + torch.linalg.solve(hessian, X[i]) * rest[i] / (1 - leverage[i])
        torch.testing.assert_close(again, closed)
        removal.append(float(((query @ again - 4) ** 2 - (query @ weights - 4) ** 2) / 2))
    expected = [0.002112, 0.024648, -0.057287, 0.803965]
    np.testing.assert_allclose(removal, expected, atol=1e-6)
