"""The card of a run: what it tells comes from the plan, and not from where the run lies."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from curate.config import plain
from curate.data.files import read_json
from jobs.plan import plan_run
from jobs.settings import parse_settings
from jobs.write import write_run
from jobs.write_card import told_settings
from tests.jobs.scored_run import POOL, scored_run

PLAN = {"score": "el2n", "keep": 0.5, "drop": "loss > 1.5"}


def card_of(root: Path, **settings: Any) -> str:
    root.mkdir()
    made = scored_run(root, plan=PLAN, **settings)
    plan_run(made, pool=POOL)
    write_run(made, pool=POOL)
    return (Path(made.run) / "shards" / "README.md").read_text()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return card_of(tmp_path_factory.mktemp("card") / "one")


def test_the_card_has_the_numbers_of_the_plan(tmp_path: Path):
    text = card_of(tmp_path / "run")
    summary = read_json(tmp_path / "run/run/plan/summary.json")
    kept = summary["kept"]["rows"]
    assert f"{kept:,} are kept ({100 * summary['kept']['row_share']:.1f} %)" in text
    for reason, number in summary["reasons"].items():
        assert (f"| `{reason}` |" in text) == bool(number)
    entry = summary["domains"]["large"]
    assert f"| large | {entry['rows']:,} | {entry['kept_rows']:,} |" in text
    assert "for which `loss > 1.5`" in text


def test_two_runs_in_different_places_have_the_same_card(tmp_path: Path, text: str):
    other = card_of(tmp_path / "somewhere else")
    assert other == text
    assert str(tmp_path) not in other
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["plan"] == PLAN
    assert settings["sources"] == {
        "web": {"path": "data", "text": "text", "domain": "topic", "label": "kind"}
    }


def test_a_licence_changes_the_card_and_nothing_else(tmp_path: Path):
    made = scored_run(tmp_path, plan=PLAN)
    plan_run(made, pool=POOL)
    write_run(made, pool=POOL)
    before = Path(made.run) / "shards"
    shutil.copytree(before, tmp_path / "before")
    values = plain(made)
    values["sources"]["web"]["license"] = "odc-by"
    again = write_run(parse_settings(values), pool=POOL)
    assert again["done"] == 0
    for path in (tmp_path / "before").rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert (
                path.read_bytes() == (before / path.relative_to(tmp_path / "before")).read_bytes()
            )
    assert "license: odc-by\n" in (before / "README.md").read_text()


def test_settings_are_told_without_defaults_and_without_places():
    settings = parse_settings(
        {
            "run": "/home/me/runs/x",
            "seed": 3,
            "sources": {
                "a": {"path": ["/home/me/data/*.parquet", "hf://datasets/o/n"], "text": "t"},
                "b": {"path": "/home/me/b.jsonl"},
            },
            "model": {"name": "/home/me/models/small", "device": "cpu"},
            "score": {"scorers": ["el2n", {"external": {"path": "/home/me/table.parquet"}}]},
            "cluster": {"kind": "inline"},
        }
    )
    found = told_settings(plain(settings))
    assert found["seed"] == 3
    assert found["sources"]["a"] == {"path": ["data/*.parquet", "hf://datasets/o/n"], "text": "t"}
    assert found["model"] == {"name": "small"}
    assert found["score"]["scorers"][1] == {"external": {"path": "table.parquet"}}
    assert set(found) == {"seed", "sources", "model", "score"}
    assert "/home" not in str(found)
