"""What Adam makes of single gradients, against torch's own optimiser and written-out gradients."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradient_loop import gradient_loop
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from curate.models.adam import (
    AdamForm,
    Moment,
    diagonal_update,
    exact_update,
    factored_scales,
    floored,
)
from curate.models.adam_pass import AdamProjector, scaled_sides
from curate.models.gradients import Engine, Sides, Wanted
from curate.models.index_pass import IndexPass
from curate.models.projection import draw_sides
from curate.models.settings import CausalLM
from curate.models.tasks.causal_lm import CausalLMTask


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(shape: tuple[int, ...], seed: int = 0, **fields: Any) -> Moment:
    first, second = drawn(*shape, seed=seed), drawn(*shape, seed=seed + 1).square()
    values: dict[str, Any] = {"step": 7, "betas": (0.8, 0.95), "eps": 1e-8, **fields}
    return Moment(first, second, **values)


def by_hand(form: str, gradients: np.ndarray, moment: Moment) -> np.ndarray:
    """The formulas of the page on arrays of one parameter, matrices (P, Q)."""
    first, second = moment.gradient.numpy(), moment.square.numpy()
    beta1, beta2 = moment.betas
    eps = moment.eps**2
    positive = np.sort(second[second > 0])
    second = np.maximum(second, positive[int(np.ceil(0.01 * len(positive))) - 1])
    if form == "exact":
        m = beta1 * first + (1 - beta1) * gradients
        v = beta2 * second + (1 - beta2) * gradients**2
        time = moment.step + 1
        return m / (1 - beta1**time) / np.sqrt(v / (1 - beta2**time) + eps)
    v = second / (1 - beta2**moment.step) + eps
    if form == "factored":
        rows, columns = v.mean(1), v.mean(0)
        v = np.outer(rows, columns) / rows.mean()
    return gradients / np.sqrt(v)


def test_the_exact_form_is_the_step_that_torchs_adam_takes_from_this_gradient():
    """Its state after seven random steps, and the way its weights go on the eighth."""
    weights = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    adam = torch.optim.Adam([weights], lr=1.0, betas=(0.8, 0.95), eps=1e-12)
    for seed in range(7):
        weights.grad = drawn(5, 3, seed=seed)
        adam.step()
    state = adam.state[weights]
    moment = Moment(
        state["exp_avg"].clone(), state["exp_avg_sq"].clone(), 7, betas=(0.8, 0.95), eps=1e-12
    )
    gradient, before = drawn(5, 3, seed=9), weights.detach().clone()
    weights.grad = gradient.clone()
    adam.step()
    found = exact_update(moment).of(gradient[None])[0]
    torch.testing.assert_close(found, before - weights.detach(), rtol=1e-9, atol=1e-12)


def test_the_diagonal_form_is_linear_and_the_limit_of_a_full_second_moment():
    """With beta1 = 0, and beta2 so near to 1 that one gradient hardly counts, both forms agree."""
    moment = moment_of((4, 6), betas=(0.0, 1 - 1e-9), step=10**12)
    gradients = drawn(3, 4, 6, seed=5)
    found = diagonal_update(moment).of(gradients)
    torch.testing.assert_close(found, exact_update(moment).of(gradients), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(diagonal_update(moment).of(2 * gradients), 2 * found)


def test_a_second_moment_of_rank_one_is_factored_without_loss():
    rows, columns = drawn(5).square() + 0.1, drawn(3, seed=1).square() + 0.1
    moment = Moment(torch.zeros(5, 3), torch.outer(rows, columns), step=3)
    left, right = factored_scales(moment)
    dense = diagonal_update(moment).of(torch.ones(1, 5, 3, dtype=torch.float64))[0]
    torch.testing.assert_close(torch.outer(left, right), dense, rtol=1e-9, atol=0)


def test_what_no_batch_has_moved_is_raised_to_the_first_percentile_of_the_rest():
    square = torch.arange(1.0, 401.0)
    square[:100] = 0
    found = floored(square)
    assert found[:100].unique().tolist() == [103.0]  # the third of 300
    assert found[102:].tolist() == square[102:].tolist()
    assert floored(torch.zeros(3)).tolist() == [0, 0, 0]


# ---- projected, in one pass over a batch


class Toy(nn.Module):
    """An embedding that is the head too, a layer used twice, a convolution, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found = self.twice(torch.tanh(self.twice(self.embed(ids))))
        return self.head(torch.tanh(self.conv(found.mT).mT))


class Bare(nn.Module):
    """A parameter that no layer of its own shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.mixing = nn.Parameter(drawn(5, 3, seed=3).float())

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.first(functional.one_hot(ids % 4, 4).to(self.mixing.dtype))) @ (
            self.mixing
        )


def model_of(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double().eval()


def batch_of(rows: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 11, (rows, 5), generator=torch.Generator().manual_seed(2))}


def losses(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["ids"]).log_softmax(-1)
    return -logits[..., 1].sum(1)


def project(
    model: nn.Module,
    form: AdamForm,
    batch: dict[str, Tensor],
    moments: dict[str, Moment],
    sides: dict[str, Sides],
    *,
    piece: int = 1 << 20,
    divisors: Tensor | None = None,
) -> dict[str, Tensor]:
    size = len(batch["ids"])
    engine = Engine(model, only=sides.__contains__)
    shares = torch.ones(size) if divisors is None else divisors
    if form == "factored":
        wanted = Wanted(squares=False, projections=scaled_sides(moments, sides))
        found = engine.measure(losses, batch, num_examples=size, wanted=wanted).projections
        return {name: values / shares[:, None, None] for name, values in found.items()}
    make = exact_update if form == "exact" else diagonal_update
    updates = {name: make(moment) for name, moment in moments.items()}
    projector = AdamProjector(updates, sides, piece)
    for _ in range(2):
        projector.begin(lambda: shares)
        wanted = Wanted(squares=False, tell=projector.see, whole=projector.whole)
        found = engine.measure(losses, batch, num_examples=size, wanted=wanted)
        result = projector.finish(found.whole)
        if result is not None:
            return result
    raise AssertionError("the second pass asks for all that the first did not show")


@pytest.mark.parametrize("form", ["exact", "diagonal", "factored"])
@pytest.mark.parametrize("kind", [Toy, Bare])
def test_projected_updates_are_those_of_written_out_gradients(
    kind: type[nn.Module], form: AdamForm
):
    """All uses of a parameter are added up before anything that is not linear is done."""
    model = model_of(kind)
    batch = batch_of(4)
    names = [name for name, _ in model.named_parameters()]
    sides = draw_sides(model, dim=2, layers=names)
    whole = gradient_loop(model, losses, batch)
    moments: dict[str, Moment] = {}
    for number, name in enumerate(names):
        left, right = sides[name]
        moments[name] = moment_of((len(left), len(right)), seed=10 * number)
    divisors = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    found = project(model, form, batch, moments, sides, divisors=divisors)
    for name, (left, right) in sides.items():
        for row in range(4):
            gradient = whole[name][row].reshape(len(left), len(right)) / divisors[row]
            update = torch.from_numpy(by_hand(form, gradient.numpy(), moments[name]))
            wanted = left.T @ update @ right
            torch.testing.assert_close(found[name][row], wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("piece", [1, 7, 40, 200])
def test_pieces_of_any_size_give_the_same_rows(piece: int):
    """Down to single rows of one example's gradient."""
    model = model_of(Toy)
    names = ["embed.weight", "twice.weight", "conv.weight", "twice.bias"]
    sides = draw_sides(model, dim=2, layers=names)
    moments = {
        name: moment_of((len(left), len(right)), seed=number)
        for number, (name, (left, right)) in enumerate(sides.items())
    }
    forms: list[AdamForm] = ["exact", "diagonal"]
    for form in forms:
        wanted = project(model, form, batch_of(5), moments, sides)
        found = project(model, form, batch_of(5), moments, sides, piece=piece)
        for name in names:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["exact", "diagonal", "factored"])
def test_neither_the_batch_nor_its_order_changes_a_row(form: AdamForm):
    model = model_of(Toy)
    sides = draw_sides(model, dim=3, layers=["embed.weight", "twice.weight"])
    moments = {name: moment_of((len(s.left), len(s.right))) for name, s in sides.items()}
    batch = batch_of(6)
    wanted = project(model, form, batch, moments, sides)
    order = [4, 1, 5, 0, 2, 3]
    mixed = project(model, form, {"ids": batch["ids"][order]}, moments, sides)
    for row in range(6):
        alone = project(model, form, {"ids": batch["ids"][row : row + 1]}, moments, sides)
        for name, values in wanted.items():
            torch.testing.assert_close(alone[name][0], values[row], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(
                mixed[name][order.index(row)], values[row], rtol=1e-9, atol=1e-10
            )


def test_less_is_the_cosine_of_the_update_and_the_plain_gradient_of_the_query():
    """Two layers of no more than p rows and columns, of which a projection loses nothing."""
    model = model_of(Bare)
    names = ["first.weight", "mixing"]
    sides = draw_sides(model, dim=8, layers=names)
    moments = {name: moment_of(tuple(dict(model.named_parameters())[name].shape)) for name in names}
    pool, query = batch_of(4), {"ids": batch_of(6)["ids"][4:]}
    found = project(model, "exact", pool, moments, sides)
    engine = Engine(model, only=sides.__contains__)
    asked = engine.measure(
        losses, query, num_examples=2, wanted=Wanted(squares=False, projections=sides)
    ).projections
    rows, asks = (
        torch.cat([each[name].flatten(1) for name in names], 1) for each in (found, asked)
    )
    cosine = functional.normalize(rows) @ functional.normalize(asks).T

    whole, target = gradient_loop(model, losses, pool), gradient_loop(model, losses, query)
    for i in range(4):
        gamma = np.concatenate(
            [by_hand("exact", whole[n][i].numpy(), moments[n]).ravel() for n in names]
        )
        for q in range(2):
            g = np.concatenate([target[name][q].numpy().ravel() for name in names])
            wanted = gamma @ g / np.linalg.norm(gamma) / np.linalg.norm(g)
            np.testing.assert_allclose(float(cosine[i, q]), wanted, rtol=1e-9)


@pytest.mark.parametrize("piece", [None, 1000])
def test_a_head_tied_to_the_embedding_is_one_parameter_even_where_its_logits_are_not_kept(
    piece: int | None,
):
    """A language model whose losses are made in two sweeps; squares are of the gradients."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 60}  # fmt: skip
    config = AutoConfig.for_model("llama", tie_word_embeddings=True, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).double().eval()
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    sides = draw_sides(model, dim=3, layers=names)
    moments = {
        name: moment_of((len(left), len(right)), seed=number)
        for number, (name, (left, right)) in enumerate(sides.items())
    }
    updates = {name: exact_update(moment) for name, moment in moments.items()}
    projector = AdamProjector(updates, sides, piece)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0, bos_token_id=None)
    task = CausalLMTask(CausalLM(max_tokens=20), tokenizer)
    ids = torch.randint(0, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "targets": ids[:, 1:], "attention_mask": torch.ones_like(ids)}
    found = IndexPass(
        model, task, sides, reduction="mean", with_squares=True, adam=projector
    ).measure(batch, 5)
    assert projector.whole == ("model.embed_tokens.weight",)

    def mean_losses(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch["ids"]).logits[:, :-1].mT
        return functional.cross_entropy(logits, batch["ids"][:, 1:], reduction="none").mean(1)

    whole = gradient_loop(model, mean_losses, {"ids": ids})
    rows: list[Tensor] = []
    for name, (left, right) in sides.items():
        update = torch.from_numpy(by_hand("exact", whole[name].numpy(), moments[name]))
        rows.append((left.T @ update @ right).flatten(1))
    torch.testing.assert_close(found.rows, torch.cat(rows, 1), rtol=1e-8, atol=1e-8)
    assert found.squares is not None
    squares = sum(whole[name].flatten(1).square().sum(1) for name in names)
    torch.testing.assert_close(found.squares, squares, rtol=1e-9, atol=0)
