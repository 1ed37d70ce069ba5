"""What `curate compare` prints."""

import json
from pathlib import Path

import pytest

from curate.cli import main
from curate.cli.compare import comparison_lines
from jobs.compare import judge_results

_ROWS = """arm,seed,metric,value
random,0,accuracy,0.80
random,1,accuracy,0.82
random,2,accuracy,0.81
mine,0,accuracy,0.95
mine,1,accuracy,0.96
mine,2,accuracy,0.955
same,0,accuracy,0.80
same,1,accuracy,0.82
same,2,accuracy,0.81
short,0,accuracy,0.9
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    path.write_text(_ROWS)
    return path


def test_a_file_of_numbers_gives_table_and_sentences(
    results: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["compare", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "accuracy, higher is better"
    assert lines[2].split()[:3] == ["arm", "tokens", "passes"]
    assert lines[3].split()[0] == "random"  # the yardstick stands first
    assert any(line.startswith("mine helps: accuracy 0.955 against 0.81") for line in lines)
    assert any(line.startswith("same is not distinguishable from random: its") for line in lines)
    assert any(line.startswith("short: no verdict, only one of short and") for line in lines)
    assert not any("scale" in line or "cost" in line for line in lines)


def test_json_holds_every_number(results: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(results), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    verdict = next(v for v in value["verdicts"] if v["arm"] == "mine")
    assert verdict["word"] == "helps"
    assert verdict["test"]["num"] == 3
    assert verdict["shared_luck"] == 1.0
    assert verdict["detectable_difference"] > 0


def test_an_arm_that_was_drawn_anew_needs_less(results: Path):
    fixed = judge_results(results)["verdicts"][0]
    redrawn = judge_results(results, redrawn=("mine",))["verdicts"][0]
    assert redrawn["corrected_p"] < fixed["corrected_p"]
    assert redrawn["detectable_difference"] < fixed["detectable_difference"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--better", "up"], 2, "--better is up"),
        (["--metric", "loss"], 2, "there is no loss\n"),
        (["--set", "compare.metric=loss"], 2, "numbers in a file are judged without settings"),
        (["--out", "run"], 2, "numbers in a file are judged without settings"),
    ],
)
def test_wrong_options_are_told(
    results: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
):
    assert main(["compare", str(results), *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_missing_file_is_missing_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(tmp_path / "none.csv")]) == 3
    assert "there is no file" in capsys.readouterr().err


def test_arms_on_the_same_data_are_told_once(results: Path):
    summary = judge_results(results)
    summary["arms"] = {"same": {"same_as": "mine", "epochs": 1.0, "tokens": 5}}
    lines = comparison_lines(summary, "run")
    assert not any(line.startswith("same is") for line in lines)
    assert any(line.endswith("(the same data as mine)") for line in lines)


def test_nothing_to_measure_on_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = Path(__file__).parents[2] / "configs" / "compare-digits.yaml"
    run = tmp_path / "run"
    given = ["--set", "index.held_out=0", "--out", str(run)]
    assert main(["compare", str(settings), *given]) == 2
    assert "nothing is left to measure the arms on" in capsys.readouterr().err
    assert not run.exists()


def test_a_mixer_that_trains_is_no_mixer_of_an_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = Path(__file__).parents[2] / "configs" / "compare-digits.yaml"
    arm = "[{name: learned, rules: {keep: 0.5}, mix: {mixer: doremi}}]"
    run = tmp_path / "run"
    assert main(["compare", str(settings), "--set", f"compare.arms={arm}", "--out", str(run)]) == 2
    assert "arm learned: the mixer doremi trains models of its own" in capsys.readouterr().err
    assert not run.exists()
