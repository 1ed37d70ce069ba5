"""The script for a machine with a GPU is in order: it runs here on a model of a few weights."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_gradients.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_gradients", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", ["tiny", "tiny-lora"])
def test_the_script_measures_every_way_and_packs_rightly(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if shape == "tiny-lora":
        pytest.importorskip("peft")
    figures = tmp_path / "figures.json"
    main = script().main
    main(["--shape", shape, "--device", "cpu", "--steps", "1", "--rows", "2", "--no-compile",
          "--json", str(figures)])  # fmt: skip
    found = json.loads(figures.read_text())
    assert found["packed_difference"] < 1e-5
    assert [line["what"] for line in found["lines"]][:2] == ["plain step", "exact norm"]
    assert all(line["tokens_per_second"] > 0 for line in found["lines"])
    assert "| exact norm |" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here"):
        script().main(["--shape", "1b"])
