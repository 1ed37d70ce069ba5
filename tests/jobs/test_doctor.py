"""The doctor finds what is missing, doubled, foreign, or computed wrongly."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_classifier, save_language_model

import curate
from curate.config import to_yaml
from curate.errors import ConfigError
from curate.models.tasks.causal_lm import CausalLMTask
from jobs import doctor
from jobs.doctor import Check, checks
from jobs.model_check import check_model


def by_name(found: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends other distributions: `versions(dask="1")`; None is not installed."""
    real = doctor.version

    def pretend(**fakes: str | None) -> None:
        def version(name: str) -> str:
            key = name.replace("-", "_")
            if key not in fakes:
                return real(name)
            found = fakes[key]
            if found is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr(doctor, "version", version)

    return pretend


def test_this_machine_is_ready():
    found = list(checks())
    assert [check for check in found if check.state == "bad"] == []
    names = by_name(found)
    assert names["torch"].text == torch.__version__
    assert "cores" in names["machine"].text
    assert "free" in names["disk (here)"].text


def test_two_faiss_packages_are_told(versions: Callable[..., None]):
    versions(faiss_cpu="1.15.1", faiss_gpu="1.15.1", faiss_gpu_cu12=None, faiss_gpu_cuvs=None)
    check = by_name(checks())["faiss"]
    assert check.state == "bad"
    assert check.text.startswith("faiss-cpu 1.15.1, faiss-gpu 1.15.1: all of them own")
    assert "uninstall all of them" in check.fix


def test_no_faiss_is_only_a_note(versions: Callable[..., None]):
    versions(faiss_cpu=None, faiss_gpu=None, faiss_gpu_cu12=None, faiss_gpu_cuvs=None)
    assert by_name(checks())["faiss"].state == "note"


def test_dask_and_distributed_of_different_versions_are_told(versions: Callable[..., None]):
    versions(dask="2026.3.0", distributed="2026.8.0")
    check = by_name(checks())["dask"]
    assert check.state == "bad"
    assert "dask 2026.3.0, distributed 2026.8.0: they belong together" in check.text


def test_a_missing_library_is_told(versions: Callable[..., None]):
    versions(accelerate=None)
    assert by_name(checks())["accelerate"] == Check(
        "accelerate", "bad", "not installed", "pip install accelerate"
    )


def test_a_foreign_jobs_package_is_told_and_not_run(tmp_path: Path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise SystemExit('it ran')")
    # The working folder comes first on the path of `python -c`, as with PYTHONPATH.
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from curate.cli import main\nsys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    document = json.loads(done.stdout)
    assert document["bad"] == 1
    (check,) = document["checks"]
    assert check["name"] == "package jobs"
    assert check["text"] == f"`import jobs` finds {tmp_path / 'jobs'}, which is not part of curate"


def test_a_command_with_a_foreign_jobs_package_says_so(tmp_path: Path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from curate.cli import main\nsys.exit(main(['status', 'anywhere']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 6
    assert f"`import jobs` finds {tmp_path / 'jobs'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_ours_are_found_where_curate_is():
    from curate.cli.imports import foreign_packages, rivals

    assert (Path(curate.__file__).parents[1] / "jobs").is_dir()
    assert foreign_packages() == {}
    assert rivals() == {}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_is_computed_right(tmp_path: Path, kind: str):
    fields: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2} if kind == "gpt2" else {}
    folder = save_language_model(tmp_path / "model", kind=kind, **fields)
    found = by_name(check_model(str(folder), None))
    assert [check.state for check in found.values()] == ["ok", "ok", "ok"]
    assert set(found) == {"model: logits", "model: padding", "model: loss"}


def test_a_classifier_is_computed_right(tmp_path: Path):
    folder = save_classifier(tmp_path / "model")
    assert [check.state for check in check_model(str(folder), None)] == ["ok", "ok", "ok"]


def test_a_model_that_is_computed_wrongly_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_language_model(tmp_path / "model")
    right = CausalLMTask.logits_and_targets

    def wrong(self: CausalLMTask, model: Any, batch: Any) -> Any:
        flat = right(self, model, batch)
        return flat._replace(logits=flat.logits * 1.1)

    monkeypatch.setattr(CausalLMTask, "logits_and_targets", wrong)
    check = by_name(check_model(str(folder), None))["model: logits"]
    assert check.state == "bad"
    assert "more than rounding explains" in check.text


def test_the_model_of_settings_is_checked(tmp_path: Path):
    folder = save_language_model(tmp_path / "model")
    values: dict[str, Any] = {
        "run": "r",
        "sources": {"a": {"path": "x"}},
        "task": {"kind": "causal-lm"},
        "model": {"name": str(folder)},
    }
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(values))
    assert all(check.state == "ok" for check in check_model(None, config))
    config.write_text(to_yaml({**values, "model": {"config": {"model_type": "llama"}}}))
    with pytest.raises(ConfigError, match="makes its model from scratch"):
        list(check_model(None, config))
