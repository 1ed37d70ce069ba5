"""Sketched norms against the matrices that they stand for, and their spread over seeds."""

import pytest
import torch
from gradient_loop import gradient_loop, wavy_losses
from torch import Tensor, nn

from curate.errors import ConfigError
from curate.models.gradients import Engine, Wanted
from curate.models.gradients.forms import Outer
from curate.models.gradients.sketch import Sketch, _fold_pieces, fold  # pyright: ignore[reportPrivateUsage]
from curate.models.gradients.squares import Squares

WIDE, DEEP = 90, 70


def folding(signs: Tensor, size: int) -> Tensor:
    """The matrix S of the page, entry by entry."""
    matrix = torch.zeros(size, len(signs), dtype=signs.dtype)
    for j, sign in enumerate(signs.tolist()):
        matrix[j % size, j] = sign
    return matrix


@pytest.mark.parametrize("width", [22, 33, 40])
def test_a_fold_is_a_product_with_signs_in_their_places(width: int):
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(2, 5, width, generator=draw, dtype=torch.float64)
    signs = (torch.randint(0, 2, (width,), generator=draw) * 2 - 1).double()
    wanted = values @ folding(signs, 11).T
    torch.testing.assert_close(fold(values, signs, 11), wanted)
    torch.testing.assert_close(_fold_pieces(values, signs, 11), wanted)


def test_half_precision_is_folded_in_float32():
    values = torch.full((1, 1, 4096), 1.0, dtype=torch.bfloat16)
    found = fold(values, torch.ones(4096), 16)
    assert found.dtype == torch.float32
    assert bool((found == 256).all())


def outer_sides(rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    left = torch.randn(3, 40, rank, generator=draw, dtype=torch.float64)
    right = torch.randn(3, 40, rank, generator=draw, dtype=torch.float64)
    up = torch.randn(rank, WIDE * 4, generator=draw, dtype=torch.float64)
    down = torch.randn(rank, DEEP * 4, generator=draw, dtype=torch.float64)
    return left @ up, right @ down


@pytest.mark.parametrize(("rank", "most"), [(1, 0.5), (20, 0.15)])
def test_sketches_scatter_around_the_square_and_less_where_the_rank_is_high(rank: int, most: float):
    left, right = outer_sides(rank)
    exact = Outer(left, right).whole().square().sum((1, 2))
    found = torch.stack(
        [Squares(Sketch(31, seed)).of([Outer(left, right)], "layer") for seed in range(300)]
    )
    ratio = found / exact
    spread = ratio.std(0)
    assert float(spread.max()) < most
    assert float(spread.min()) > 0  # it is a sketch
    # The mean of 300 is within four of its standard errors.
    assert bool(((ratio.mean(0) - 1).abs() < 4 * spread / 300**0.5).all())


def test_a_larger_sketch_errs_less():
    left, right = outer_sides(4)
    exact = Outer(left, right).whole().square().sum((1, 2))

    def spread(size: int) -> float:
        found = [Squares(Sketch(size, seed)).of([Outer(left, right)]) for seed in range(60)]
        return float((torch.stack(found) / exact - 1).square().mean().sqrt())

    assert spread(95) < 0.75 * spread(23)


def test_parameters_meet_different_signs_and_examples_the_same_ones():
    left, right = outer_sides(1)
    squares = Squares(Sketch(31, 0))
    both = squares.of([Outer(left, right)], "a"), squares.of([Outer(left, right)], "b")
    assert not torch.allclose(*both)
    again = Squares(Sketch(31, 0)).of([Outer(left[1:2], right[1:2])], "a")
    torch.testing.assert_close(again, both[0][1:2])


def test_what_is_cheap_stays_exact():
    left, right = outer_sides(1)
    exact = Squares().of([Outer(left, right)])
    torch.testing.assert_close(Squares(Sketch(511)).of([Outer(left, right)]), exact)
    torch.testing.assert_close(
        Squares(Sketch(31)).of([Outer(left[:, :2], right[:, :2])]),  # T of 2: the Gram form
        Squares().of([Outer(left[:, :2], right[:, :2])]),
    )


def test_the_engine_sketches_where_it_is_asked_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 300)).double()
    batch = {"x": torch.randn(6, 200, 300).double(), "c": torch.ones(6).double()}
    loop = gradient_loop(model, wavy_losses, batch)
    exact = torch.cat([v.flatten(1) for v in loop.values()], 1).norm(dim=1)
    wanted = Wanted(sketch=Sketch(63))
    found = Engine(model).measure(wavy_losses, batch, num_examples=6, wanted=wanted)  # pyright: ignore[reportArgumentType]
    error = (found.total().sqrt() - exact).abs() / exact
    assert 1e-5 < float(error.max()) < 0.2
    for name in ("0.bias", "2.bias"):
        alone = loop[name].norm(dim=1)
        torch.testing.assert_close(found.squares[name].sqrt(), alone)


def test_a_sketch_that_says_nothing_is_refused():
    with pytest.raises(ConfigError, match="says nothing"):
        Sketch(4)
    assert Sketch(64).size == 63
