from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, classifier_tokenizer, save_classifier
from torch.nn import functional

from curate.errors import ConfigError
from curate.models.load import load_model
from curate.models.mlp import MLP
from curate.models.quantities import measure
from curate.models.settings import Model, TabularClassification, TextClassification
from curate.models.tasks import build_task

TEXTS = ["the cat in the hat", "a", "in the longest of them all", "ü?"]
CPU = torch.device("cpu")


def text_fields(labels: list[int | None]) -> pl.DataFrame:
    return pl.DataFrame({"text": TEXTS, "label": pl.Series(labels, dtype=pl.Int64)})


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_texts_are_scored_as_the_model_scores_each_alone(tmp_path: Path, kind: str):
    """llama finds the end of a text by its padding token, so that padding could change it."""
    settings = TextClassification(num_classes=3, max_tokens=64)
    folder = save_classifier(tmp_path / kind, kind=kind)
    loaded = load_model(Model(name=str(folder), device="cpu"), settings)
    task = build_task(settings, loaded.tokenizer, max_positions=loaded.max_positions)
    encoded = task.encode(text_fields([0, 1, 2, 1]))
    tokenizer = classifier_tokenizer()
    for budget in (1, 4096):
        found, _ = measure(loaded.model, task, encoded, batch_tokens=budget, device=CPU)
        for index, (text, label) in enumerate(zip(TEXTS, [0, 1, 2, 1], strict=True)):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = loaded.model(input_ids=ids).logits[0]
            error = logits.softmax(-1) - functional.one_hot(torch.tensor(label), 3)
            loss = functional.cross_entropy(logits, torch.tensor(label))
            assert found["error_norms"][index].item() == pytest.approx(
                error.norm().item(), abs=1e-6
            )
            assert found["loss"][index].item() == pytest.approx(loss.item(), abs=1e-5)
            assert found["num_scored"][index].item() == ids.shape[1]


def test_special_tokens_surround_the_text_even_where_it_is_cut():
    tokenizer = classifier_tokenizer()
    task = build_task(TextClassification(num_classes=2, max_tokens=5), tokenizer)
    encoded = task.encode(text_fields([0, 1, 0, 1]))
    first, last = (tokenizer.convert_tokens_to_ids(name) for name in ("[CLS]", "[SEP]"))
    batch = task.collate(encoded, [0, 1])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["input_ids"][0, 0] == batch["input_ids"][1, 0] == first
    assert batch["input_ids"][0, 4] == batch["input_ids"][1, 2] == last
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert encoded.truncated.tolist() == [True, False, True, False]
    assert encoded.num_scored.tolist()[:2] == [5, 3]


def test_the_positions_of_the_model_cut_the_text_too():
    tokenizer = classifier_tokenizer()
    task = build_task(TextClassification(num_classes=2), tokenizer, max_positions=7)
    assert task.encode(text_fields([0] * 4)).lengths.max() == 7
    assert task.facts() == {"max_tokens": 7}


def test_a_text_without_a_label_is_not_scored():
    task = build_task(TextClassification(num_classes=3), classifier_tokenizer())
    encoded = task.encode(text_fields([0, None, 2, 1]))
    assert (encoded.num_scored > 0).tolist() == [True, False, True, True]


def test_a_label_outside_the_classes_is_refused():
    task = build_task(TextClassification(num_classes=3), classifier_tokenizer())
    with pytest.raises(ConfigError, match="label 3 does not exist"):
        task.encode(text_fields([0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"label": [0]}, "no text column"), ({"text": ["a"]}, "no label column")],
)
def test_a_missing_field_is_named(columns: dict[str, Any], message: str):
    task = build_task(TextClassification(num_classes=3), classifier_tokenizer())
    with pytest.raises(ConfigError, match=message):
        task.encode(pl.DataFrame(columns))


def test_a_task_for_text_needs_a_tokenizer_with_some_padding():
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        build_task(TextClassification(num_classes=2), None)
    with pytest.raises(ConfigError, match="neither a padding token nor an end-of-text"):
        build_task(TextClassification(num_classes=2), byte_tokenizer(eos=False))


def test_numbers_are_scaled_and_scored_row_by_row():
    torch.manual_seed(0)
    network = MLP(num_features=3, num_classes=4, hidden=(5,)).eval()
    rows = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    labels = np.arange(9) % 4
    task = build_task(TabularClassification(num_classes=4, scale=0.25), None)
    for features in (
        pl.Series("features", rows, dtype=pl.Array(pl.Float32, 3)),
        pl.Series("features", rows.tolist(), dtype=pl.List(pl.Float64)),
    ):
        fields = pl.DataFrame([features, pl.Series("label", labels)])
        found, _ = measure(network, task, task.encode(fields), batch_tokens=4, device=CPU)
        with torch.no_grad():
            wanted = functional.cross_entropy(
                network(torch.from_numpy(rows / 4)), torch.from_numpy(labels), reduction="none"
            )
        torch.testing.assert_close(found["loss"], wanted)


def test_rows_with_missing_numbers_are_not_scored():
    task = build_task(TabularClassification(num_classes=2), None)
    features = pl.Series([[1.0, 2.0], [1.0, None], None, [3.0, float("inf")]])
    encoded = task.encode(pl.DataFrame({"features": features, "label": [0, 1, 0, 1]}))
    assert encoded.num_scored.tolist() == [1, 0, 0, 0]


def test_rows_of_different_width_are_refused():
    task = build_task(TabularClassification(num_classes=2), None)
    fields = pl.DataFrame({"features": [[1.0], [1.0, 2.0]], "label": [0, 1]})
    with pytest.raises(ConfigError, match="between 1 and 2 features"):
        task.encode(fields)


def test_the_training_loss_is_the_mean_over_the_batch():
    torch.manual_seed(0)
    network = MLP(num_features=2, num_classes=2)
    task = build_task(TabularClassification(num_classes=2), None)
    fields = pl.DataFrame({"features": [[1.0, 2.0], [0.0, -1.0]], "label": [0, 1]})
    encoded = task.encode(fields)
    loss = task.loss(network, task.collate(encoded, [0, 1]))
    found, _ = measure(network, task, encoded, batch_tokens=2, device=CPU)
    torch.testing.assert_close(loss.detach(), found["loss"].mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
