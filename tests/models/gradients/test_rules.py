"""Every kind of layer against autograd, one example at a time, in float64."""

import pytest
import torch
from gradient_loop import assert_squares, batch_of, gradient_loop, squares_of, wavy_losses
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from curate.models.gradients import Engine, LowRank, Sides, Wanted
from curate.models.gradients.rules import Rule, local, rule_of


class Steep(nn.Module):
    """A layer with a learned slope: no formula for it."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.3, -0.2, 0.9]))

    def forward(self, given: Tensor) -> Tensor:
        return torch.tanh(given * self.slope)


class PlusOneRMS(nn.Module):
    """As Gemma has it: the gain counts from one, and the eps is called `eps`."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.9]))

    def forward(self, given: Tensor) -> Tensor:
        normal = given * torch.rsqrt(given.pow(2).mean(-1, keepdim=True) + self.eps)
        return normal * (1 + self.weight)


class Doubled(nn.Embedding):
    """An embedding that does more than look up."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 3 * super().forward(input)


class Router(nn.Module):
    """A product with its own weight, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional.linear(given, self.weight)
        return logits, logits.softmax(-1)


class Second(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, given: Tensor) -> Tensor:
        return self.inner(given)[1]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def ids(*shape: int) -> Tensor:
    found = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(5))
    found[0, :3] = 4  # a token that stands more than once
    return found


def batch_norm() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4)
    layer(torch.randn(9, 4, 3, 3))
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(3, 5), normal(4, 6, 3)),
    "linear without bias": (lambda: nn.Linear(3, 5, bias=False), normal(4, 6, 3)),
    "linear of vectors": (lambda: nn.Linear(3, 5), normal(4, 3)),
    "linear of four axes": (lambda: nn.Linear(3, 5), normal(4, 2, 6, 3)),
    "a wide linear on long rows": (lambda: nn.Linear(3, 4), normal(2, 300, 3)),
    "gram form in blocks": (lambda: nn.Linear(600, 600), normal(2, 256, 600)),
    "matrix form in pieces": (lambda: nn.Linear(400, 400), normal(2, 300, 400)),
    "a wide linear on few rows": (lambda: nn.Linear(40, 50), normal(3, 2, 40)),
    "conv1d of transformers": (lambda: Conv1D(5, 3), normal(4, 6, 3)),
    "embedding": (lambda: nn.Embedding(7, 3), ids(4, 6)),
    "embedding with padding": (lambda: nn.Embedding(7, 3, padding_idx=4), ids(4, 6)),
    "embedding that scales": (lambda: Doubled(7, 3), ids(4, 6)),
    "layer norm": (lambda: nn.LayerNorm(3), normal(4, 6, 3)),
    "layer norm of two axes": (lambda: nn.LayerNorm([6, 3]), normal(4, 2, 6, 3)),
    "layer norm without bias": (lambda: nn.LayerNorm(3, bias=False), normal(4, 6, 3)),
    "rms norm": (lambda: nn.RMSNorm(3), normal(4, 6, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), normal(3, 4, 5)),
    "batch norm": (batch_norm, normal(3, 4, 5, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), normal(3, 4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2), normal(3, 4, 7, 6)),
    "depth-wise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), normal(3, 4, 7, 6)),
    "reflecting": (
        lambda: nn.Conv2d(4, 2, 3, padding=2, padding_mode="reflect"),
        normal(3, 4, 7, 6),
    ),
    "one axis": (lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2, padding=1), normal(3, 4, 9)),
    "three axes": (lambda: nn.Conv3d(2, 3, 2), normal(3, 2, 3, 3, 3)),
    "prelu": (lambda: nn.PReLU(), normal(3, 4, 5)),
    "own layer": (Steep, normal(4, 6, 3)),
    "router": (lambda: Second(Router()), normal(4, 6, 3)),
}


def shaken(module: nn.Module) -> nn.Module:
    """In eval mode and float64, no gain at one and no shift at zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def layer(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, given = LAYERS[name]
    return shaken(make()), batch_of(given)


@pytest.mark.parametrize("name", LAYERS)
def test_squares_are_those_of_the_loop(name: str):
    module, batch = layer(name)
    engine = Engine(module)
    found = engine.measure(wavy_losses, batch, num_examples=len(batch["x"]))
    assert_squares(found.squares, squares_of(gradient_loop(module, wavy_losses, batch)))
    assert engine.slow == []


@pytest.mark.parametrize("name", [name for name in LAYERS if " form " not in name])
def test_gradients_inner_products_and_projections_are_those_of_the_loop(name: str):
    module, batch = layer(name)
    wanted = gradient_loop(module, wavy_losses, batch)
    names = list(wanted)
    generator = torch.Generator().manual_seed(9)
    target = {
        name: torch.randn(value.shape[1:], generator=generator, dtype=torch.float64)
        for name, value in wanted.items()
    }
    matrices = [name for name in names if wanted[name].dim() == 3]
    low = {
        name: LowRank(target[name][:, :2], torch.randn(wanted[name].shape[2], 2).double())
        for name in matrices
    }
    sides = {name: Sides(target[name][:, :2], low[name].right) for name in matrices}
    found = Engine(module).measure(
        wavy_losses,
        batch,
        num_examples=len(batch["x"]),
        wanted=Wanted(directions={"target": target, "low": low}, projections=sides, whole=names),
    )
    assert_squares(found.squares, squares_of(wanted))
    for name, value in wanted.items():
        torch.testing.assert_close(found.whole[name], value, rtol=1e-9, atol=1e-12)
    inner = sum((wanted[name] * target[name]).flatten(1).sum(1) for name in names)
    torch.testing.assert_close(found.inner["target"], inner, rtol=1e-9, atol=1e-10)
    for name in matrices:
        projected = sides[name].left.T @ wanted[name] @ sides[name].right
        torch.testing.assert_close(found.projections[name], projected, rtol=1e-9, atol=1e-10)
    if matrices:
        inner = sum(
            (wanted[name] * (low[name].left @ low[name].right.T)).flatten(1).sum(1)
            for name in matrices
        )
        torch.testing.assert_close(found.inner["low"], inner, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "is_local"),
    [
        (PlusOneRMS, False),
        (nn.PReLU, True),
        (Steep, True),
        (lambda: nn.BatchNorm1d(3), False),
    ],
)
def test_a_formula_is_preferred_to_running_a_layer_again(make: type[nn.Module], is_local: bool):
    rule: Rule | None = rule_of(make().eval())
    assert rule is not None
    assert (rule is local.forms) == is_local


def test_an_rms_norm_is_known_by_what_it_computes():
    torch.manual_seed(0)
    module, batch = PlusOneRMS().double(), batch_of(normal(4, 6, 3))
    found = Engine(module).measure(wavy_losses, batch, num_examples=4)
    # These layers raise to float32 themselves, and so does the rule.
    wanted = squares_of(gradient_loop(module, wavy_losses, batch))
    assert_squares(found.squares, wanted, rtol=1e-6)


def test_an_rms_norm_with_another_mean_is_not_taken_for_one():
    class Centred(PlusOneRMS):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given - given.mean(-1, keepdim=True))

    module, batch = Centred().double(), batch_of(normal(4, 6, 3))
    assert rule_of(module) is local.forms
    found = Engine(module).measure(wavy_losses, batch, num_examples=4)
    assert_squares(found.squares, squares_of(gradient_loop(module, wavy_losses, batch)))


def test_activations_that_work_in_place_do_no_harm():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(27, 4), nn.ReLU(inplace=True), nn.Linear(4, 2),
    ).double()  # fmt: skip
    batch = batch_of(normal(3, 2, 6, 6))
    found = Engine(module).measure(wavy_losses, batch, num_examples=3)
    assert_squares(found.squares, squares_of(gradient_loop(module, wavy_losses, batch)))
