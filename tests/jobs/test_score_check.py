"""What a scorer needs of the settings is missed before anything is indexed or trained."""

from pathlib import Path
from typing import Any

import pytest

from curate.errors import ConfigError, CurateError, InputError
from jobs.score_check import check_scores
from jobs.settings import Settings, parse_settings

TRAIN = {"epochs": 2, "save_every_epochs": 1}


def settings(folder: Path, scorer: Any, **sections: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(folder / "run"),
        "sources": {"a": {"path": str(folder / "absent.parquet"), "features": "x"}},
        "task": {"kind": "tabular-classification", "num_classes": 2},
        "model": {"config": {"model_type": "mlp", "hidden": [4]}},
        "checkpoints": {"train": TRAIN},
        "score": {"scorers": [scorer]},
    }
    return parse_settings({**values, **sections})


@pytest.mark.parametrize(
    ("options", "train", "count"),
    [
        ({}, {"epochs": 1}, 1),
        ({"stage": "early"}, TRAIN, 2),
        ({"stage": "late"}, {"epochs": 0.2, "save_every_epochs": 0.1}, 2),
        ({}, {"epochs": 5, "save_every_epochs": 1, "max_steps": 1}, 1),
    ],
)
def test_a_training_that_saves_too_few_checkpoints_for_vog(
    tmp_path: Path, options: Any, train: Any, count: int
):
    one = settings(tmp_path, {"vog": options}, checkpoints={"train": train})
    with pytest.raises(ConfigError, match=f"at most {count} of each seed") as told:
        check_scores(one)
    assert "save_every_epochs" in told.value.fix


@pytest.mark.parametrize("names", ["last", ["seed-0/step-000010"]])
def test_a_choice_of_one_checkpoint_is_too_few_for_vog(tmp_path: Path, names: Any):
    score = {"scorers": ["vog"], "checkpoints": names}
    with pytest.raises(ConfigError, match="at most 1"):
        check_scores(settings(tmp_path, "vog", score=score))


@pytest.mark.parametrize("checkpoints", [{}, {"paths": ["one"]}])
def test_a_single_model_is_too_few_for_vog(tmp_path: Path, checkpoints: Any):
    with pytest.raises(ConfigError, match="there is 1"):
        check_scores(settings(tmp_path, "vog", checkpoints=checkpoints))


@pytest.mark.parametrize(
    ("options", "train"),
    [
        ({}, TRAIN),
        ({"stage": "early"}, {"epochs": 2.5, "save_every_epochs": 1}),
        ({"stage": "late"}, {"epochs": 0.3, "save_every_epochs": 0.1}),
    ],
)
def test_enough_checkpoints_pass(tmp_path: Path, options: Any, train: Any):
    check_scores(settings(tmp_path, {"vog": options}, checkpoints={"train": train}))
    named = {"scorers": ["vog"], "checkpoints": ["seed-0/step-000001", "seed-0/step-000002"]}
    check_scores(settings(tmp_path, "vog", score=named))


PAIRS = {"kind": "preference"}
TEXTS = {"kind": "causal-lm"}


@pytest.mark.parametrize(
    ("scorer", "sections", "said"),
    [
        ("vog", {"task": PAIRS}, "pairs of texts"),
        ("dvgs", {}, "with a target"),
        ("dvgs", {"target": {"path": "x.parquet"}, "model": {}}, "trains a model on the target"),
        ("pvi", {"task": PAIRS}, "left out"),
        (
            "pvi",
            {"task": TEXTS, "sources": {"a": {"path": "x", "text": "body"}}},
            "a plain text has no input",
        ),
        ("pvi", {"model": {}}, "none to start from"),
        ("aum_threshold", {"task": TEXTS}, "no classes"),
        ("aum_threshold", {"checkpoints": {}}, "nothing says how"),
    ],
)
def test_what_does_not_suit_a_scorer_is_refused(
    tmp_path: Path, scorer: str, sections: dict[str, Any], said: str
):
    with pytest.raises(ConfigError, match=said):
        check_scores(settings(tmp_path, scorer, **sections))


def test_a_target_that_is_not_there_is_named(tmp_path: Path):
    target = {"path": str(tmp_path / "trusted.parquet"), "features": "x"}
    with pytest.raises(InputError, match=r"^target\.path .*trusted"):
        check_scores(settings(tmp_path, "dvgs", target=target))


def test_a_table_of_probabilities_that_is_not_there_is_named(tmp_path: Path):
    scorer = {"label_issues": {"probabilities": str(tmp_path / "mine.parquet")}}
    with pytest.raises(CurateError, match=r"mine\.parquet"):
        check_scores(settings(tmp_path, scorer))
