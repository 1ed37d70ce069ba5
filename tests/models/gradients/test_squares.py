"""Norms worked out by hand."""

import math

import pytest
import torch
from gradient_loop import batch_of, gradient_loop, wavy_losses
from torch import Tensor, nn
from torch.nn import functional

from curate.models.gradients import Engine, Sides, Wanted
from curate.models.gradients.forms import Lookup, Outer
from curate.models.gradients.squares import (
    Picked,
    Squares,
    by_matrix,
    gram_strips,
    place_of,
)


def doubles(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None]


GIVEN = doubles((1, 2), (0, 1), (1, 0))
BACK = doubles((1, 0, -1), (0.5, 0, 1), (0, 2, 1))


class FixedGradient(nn.Module):
    """Runs a layer on one example and gives its output a gradient chosen by hand."""

    def __init__(self, layer: nn.Module, back: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.back = back

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (self.layer(batch["x"]) * self.back).flatten(1).sum(1)


def measured(layer: nn.Module, given: Tensor, back: Tensor) -> dict[str, float]:
    fixed = FixedGradient(layer, back)
    found = Engine(layer).measure(fixed.losses, {"x": given}, num_examples=len(given))  # pyright: ignore[reportArgumentType]
    return {name: values.item() for name, values in found.squares.items()}


def test_a_sequence_has_the_norm_of_the_sum_not_the_sum_of_norms():
    found = measured(nn.Linear(2, 3).double(), GIVEN, BACK)
    assert found["weight"] == pytest.approx(12.25, rel=1e-12)
    assert found["bias"] == pytest.approx(7.25, rel=1e-12)
    assert math.sqrt(sum(found.values())) == pytest.approx(4.415880, abs=1e-6)


def test_both_forms_give_the_same_and_the_gradient_itself():
    form = Outer(BACK, GIVEN)
    wanted = torch.tensor([[1, 2, 0], [2.5, 0, -1]], dtype=torch.float64).T
    torch.testing.assert_close(form.whole()[0], wanted)
    gram, other = gram_strips(BACK, 1), gram_strips(GIVEN, 1)
    assert (gram[0] * other[0]).sum().item() == pytest.approx(12.25)
    assert by_matrix(BACK, GIVEN).item() == pytest.approx(12.25)


def test_a_second_example_has_the_inner_product_of_the_page():
    x = doubles((1, 2), (0, 1), (3, -1))
    g = doubles((1, 0, -1), (2, 1, 0), (0, -1, 1))
    first = Outer(g, x)
    assert Squares().of([first]).item() == pytest.approx(43)
    second = Outer(doubles((1, 1, 0), (0, 1, -1)), doubles((1, 1), (2, 0)))
    assert second.dot(first.whole()[0]).item() == pytest.approx(-6)
    assert first.dot(second.whole()[0]).item() == pytest.approx(-6)


def test_a_two_sided_projection_is_that_of_the_page():
    x = doubles((1, 2), (0, 1), (3, -1))
    g = doubles((1, 0, -1), (2, 1, 0), (0, -1, 1))
    left = doubles((1, 1), (1, -1), (-1, 1))[0] / math.sqrt(2)
    right = doubles((1, -1), (1, 1))[0] / math.sqrt(2)
    wanted = torch.tensor([[2.5, 6.5], [2.5, -3.5]], dtype=torch.float64)
    torch.testing.assert_close(Outer(g, x).project(left, right)[0], wanted)


def test_a_token_that_stands_twice_is_summed_before_the_norm():
    ids = torch.tensor([[4, 7, 4]])
    assert measured(nn.Embedding(9, 2).double(), ids, doubles((1, 0), (0, 1), (2, 2))) == {
        "weight": pytest.approx(14)
    }
    other = Lookup(torch.tensor([[5, 7, 5]]), doubles((1, 0), (2, 1), (-1, 3)), 9)
    assert Squares().of([other]).item() == pytest.approx(14)


def test_tied_embedding_and_head_have_their_cross_term():
    head = Outer(
        doubles((0.2, -0.5, 0.3), (-0.6, 0.4, 0.2), (0.1, 0.1, -0.2)),
        doubles((1, 0), (0, 1), (1, 1)),
    )
    ids = torch.tensor([[0, 1, 0]])
    lookup = Lookup(ids, doubles((0.5, 0.1), (-0.2, 0.3), (0.4, -0.1)), 3)
    squares = Squares()
    assert squares.of([head]).item() == pytest.approx(0.76)
    assert squares.of([lookup]).item() == pytest.approx(0.94)
    assert Picked.of(head, ids, squares).cross(lookup).item() == pytest.approx(0.50)
    assert squares.of([head, lookup]).item() == pytest.approx(2.70)


def test_layer_norm_has_the_gradient_of_the_page():
    found = measured(
        nn.LayerNorm(3).double(), doubles((1, 2, 3), (2, 0, -2)), doubles((1, 0, 1), (0, 1, 1))
    )
    assert found["weight"] == pytest.approx(1.49998, abs=1e-5)
    assert found["bias"] == pytest.approx(6)


def test_a_softmax_layer_has_the_error_norm_times_the_length_of_its_input():
    layer = nn.Linear(3, 3).double()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.7, 0.2, 0.1]).log())

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    batch = {"x": torch.tensor([[1.0, 2, 2]]).double(), "y": torch.tensor([1])}
    found = Engine(layer).measure(losses, batch, num_examples=1)  # pyright: ignore[reportArgumentType]
    assert found.squares["weight"].sqrt().item() == pytest.approx(3.203123, abs=1e-6)
    assert found.total().sqrt().item() == pytest.approx(3.376389, abs=1e-6)


def test_square_orthogonal_projections_keep_the_norm():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    batch = batch_of(torch.randn(2, 5, 4, dtype=torch.float64))

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]).sin().flatten(1)).sum(1)

    left, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    wanted = Wanted(projections={"weight": Sides(left, right)})
    found = Engine(layer).measure(losses, batch, num_examples=2, wanted=wanted)  # pyright: ignore[reportArgumentType]
    norms = found.projections["weight"].flatten(1).square().sum(1)
    torch.testing.assert_close(norms, found.squares["weight"])
    whole = gradient_loop(layer, losses, batch)["weight"]  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found.projections["weight"], left.T @ whole @ right)


def test_a_part_of_an_input_does_not_get_the_gram_matrix_of_the_whole():
    torch.manual_seed(0)
    x, g = torch.randn(2, 6, 40).double(), torch.randn(2, 6, 50).double()
    squares = Squares()
    for part in (6, 3, 6):
        form = Outer(g[:, :part], x[:, :part])
        wanted = form.whole().square().sum((1, 2))
        torch.testing.assert_close(squares.of([form]), wanted)


@pytest.mark.parametrize("positions", [5, 64, 70, 257, 300])
def test_the_gram_form_counts_every_pair_of_positions(positions: int):
    draw = torch.Generator().manual_seed(positions)
    left = torch.randn(2, positions, 900, generator=draw, dtype=torch.float64)
    right = torch.randn(2, positions, 1000, generator=draw, dtype=torch.float64)
    for sharers in ({}, {place_of(right): 3}):
        found = Squares(None, sharers).of([Outer(left, right)])
        torch.testing.assert_close(found, (left.mT @ right).square().sum((1, 2)))


def test_layers_that_share_their_input_share_its_gram_matrix(monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []

    def counted(values: Tensor, strips: int) -> list[Tensor]:
        made.append(values.shape[2])
        return gram_strips(values, strips)

    monkeypatch.setattr("curate.models.gradients.squares.gram_strips", counted)
    layers = nn.ModuleList(nn.Linear(60, 50) for _ in range(3)).double()
    x = torch.randn(2, 32, 60, dtype=torch.float64)  # alone, the matrix form would be cheaper

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([layer(x).sin() for layer in self.layers]).sum(0)

    model, batch = Three(), batch_of(x)
    engine = Engine(model)
    engine.measure(wavy_losses, batch, num_examples=2)
    made.clear()
    found = engine.measure(wavy_losses, batch, num_examples=2)
    assert made == [60, 50, 50, 50]
    loop = gradient_loop(model, wavy_losses, batch)
    for name in found.squares:
        torch.testing.assert_close(found.squares[name], loop[name].flatten(1).square().sum(1))
