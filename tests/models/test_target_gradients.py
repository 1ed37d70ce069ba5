"""Training on the target, and gradients that meet its own, against autograd and JVP."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradient_loop import gradient_loop
from tiny_models import save_classifier
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from curate.errors import ConfigError, DivergedError, InputError
from curate.models.gradient_similarity import SimilarityPass
from curate.models.mlp import MLP
from curate.models.optimiser import Optimiser
from curate.models.recorded_steps import load_step, put, step_path
from curate.models.settings import TabularClassification, TextClassification, Train
from curate.models.target_gradients import (
    Recording,
    batch_gradient,
    evaluated_steps,
    record,
    target_lengths,
    target_schedule,
)
from curate.models.tasks import Encoded
from curate.models.tasks.classification import TabularTask, TextTask
from scorers.dvgs import similarities

CPU = torch.device("cpu")
TASK = TabularTask(TabularClassification(num_classes=3))


def everything(name: str) -> bool:
    return True


def table(features: Any, labels: Any) -> Encoded:
    numbers = np.asarray(features, dtype=np.float32)
    classes = np.asarray(labels, dtype=np.int64)
    return Encoded(
        lengths=np.ones(len(classes), dtype=np.int64),
        num_scored=(classes >= 0).astype(np.int64),
        truncated=np.zeros(len(classes), dtype=bool),
        arrays={"features": numbers, "labels": classes},
        problems={},
    )


def drawn(count: int, seed: int = 0) -> Encoded:
    generator = np.random.default_rng(seed)
    return table(generator.normal(size=(count, 4)), generator.integers(0, 3, count))


def network(seed: int = 0, *, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))
        return nn.Sequential(*layers).eval()


def values_of(
    model: nn.Module, pool: Encoded, target: Encoded, *, batch: int = 64, **more: Any
) -> dict[str, np.ndarray]:
    """All four similarities with the gradient of the whole target."""
    names = [name for name, _ in model.named_parameters() if more.get("only", everything)(name)]
    gradient, _ = batch_gradient(model, TASK, TASK.collate(target, np.arange(len(target))), names)
    measuring = SimilarityPass(model, TASK, batch_tokens=batch, device=CPU, **more)
    dot, square, _ = measuring.measure(pool, np.arange(len(pool)), gradient)
    norm = float(sum(value.double().square().sum() for value in gradient.values()))
    return {name: values.numpy() for name, values in similarities(dot, square, norm).items()}


def linear(features: int, classes: int = 2) -> nn.Module:
    model = nn.Linear(features, classes, bias=False)
    nn.init.zeros_(model.weight)
    return model.eval()


def test_softmax_regression_with_zero_weights_has_the_similarities_of_the_page():
    pool = table([[1, 0], [1, 0], [0, 1], [1, 1]], [0, 1, 0, 0])
    found = values_of(linear(2), pool, table([[1, 0], [1, 1]], [0, 0]))
    wanted = {
        "cosine": [0.894427, -0.894427, 0.447214, 0.948683],
        "dot": [0.5, -0.5, 0.25, 0.75],
        "projection": [0.632456, -0.632456, 0.316228, 0.948683],
        "distance": [-0.353553, -1.457738, -0.790569, -0.353553],
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)


def test_the_only_target_example_agrees_with_itself_and_its_flipped_label_is_opposed():
    """In a binary softmax the gradient of the other label is antiparallel, whatever p is."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).eval()
    x = [[0.3, -1.2, 0.7]]
    found = values_of(model, table(x * 2, [1, 0]), table(x, [1]))
    np.testing.assert_allclose(found["cosine"], [1, -1], atol=1e-6)


def test_the_cosine_is_exact_where_the_model_is_all_but_sure():
    """With 1 - p = 4e-8, p is 1 in float32: as p - 1 half of the gradient would be lost."""
    model = nn.Linear(1, 2, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[10.0], [-10.0]]))
    found = values_of(model, table([[0.85]], [0]), table([[-1.0]], [0]))
    np.testing.assert_allclose(found["cosine"], [-1], atol=1e-6)


def test_disjoint_features_have_nothing_in_common():
    pool = table([[0, 0, 1, 2], [0, 0, -1, 1]], [0, 1])
    found = values_of(linear(4), pool, table([[1, 2, 0, 0], [2, -1, 0, 0]], [0, 1]))
    for name in ("cosine", "dot", "projection"):
        np.testing.assert_allclose(found[name], 0, atol=1e-9)


def test_a_target_that_is_repeated_is_the_same_target():
    model, pool, target = network(), drawn(9), drawn(5, 1)
    twice = table(np.tile(target.arrays["features"], (2, 1)), np.tile(target.arrays["labels"], 2))
    once = values_of(model, pool, target)
    for name, values in values_of(model, pool, twice).items():
        np.testing.assert_allclose(values, once[name], atol=1e-6)


def test_the_mean_dot_over_the_pool_is_the_dot_with_the_mean_gradient():
    model, pool, target = network(), drawn(12), drawn(5, 1)
    names = [name for name, _ in model.named_parameters()]
    mean, _ = batch_gradient(model, TASK, TASK.collate(pool, np.arange(12)), names)
    own, _ = batch_gradient(model, TASK, TASK.collate(target, np.arange(5)), names)
    wanted = sum(float((mean[name].double() * own[name].double()).sum()) for name in names)
    assert values_of(model, pool, target)["dot"].mean() == pytest.approx(wanted, rel=1e-5)


def losses_by_hand(model: nn.Module, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Any:
    logits = functional_call(model, weights, (batch["features"],))
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def test_the_dots_are_those_of_jvp_and_of_vmapped_gradients():
    model, pool, target = network(), drawn(10), drawn(5, 1)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    own = TASK.collate(target, np.arange(5))
    direction = grad(lambda w: losses_by_hand(model, w, own).mean())(weights)
    batch = TASK.collate(pool, np.arange(10))
    found = values_of(model, pool, target, batch=12)["dot"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own forward mode uses what torch deprecates
        forward = jvp(lambda w: losses_by_hand(model, w, batch), (weights,), (direction,))[1]
    np.testing.assert_allclose(found, forward.numpy(), rtol=1e-5, atol=1e-6)

    def single(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        one = {"features": x[None], "labels": y[None]}
        return losses_by_hand(model, w, one).sum()

    each = vmap(grad(single), in_dims=(None, 0, 0))(weights, batch["features"], batch["labels"])
    explicit = sum((each[name] * direction[name]).flatten(1).sum(1) for name in weights)
    np.testing.assert_allclose(found, explicit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_order_and_size_of_the_batches_do_not_matter(batch: int):
    model, pool, target = network(), drawn(20), drawn(5, 1)
    order = np.random.default_rng(2).permutation(20)
    mixed = table(pool.arrays["features"][order], pool.arrays["labels"][order])
    whole = values_of(model, pool, target)
    for name, values in values_of(model, mixed, target, batch=batch).items():
        np.testing.assert_allclose(values, whole[name][order], rtol=1e-5, atol=1e-5)


class Normed(nn.Module):
    """A network whose norm works on each row alone."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = norm
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


def test_instance_norm_of_rows_is_layer_norm_without_gain():
    instance = Normed(lambda x: functional.instance_norm(x[:, None])[:, 0])
    layer = Normed(lambda x: functional.layer_norm(x, (8,)))
    one, other = (values_of(model.eval(), drawn(9), drawn(5, 1)) for model in (instance, layer))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def test_a_subset_of_the_parameters_is_measured_alone():
    model, pool, target = network(), drawn(8), drawn(5, 1)
    found = values_of(model, pool, target, only=lambda name: name.startswith("4."))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch["features"]), batch["labels"], reduction="none")

    each = gradient_loop(model, losses, TASK.collate(pool, np.arange(8)))
    own = gradient_loop(model, losses, TASK.collate(target, np.arange(5)))
    g = torch.cat([each[name].flatten(1) for name in ("4.weight", "4.bias")], 1)
    t = torch.cat([own[name].mean(0).flatten() for name in ("4.weight", "4.bias")])
    np.testing.assert_allclose(found["cosine"], functional.cosine_similarity(g, t[None]), atol=1e-6)


def test_the_loss_of_a_text_is_the_mean_over_its_positions_and_padding_changes_nothing(
    tmp_path: Path,
):
    import polars as pl
    from tiny_models import classifier_tokenizer

    model = AutoModelForSequenceClassification.from_pretrained(save_classifier(tmp_path)).eval()
    task = TextTask(TextClassification(num_classes=3), classifier_tokenizer())
    texts = ["a cat", "the hat in the house", "then", "in a hat there was a cat"]
    encoded = task.encode(pl.DataFrame({"text": texts, "label": [0, 1, 2, 0]}))
    names = [name for name, _ in model.named_parameters()]
    gradient, _ = batch_gradient(model, task, task.collate(encoded, [0, 2]), names)
    found = [
        SimilarityPass(model, task, batch_tokens=size, device=CPU).measure(
            encoded, np.arange(4), gradient
        )
        for size in (1, 400)
    ]
    for position in range(4):
        alone, _ = batch_gradient(model, task, task.collate(encoded, [position]), names)
        dot = sum(float((alone[n].double() * gradient[n].double()).sum()) for n in names)
        for dots, _, _ in found:
            assert float(dots[position]) == pytest.approx(dot, rel=1e-4, abs=1e-5)


def recording(folder: Path, **more: Any) -> Recording:
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"every": 2, "measures": everything, "resume_every_seconds": 0.0}
    return Recording(folder=folder, fingerprint="same", **{**options, **more})


def trained(
    folder: Path, *, task: Any = TASK, lr: float = 0.01, dropout: float = 0.5, **more: Any
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A training of 3 epochs of 4 batches each."""
    target = drawn(14, 5)
    lengths, budget = target_lengths(target, batch_size=4, batch_tokens=100)
    schedule = target_schedule(lengths, seed=7, budget=budget, epochs=3)
    settings = Train(lr=lr, weight_decay=0, warmup=0, schedule="constant", clip_norm=0)
    model = network(dropout=dropout)
    optimiser = Optimiser(model, settings, seed=7, total_steps=12, device=CPU)
    points = record(
        optimiser,
        task,
        target,
        lengths=lengths,
        budget=budget,
        schedule=schedule,
        recording=recording(folder, **more),
    )
    return model, points


def step_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "steps").iterdir())}


def test_every_evaluated_step_leaves_weights_and_the_gradient_before_its_update(tmp_path: Path):
    """Plain Adam on the recorded gradients takes the recorded weights from step to step."""
    _, points = trained(tmp_path, dropout=0.0, every=1)
    assert [point["step"] for point in points] == list(range(1, 13))
    weights = {n: p.detach().clone() for n, p in network().named_parameters()}
    adam = torch.optim.Adam(weights.values(), lr=0.01)
    for point in points:
        recorded = load_step(tmp_path, point["step"])
        for name, value in weights.items():
            torch.testing.assert_close(recorded.weights[name], value, atol=1e-6, rtol=1e-5)
            value.grad = recorded.gradient[name]
        square = sum(float(g.double().square().sum()) for g in recorded.gradient.values())
        assert point["square"] == pytest.approx(square)
        adam.step()


def test_dropout_is_off_for_the_gradient_and_on_for_the_update(tmp_path: Path):
    without, _ = trained(tmp_path / "without", dropout=0.0)
    with_dropout, _ = trained(tmp_path / "with", dropout=0.5)
    first = [load_step(tmp_path / name, 1).gradient for name in ("without", "with")]
    for name, gradient in first[0].items():
        assert torch.equal(gradient, first[1][name])
    pairs = zip(without.parameters(), with_dropout.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs)


class KilledError(Exception):
    """Stands for a kill: nothing is caught or written after it."""


class Mortal(TabularTask):
    """Dies in the update of a step."""

    def __init__(self, calls: int) -> None:
        super().__init__(TabularClassification(num_classes=3))
        self.calls = calls

    def logits_and_targets(self, model: nn.Module, batch: Any) -> Any:
        if model.training:
            self.calls -= 1
            if self.calls < 0:
                raise KilledError
        return super().logits_and_targets(model, batch)


@pytest.mark.parametrize(
    ("calls", "resume_every_seconds"), [(0, 0.0), (1, 0.0), (8, 0.0), (7, 1e9)]
)
def test_a_training_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, calls: int, resume_every_seconds: float
):
    model, points = trained(tmp_path / "whole")
    more = {"resume_every_seconds": resume_every_seconds}
    with pytest.raises(KilledError):
        trained(tmp_path / "killed", task=Mortal(calls), **more)
    assert (tmp_path / "killed" / "resume").exists() == (resume_every_seconds == 0 and calls > 0)
    again, resumed = trained(tmp_path / "killed", **more)
    assert resumed == points
    assert step_bytes(tmp_path / "killed") == step_bytes(tmp_path / "whole")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_weights_of_a_step_can_be_put_back_buffers_too(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    target = drawn(8)
    lengths, budget = target_lengths(target, batch_size=4, batch_tokens=100)
    schedule = target_schedule(lengths, seed=1, budget=budget, epochs=2)
    settings = Train(lr=0.1, weight_decay=0, warmup=0, schedule="constant", clip_norm=0)
    optimiser = Optimiser(model, settings, seed=1, total_steps=4, device=CPU)
    points = record(optimiser, TASK, target, lengths=lengths, budget=budget, schedule=schedule,
                    recording=recording(tmp_path, every=3))  # fmt: skip
    assert [point["step"] for point in points] == [1, 4]
    recorded = load_step(tmp_path, 4)
    assert int(recorded.buffers["1.num_batches_tracked"]) == 3
    fresh = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    put(fresh, recorded)
    assert torch.equal(dict(fresh.named_buffers())["1.running_mean"],
                       recorded.buffers["1.running_mean"])  # fmt: skip


def test_a_minibatch_is_within_both_bounds():
    long = table(np.zeros((50, 4)), np.zeros(50))
    lengths = np.array([3] * 40 + [60] * 10)
    encoded = Encoded(lengths=lengths, num_scored=lengths, truncated=long.truncated,
                      arrays=long.arrays, problems={})  # fmt: skip
    counts, budget = target_lengths(encoded, batch_size=7, batch_tokens=128)
    assert 7 * counts.min() <= budget < 8 * counts.min()
    assert budget // counts.max() == 2
    counts, budget = target_lengths(drawn(300), batch_size=100, batch_tokens=8192)
    assert target_schedule(counts, seed=0, budget=budget, epochs=10).total_steps == 30


@pytest.mark.parametrize(
    ("total", "every", "wanted"),
    [(10, "auto", (1, 10)), (100, "auto", (1, 100)), (101, "auto", (2, 51)),
     (300, "auto", (3, 100)), (10, 3, (3, 4)), (9, 100, (100, 1))],
)  # fmt: skip
def test_how_many_steps_are_evaluated(total: int, every: Any, wanted: tuple[int, int]):
    gap, steps = evaluated_steps(total, every)
    assert (gap, len(steps)) == wanted
    assert steps[0] == 1


def test_what_the_disk_cannot_hold_is_refused_before_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = SimpleNamespace(total=1 << 40, used=0, free=(256 << 20) + 2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="evaluated steps with 1 seeds") as caught:
        trained(tmp_path)
    assert "score.scorers.dvgs.every" in caught.value.fix or "free some space" in caught.value.fix
    assert not (tmp_path / "steps").exists()


def test_the_disk_must_hold_the_trainings_that_are_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    size = sum(p.numel() for p in network().parameters())
    usage = SimpleNamespace(total=0, used=0, free=(256 << 20) + 6 * 8 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    trained(tmp_path / "one")
    with pytest.raises(ConfigError, match="2 seeds") as caught:
        trained(tmp_path / "two", runs=2)
    assert "every to 4 or more" in caught.value.fix


def test_a_target_that_makes_training_diverge_is_said(tmp_path: Path):
    with pytest.raises(DivergedError, match="the loss on the target at step"):
        trained(tmp_path, lr=1e30)


def test_no_parameter_of_that_name_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match="no parameter") as caught:
        trained(tmp_path, measures=lambda name: "lora" in name)
    assert "0.weight" in caught.value.fix


def test_a_step_that_is_gone_is_named(tmp_path: Path):
    trained(tmp_path)
    step_path(tmp_path, 3).unlink()
    with pytest.raises(InputError, match="step-000003"):
        load_step(tmp_path, 3)


def test_mlp_is_measured_too(tmp_path: Path):
    torch.manual_seed(1)
    model = MLP(num_features=4, num_classes=3, hidden=(5,)).eval()
    assert np.isfinite(values_of(model, drawn(6), drawn(5, 1))["cosine"]).all()
