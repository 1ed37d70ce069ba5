"""What is due of a scorer with passes of its own, and what it leaves behind where one fails."""

from pathlib import Path

import pytest
from influence_world import INLINE, make_world, scored, settings_of, table

from curate.errors import CurateError
from jobs.score import plan_score, score_run


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def test_what_is_due_of_a_scorer_with_steps_of_its_own_is_named(world: Path):
    scored(settings_of(world, {}))
    state = plan_score(settings_of(world, {"damping": 0.2}))
    assert state.why == (
        "6 tasks of its own are due for influence:"
        " factors of the curvature, queries, scores, lists",
        "3 score tables are to be computed from what is measured",
    )
    more = settings_of(world, {}, score={"scorers": [{"influence": {"dtype": "float32"}}, "loss"]})
    assert plan_score(more).why[0] == "6 passes of a checkpoint over a partition are new"


def test_a_scorer_that_failed_leaves_its_columns_as_they_were_and_others_get_theirs(world: Path):
    """Neither values of other options, nor a mark that says they are those of the new ones."""
    scored(settings_of(world, {}))
    output = world / "run" / "scores" / "influence"
    before = {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
    scorers = [{"influence": {"tasks": "topics", "aggregate": "max"}}, "random", "loss"]
    settings = settings_of(world, {}, score={"scorers": scorers, "batch_tokens": 64})
    with pytest.raises(CurateError, match="no column 'topics'"):
        score_run(settings, pool=INLINE)
    assert {path: path.read_bytes() for path in before} == before
    assert table(settings, "scores/random").height == 30
    assert table(settings, "scores/loss").height == 30
    again = settings_of(world, {"aggregate": "max"})
    scored(again)
    assert any(path.read_bytes() != before[path] for path in before)
