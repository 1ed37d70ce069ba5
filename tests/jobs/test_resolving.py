"""Resolved settings mean the same from any folder and on any day."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from curate.config import plain
from jobs.resolving import resolved
from jobs.settings import Settings, parse_settings

SHA = "0123456789abcdef0123456789abcdef01234567"


def settings(**more: Any) -> Settings:
    return parse_settings({"run": "run", "sources": {"a": {"path": "d.parquet"}}, **more})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Stands for the hub: answers with `answer`, or raises it; lists what was asked."""

    def install(answer: Any) -> list[str]:
        asked: list[str] = []

        def repo_info(_: HfApi, name: str, *, repo_type: str) -> SimpleNamespace:
            asked.append(f"{repo_type} {name}")
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(sha=answer)

        monkeypatch.setattr(HfApi, "repo_info", repo_info)
        return asked

    return install


def test_local_paths_become_absolute_and_addresses_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "tokens"):
        (tmp_path / name).mkdir()
    full = resolved(
        settings(
            sources={
                "a": {"path": "data/*.parquet"},
                "b": {"path": ["s3://bucket/x.parquet", "~/y.parquet"]},
                "c": {"path": "pkg://json"},
            },
            model={"name": "model"},
            plan={"tokenizer": "tokens"},
            score={"scorers": ["length", {"own:Score": {"path": "q.parquet", "column": "q"}}]},
        )
    )
    assert full.sources["a"].path == str(tmp_path / "data/*.parquet")
    assert full.sources["b"].path == ("s3://bucket/x.parquet", str(Path.home() / "y.parquet"))
    assert full.sources["c"].path == "pkg://json"
    assert (full.model.name, full.model.revision) == (str(tmp_path / "model"), None)
    assert full.plan.tokenizer == str(tmp_path / "tokens")
    assert full.score.named["own:Score"] == {"path": str(tmp_path / "q.parquet"), "column": "q"}
    assert full.run == str(tmp_path / "run")
    assert resolved(full) == full


def test_hub_names_are_pinned_to_the_commit_of_today(hub: Callable[[Any], list[str]]):
    asked = hub(SHA)
    full = resolved(
        settings(
            model={"name": "owner/model"},
            sources={"a": {"path": "hf://datasets/owner/data/train"},
                     "b": {"path": "owner/other", "format": "datasets"}},
        )
    )  # fmt: skip
    assert full.model.revision == full.sources["a"].revision == SHA
    assert full.sources["b"].path == "owner/other"
    assert asked == ["dataset owner/data", "dataset owner/other", "model owner/model"]


def test_a_pinned_revision_stays_when_the_hub_moves_on(hub: Callable[[Any], list[str]]):
    first = resolved(settings(model={"name": "owner/model", "revision": "v1"}))
    asked = hub(SHA)
    again = resolved(settings(model={"name": "owner/model"}), old=plain(first))
    assert again.model.revision == "v1"
    other = resolved(settings(model={"name": "owner/new"}), old=plain(first))
    assert other.model.revision == SHA
    assert asked == ["model owner/new"]


def test_without_a_network_the_local_cache_says_which_commit(
    hub: Callable[[Any], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub(ConnectionError("no network"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolved(settings(model={"name": "owner/model"})).model.revision is None
    ref = tmp_path / "models--owner--model" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text(SHA)
    assert resolved(settings(model={"name": "owner/model"})).model.revision == SHA


def test_tables_of_external_scores_are_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tables = {"quality": "q.parquet", "stars": {"path": "s.csv", "on": "id"}}
    full = resolved(settings(score={"scorers": ["random", {"external": tables}]}))
    assert full.score.named["external"] == {
        "quality": str(tmp_path / "q.parquet"),
        "stars": {"path": str(tmp_path / "s.csv"), "on": "id"},
    }


def test_local_names_in_task_adapter_and_options_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else `curate run RUN/config.yaml` means something else from another folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("start", "adapter"):
        (tmp_path / name).mkdir()
    full = resolved(
        settings(
            model={"name": "start", "adapter": "adapter"},
            task={"kind": "preference", "reference": "start"},
            score={"scorers": [{"label_issues": {"probabilities": "mine.parquet"}}]},
        )
    )
    assert full.model.adapter == str(tmp_path / "adapter")
    assert full.task["reference"] == str(tmp_path / "start")
    assert full.score.named["label_issues"]["probabilities"] == str(tmp_path / "mine.parquet")
    hub_id = settings(task={"kind": "preference", "reference": "owner/model"})
    assert resolved(hub_id).task["reference"] == "owner/model"
