"""Planning and writing ask no model library, even where models were trained; nothing is missed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from e2e.small_run import write_config

from curate.cli import main
from curate.data.layout import RunFolder

ROOT = Path(__file__).parents[2]


def values(folder: Path, **more: Any) -> dict[str, Any]:
    """A run that trains its tokenizer and its model."""
    return {
        "run": str(folder / "run"),
        "sources": {"a": {"path": str(folder / "a.parquet"), "text": "text"}},
        "task": {"kind": "causal-lm", "max_tokens": 16},
        "model": {
            "config": {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
                       "num_hidden_layers": 1, "num_attention_heads": 1,
                       "num_key_value_heads": 1, "max_position_embeddings": 16},
            "tokenizer": {"train": "bpe", "vocab_size": 300},
        },
        "checkpoints": {"train": {"seeds": [0], "lr": 1e-3}},
        "score": {"scorers": ["el2n", "random"]},
        "plan": {"score": "el2n", "keep": 0.5},
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    texts = [f"text number {i} says {'yes' if i % 2 else 'no'}" for i in range(40)]
    pl.DataFrame({"text": texts}).write_parquet(folder / "a.parquet")
    path = write_config(folder / "c.yaml", values(folder))
    assert main(["run", str(path), "-q"]) == 0
    return folder


LIGHT = """
import json, sys
from curate.cli import main
assert main([*{arguments!r}, "-q", "--json"]) == 0
heavy = {{"torch", "transformers", "tokenizers", "distributed"}} & set(sys.modules)
print("HEAVY", *sorted(heavy))
"""


def run_alone(*arguments: str) -> tuple[dict[str, Any], list[str]]:
    """The JSON that a command prints in a process of its own, and which libraries it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments)],
        check=True, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    document, _, heavy = done.stdout.rpartition("HEAVY")
    return json.loads(document), heavy.split()


@pytest.mark.parametrize("command", ["plan", "write"])
def test_no_model_library_is_loaded_for_a_run_whose_model_is_trained(trained: Path, command: str):
    document, heavy = run_alone(command, str(trained / "run"))
    assert heavy == []
    assert {summary["done"] for summary in document["stages"].values()} == {0}


def test_another_plan_is_made_without_them_too(trained: Path):
    more = ("--set", "plan.keep=0.3", "--set", "mix.mixer=unimax")
    document, heavy = run_alone("write", str(trained / "run"), *more)
    assert heavy == []
    assert document["stages"]["plan"]["done"] == 1
    assert document["stages"]["write"]["done"] == 1


def test_a_plan_by_a_score_that_reads_the_target_only_loads_none_of_them(tmp_path: Path):
    """No vectors are made there, so that the target is all that was embedded."""
    texts = [f"text number {i} says {'yes' if i % 2 else 'no'}" for i in range(40)]
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"text": texts[1::2]}).write_parquet(tmp_path / "t.parquet")
    path = write_config(
        tmp_path / "c.yaml",
        {
            "run": str(tmp_path / "run"),
            "sources": {"pool": {"path": str(tmp_path / "a.parquet"), "text": "text"}},
            "target": {"path": str(tmp_path / "t.parquet"), "text": "text"},
            "score": {"scorers": ["dsir"]},
            "plan": {"score": "dsir", "keep": 0.5},
        },
    )
    assert main(["run", str(path), "-q"]) == 0
    document, heavy = run_alone("plan", str(tmp_path / "run"))
    assert heavy == []
    assert {summary["done"] for summary in document["stages"].values()} == {0}


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, where anything may be changed."""
    shutil.copytree(trained, tmp_path / "copy", copy_function=shutil.copy2)
    text = (tmp_path / "copy" / "run" / "config.yaml").read_text()
    moved = text.replace(str(trained), str(tmp_path / "copy"))
    (tmp_path / "copy" / "run" / "config.yaml").write_text(moved)
    assert main(["plan", str(tmp_path / "copy" / "run"), "-q"]) == 0
    return tmp_path / "copy" / "run"


def planned(run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", str(run), "-q", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)["stages"]


def test_what_is_missing_or_changed_is_still_found(run: Path, capsys: pytest.CaptureFixture[str]):
    assert planned(run, capsys)["score"]["done"] == 0
    (part,) = RunFolder(run).partitions()
    RunFolder(run).scores(part, "el2n").path.unlink()
    planned(run, capsys)
    assert RunFolder(run).scores(part, "el2n").path.exists()
    (checkpoint,) = (run / "checkpoints" / "seed-0").glob("step-*")
    RunFolder(run).quantities(part, f"seed-0-{checkpoint.name}").path.write_bytes(b"")
    assert planned(run, capsys)["score"]["done"] == 1
    before = json.loads((run / "manifest.json").read_text())["stages"]["score"]["files"]
    stages = planned(run, capsys, "--set", "checkpoints.train.lr=0.01")
    assert (stages["train"]["done"], stages["score"]["done"]) == (1, 1)
    after = json.loads((run / "manifest.json").read_text())["stages"]["score"]["files"]
    assert before != after
    stages = planned(run, capsys, "--set", "score.scorers=[loss]", "--set", "plan.score=loss")
    assert stages["score"]["scorers"].keys() == {"loss"}


def test_new_data_is_trained_on_and_scored(run: Path, capsys: pytest.CaptureFixture[str]):
    path = run.parent / "a.parquet"
    frame = pl.read_parquet(path)
    pl.concat([frame, pl.DataFrame({"text": ["one more text"]})]).write_parquet(path)
    stages = planned(run, capsys)
    assert (stages["train"]["done"], stages["score"]["done"]) == (1, 1)
    assert stages["score"]["rows"] == 41
