"""GraNd from sketched norms, through the whole way from a table to a column."""

import logging
from pathlib import Path

import polars as pl
import pytest
from tiny_models import save_language_model

import curate
from curate.models.gradients.groups import Squared, matching, parse_name
from curate.models.gradients.sketch import Sketch

TEXTS = ["the cat in the hat and the dog " * 9, "a b c d e f " * 30, "short"]


def grand(folder: Path, **options: str) -> pl.DataFrame:
    table = pl.DataFrame({"text": TEXTS})
    return curate.score(
        table, scorers=[{"grand": options}], model=str(folder), task="causal-lm", device="cpu"
    )


def test_sketched_norms_are_near_the_exact_ones_and_the_log_says_how_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    folder = save_language_model(tmp_path / "m")
    exact = grand(folder)["grand"]
    monkeypatch.setattr("curate.models.gradient_pass.Sketch", lambda: Sketch(15))
    with caplog.at_level(logging.INFO):
        sketched = grand(folder, norm="sketched")["grand"]
    error = ((sketched - exact) / exact).abs()
    assert 1e-5 < float(error.max() or 0) < 0.3  # pyright: ignore[reportArgumentType]
    assert "sketched gradient norms of" in caplog.text


def test_a_sketched_quantity_has_a_name_of_its_own():
    for one in (Squared("all", None, True), Squared("self_attn", "layer_0", True)):
        assert parse_name(one.name) == one
        assert parse_name(one._replace(sketched=False).name) == one._replace(sketched=False)
    held = ["grad_sq_norm/head", "sketched_grad_sq_norm/head"]
    assert matching(["sketched_grad_sq_norm/*"], held) == ["sketched_grad_sq_norm/head"]
