"""What every scorer of the catalog promises, whatever it measures."""

from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import save_classifier, save_language_model

import curate
from curate.config import resolve
from curate.models.mlp import MLP
from curate.models.quantities import LOG, QUANTITIES
from jobs.chosen import chosen_scorers
from scorers.catalog import EXTERNAL, SCORERS, build_scorer

NAMES = [name for name in SCORERS if name != EXTERNAL]
KINDS = {entry.name: entry.kind for entry in chosen_scorers({name: {} for name in NAMES})}
MEASURED = [name for name in NAMES if KINDS[name] in ("pass", "plain")]
LOGGED = [name for name in NAMES if KINDS[name] == "log"]
WORDS = ["the", "cat", "in", "a", "hat", "then", "sat", "there", "until", "dawn"]
TEXTS = [" ".join(WORDS[(i * k) % 10] for k in range(1, 2 + i % 11)) for i in range(30)]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Task -> what `curate.score` needs for it."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    MLP(num_features=3, num_classes=4, hidden=(8,)).save_pretrained(root / "mlp")
    labels = pl.Series("label", [i % 4 for i in range(30)])
    numbers = np.random.default_rng(0).normal(size=(30, 3))
    return {
        "causal-lm": {
            "dataset": pl.DataFrame({"text": TEXTS}),
            "task": "causal-lm",
            "model": save_language_model(root / "lm"),
        },
        "text-classification": {
            "dataset": pl.DataFrame({"text": TEXTS}).with_columns(labels),
            "task": {"kind": "text-classification", "num_classes": 4},
            "model": save_classifier(root / "classifier", num_labels=4),
        },
        "tabular-classification": {
            "dataset": pl.DataFrame({"x": numbers}).with_columns(labels),
            "task": {"kind": "tabular-classification", "num_classes": 4},
            "model": root / "mlp",
            "features": "x",
        },
    }


TASKS = ["causal-lm", "text-classification", "tabular-classification"]


def scored(
    world: dict[str, Any], name: str, rows: Sequence[int] | None = None, **more: Any
) -> pl.DataFrame:
    options = {**world, **more}
    dataset = options.pop("dataset")
    if rows is not None:
        dataset = dataset[list(rows)]
    return curate.score(dataset, scorers=[name], **options)


@pytest.mark.parametrize("name", NAMES)
def test_it_names_what_it_needs_and_what_it_gives(name: str):
    scorer = build_scorer(name, {})
    assert is_dataclass(scorer)
    assert scorer.needs <= QUANTITIES.keys() or KINDS[name] == "own"
    shape = (3, 2) if KINDS[name] == "log" else (2,)
    values = {need: torch.full(shape, 0.5) for need in scorer.needs}
    found = scorer.score(values)
    assert found.keys() == scorer.columns.keys()
    assert all(column.shape == (2,) for column in found.values())
    assert all(text for text in scorer.columns.values())


@pytest.mark.parametrize("name", SCORERS)
def test_it_has_a_page_that_says_when_not_to_trust_it(name: str):
    page = Path(__file__).parents[2] / "docs" / "scorers" / f"{name}.md"
    assert "## When not to trust it" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCORERS)
def test_its_file_opens_with_source_departures_and_cost(name: str):
    import inspect
    import sys

    kind = resolve(SCORERS, name, what="scorer")
    header = inspect.getdoc(sys.modules[kind.__module__]) or ""
    for section in ("Source:", "Departures:", "Cost:", "Shapes:"):
        assert section in header


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MEASURED)
def test_every_example_has_a_finite_score_and_the_same_one_twice(
    worlds: dict[str, dict[str, Any]], name: str, task: str
):
    world = worlds[task]
    first, second = scored(world, name), scored(world, name)
    assert first.height == 30
    for column in first:
        assert column.is_finite().all(), column.name
        assert column.null_count() == 0
    assert first.equals(second)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MEASURED)
def test_batch_size_matters_only_to_rounding(
    worlds: dict[str, dict[str, Any]], name: str, task: str
):
    whole = scored(worlds[task], name)
    for budget in (1, 64):
        small = scored(worlds[task], name, batch_tokens=budget)
        for column in whole.columns:
            # Perplexity is exp(loss): an absolute 1e-6 in the loss is a relative one here.
            np.testing.assert_allclose(small[column], whole[column], rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", [name for name in MEASURED if name != "random"])
def test_the_score_of_an_example_does_not_depend_on_its_neighbours(
    worlds: dict[str, dict[str, Any]], name: str, task: str
):
    order = list(np.random.default_rng(1).permutation(30)[:17])
    whole, some = scored(worlds[task], name), scored(worlds[task], name, rows=order)
    for column in whole.columns:
        np.testing.assert_allclose(some[column], whole[column].gather(order), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOGGED)
def test_a_history_is_read_example_by_example(name: str):
    draw = torch.Generator().manual_seed(0)
    history = {need: torch.rand(5, 20, generator=draw, dtype=torch.float64) for need in LOG}
    history["correct_by_epoch"] = history["correct_by_epoch"].round()
    order = torch.randperm(20, generator=draw)
    scorer = build_scorer(name, {})
    whole = scorer.score(history)
    some = scorer.score({need: values[:, order] for need, values in history.items()})
    for column, values in whole.items():
        assert values.isfinite().all()
        torch.testing.assert_close(some[column], values[order])


@pytest.mark.parametrize("name", LOGGED)
def test_what_was_never_trained_on_has_no_score_and_a_missed_epoch_leaves_one(name: str):
    history = {need: torch.full((4, 3), 0.75, dtype=torch.float64) for need in LOG}
    for values in history.values():
        values[:, 1] = torch.nan
        values[2, 2] = torch.nan
    for values in build_scorer(name, {}).score(history).values():
        assert values[0].isfinite()
        assert values[1].isnan()
        assert values[2].isfinite()
