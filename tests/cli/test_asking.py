"""`curate show RUN --query` as a user types it, from data to an answer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny_models import save_language_model

from curate.config import to_yaml

ROOT = Path(__file__).parents[2]


def curate(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "curate", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    texts = [f"the {a} cat sat in a {b}" for a in ("red", "old", "wet") for b in ("hat", "box")]
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "rows.parquet")
    pl.DataFrame({"text": ["a red hat"]}).write_parquet(tmp_path / "target.parquet")
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "sources": {"rows": {"path": str(tmp_path / "rows.parquet"), "text": "text"}},
        "target": {"path": str(tmp_path / "target.parquet"), "text": "text"},
        "task": {"kind": "causal-lm", "max_tokens": 64},
        "model": {"name": str(save_language_model(tmp_path / "lm")), "device": "cpu"},
        "index": {"held_out": 0.0},
        "score": {"scorers": [{"influence": {"metric": "cosine"}}]},
    }
    (tmp_path / "config.yaml").write_text(to_yaml(values))
    return tmp_path / "config.yaml"


@pytest.mark.slow
def test_a_text_is_answered_by_the_examples_like_it(config: Path):
    run = config.parent / "run"
    scored = curate("score", config)
    assert scored.returncode == 0, scored.stderr
    found = curate("show", run, "--query", "the old cat sat in a box", "--examples", 2)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0].startswith("run ")
    assert lines[1].endswith("metric cosine at 1 checkpoint")
    best = lines[lines.index("helps most") + 1]
    assert "rows/rows.parquet:3" in best
    assert best.endswith("the old cat sat in a box")
    assert best.split()[0] == "+1"
    assert len(lines[lines.index("hurts most") + 1 :]) == 2
    document = json.loads(curate("show", run, "--query", "the old cat", "--json").stdout)
    assert document["command"] == "show"
    assert [one["rank"] for one in document["helps"]] == [1, 2, 3]


def test_a_run_without_scores_is_told_what_to_do(config: Path):
    assert curate("index", config).returncode == 0
    found = curate("show", config.parent / "run", "--query", "a hat")
    assert found.returncode not in (0, 1)
    assert "no whole influence index" in found.stderr
    assert "run `curate score" in found.stderr
    assert "Traceback" not in found.stderr


def test_show_without_a_query_loads_no_torch(config: Path):
    assert curate("index", config).returncode == 0
    code = (
        "import sys\nfrom curate.cli import main\n"
        f"main(['show', {str(config.parent / 'run')!r}])\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
