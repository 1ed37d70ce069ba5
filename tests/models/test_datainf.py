"""DataInf against its definition and the figures of a worked example."""

import numpy as np
import torch

from curate.models.datainf import inverse_product, layer_damping, scores

G = torch.tensor([[1.0, 0], [1, 1], [0, 2]], dtype=torch.float64)
V = torch.ones(2, dtype=torch.float64)


def exact(gradients: torch.Tensor, damping: float) -> torch.Tensor:
    fisher = gradients.T @ gradients / len(gradients)
    return torch.linalg.solve(fisher + damping * torch.eye(2, dtype=torch.float64), V)


def test_the_worked_example_has_its_figures():
    np.testing.assert_allclose(exact(G, 0.5), [0.758621, 0.344828], atol=1e-6)
    np.testing.assert_allclose(inverse_product(G, V, 0.5), [1.022222, 0.874074], atol=1e-6)


def test_with_one_example_it_is_exact():
    np.testing.assert_allclose(inverse_product(G[1:2], V, 0.5), [0.4, 0.4], atol=1e-12)
    np.testing.assert_allclose(exact(G[1:2], 0.5), [0.4, 0.4], atol=1e-12)


def test_scores_are_products_with_the_mean_of_the_inverses():
    draw = torch.Generator().manual_seed(0)
    sizes = {"a": 5, "b": 3}
    own = {n: torch.randn(11, k, generator=draw, dtype=torch.float64) for n, k in sizes.items()}
    asked = {n: torch.randn(4, k, generator=draw, dtype=torch.float64) for n, k in sizes.items()}
    wanted = torch.zeros(11, 4, dtype=torch.float64)
    for name, size in sizes.items():
        damping = 0.1 * float(own[name].square().sum()) / 11 / size
        assert abs(layer_damping(own[name]) - damping) < 1e-12
        eye = damping * torch.eye(size, dtype=torch.float64)
        mean = torch.stack([torch.linalg.inv(eye + torch.outer(g, g)) for g in own[name]]).mean(0)
        wanted += own[name] @ mean @ asked[name].T
    for block in (3, 100):
        torch.testing.assert_close(scores(own, asked, block=block), wanted)


def test_a_layer_without_gradients_adds_nothing():
    own = {"a": torch.zeros(3, 2), "b": torch.ones(3, 2)}
    asked = {"a": torch.zeros(1, 2), "b": torch.ones(1, 2)}
    alone = scores({"b": own["b"]}, {"b": asked["b"]})
    assert torch.equal(scores(own, asked), alone)
