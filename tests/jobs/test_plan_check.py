"""A plan that reads columns which nothing makes is refused before anything runs."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from curate.errors import ConfigError, InputError
from jobs.plan_check import check_plan
from jobs.settings import Settings, parse_settings


def settings(folder: Path, score: str, *scorers: Any) -> Settings:
    return parse_settings(
        {
            "run": str(folder / "run"),
            "sources": {"a": {"path": str(folder / "data.parquet"), "text": "text"}},
            "score": {"scorers": list(scorers)},
            "plan": {"score": score},
        }
    )


@pytest.mark.parametrize(
    "score", ["el2n", "el2n_std", "0.5*rank(el2n) + 0.5*rank(loss)", "el2n.num_scored", "quality"]
)
def test_columns_of_chosen_scorers_are_known_before_they_are_made(tmp_path: Path, score: str):
    table = tmp_path / "quality.csv"
    pl.DataFrame({"source": ["a"], "file": ["f"], "row": [0], "quality": [1.0]}).write_csv(table)
    external = {"external": {"judge": str(table)}}
    check_plan(settings(tmp_path, score, "el2n", "loss", external))


def test_a_typo_names_the_nearest_column(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"eln2(.|\n)*el2n"):
        check_plan(settings(tmp_path, "eln2", "el2n", "length"))


def test_a_score_without_any_scorer_is_refused(tmp_path: Path):
    with pytest.raises(InputError):
        check_plan(settings(tmp_path, "el2n"))


def test_columns_that_only_the_model_knows_are_believed(tmp_path: Path):
    by_layer = {"grand": {"by_layer": True}}
    for score in ("grand_layer_0", "rank(grand_head) - rank(grand_layer_11_std)", "grand"):
        check_plan(settings(tmp_path, score, by_layer))
    with pytest.raises(ConfigError, match="grand_layer_0"):
        check_plan(settings(tmp_path, "grand_layer_0", "grand"))
    with pytest.raises(ConfigError, match="gradn"):
        check_plan(settings(tmp_path, "gradn", by_layer))


def test_the_share_that_windows_scored_can_be_read(tmp_path: Path) -> None:
    task = {"kind": "causal-lm", "max_tokens": 64, "window": {"overlap": 16}}
    sources = {"web": {"path": str(tmp_path), "text": "text"}}
    values = {"run": str(tmp_path / "run"), "sources": sources, "score": {"scorers": ["loss"]},
              "plan": {"score": "loss * scored_share"}}  # fmt: skip
    check_plan(parse_settings({**values, "task": task}))
    with pytest.raises(ConfigError, match="scored_share"):
        check_plan(parse_settings({**values, "task": {"kind": "causal-lm"}}))
