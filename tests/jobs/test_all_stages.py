"""Which stages a command runs, and what is noted of those that fail."""

from pathlib import Path
from typing import Any

import pytest

from curate.errors import CurateError
from jobs import all_stages
from jobs.all_stages import STAGES, Stage, failures, load, run_stages, stages_for
from jobs.cluster import Cluster, open_pool
from jobs.settings import Settings, parse_settings

SCRATCH = {
    "task": {"kind": "causal-lm"},
    "model": {"config": {"model_type": "llama"}, "tokenizer": {"train": "bpe"}},
    "checkpoints": {"train": {}},
}


def settings(**more: Any) -> Settings:
    return parse_settings({"run": "r", "sources": {"a": {"path": "d.parquet"}}, **more})


def names(command: str, **more: Any) -> list[str]:
    return [stage.name for stage in stages_for(settings(**more), command)]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_address_of_a_stage_leads_somewhere(stage: Stage):
    assert callable(load(stage.run))
    assert callable(load(stage.state))
    assert stage.measure is None or callable(load(stage.measure))


def test_stages_stand_behind_what_they_need():
    order = [stage.name for stage in STAGES]
    for stage in STAGES:
        assert all(order.index(name) < order.index(stage.name) for name in stage.needs)


@pytest.mark.parametrize(
    ("command", "more", "expected"),
    [
        ("index", {}, "index"),
        ("train", SCRATCH, "index tokenizer train"),
        ("score", {"score": {"scorers": ["random"]}}, "index score"),
        ("score", {**SCRATCH, "score": {"scorers": ["el2n"]}}, "index tokenizer train score"),
        ("mix", {"mix": {"mixer": "natural"}}, "index lengths mix"),
        ("mix", {**SCRATCH, "mix": {"mixer": "natural"}}, "index tokenizer lengths mix"),
        ("plan", {}, "index lengths plan"),
        ("plan", {"score": {"scorers": ["random"]}}, "index lengths plan"),
        (
            "plan",
            {"score": {"scorers": ["random"]}, "plan": {"score": "random"}},
            "index score lengths plan",
        ),
        ("write", {"mix": {"mixer": "natural"}}, "index lengths mix plan write"),
        ("run", {}, "index lengths plan write"),
        ("run", {"score": {"scorers": ["random"]}}, "index score lengths plan write"),
        (
            "run",
            {**SCRATCH, "score": {"scorers": ["el2n"]}, "mix": {"mixer": "natural"}},
            "index tokenizer train score lengths mix plan write",
        ),
    ],
)
def test_a_command_runs_what_it_needs_and_no_more(
    command: str, more: dict[str, Any], expected: str
):
    assert names(command, **more) == expected.split()


def test_a_failure_is_noted_until_the_stage_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full = settings(run=str(tmp_path))
    error: CurateError | None = CurateError("2 of 5 tasks failed; x: broken", fix="mend it")
    error.tasks = ["x", "y"]

    def stage_run(*_: object, **__: object) -> dict[str, int]:
        if error is not None:
            raise error
        return {"done": 1}

    monkeypatch.setattr(all_stages, "load", lambda _: stage_run)
    stages = [stage for stage in STAGES if stage.name == "index"]
    with open_pool(Cluster()) as pool:
        with pytest.raises(CurateError, match="2 of 5"):
            run_stages(full, stages, pool=pool)
        assert failures(tmp_path) == {
            "index": {"what": "2 of 5 tasks failed; x: broken", "tasks": ["x", "y"]}
        }
        error = None
        assert run_stages(full, stages, pool=pool) == {"index": {"done": 1}}
    assert failures(tmp_path) == {}
