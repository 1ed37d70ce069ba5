"""The passes of EK-FAC against autograd, one example at a time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, classifier_tokenizer, save_classifier, save_language_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from curate.errors import ConfigError
from curate.models.example_losses import draw_keys, drawn_labels, uniforms
from curate.models.kfac import Basis, Curvature, basis_of, damped
from curate.models.kfac_layers import Layer, in_groups, layers_of
from curate.models.kfac_pass import KFACPass
from curate.models.kfac_queries import query_directions
from curate.models.mlp import MLP
from curate.models.settings import CausalLM, TabularClassification, TextClassification, Window
from curate.models.tasks import Encoded, Task
from curate.models.tasks.causal_lm import CausalLMTask
from curate.models.tasks.classification import TabularTask, TextTask

CPU = torch.device("cpu")
TEXTS = ["the cat", "in a hat the cat sat", "there", "a cat in the hat sat there then", "hat a"]
NAMES = [f"example {i}" for i in range(40)]


@dataclasses.dataclass
class World:
    model: nn.Module
    task: Task
    encoded: Encoded

    @property
    def everything(self) -> np.ndarray:
        return np.arange(len(self.encoded))

    def layers(self) -> list[Layer]:
        return layers_of(self.model)

    def engine(self, **more: Any) -> KFACPass:
        options: dict[str, Any] = {"batch_tokens": 64, "device": CPU, **more}
        return KFACPass(self.model, self.task, self.layers(), **options)


def tabular() -> World:
    torch.manual_seed(0)
    model = MLP(num_features=4, num_classes=3, hidden=(5,)).double().eval()
    draw = np.random.default_rng(0)
    encoded = Encoded(
        lengths=np.ones(12, dtype=np.int64),
        num_scored=np.ones(12, dtype=np.int64),
        truncated=np.zeros(12, dtype=bool),
        arrays={
            "features": draw.normal(size=(12, 4)).astype(np.float32),
            "labels": draw.integers(0, 3, 12),
        },
        problems={},
    )
    return World(model, TabularTask(TabularClassification(num_classes=3)), encoded)


def language(folder: Path, kind: str = "llama", **fields: Any) -> World:
    save_language_model(folder / kind, kind=kind, **fields)
    model = AutoModelForCausalLM.from_pretrained(folder / kind).double().eval()
    task = CausalLMTask(CausalLM(max_tokens=32), byte_tokenizer())
    return World(model, task, task.encode(pl.DataFrame({"text": TEXTS})))


def gpt2(folder: Path) -> World:
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return language(folder, "gpt2", **shape)


def classifier(folder: Path) -> World:
    save_classifier(folder / "bert")
    found = AutoModelForSequenceClassification.from_pretrained(folder / "bert").double().eval()
    task = TextTask(TextClassification(num_classes=3), classifier_tokenizer())
    fields = pl.DataFrame({"text": TEXTS, "label": [0, 1, 2, 1, 0]})
    return World(found, task, task.encode(fields))


def world_of(kind: str, folder: Path) -> World:
    makers: dict[str, Callable[[Path], World]] = {
        "mlp": lambda _: tabular(),
        "llama": language,
        "gpt2": gpt2,
        "bert": classifier,
    }
    return makers[kind](folder)


KINDS = ["mlp", "llama", "gpt2", "bert"]


def alone(
    world: World, index: int, draws: np.ndarray | None, *, mean: bool = False
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Layer -> gradient (O, I) by autograd; layer -> inputs and output gradients of its tokens."""
    batch = world.task.collate(world.encoded, np.array([index]))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles: list[Any] = []
    for layer in world.layers():

        def watch(_m: nn.Module, args: Any, output: Tensor, name: str = layer.name) -> None:
            output.retain_grad()
            seen[name] = args[0].detach(), output

        handles.append(world.model.get_submodule(layer.name).register_forward_hook(watch))
    world.model.zero_grad()
    flat = world.task.logits_and_targets(world.model, batch)
    targets = flat.targets
    if draws is not None:
        chosen = np.random.Generator(np.random.Philox(key=draws[index].view(np.uint64)))
        sums = flat.logits.detach().softmax(1).numpy().cumsum(1)
        pairs = zip(sums, chosen.random(len(sums)), strict=True)
        targets = torch.tensor([np.searchsorted(s, u, side="right") for s, u in pairs])
    loss = functional.cross_entropy(flat.logits, targets, reduction="sum")
    if mean:
        loss = loss / (len(targets) if draws is None else len(targets) ** 0.5)
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients: dict[str, Tensor] = {}
    sides: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in world.layers():
        module: Any = world.model.get_submodule(layer.name)
        weight = module.weight.grad.T if layer.is_transposed else module.weight.grad
        given, output = seen[layer.name]
        assert output.grad is not None
        given, back = given.reshape(-1, given.shape[-1]), output.grad.reshape(-1, output.shape[-1])
        if layer.bias is not None:
            weight = torch.cat([weight, module.bias.grad[:, None]], 1)
            given = torch.cat([given, torch.ones(len(given), 1).double()], 1)
        gradients[layer.name], sides[layer.name] = weight.clone(), (given, back)
    return gradients, sides


def keys(world: World, seed: int = 0) -> np.ndarray:
    return draw_keys(NAMES[: len(world.encoded)], seed=seed)


def fitted(
    world: World, engine: KFACPass, draws: np.ndarray
) -> tuple[dict[str, Basis], dict[str, Curvature]]:
    sums = engine.factors(world.encoded, world.everything, draws)
    bases = {name: basis_of(one) for name, one in sums.items()}
    values = engine.eigenvalues(world.encoded, world.everything, bases, draws)
    num = len(world.encoded)
    return bases, {name: damped(bases[name], one / num) for name, one in values.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_mean", [False, True])
def test_factors_are_sums_over_tokens_and_eigenvalues_over_examples(
    kind: str, is_mean: bool, tmp_path: Path
):
    world = world_of(kind, tmp_path)
    engine = world.engine(reduction="mean" if is_mean else "sum")
    draws = keys(world)
    found = engine.factors(world.encoded, world.everything, draws)
    each = [alone(world, i, draws, mean=is_mean) for i in world.everything]
    for layer in world.layers():
        sides = [one[1][layer.name] for one in each]
        given, back = (torch.cat(part) for part in zip(*sides, strict=True))
        torch.testing.assert_close(found[layer.name].inputs, given.T @ given)
        torch.testing.assert_close(found[layer.name].outputs, back.T @ back)
        assert float(found[layer.name].num_tokens) == len(given)
    bases = {name: basis_of(one) for name, one in found.items()}
    values = engine.eigenvalues(world.encoded, world.everything, bases, draws)
    for layer in world.layers():
        basis = bases[layer.name]
        wanted = sum((basis.left.T @ one[0][layer.name] @ basis.right) ** 2 for one in each)
        torch.testing.assert_close(values[layer.name], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_self_influence_is_the_score_of_an_example_with_itself_and_the_dense_product(
    kind: str, tmp_path: Path
):
    world = world_of(kind, tmp_path)
    engine, draws = world.engine(), keys(world)
    _, curvatures = fitted(world, engine, draws)
    own = engine.self_influence(world.encoded, world.everything, curvatures)
    gradients = engine.gradients(world.encoded, world.everything)
    each = [alone(world, i, None)[0] for i in world.everything]
    dense = torch.zeros(len(each), len(each), dtype=torch.float64)
    for layer in world.layers():
        curvature = curvatures[layer.name]
        flat = torch.stack([one[layer.name].flatten() for one in each])
        within = flat @ torch.kron(curvature.left, curvature.right)
        torch.testing.assert_close(gradients[layer.name].flatten(1), flat)
        dense += within / curvature.damped.flatten() @ within.T
    queries, kept = query_directions(gradients, curvatures, engine.layers)
    assert kept == pytest.approx(1)
    scores = engine.scores(world.encoded, world.everything, queries)
    torch.testing.assert_close(scores, dense)
    torch.testing.assert_close(own, dense.diagonal())


def test_queries_of_low_rank_are_scored_exactly_and_the_rest_is_said(tmp_path: Path):
    world = gpt2(tmp_path)
    engine = world.engine()
    _, curvatures = fitted(world, engine, keys(world))
    gradients = engine.gradients(world.encoded, world.everything[:2])
    queries, kept = query_directions(gradients, curvatures, engine.layers, rank=3)
    assert 0.5 < kept < 1
    found = engine.scores(world.encoded, world.everything, queries)
    own = engine.gradients(world.encoded, world.everything)
    wanted = torch.zeros(5, 2, dtype=torch.float64)
    for layer in engine.layers:
        for q in range(2):
            left, values, right = np.linalg.svd(
                curvatures[layer.name].inverse(gradients[layer.name][q]).numpy()
            )
            near = torch.from_numpy((left[:, :3] * values[:3]) @ right[:3])
            wanted[:, q] += (own[layer.name] * near).sum((1, 2))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_batches_padding_and_order_change_nothing(kind: str, tmp_path: Path):
    world = world_of(kind, tmp_path)
    draws = keys(world)
    whole, single = world.engine(batch_tokens=1000), world.engine(batch_tokens=1)
    one, two = fitted(world, whole, draws)[1], fitted(world, single, draws)[1]
    for layer in world.layers():
        torch.testing.assert_close(one[layer.name].damped, two[layer.name].damped)
    together = whole.self_influence(world.encoded, world.everything, one)
    torch.testing.assert_close(
        single.self_influence(world.encoded, world.everything, one), together
    )
    order = np.array([3, 0, 4, 1, 2])
    again = whole.self_influence(world.encoded, order, one)
    torch.testing.assert_close(again, together[torch.from_numpy(order)])


def test_rows_that_fill_up_a_batch_of_windows_are_no_tokens(tmp_path: Path):
    world = language(tmp_path)
    settings = CausalLM(max_tokens=8, window=Window(overlap=2))
    world.task = CausalLMTask(settings, byte_tokenizer())
    world.encoded = world.task.encode(pl.DataFrame({"text": TEXTS}))
    draws = keys(world)
    one, two = (
        world.engine(batch_tokens=size).factors(world.encoded, world.everything, draws)
        for size in (1000, 1)
    )
    assert world.encoded.num_scored.max() > 8
    for name, sums in one.items():
        for first, second in zip(sums, two[name], strict=True):
            torch.testing.assert_close(first, second)


def test_sums_of_two_partitions_are_those_of_the_whole(tmp_path: Path):
    world = language(tmp_path)
    engine, draws = world.engine(), keys(world)
    first, second = (
        engine.factors(world.encoded, part, draws) for part in np.split(world.everything, [2])
    )
    whole = engine.factors(world.encoded, world.everything, draws)
    for name, sums in whole.items():
        for one, two in zip(first[name].plus(second[name]), sums, strict=True):
            torch.testing.assert_close(one, two)


def test_dataset_labels_give_the_empirical_matrix_which_is_another_one():
    world = tabular()
    engine = world.engine()
    found = engine.factors(world.encoded, world.everything, labels="dataset")
    sampled = engine.factors(world.encoded, world.everything, keys(world))
    each = [alone(world, i, None)[1] for i in world.everything]
    for layer in world.layers():
        back = torch.cat([one[layer.name][1] for one in each])
        torch.testing.assert_close(found[layer.name].outputs, back.T @ back)
        assert not torch.allclose(found[layer.name].outputs, sampled[layer.name].outputs)
        torch.testing.assert_close(found[layer.name].inputs, sampled[layer.name].inputs)


def test_drawn_labels_have_the_frequencies_of_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -1.0, 3.0]]).double()
    owner = torch.zeros(20_000, dtype=torch.long)
    chosen = uniforms(torch.from_numpy(draw_keys(["a"], seed=0)), owner)
    found = drawn_labels(logits.expand(20_000, 4), chosen).bincount(minlength=4) / 20_000
    assert float((found - logits.softmax(1)[0]).abs().max()) < 3 * (0.25 / 20_000) ** 0.5


def test_drawn_labels_come_as_near_to_the_fisher_matrix_as_the_root_of_their_number():
    world = tabular()
    engine, layer = world.engine(), world.layers()[-1]
    batch = world.task.collate(world.encoded, world.everything)
    shares = world.task.logits_and_targets(world.model, batch).logits.detach().softmax(1)
    truth = torch.diag(shares.sum(0)) - shares.T @ shares

    def error(count: int, start: int) -> float:
        total: Tensor | None = None
        for seed in range(start, start + count):
            sums = engine.factors(world.encoded, world.everything, keys(world, seed))
            outputs = sums[layer.name].outputs
            total = outputs if total is None else total + outputs
        assert total is not None
        return float((total / count - truth).norm() / truth.norm())

    few, many = np.mean([error(2, 10 * k) for k in range(8)]), error(100, 200)
    assert many < 0.08
    assert 3 < few / many < 20  # 7 is the root of 50


def test_an_example_has_the_same_labels_whatever_its_batch():
    draws = torch.from_numpy(draw_keys(["a", "b", "c"], seed=1))
    together = uniforms(draws, torch.tensor([0, 0, 0, 1, 2, 2]))
    assert torch.equal(uniforms(draws[2:], torch.tensor([0, 0])), together[4:])
    assert not torch.equal(uniforms(draws[2:], torch.tensor([0, 0])), together[:2])
    other = torch.from_numpy(draw_keys(["a", "b", "c"], seed=2))
    assert not torch.equal(uniforms(other, torch.tensor([0, 1, 2])), together[[0, 3, 4]])


def test_a_language_models_head_counts_where_it_is_named(tmp_path: Path):
    world = language(tmp_path)
    names = [layer.name for layer in layers_of(world.model)]
    assert not any("lm_head" in name or "embed" in name for name in names)
    (head,) = layers_of(world.model, only=lambda name: name == "lm_head.weight")
    engine = KFACPass(world.model, world.task, [head], batch_tokens=64, device=CPU)
    found = engine.factors(world.encoded, world.everything, labels="dataset")
    assert float(found["lm_head"].num_tokens) == world.encoded.num_scored.sum()
    batch = world.task.collate(world.encoded, world.everything)
    flat = world.task.logits_and_targets(world.model, batch)
    errors = flat.logits.detach().softmax(1) - functional.one_hot(flat.targets, head.num_outputs)
    torch.testing.assert_close(found["lm_head"].outputs, errors.T @ errors)


def test_a_shared_weight_and_an_embedding_are_left_out(tmp_path: Path):
    world = gpt2(tmp_path)
    with pytest.raises(ConfigError, match="matrix of its own"):
        layers_of(world.model, only=lambda name: "wte" in name or "lm_head" in name)


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, features: Tensor) -> Tensor:
        given = features.to(self.inner.weight.dtype)
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(given)))))


def test_the_calls_of_one_layer_are_put_together_before_the_square():
    world = tabular()
    torch.manual_seed(1)
    world.model = Twice().double().eval()
    engine = world.engine()
    sums = engine.factors(world.encoded, world.everything, keys(world))
    assert float(sums["inner"].num_tokens) == 24
    curvatures = fitted(world, engine, keys(world))[1]
    own = engine.self_influence(world.encoded, world.everything, curvatures)
    gradients = engine.gradients(world.encoded, world.everything)
    wanted = sum(
        (gradients[name] * curvatures[name].inverse(gradients[name])).sum((1, 2))
        for name in ("inner", "last")
    )
    torch.testing.assert_close(own, wanted)


def test_convolutions_are_layers_on_their_patches():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    model = nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), layer, nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    )
    world = tabular()
    world.model = nn.Sequential(_Doubled(), model).double().eval()
    world.encoded.arrays["features"] = np.random.default_rng(1).normal(size=(12, 32))
    engine = world.engine()
    curvatures = fitted(world, engine, keys(world))[1]
    assert curvatures["1.1"].right.shape == (19, 19)
    own = engine.self_influence(world.encoded, world.everything, curvatures)
    gradients = engine.gradients(world.encoded, world.everything)
    wanted = sum(
        (gradients[name] * one.inverse(gradients[name])).sum((1, 2))
        for name, one in curvatures.items()
    )
    torch.testing.assert_close(own, wanted)
    queries, _ = query_directions(gradients, curvatures, engine.layers)
    scores = engine.scores(world.encoded, world.everything, queries)
    torch.testing.assert_close(scores.diagonal(), own)


class _Doubled(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.double()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 14, 100])
def test_groups_of_layers_are_in_order_complete_and_of_like_size(count: int, tmp_path: Path):
    layers = language(tmp_path).layers()
    groups = in_groups(layers, count)
    assert [layer for group in groups for layer in group] == layers
    assert len(groups) == min(count, len(layers))
    assert all(groups)
    sizes = [sum(layer.num_bytes for layer in group) for group in groups]
    assert max(sizes) <= sum(sizes) / len(sizes) + 2 * max(layer.num_bytes for layer in layers)


def test_float32_agrees_with_float64(tmp_path: Path):
    world = language(tmp_path)
    engine, draws = world.engine(), keys(world)
    bases, curvatures = fitted(world, engine, draws)
    exact = engine.self_influence(world.encoded, world.everything, curvatures)
    world.model.float()
    single = world.engine()
    values = single.eigenvalues(world.encoded, world.everything, bases, draws)
    again = {name: damped(bases[name], one / 5) for name, one in values.items()}
    found = single.self_influence(world.encoded, world.everything, again)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0)


def test_a_batch_that_does_not_fit_leaves_no_trace():
    world = tabular()
    draws = keys(world)
    wanted = world.engine().factors(world.encoded, world.everything, draws)
    engine = world.engine()
    seen = [0]
    original = KFACPass._check  # pyright: ignore[reportPrivateUsage]

    def check(self: KFACPass) -> None:
        seen[0] += 1
        if seen[0] == 1:
            raise MemoryError  # everything was told, nothing is committed
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KFACPass, "_check", check)
        found = engine.factors(world.encoded, world.everything, draws)
    assert seen[0] > 2
    for name, sums in wanted.items():
        for one, two in zip(found[name], sums, strict=True):
            torch.testing.assert_close(one, two)
