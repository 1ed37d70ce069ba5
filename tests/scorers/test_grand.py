"""GraNd against autograd on single examples, through the whole way from a table to a column."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, save_classifier, save_language_model
from torch import Tensor, nn
from torch.nn import functional

import curate
from curate.models.load import load_model
from curate.models.mlp import MLP
from curate.models.quantities import FORWARD, GRADIENT, measure
from curate.models.settings import CausalLM, Model
from curate.models.tasks import build_task
from scorers.el2n import EL2N
from scorers.grand import GraNd

TEXTS = ["the cat in the hat", "in", "the longest of them all, by far the longest", "a a a a a a"]


def norm_of(loss: Tensor, model: nn.Module) -> float:
    grads: Any = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5


def test_the_norm_is_divided_by_the_root_of_the_counted_positions():
    quantities = {
        "grad_sq_norm": torch.tensor([36.0, 0, 4]),
        "num_positions": torch.tensor([9, 1, 1]),
    }
    found = GraNd().score(quantities)
    torch.testing.assert_close(found["grand_sum"], torch.tensor([6.0, 0, 2]))
    torch.testing.assert_close(found["grand"], torch.tensor([2.0, 0, 2]))


def test_a_language_model_has_the_norms_of_single_sequences(tmp_path: Path):
    folder = save_language_model(tmp_path / "lm")
    found = curate.score(
        pl.DataFrame({"text": TEXTS}), scorers=["grand"], model=folder, task="causal-lm"
    )
    tokenizer = byte_tokenizer()
    model: Any = load_model(Model(name=str(folder)), CausalLM()).model.double()
    for text, grand, total in zip(TEXTS, found["grand"], found["grand_sum"], strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        if tokenizer(text).input_ids[0] == tokenizer.bos_token_id:
            ids = ids[:, 1:]
        logits = model(input_ids=ids).logits[0, :-1]
        wanted = norm_of(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"), model)
        assert total == pytest.approx(wanted, rel=1e-5)
        assert grand == pytest.approx(wanted / (ids.shape[1] - 1) ** 0.5, rel=1e-5)


def test_a_text_classifier_counts_one_position(tmp_path: Path):
    folder = save_classifier(tmp_path / "classifier", num_labels=3)
    frame = pl.DataFrame({"text": TEXTS, "label": [0, 2, 1, 1]})
    found = curate.score(
        frame,
        scorers=["grand"],
        model=folder,
        task={"kind": "text-classification", "num_classes": 3},
    )
    assert found["grand"].to_list() == found["grand_sum"].to_list()
    assert found["grand"].is_between(1e-4, 1e4).all()


@pytest.fixture(scope="module")
def digits_like(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame]:
    folder = tmp_path_factory.mktemp("mlp")
    torch.manual_seed(0)
    MLP(num_features=4, num_classes=3, hidden=(8,)).save_pretrained(folder)
    numbers = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    return folder, pl.DataFrame({"x": numbers, "label": [i % 3 for i in range(40)]})


def scored(world: tuple[Path, pl.DataFrame], *scorers: str) -> pl.DataFrame:
    task = {"kind": "tabular-classification", "num_classes": 3}
    return curate.score(world[1], scorers=list(scorers), model=world[0], task=task, features="x")


def test_a_table_has_the_norms_of_single_rows(digits_like: tuple[Path, pl.DataFrame]):
    folder, frame = digits_like
    found = scored(digits_like, "grand")
    model = MLP.from_pretrained(folder).double()
    for row, grand in zip(frame.iter_rows(named=True), found["grand"], strict=True):
        logits = model(torch.tensor([row["x"]]))
        wanted = norm_of(functional.cross_entropy(logits, torch.tensor([row["label"]])), model)
        assert grand == pytest.approx(wanted, rel=1e-5)


def test_forward_scores_are_the_same_with_and_without_it(
    digits_like: tuple[Path, pl.DataFrame],
):
    alone, both = scored(digits_like, "el2n", "loss"), scored(digits_like, "el2n", "grand", "loss")
    for column in alone.columns:
        np.testing.assert_allclose(both[column], alone[column], rtol=1e-6, atol=1e-7)


def test_with_one_linear_layer_it_is_the_error_norm_times_the_length_of_the_input(
    tmp_path: Path,
):
    torch.manual_seed(0)
    MLP(num_features=4, num_classes=3, hidden=()).save_pretrained(tmp_path)
    numbers = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    frame = pl.DataFrame({"x": numbers, "label": [i % 3 for i in range(20)]})
    found = scored((tmp_path, frame), "el2n", "grand")
    length = np.sqrt((numbers.astype(np.float64) ** 2).sum(1) + 1)  # the bias sees a 1
    np.testing.assert_allclose(found["grand"], found["el2n"] * length, rtol=1e-5)


def test_before_training_it_follows_the_length_of_the_input(tmp_path: Path):
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    features, labels = features[:300].astype(np.float32) / 16, labels[:300]
    frame = pl.DataFrame({"x": features, "label": labels})
    runs: list[np.ndarray] = []
    for seed in range(10):
        torch.manual_seed(seed)
        MLP(num_features=64, num_classes=10, hidden=(256,)).save_pretrained(tmp_path)
        task = {"kind": "tabular-classification", "num_classes": 10}
        found = curate.score(frame, scorers=["grand"], model=tmp_path, task=task, features="x")
        runs.append(found["grand"].to_numpy())
    length = pl.Series("length", np.linalg.norm(features, axis=1))
    table = pl.DataFrame({"grand": np.mean(runs, axis=0), "length": length})
    correlation = table.select(pl.corr("grand", "length", method="spearman")).item()
    assert correlation > 0.8


def test_an_example_with_a_loss_that_is_not_finite_is_not_scored(
    digits_like: tuple[Path, pl.DataFrame],
):
    folder, frame = digits_like
    numbers = frame["x"].to_numpy().copy()
    numbers[7] = 3e38
    huge = frame.with_columns(pl.Series("x", numbers))
    found = scored((folder, huge), "grand")
    assert found["grand"].null_count() == 1
    assert found["grand"][7] is None
    whole = scored(digits_like, "grand")["grand"]
    rest = [i for i in range(40) if i != 7]
    np.testing.assert_allclose(found["grand"].gather(rest), whole.gather(rest), rtol=1e-5)


def test_a_pass_without_gradients_measures_none_and_says_nothing_of_them(tmp_path: Path):
    loaded = load_model(Model(name=str(save_language_model(tmp_path / "lm"))), CausalLM())
    task = build_task(CausalLM(), loaded.tokenizer)
    encoded = task.encode(pl.DataFrame({"text": TEXTS}))
    how: dict[str, Any] = {"batch_tokens": 64, "device": loaded.device}
    plain, _ = measure(loaded.model, task, encoded, **how)
    assert plain.keys() == FORWARD.keys()
    more, _ = measure(loaded.model, task, encoded, **how, wanted=GraNd.needs | EL2N.needs)
    assert more.keys() == FORWARD.keys() | GRADIENT.keys()
    assert all(not p.requires_grad or p.grad is None for p in loaded.model.parameters())
