"""Input gradients and their spread, against single examples, stacked formulas and closed forms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import save_classifier, save_language_model
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import ConfigError
from curate.models.input_gradients import How, input_gradients
from curate.models.input_spread import Moments, Spread, gradient_spread
from curate.models.load import load_model
from curate.models.mlp import MLP
from curate.models.resident import Resident
from curate.models.settings import (
    CausalLM,
    Model,
    TabularClassification,
    TextClassification,
)
from curate.models.tasks import Flat, build_task

CPU = torch.device("cpu")
TEXTS = ["the cat in the hat", "in", "the longest of them all, by far the longest", "a a a a a a"]
LABELS = [0, 2, 1, 1]


class Turns:
    """Models in a list, as they are."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = models

    def __len__(self) -> int:
        return len(self._models)

    def at(self, index: int) -> nn.Module:
        return self._models[index]


def spread(models: Sequence[nn.Module], task: Any, encoded: Any, **more: Any) -> Spread:
    how = How(**{k: more.pop(k) for k in list(more) if k in How.__dataclass_fields__})
    options: dict[str, Any] = {"batch_tokens": 64, **more}
    return gradient_spread(Turns(models), task, encoded, how=how, device=CPU, **options)


def stacked(gradients: Tensor) -> Tensor:
    """The definition, on all gradients (K, n) of one example at once."""
    return gradients.double().std(0, correction=0).mean()


def mlps(count: int, hidden: Sequence[int] = (8,), features: int = 4) -> list[MLP]:
    torch.manual_seed(0)
    return [MLP(num_features=features, num_classes=3, hidden=hidden).double() for _ in range(count)]


def table(rows: int = 30, features: int = 4) -> tuple[Any, Any, Tensor, Tensor]:
    """Task, encoded rows, their numbers and their labels."""
    numbers = np.random.default_rng(0).normal(size=(rows, features)).astype(np.float32)
    labels = [i % 3 for i in range(rows)]
    task = build_task(TabularClassification(num_classes=3), None)
    encoded = task.encode(pl.DataFrame({"features": numbers.tolist(), "label": labels}))
    return task, encoded, torch.from_numpy(numbers).double(), torch.tensor(labels)


def gradient_of(model: nn.Module, numbers: Tensor, label: int) -> Tensor:
    leaf = numbers.clone()[None].requires_grad_()
    model(leaf)[0, label].backward()
    assert leaf.grad is not None
    return leaf.grad[0]


def texts(folder: Path, count: int = 2, kind: str = "bert", **fields: Any) -> tuple[Any, Any, Any]:
    """Text classifiers that share nothing, their task and the encoded texts."""
    models: list[nn.Module] = []
    settings = TextClassification(num_classes=3, max_tokens=64)
    task: Any = None
    for seed in range(count):
        save_classifier(folder / str(seed), kind=kind, seed=seed, **fields)
        loaded = load_model(Model(name=str(folder / str(seed))), settings)
        models.append(loaded.model.double())
        task = build_task(settings, loaded.tokenizer)
    return models, task, task.encode(pl.DataFrame({"text": TEXTS, "label": LABELS}))


def by_embeddings(model: Any, ids: Tensor, label: int) -> Tensor:
    """The gradient of one text by transformers' own way in."""
    leaf = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
    model(inputs_embeds=leaf).logits[0, label].backward()
    return leaf.grad[0]


def ids_of(encoded: Any, index: int) -> Tensor:
    starts = encoded.arrays["starts"]
    return torch.from_numpy(encoded.arrays["tokens"][starts[index] : starts[index + 1]]).long()


def test_three_checkpoints_of_two_by_two_numbers_give_the_known_value():
    gradients = torch.tensor(
        [[[1.0, 0], [2, 2]], [[3, 0], [2, -1]], [[2, 0], [2, 2]]], dtype=torch.float64
    )
    moments = Moments(1, 4, gradients)
    for count, gradient in enumerate(gradients, start=1):
        moments.add(torch.tensor([0]), gradient.reshape(1, 4), count)
    found = moments.mean_deviation(torch.tensor([0]), 1, 3)
    # Not the mean variance 0.666667, nor its root.
    torch.testing.assert_close(
        found, torch.tensor([0.557678], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_a_batch_gives_every_row_the_gradient_it_has_alone():
    (model,) = mlps(1)
    task, encoded, numbers, labels = table()
    batch = task.collate(encoded, np.arange(30))
    found = input_gradients(model, task, batch, num_examples=30, how=How())
    wanted = torch.stack(
        [gradient_of(model, row, int(c)) for row, c in zip(numbers, labels, strict=True)]
    )
    torch.testing.assert_close(found.values.double(), wanted, rtol=1e-6, atol=1e-6)
    assert found.chosen.tolist() == labels.tolist()
    assert found.owner.tolist() == list(range(30))


def test_a_batch_gives_every_text_the_gradient_it_has_alone(tmp_path: Path):
    (model,), task, encoded = texts(tmp_path, 1)
    batch = task.collate(encoded, np.arange(4))
    found = input_gradients(model, task, batch, num_examples=4, how=How())
    for index, label in enumerate(LABELS):
        wanted = by_embeddings(model, ids_of(encoded, index), label)
        mine = found.values[found.owner == index]
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-8)


def test_a_classifier_that_finds_the_end_by_its_token_reads_no_padding(tmp_path: Path):
    (model,), task, encoded = texts(tmp_path, 1, kind="llama")
    batch = task.collate(encoded, np.arange(4))
    found = input_gradients(model, task, batch, num_examples=4, how=How())
    for index, label in enumerate(LABELS):
        wanted = by_embeddings(model, ids_of(encoded, index), label)
        mine = found.values[found.owner == index]
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-8)


def test_a_language_model_sums_the_logits_of_its_targets(tmp_path: Path):
    folder = save_language_model(tmp_path / "lm")
    loaded = load_model(Model(name=str(folder)), CausalLM())
    model: Any = loaded.model.double()
    task = build_task(CausalLM(), loaded.tokenizer)
    encoded = task.encode(pl.DataFrame({"text": TEXTS}))
    batch = task.collate(encoded, np.arange(4))
    found = input_gradients(model, task, batch, num_examples=4, how=How())
    for index in range(4):
        ids = ids_of(encoded, index)
        leaf = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
        logits = model(inputs_embeds=leaf).logits[0, :-1]
        logits.gather(1, ids[1:, None]).sum().backward()
        mine = found.values[found.owner == index]
        # The head works in the type of its weights; the sum is of float64 here.
        torch.testing.assert_close(mine, leaf.grad[0], rtol=1e-6, atol=1e-8)


def test_probabilities_and_predicted_classes_are_what_they_say():
    (model,) = mlps(1)
    task, encoded, numbers, labels = table(6)
    batch = task.collate(encoded, np.arange(6))
    shares = input_gradients(model, task, batch, num_examples=6, how=How(output="probability"))
    for index in range(6):
        leaf = numbers[index][None].requires_grad_()
        functional.softmax(model(leaf), 1)[0, labels[index]].backward()
        assert leaf.grad is not None
        torch.testing.assert_close(
            shares.values[index].double(), leaf.grad[0], rtol=1e-6, atol=1e-7
        )
    predicted = input_gradients(model, task, batch, num_examples=6, how=How(target="predicted"))
    assert predicted.chosen.tolist() == model(numbers).argmax(1).tolist()


def test_the_spread_equals_the_stacked_formula():
    models = mlps(5)
    task, encoded, numbers, labels = table()
    found = spread(models, task, encoded).mean_deviation
    for index in range(30):
        each = torch.stack([gradient_of(m, numbers[index], int(labels[index])) for m in models])
        assert found[index].item() == pytest.approx(stacked(each).item(), rel=1e-6)


def test_the_spread_of_texts_leaves_padding_out(tmp_path: Path):
    models, task, encoded = texts(tmp_path, 3)
    found = spread(models, task, encoded).mean_deviation
    for index, label in enumerate(LABELS):
        ids = ids_of(encoded, index)
        each = torch.stack([by_embeddings(model, ids, label) for model in models])
        assert found[index].item() == pytest.approx(stacked(each).item(), rel=1e-6)


def test_norms_of_tokens_and_gradients_of_length_one(tmp_path: Path):
    models, task, encoded = texts(tmp_path, 3)
    norms = spread(models, task, encoded, reduce="l2").mean_deviation
    units = spread(models, task, encoded, unit=True).mean_deviation
    for index, label in enumerate(LABELS):
        ids = ids_of(encoded, index)
        each = torch.stack([by_embeddings(model, ids, label) for model in models])
        assert norms[index].item() == pytest.approx(stacked(each.norm(dim=2)).item(), rel=1e-6)
        unit = each / each.flatten(1).norm(dim=1)[:, None, None]
        assert units[index].item() == pytest.approx(stacked(unit).item(), rel=1e-6)


def test_padding_tokens_change_nothing(tmp_path: Path):
    """Without the mask the mean would be over the padding too, n / (n + m) of what it is."""
    models, task, encoded = texts(tmp_path, 2)
    alone = [
        spread(models, task, encoded, batch_tokens=1).mean_deviation[index] for index in range(4)
    ]
    together = spread(models, task, encoded, batch_tokens=10_000).mean_deviation
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-6, atol=0)
    assert encoded.lengths.max() > 3 * encoded.lengths.min()


def test_batches_blocks_and_order_do_not_matter(tmp_path: Path):
    models, task, encoded = texts(tmp_path, 3)
    whole = spread(models, task, encoded).mean_deviation
    for budget in (1, 4096):
        for block_bytes in (1, 40_000):
            found = spread(models, task, encoded, batch_tokens=budget, block_bytes=block_bytes)
            torch.testing.assert_close(found.mean_deviation, whole, rtol=1e-6, atol=0)
    order = [2, 0, 3, 1]
    frame = pl.DataFrame({"text": TEXTS, "label": LABELS})[order]
    found = spread(models, task, task.encode(frame)).mean_deviation
    torch.testing.assert_close(found, whole[order], rtol=1e-6, atol=0)


def test_the_order_of_checkpoints_does_not_matter_and_equal_ones_give_nothing():
    models = mlps(4)
    task, encoded, _, _ = table()
    whole = spread(models, task, encoded).mean_deviation
    other = spread([models[k] for k in (2, 0, 3, 1)], task, encoded).mean_deviation
    torch.testing.assert_close(other, whole, rtol=1e-6, atol=0)
    same = spread([models[0]] * 4, task, encoded).mean_deviation
    assert same.abs().max() < 1e-7
    assert whole.min() > 1e-3


@pytest.mark.parametrize("factor", [3.0, -0.5])
def test_logits_times_a_number_give_its_size_times_the_spread(factor: float):
    models = mlps(3)
    task, encoded, _, _ = table()
    whole = spread(models, task, encoded).mean_deviation
    with torch.no_grad():
        for model in models:
            last = model.layers[-1]
            assert isinstance(last, nn.Linear)
            last.weight *= factor
    scaled = spread(models, task, encoded).mean_deviation
    torch.testing.assert_close(scaled, whole * abs(factor), rtol=1e-6, atol=0)


def test_with_a_linear_model_all_examples_of_a_class_tie():
    models = mlps(3, hidden=())
    task, encoded, _, labels = table()
    found = spread(models, task, encoded).mean_deviation
    weights = torch.stack([next(model.parameters()).detach() for model in models])  # (K, C, F)
    for label in range(3):
        mine = found[labels == label]
        assert mine.min() == mine.max()
        assert mine[0].item() == pytest.approx(stacked(weights[:, label]).item(), rel=1e-6)


class Colours(nn.Module):
    """(B, C) logits of (B, 3, 4, 4) images."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)
        ).double()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layers(pixel_values.double())


class ColourTask:
    """The least that a task of images does."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def collate(self, encoded: Any, indices: Any) -> dict[str, Tensor]:
        chosen = torch.as_tensor(np.asarray(indices))
        return {"pixel_values": self.images[chosen], "labels": chosen % 2}

    def pieces(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        logits = model(batch["pixel_values"])
        yield Flat(logits, batch["labels"], torch.arange(len(logits)))


def test_colour_channels_are_averaged_with_their_sign_before_the_spread():
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    models = [Colours(seed) for seed in range(3)]
    encoded = table(5)[1]
    task = ColourTask(images)
    mean = spread(models, task, encoded).mean_deviation
    each_channel = spread(models, task, encoded, channel="none").mean_deviation
    for index in range(5):
        gradients: list[Tensor] = []
        for model in models:
            leaf = images[index][None].requires_grad_()
            model(leaf)[0, index % 2].backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad[0])
        each = torch.stack(gradients)  # (K, 3, 4, 4)
        assert mean[index].item() == pytest.approx(stacked(each.mean(1)).item(), rel=1e-5)
        assert each_channel[index].item() == pytest.approx(stacked(each).item(), rel=1e-5)


def test_a_predicted_class_is_that_of_the_last_checkpoint_for_all():
    models = mlps(4)
    task, encoded, numbers, _ = table()
    found = spread(models, task, encoded, target="predicted")
    last = models[-1](numbers).argmax(1)
    assert found.chosen.tolist() == last.tolist()
    assert any(bool((m(numbers).argmax(1) != last).any()) for m in models[:-1])
    for index in range(30):
        each = torch.stack([gradient_of(m, numbers[index], int(last[index])) for m in models])
        assert found.mean_deviation[index].item() == pytest.approx(stacked(each).item(), rel=1e-6)


def test_a_row_that_is_not_finite_has_no_score_and_spoils_no_other():
    models = mlps(3)
    task, encoded, _, _ = table()
    whole = spread(models, task, encoded).mean_deviation
    encoded.arrays["features"][7] = np.nan
    found = spread(models, task, encoded).mean_deviation
    rest = [i for i in range(30) if i != 7]
    assert found[7].isnan()
    torch.testing.assert_close(found[rest], whole[rest], rtol=1e-6, atol=0)


def test_examples_that_do_not_count_are_not_shown():
    models = mlps(3)
    task, encoded, _, _ = table()
    whole = spread(models, task, encoded).mean_deviation
    encoded.num_scored[[0, 9]] = 0
    found = spread(models, task, encoded)
    assert found.mean_deviation[[0, 9]].isnan().all()
    assert found.chosen[[0, 9]].tolist() == [-1, -1]
    rest = [i for i in range(30) if i not in (0, 9)]
    torch.testing.assert_close(found.mean_deviation[rest], whole[rest], rtol=1e-6, atol=0)
    encoded.num_scored[:] = 0
    assert spread(models, task, encoded).mean_deviation.isnan().all()


def test_lack_of_memory_halves_the_batch_and_the_scores_stay():
    models = mlps(3)
    task, encoded, _, _ = table()
    whole = spread(models, task, encoded, batch_tokens=400).mean_deviation
    calls = iter([False, False, True])

    def fails(_module: Any, _args: Any) -> None:
        if next(calls, False):
            raise torch.OutOfMemoryError("out of memory")

    handle = models[0].register_forward_pre_hook(fails)
    found = spread([*models[:2], models[0]], task, encoded, batch_tokens=400)
    handle.remove()
    again = spread([*models[:2], models[0]], task, encoded, batch_tokens=400)
    assert found.passed.halved == 1
    torch.testing.assert_close(found.mean_deviation, again.mean_deviation, rtol=1e-6, atol=0)
    assert not torch.allclose(found.mean_deviation, whole)


def test_parameters_are_frozen_for_the_pass_alone():
    (model,) = mlps(1)
    task, encoded, _, _ = table()
    first = next(model.parameters())
    first.requires_grad_(False)
    spread([model, model], task, encoded)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_moving_embeddings_are_seen(tmp_path: Path):
    models, task, encoded = texts(tmp_path, 2)
    assert spread(models, task, encoded).moved is True
    models[1].get_input_embeddings().load_state_dict(models[0].get_input_embeddings().state_dict())
    assert spread(models, task, encoded).moved is False
    assert spread(mlps(2), *table()[:2]).moved is None


def test_half_precision_keeps_gradients_that_fp16_would_lose():
    (model,) = mlps(1, hidden=(64,))
    task, encoded, numbers, labels = table(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4e-4 if parameter.ndim == 2 else 0
    batch = task.collate(encoded, np.arange(8))
    wanted = torch.stack(
        [gradient_of(model, row, int(c)) for row, c in zip(numbers, labels, strict=True)]
    )
    half = input_gradients(model.half(), task, batch, num_examples=8, how=How()).values
    assert half.dtype == torch.float32
    assert 0 < wanted.abs().max() < 6e-7  # the finest step of fp16 is 6e-8
    error = (half.double() - wanted).norm() / wanted.norm()
    assert error < 0.01


def test_a_model_that_looks_its_tokens_up_twice_is_refused(tmp_path: Path):
    from transformers import (
        BartConfig,
        BartForSequenceClassification,
        T5Config,
        T5ForSequenceClassification,
    )

    _, task, encoded = texts(tmp_path, 1)
    small: dict[str, Any] = {"vocab_size": 300, "num_labels": 3}
    small["eos_token_id"] = int(ids_of(encoded, 0)[-1])
    shape: dict[str, Any] = {"d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    shape["decoder_start_token_id"] = 0
    t5 = T5ForSequenceClassification(T5Config(**small, **shape, d_model=16))
    shape = {f"{side}_{name}": 2 for side in ("encoder", "decoder")
             for name in ("layers", "attention_heads", "ffn_dim")}  # fmt: skip
    bart = BartForSequenceClassification(BartConfig(**small, **shape, d_model=16))
    for model in (t5.eval(), bart.eval()):
        with pytest.raises(ConfigError, match=rf"{type(model).__name__}.*no one input"):
            spread([model, model], task, encoded)


def test_a_batch_without_a_known_input_is_refused():
    class Sounds(ColourTask):
        def collate(self, encoded: Any, indices: Any) -> dict[str, Tensor]:
            return {"sound": torch.zeros(len(indices), 3), "labels": torch.zeros(len(indices))}

    with pytest.raises(ConfigError, match=r"needs one of input_ids.*holds labels, sound"):
        spread([Colours(0)] * 2, Sounds(torch.zeros(1)), table(5)[1])


def test_several_sequences_for_one_example_are_refused(tmp_path: Path):
    (model,), task, encoded = texts(tmp_path, 1)
    batch = task.collate(encoded, np.arange(4))
    with pytest.raises(ConfigError, match=r"batch of 2 holds input_ids \(4, \d+\)"):
        input_gradients(model, task, batch, num_examples=2, how=How())
    batch = {key: value.unflatten(0, (2, 2)) for key, value in batch.items()}
    with pytest.raises(ConfigError, match=r"batch of 2 holds input_ids \(2, 2, \d+\)"):
        input_gradients(model, task, batch, num_examples=2, how=How())


def test_a_model_without_a_way_back_is_refused():
    class Cut(Colours):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return super().forward(pixel_values).detach()

    with pytest.raises(ConfigError, match="outputs of Cut have no gradient"):
        spread([Cut(0)] * 2, ColourTask(torch.randn(5, 3, 4, 4)), table(5)[1])


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_checkpoints_take_turns_in_one_model_or_are_loaded(keep_bytes: int):
    models = mlps(3)
    loads: list[int] = []

    def load(index: int) -> nn.Module:
        loads.append(index)
        return models[index]

    resident = Resident(["a", "b", "c"], load, keep_bytes=keep_bytes)
    task, encoded, _, _ = table()
    wanted = spread(models, task, encoded).mean_deviation
    found = gradient_spread(
        resident, task, encoded, how=How(), device=CPU, batch_tokens=64, block_bytes=200
    )
    torch.testing.assert_close(found.mean_deviation, wanted, rtol=0, atol=0)
    assert len(resident) == 3
    assert (len(loads) == 3) == bool(keep_bytes)
    assert (resident.at(2) is resident.at(1)) == bool(keep_bytes)
    assert resident.at(2).state_dict().keys() == models[2].state_dict().keys()
    for name, value in models[2].state_dict().items():
        assert torch.equal(resident.at(2).state_dict()[name], value)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_a_checkpoint_of_another_shape_is_named(keep_bytes: int):
    models: list[nn.Module] = [*mlps(2), *mlps(1, hidden=(9,))]
    names = ["step-1", "step-2", "step-3"]
    with pytest.raises(ConfigError, match=r"step-3 has another architecture than step-1: layers"):
        Resident(names, lambda k: models[k], keep_bytes=keep_bytes).at(2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("target", ["label", "predicted"])
def test_a_gpu_gives_the_same_scores(tmp_path: Path, target: str):
    models, task, encoded = texts(tmp_path, 3)
    wanted = spread(models, task, encoded, target=target)
    cuda = torch.device("cuda")
    turns = Resident(["a", "b", "c"], lambda index: models[index].to(cuda))
    how = How(target=target)  # pyright: ignore[reportArgumentType]
    found = gradient_spread(turns, task, encoded, how=how, device=cuda, batch_tokens=64)
    torch.testing.assert_close(found.mean_deviation, wanted.mean_deviation, rtol=1e-6, atol=0)
    assert found.chosen.tolist() == wanted.chosen.tolist()


def disc_and_ring(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(600, 2) points of the two classes, their classes and their radii, mixed."""
    draw = np.random.default_rng(seed)
    labels = np.arange(600) % 2
    radius = np.where(labels == 0, draw.uniform(0, 1.2, 600), draw.uniform(1.4, 2.6, 600))
    angle = draw.uniform(0, 2 * np.pi, 600)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    order = draw.permutation(600)
    return (
        torch.from_numpy(points[order]).float(),
        torch.from_numpy(labels[order]),
        torch.from_numpy(radius[order]),
    )


@pytest.mark.slow
def test_scores_rise_towards_the_boundary_of_a_disc_and_a_ring():
    """The paper's Figure 1, five seeds: Spearman with the distance to the boundary below -0.85."""
    found: list[float] = []
    for seed in range(5):
        points, labels, radius = disc_and_ring(seed)
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
        )
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        kept: list[nn.Module] = []
        for epoch in range(1, 61):
            for batch in torch.randperm(400).split(50):
                optimiser.zero_grad()
                functional.cross_entropy(model(points[batch]), labels[batch]).backward()
                optimiser.step()
            if epoch % 12 == 0:
                copy = MLP(num_features=2, num_classes=2)
                copy.layers = nn.Sequential(*[type(m)(m.in_features, m.out_features)
                                              if isinstance(m, nn.Linear) else nn.Tanh()
                                              for m in model])  # fmt: skip
                copy.layers.load_state_dict(model.state_dict())
                kept.append(copy)
        task = build_task(TabularClassification(num_classes=2), None)
        frame = pl.DataFrame({"features": points[400:].tolist(), "label": labels[400:].numpy()})
        raw = spread(kept, task, task.encode(frame), batch_tokens=4096).mean_deviation
        scores = raw.clone()
        for label in range(2):
            mine = labels[400:] == label
            scores[mine] = (raw[mine] - raw[mine].mean()) / raw[mine].std(correction=0)
        away = (radius[400:] - 1.3).abs()
        ranks = pl.DataFrame({"score": scores.numpy(), "away": away.numpy()})
        found.append(ranks.select(pl.corr("score", "away", method="spearman")).item())
    assert len(found) == 5
    assert np.mean(found) < -0.85
