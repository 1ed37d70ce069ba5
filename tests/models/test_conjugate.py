"""The damped exact answer against dense algebra, and how far the fast methods are from it."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, save_language_model
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from curate.models.conjugate import GaussNewton, conjugate_gradients
from curate.models.example_losses import draw_keys
from curate.models.gradients import Sides
from curate.models.influence_check import Check, influence_distances
from curate.models.influence_distance import (
    distance,
    ekfac_distance,
    ekfac_inverse,
    exact_scores,
)
from curate.models.kfac import basis_of, damped
from curate.models.kfac_layers import layers_of
from curate.models.kfac_pass import KFACPass
from curate.models.mlp import MLP
from curate.models.settings import CausalLM, TabularClassification
from curate.models.tasks import Encoded, Task
from curate.models.tasks.causal_lm import CausalLMTask
from curate.models.tasks.classification import TabularTask

CPU = torch.device("cpu")
TEXTS = ["the cat", "in a hat the", "there", "a cat in"]


def tabular(hidden: tuple[int, ...] = (5,), rows: int = 40) -> tuple[nn.Module, Task, Encoded]:
    torch.manual_seed(0)
    model = MLP(num_features=4, num_classes=3, hidden=hidden).double().eval()
    draw = np.random.default_rng(0)
    features = (draw.normal(size=(rows, 4)) * [4, 1, 1, 0.25]).astype(np.float32)
    labels = (features[:, :3] + draw.normal(size=(rows, 3))).argmax(1)
    encoded = Encoded(
        lengths=np.ones(rows, dtype=np.int64),
        num_scored=np.ones(rows, dtype=np.int64),
        truncated=np.zeros(rows, dtype=bool),
        arrays={"features": features, "labels": labels},
        problems={},
    )
    return model, TabularTask(TabularClassification(num_classes=3)), encoded


def language(folder: Path) -> tuple[nn.Module, Task, Encoded]:
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    save_language_model(folder / "tiny", **shape)
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny").double().eval()
    task = CausalLMTask(CausalLM(max_tokens=16), byte_tokenizer())
    return model, task, task.encode(pl.DataFrame({"text": TEXTS}))


def dense(
    model: nn.Module, task: Task, encoded: Encoded, names: list[str], *, mean: bool = False
) -> Tensor:
    """(P, P) mean Gauss-Newton matrix from whole Jacobians, an example at a time."""
    known = {name: p.detach() for name, p in model.named_parameters() if name in names}
    total: Tensor | None = None
    for index in range(len(encoded)):
        batch = task.collate(encoded, np.array([index]))
        wrapped = _Logits(model, task)
        wrapped(batch)

        def logits(values: dict[str, Tensor], wrapped: Any = wrapped, batch: Any = batch) -> Tensor:
            return functional_call(wrapped, {f"model.{k}": v for k, v in values.items()}, (batch,))

        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacrev(logits)(known)
        rows = torch.cat([jacobian[name].flatten(2) for name in names], 2)  # (M, V, P)
        share = logits(known).softmax(1)
        inner = torch.diag_embed(share) - share[:, :, None] * share[:, None, :]
        found = torch.einsum("mvp,mvw,mwq->pq", rows, inner, rows)
        found = found / (len(share) if mean else 1)
        total = found if total is None else total + found
    assert total is not None
    return total.detach() / len(encoded)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> Tensor:
        return self.task.logits_and_targets(self.model, batch).logits


def split(vector: Tensor, model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    known = dict(model.named_parameters())
    parts = vector.split([known[name].numel() for name in names])
    return {n: part.reshape(known[n].shape) for n, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("kind", ["mlp", "llama"])
@pytest.mark.parametrize("is_mean", [False, True])
def test_products_and_solutions_are_those_of_the_dense_matrix(
    kind: str, is_mean: bool, tmp_path: Path
):
    model, task, encoded = tabular() if kind == "mlp" else language(tmp_path)
    names = [name for layer in layers_of(model) for name in layer.parameters]
    matrix = dense(model, task, encoded, names, mean=is_mean)
    draw = torch.Generator().manual_seed(0)
    vector = torch.randn(len(matrix), generator=draw, dtype=torch.float64)
    batches = [task.collate(encoded, part) for part in np.array_split(np.arange(len(encoded)), 2)]
    curvature = GaussNewton(model, task, batches, names, reduction="mean" if is_mean else "sum")
    found = curvature.product(split(vector, model, names))
    flat = torch.cat([found[name].flatten() for name in names])
    torch.testing.assert_close(flat, matrix @ vector)
    damping = {name: 0.05 + 0.01 * i for i, name in enumerate(names)}
    known = dict(model.named_parameters())
    added = torch.cat([torch.full((known[n].numel(),), damping[n]).double() for n in names])
    solved = conjugate_gradients(
        curvature.product, split(vector, model, names), damping, tolerance=1e-10
    )
    flat = torch.cat([solved.solution[name].flatten() for name in names])
    wanted = torch.linalg.solve(matrix + torch.diag(added), vector)
    torch.testing.assert_close(flat, wanted, rtol=1e-4, atol=1e-5)
    assert solved.residual <= 1e-10


@pytest.mark.parametrize("kind", ["mlp", "llama"])
def test_preconditioned_by_ekfac_the_solution_is_the_same(kind: str, tmp_path: Path):
    model, task, encoded = tabular() if kind == "mlp" else language(tmp_path)
    layers, chosen = layers_of(model), np.arange(len(encoded))
    engine = KFACPass(model, task, layers, batch_tokens=64, device=CPU)
    names = [str(number) for number in range(len(encoded))]
    sums = engine.factors(encoded, chosen, draw_keys(names, seed=0))
    bases = {name: basis_of(own) for name, own in sums.items()}
    squares = engine.eigenvalues(encoded, chosen, bases, draw_keys(names, seed=1))
    share = 0.1 if kind == "mlp" else 1.0
    curvatures = {n: damped(bases[n], own / len(chosen), share=share) for n, own in squares.items()}
    damping = {
        name: share * float(squares[layer.name].mean()) / len(chosen)
        for layer in layers
        for name in layer.parameters
    }
    batches = [task.collate(encoded, chosen)]
    product = GaussNewton(model, task, batches, list(damping)).product
    (right,) = engine.parameter_gradients(encoded, chosen[:1])
    plain = conjugate_gradients(product, right, damping, tolerance=1e-7, max_iterations=1000)
    inverse = ekfac_inverse(curvatures, layers)
    turned = conjugate_gradients(
        product, right, damping, inverse=inverse, tolerance=1e-7, max_iterations=1000
    )
    assert max(plain.residual, turned.residual) <= 1e-7
    # Llama's norms work in float32 whatever the model's type, so that products are that exact.
    for name, value in plain.solution.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(turned.solution[name], value, atol=1e-4 * scale, rtol=1e-4)
    # The inverse itself, layer by layer.
    for layer in layers:
        own = {name: right[name][None] for name in layer.parameters}
        wanted = curvatures[layer.name].inverse(layer.joined(own))
        found = {name: inverse(right)[name][None] for name in layer.parameters}
        torch.testing.assert_close(layer.joined(found), wanted)


@pytest.mark.parametrize("is_mean", [False, True])
def test_sampled_labels_measure_the_diagonal_of_the_dense_matrix(is_mean: bool, tmp_path: Path):
    """In the eigenvectors' axes: sums over an example's tokens, means over examples."""
    model, task, encoded = language(tmp_path)
    reduction = "mean" if is_mean else "sum"
    (layer,) = layers_of(model, only=lambda name: name.endswith("down_proj.weight"))
    engine = KFACPass(model, task, [layer], batch_tokens=64, device=CPU, reduction=reduction)
    chosen = np.arange(len(encoded))
    rounds = [draw_keys(TEXTS, seed=seed) for seed in range(150)]
    basis = basis_of(engine.factors(encoded, chosen, rounds[0])[layer.name])
    bases = {layer.name: basis}
    each = [engine.eigenvalues(encoded, chosen, bases, draws)[layer.name] for draws in rounds]
    measured = torch.stack(each).mean(0) / len(encoded)
    matrix = dense(model, task, encoded, layer.parameters, mean=is_mean)
    axes = torch.kron(basis.left, basis.right)
    wanted = (axes.T @ matrix @ axes).diagonal().reshape(measured.shape)
    assert float((measured - wanted).norm() / wanted.norm()) < 0.15
    assert float(measured.sum() / wanted.sum()) == pytest.approx(1, abs=0.05)


def test_exact_scores_are_those_of_the_dense_inverse():
    model, task, encoded = tabular()
    layers = layers_of(model)
    names = [name for layer in layers for name in layer.parameters]
    matrix = dense(model, task, encoded, names)
    damping = {layer.name: 0.02 * (1 + i) for i, layer in enumerate(layers)}
    known = dict(model.named_parameters())
    added = torch.cat(
        [
            torch.full((known[name].numel(),), damping[layer.name]).double()
            for layer in layers
            for name in layer.parameters
        ]
    )
    chosen, queries = np.arange(30), np.arange(30, 40)
    found = exact_scores(
        model, task, encoded, chosen, queries, layers=layers, damping=damping, device=CPU,
        tolerance=1e-9,
    )  # fmt: skip
    rows: list[Tensor] = []
    for index in range(40):
        batch = task.collate(encoded, np.array([index]))
        loss = functional.cross_entropy(model(batch["features"]), batch["labels"])
        grads = torch.autograd.grad(loss, [known[name] for name in names])
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    gradients = torch.stack(rows)
    small = Encoded(**_fields(encoded, chosen))
    matrix = dense(model, task, small, names)
    wanted = gradients[:30] @ torch.linalg.solve(matrix + torch.diag(added), gradients[30:].T)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def _fields(encoded: Encoded, chosen: np.ndarray) -> dict[str, Any]:
    return {
        "lengths": encoded.lengths[chosen],
        "num_scored": encoded.num_scored[chosen],
        "truncated": encoded.truncated[chosen],
        "arrays": {name: values[chosen] for name, values in encoded.arrays.items()},
        "problems": {},
    }


def test_ekfac_is_nearer_to_the_exact_answer_than_no_curvature():
    model, task, encoded = tabular(hidden=(), rows=120)
    layers = layers_of(model)
    engine = KFACPass(model, task, layers, batch_tokens=64, device=CPU)
    chosen, queries = np.arange(110), np.arange(110, 120)
    (name,) = [layer.name for layer in layers]
    rounds = [draw_keys([str(i) for i in range(120)], seed=seed) for seed in range(10)]
    sums = engine.factors(encoded, chosen, rounds[0])
    for draws in rounds[1:]:
        sums = {name: sums[name].plus(engine.factors(encoded, chosen, draws)[name])}
    bases = {name: basis_of(sums[name])}
    values = sum(engine.eigenvalues(encoded, chosen, bases, draws)[name] for draws in rounds)
    assert isinstance(values, Tensor)
    values = values / (10 * len(chosen))
    curvatures = {name: damped(bases[name], values)}
    damping = {name: 0.1 * float(values.mean())}
    exact = exact_scores(
        model, task, encoded, chosen, queries, layers=layers, damping=damping, device=CPU
    )
    found = ekfac_distance(engine, encoded, chosen, queries, curvatures=curvatures, exact=exact)
    plain = engine.scores(encoded, chosen, engine.parameter_gradients(encoded, queries))
    nothing = distance(plain, exact)
    assert found.num_queries == 10
    assert found.spearman > 0.95
    assert found.scale == pytest.approx(1, abs=0.15)
    assert found.relative_error < 0.5 * nothing.relative_error


def test_the_distance_sees_no_scale_and_no_reversal_goes_unseen():
    draw = torch.Generator().manual_seed(0)
    exact = torch.randn(20, 3, generator=draw)
    same = distance(3 * exact, exact)
    assert same.relative_error == pytest.approx(0, abs=1e-6)
    assert same.scale == pytest.approx(1 / 3)
    assert (same.pearson, same.spearman) == (pytest.approx(1), pytest.approx(1))
    assert distance(-exact, exact).spearman == pytest.approx(-1)
    curved = distance(exact.exp(), exact)
    assert curved.spearman == pytest.approx(1)
    assert curved.pearson < 0.99


def test_logistic_regression_has_the_influence_and_the_removal_of_the_page():
    values = torch.tensor([-2, -1, -0.5, 0.5, 1, 2]).double()
    features = torch.stack([torch.ones(6).double(), values], 1)
    target = torch.tensor([0, 0, 1, 0, 1, 1]).double()

    def fitted(kept: list[int]) -> tuple[Tensor, Tensor]:
        weights = torch.zeros(2, dtype=torch.float64)
        hessian = torch.eye(2, dtype=torch.float64)
        x, y = features[kept], target[kept]
        for _ in range(50):
            share = (x @ weights).sigmoid()
            hessian = (x.T * (share * (1 - share))) @ x + 0.1 * torch.eye(2).double()
            weights = weights - torch.linalg.solve(hessian, x.T @ (share - y) + 0.1 * weights)
        return weights, hessian

    asked = torch.tensor([1, 0.25]).double()

    def loss(weights: Tensor) -> float:
        return float(functional.softplus(-(asked @ weights)))

    weights, hessian = fitted(list(range(6)))
    assert float(weights[1]) == pytest.approx(1.225747, abs=1e-6)
    assert loss(weights) == pytest.approx(0.551621, abs=1e-6)
    gradients = ((features @ weights).sigmoid() - target)[:, None] * features
    own = ((asked @ weights).sigmoid() - 1) * asked

    def product(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"w": hessian @ vector["w"] - 0.1 * vector["w"]}

    solved = conjugate_gradients(product, {"w": own}, {"w": 0.1}, tolerance=1e-12)
    influence = gradients @ solved.solution["w"]
    wanted = [-0.017313, -0.070458, 0.231296, -0.291124, 0.112323, 0.046583]
    np.testing.assert_allclose(influence, wanted, atol=1e-6)
    removal = [loss(fitted([j for j in range(6) if j != i])[0]) - loss(weights) for i in range(6)]
    true = [-0.024580, -0.087876, 0.593022, -0.403045, 0.158148, 0.068547]
    np.testing.assert_allclose(removal, true, atol=1e-6)
    near = distance(influence[:, None], torch.tensor(removal).double()[:, None])
    assert near.spearman == pytest.approx(1)
    assert near.pearson == pytest.approx(0.9658, abs=1e-4)


def test_the_check_ranks_the_ways_and_leaves_out_the_projected_ones_without_sides():
    model, task, encoded = tabular(hidden=(6,), rows=150)
    parameters = dict(model.named_parameters())
    # Square orthogonal sides: nothing is lost but what the empirical matrix leaves out.
    sides = {
        name: Sides(
            torch.linalg.qr(torch.randn(len(value), len(value)).double())[0],
            torch.linalg.qr(torch.randn(value[0].numel(), value[0].numel()).double())[0],
        )
        for name, value in parameters.items()
        if value.dim() == 2
    }
    how = Check(draws=4, damping=0.1)
    found = influence_distances(model, task, encoded, device=CPU, how=how, sides=sides)
    assert set(found) == {"ekfac", "gradients", "fisher", "datainf"}
    assert all(one.num_queries == 10 for one in found.values())
    others = [one for name, one in found.items() if name != "ekfac"]
    assert all(found["ekfac"].relative_error < one.relative_error for one in others)
    assert found["ekfac"].spearman > 0.7 > found["gradients"].spearman
    assert set(influence_distances(model, task, encoded, device=CPU)) == {"ekfac", "gradients"}


def test_projected_scores_on_orthogonal_sides_are_those_of_whole_gradients():
    model, task, encoded = tabular(hidden=(), rows=30)
    torch.manual_seed(1)
    sides = {
        "layers.0.weight": Sides(
            torch.linalg.qr(torch.randn(3, 3).double())[0],
            torch.linalg.qr(torch.randn(4, 4).double())[0],
        )
    }
    engine = KFACPass(model, task, layers_of(model), batch_tokens=64, device=CPU)
    rows = np.arange(30)
    projected = engine.projections(encoded, rows, sides)["layers.0.weight"]
    whole = torch.stack(
        [one["layers.0.weight"].flatten() for one in engine.parameter_gradients(encoded, rows)]
    )
    torch.testing.assert_close(projected @ projected.T, whole @ whole.T)
