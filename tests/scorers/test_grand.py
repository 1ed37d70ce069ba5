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
from curate.errors import ConfigError
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


def scored(world: tuple[Path, pl.DataFrame], *scorers: Any) -> pl.DataFrame:
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
    more, _ = measure(loaded.model, task, encoded, **how, wanted=GraNd().needs | EL2N.needs)
    assert more.keys() == FORWARD.keys() | GRADIENT.keys()
    assert all(not p.requires_grad or p.grad is None for p in loaded.model.parameters())


def grads_of(folder: Path, text: str) -> dict[str, Tensor]:
    """Gradients of one text's summed loss, in float64, by autograd; a tied head has its own."""
    tokenizer = byte_tokenizer()
    model: Any = load_model(Model(name=str(folder)), CausalLM()).model.double()
    if model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
    if tokenizer(text).input_ids[0] == tokenizer.bos_token_id:
        ids = ids[:, 1:]
    loss = functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:],
                                    reduction="sum")  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(names, grads, strict=True))


def length_of(grads: dict[str, Tensor], part: str) -> float:
    return sum(float(g.square().sum()) for name, g in grads.items() if part in name) ** 0.5


def score_texts(folder: Path, **options: Any) -> pl.DataFrame:
    return curate.score(
        pl.DataFrame({"text": TEXTS}), scorers=[{"grand": options}], model=folder, task="causal-lm"
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_of_the_head_it_is_the_gradient_of_the_last_layer_alone(
    tmp_path: Path, tied: bool, pieces: bool, monkeypatch: pytest.MonkeyPatch
):
    if pieces:
        monkeypatch.setattr("curate.models.gradients.softmax.KEPT_NUMBERS", {"cpu": 0})
        monkeypatch.setattr("curate.models.gradients.softmax.BLOCK_NUMBERS", {"cpu": 400})
    folder = save_language_model(tmp_path / "lm", tie_word_embeddings=tied)
    found = score_texts(folder, parameters="head")
    for text, total in zip(TEXTS, found["grand_sum"], strict=True):
        wanted = length_of(grads_of(folder, text), "lm_head")
        assert total == pytest.approx(wanted, rel=1e-5)


def test_capped_logits_have_the_gradient_of_the_last_layer_too(tmp_path: Path):
    folder = save_language_model(
        tmp_path / "lm", kind="gemma2", head_dim=8, final_logit_softcapping=2.0
    )
    found = score_texts(folder, parameters="head")
    for text, total in zip(TEXTS, found["grand_sum"], strict=True):
        wanted = length_of(grads_of(folder, text), "lm_head")
        assert total == pytest.approx(wanted, rel=1e-5)


def test_of_the_head_it_is_el2n_times_the_length_of_the_features(
    digits_like: tuple[Path, pl.DataFrame],
):
    folder, frame = digits_like
    found = scored(digits_like, "el2n", {"grand": {"parameters": "head"}})
    model = MLP.from_pretrained(folder).double()
    with torch.no_grad():
        features = model.layers[:-1](torch.tensor(frame["x"].to_numpy()).double())
    length = (features.square().sum(1) + 1).sqrt().numpy()  # the bias sees a 1
    np.testing.assert_allclose(found["grand"], found["el2n"] * length, rtol=1e-5)


def test_an_expression_chooses_parameters_by_name(tmp_path: Path):
    folder = save_language_model(tmp_path / "lm")
    found = score_texts(folder, parameters=r"mlp\.(up|down)")
    for text, total in zip(TEXTS, found["grand_sum"], strict=True):
        grads = grads_of(folder, text)
        wanted = (length_of(grads, "mlp.up") ** 2 + length_of(grads, "mlp.down") ** 2) ** 0.5
        assert total == pytest.approx(wanted, rel=1e-5)


def test_groups_of_layers_have_their_own_columns(tmp_path: Path):
    folder = save_language_model(tmp_path / "lm", num_hidden_layers=2)
    found = score_texts(folder, by_layer=True)
    parts = {
        "grand_embeddings": "embed_tokens",
        "grand_layer_0": "layers.0.",
        "grand_layer_1": "layers.1.",
        "grand_final": "model.norm",
        "grand_head": "lm_head",
    }
    assert set(found.columns) == {"grand", "grand_sum", "num_scored", *parts}
    for row, text in enumerate(TEXTS):
        grads, root = grads_of(folder, text), found["num_scored"][row] ** 0.5
        for column, part in parts.items():
            wanted = length_of(grads, part) / root
            assert found[column][row] == pytest.approx(wanted, rel=1e-5), column
    squares = sum(found[column] ** 2 for column in parts)
    np.testing.assert_allclose(squares, found["grand"] ** 2, rtol=1e-5)  # pyright: ignore


def test_all_that_scorers_ask_for_comes_from_one_pass(tmp_path: Path):
    loaded = load_model(Model(name=str(save_language_model(tmp_path / "lm"))), CausalLM())
    task = build_task(CausalLM(), loaded.tokenizer)
    encoded = task.encode(pl.DataFrame({"text": TEXTS}))
    how: dict[str, Any] = {"batch_tokens": 100_000, "device": loaded.device}
    scorers = [GraNd(), GraNd(parameters="head"), GraNd(parameters="mlp", by_layer=True)]
    alone = [measure(loaded.model, task, encoded, **how, wanted=s.needs)[0] for s in scorers]
    calls: list[int] = []
    handle = loaded.model.base_model.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    union = frozenset[str]().union(*(scorer.needs for scorer in scorers))
    together, _ = measure(loaded.model, task, encoded, **how, wanted=union)
    handle.remove()
    # The engine's check on two examples runs it twice, the pass itself once.
    assert len(calls) == 3
    assert together.keys() == set().union(*alone)
    for found in alone:
        for name, values in found.items():
            torch.testing.assert_close(together[name], values, rtol=1e-6, atol=1e-7, msg=name)


def test_of_the_head_alone_the_body_has_no_graph(tmp_path: Path):
    loaded = load_model(Model(name=str(save_language_model(tmp_path / "lm"))), CausalLM())
    task = build_task(CausalLM(), loaded.tokenizer)
    encoded = task.encode(pl.DataFrame({"text": TEXTS}))
    seen: list[bool] = []
    body: Any = loaded.model.base_model
    body.register_forward_hook(lambda _m, _a, output: seen.append(output[0].requires_grad))
    needs = GraNd(parameters="head").needs
    measure(loaded.model, task, encoded, batch_tokens=64, device=loaded.device, wanted=needs)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": "("}, "no regular expression"),
        ({"parameters": ""}, "empty"),
        ({"parameters": "head", "by_layer": True}, "nothing to divide"),
        ({"parameters": "no_such_layer"}, r"no parameter .* 'no_such_layer'"),
    ],
)
def test_options_that_choose_nothing_are_refused(
    digits_like: tuple[Path, pl.DataFrame], options: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        scored(digits_like, {"grand": options})
