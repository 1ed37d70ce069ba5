"""`curate show --score` between the scores and a plan."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import byte_tokenizer

Curate = Callable[..., Any]
"""Runs a command: code, out, err."""
Config = Callable[..., Path]
"""Writes settings."""


@pytest.fixture
def run(curate: Curate, config: Config, tmp_path: Path) -> Path:
    """Scored, but not planned: nothing has counted tokens."""
    assert curate("score", config(plan={}), "-q").code == 0
    return tmp_path / "run"


def test_scores_are_shown_before_there_is_a_plan(curate: Curate, run: Path):
    result = curate("show", run, "--score", "random", "--examples", "40", "--json")
    assert result.code == 0, result.err
    shown = [one["score"] for one in json.loads(result.out)["highest"]]
    assert len(shown) > 1
    assert shown == sorted(shown, reverse=True)


def test_tokens_that_are_not_counted_yet_are_no_damage(
    curate: Curate, config: Config, tmp_path: Path
):
    byte_tokenizer(merges=False).save_pretrained(tmp_path / "bytes")
    path = config(plan={"tokenizer": str(tmp_path / "bytes")})
    assert curate("score", path, "-q").code == 0
    run = tmp_path / "run"
    result = curate("show", run, "--score", "random * num_tokens")
    assert result.code == 3
    assert "have not been counted yet" in result.err
    assert "damaged" not in result.err
    assert f"curate plan {run}" in result.err
    assert curate("plan", run, "-q").code == 0
    assert curate("show", run, "--score", "random * num_tokens").code == 0


def test_characters_need_no_counting(curate: Curate, run: Path):
    assert curate("show", run, "--score", "random * num_tokens").code == 0
