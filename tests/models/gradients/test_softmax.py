"""The output head swept in pieces: the same gradients as from whole logits, which never exist."""

from typing import Any

import pytest
import torch
from gradient_loop import assert_squares, gradient_loop, squares_of
from largest_tensor import Largest
from torch import Tensor, nn
from torch.nn import functional

from curate.models.gradients import Engine, LowRank, Sides, Wanted, first_sweep, softmax_losses
from curate.models.gradients import softmax as softmax_module

VOCABULARY = 37
COUNTED = torch.tensor([[1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()


class Small(nn.Module):
    """An embedding, a body, and a head that may share the embedding's weight."""

    def __init__(self, *, tied: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=bias)
        self.second = nn.Embedding(VOCABULARY, 8) if tied == 2 else None
        if tied:
            self.head.weight = self.table.weight
        if self.second is not None:
            self.second.weight = self.table.weight
        self.double()

    def states(self, ids: Tensor) -> Tensor:
        given = self.table(ids)
        if self.second is not None:
            given = given + self.second(ids.flip(1)).sin()
        return self.body(given).tanh()


def swept_losses(model: Any, batch: Any) -> Tensor:
    rows, columns = torch.nonzero(batch["counted"], as_tuple=True)
    states = model.states(batch["ids"])[rows, columns]
    sweep = first_sweep(model.head, states, batch["targets"][rows, columns], rows)
    losses = softmax_losses(model.head, sweep)
    return torch.zeros(len(batch["ids"]), dtype=losses.dtype).index_add(0, rows, losses)


def whole_losses(model: Any, batch: Any) -> Tensor:
    logits = model.head(model.states(batch["ids"]))
    losses = functional.cross_entropy(logits.mT, batch["targets"], reduction="none")
    return (losses * batch["counted"]).sum(1)


def given() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, 6), generator=draw)
    targets = torch.randint(0, VOCABULARY, (3, 6), generator=draw)
    ids[0, 1] = ids[0, 4] = targets[0, 2]  # looked up twice, and predicted
    return {"ids": ids, "targets": targets, "counted": COUNTED}


@pytest.fixture(params=["kept", "examples", "columns"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All logits kept; whole examples at a time; a few columns of one example at a time."""
    numbers = {"kept": 10**6, "examples": 8 * VOCABULARY, "columns": 20}[request.param]
    kept = 10**6 if request.param == "kept" else 0
    monkeypatch.setattr(softmax_module, "KEPT_NUMBERS", {"cpu": kept})
    monkeypatch.setattr(softmax_module, "BLOCK_NUMBERS", {"cpu": numbers})
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [0, 1, 2])
def test_squares_are_those_of_whole_logits(pieces: str, tied: int, bias: bool):
    model, batch = Small(tied=tied, bias=bias), given()
    engine = Engine(model, head=model.head)
    found = engine.measure(swept_losses, batch, num_examples=3)
    assert_squares(found.squares, squares_of(gradient_loop(model, whole_losses, batch)))
    assert engine.slow == []


def test_gradients_inner_products_and_projections_are_those_of_whole_logits(pieces: str):
    model, batch = Small(tied=0, bias=True), given()
    loop = gradient_loop(model, whole_losses, batch)
    draw = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    dense = {name: normal(*p.shape) for name, p in model.named_parameters()}
    thin = LowRank(normal(VOCABULARY, 2), normal(8, 2))
    sides = Sides(normal(VOCABULARY, 3), normal(8, 2))
    found = Engine(model).measure(
        swept_losses,
        batch,
        num_examples=3,
        wanted=Wanted(
            directions={"dense": dense, "thin": {"head.weight": thin}},
            projections={"head.weight": sides},
            whole=["head.weight", "head.bias", "table.weight"],
        ),
    )
    inner = torch.stack([(loop[n] * dense[n]).flatten(1).sum(1) for n in loop]).sum(0)
    torch.testing.assert_close(found.inner["dense"], inner)
    gradient = loop["head.weight"]
    torch.testing.assert_close(
        found.inner["thin"], (gradient * (thin.left @ thin.right.T)).sum((1, 2))
    )
    torch.testing.assert_close(
        found.projections["head.weight"], sides.left.T @ gradient @ sides.right
    )
    for name, values in found.whole.items():
        torch.testing.assert_close(values, loop[name])


@pytest.mark.parametrize("is_swept", [True, False])
def test_a_tied_head_has_its_own_square_beside_the_shared_one(pieces: str, is_swept: bool):
    model, batch = Small(tied=1, bias=True), given()
    losses = swept_losses if is_swept else whole_losses
    found = Engine(model, head=model.head).measure(losses, batch, num_examples=3)
    untied = Small(tied=0, bias=True)
    untied.load_state_dict(model.state_dict())
    wanted = squares_of(gradient_loop(untied, whole_losses, batch))
    torch.testing.assert_close(found.alone["table.weight"], wanted["head.weight"])
    only = Engine(model, only=lambda n: n in ("table.weight", "head.bias"), head=model.head,
                  head_only=True)  # fmt: skip
    alone = only.measure(losses, batch, num_examples=3)
    torch.testing.assert_close(alone.squares["table.weight"], wanted["head.weight"])
    torch.testing.assert_close(alone.squares["head.bias"], wanted["head.bias"])


def test_the_body_is_measured_behind_a_frozen_head(pieces: str):
    model, batch = Small(tied=0, bias=True), given()
    model.head.requires_grad_(False)
    found = Engine(model).measure(swept_losses, batch, num_examples=3)
    assert_squares(found.squares, squares_of(gradient_loop(model, whole_losses, batch)))


def test_losses_may_be_weighted_after_the_sweep(pieces: str):
    model, batch = Small(tied=1, bias=True), given()

    def squared(losses: Any) -> Any:
        return lambda model, batch: losses(model, batch).square()

    found = Engine(model).measure(squared(swept_losses), batch, num_examples=3)
    wanted = squares_of(gradient_loop(model, squared(whole_losses), batch))
    assert_squares(found.squares, wanted)


def test_a_sure_prediction_keeps_its_tiny_error_in_float32():
    model, batch = Small(tied=0, bias=True), given()
    with torch.no_grad():
        model.head.bias[5] += 25
    batch["targets"] = torch.full_like(batch["targets"], 5)
    wanted = squares_of(gradient_loop(model, whole_losses, batch))
    found = Engine(model.float()).measure(swept_losses, batch, num_examples=3)
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(found.squares[name], wanted[name], rtol=1e-5, atol=0)


def test_a_broken_example_does_not_spoil_the_others(pieces: str):
    model, batch = Small(tied=1, bias=True), given()
    engine = Engine(model)
    wanted = engine.measure(swept_losses, batch, num_examples=3).total()

    def broken(model: Any, batch: Any) -> Tensor:
        scale = torch.ones(3, dtype=torch.float64)
        scale[1] = torch.inf
        return swept_losses(model, batch) * scale

    found = engine.measure(broken, batch, num_examples=3).total()
    assert not found[1].isfinite()
    torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]])


def test_with_the_head_alone_nothing_is_differentiated_but_the_head():
    model, batch = Small(tied=1, bias=True), given()
    engine = Engine(model, only=lambda name: name == "table.weight", head=model.head,
                    head_only=True)  # fmt: skip
    seen: list[bool] = []
    model.body.register_forward_hook(lambda _m, _a, output: seen.append(output.requires_grad))
    engine.measure(swept_losses, batch, num_examples=3)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("tied", [0, 1])
def test_no_tensor_has_a_number_for_each_position_and_token(pieces: str, tied: int):
    model, batch = Small(tied=tied, bias=True), given()
    engine = Engine(model)
    with Largest() as largest:
        engine.measure(swept_losses, batch, num_examples=3)
    whole = int(COUNTED.sum()) * VOCABULARY
    if pieces == "kept":
        assert largest.numbers >= whole
    else:
        assert largest.numbers < whole
