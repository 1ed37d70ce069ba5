"""The doctor finds what is missing, doubled, foreign, or computed wrongly."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_models import save_classifier, save_language_model
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import curate
from curate.cli.tools import print_doctor
from curate.config import to_yaml
from curate.errors import ConfigError, CurateError
from curate.models.checkpoints import save_checkpoint
from curate.models.cnn import CNN
from curate.models.gradients import Engine, Gradients, squares
from curate.models.gradients.forms import Lookup
from curate.models.mlp import MLP
from curate.models.settings import TASKS
from curate.models.tasks.causal_lm import CausalLMTask
from jobs import doctor
from jobs.doctor import Check, checks
from jobs.model_check import check_model

ROOT = Path(__file__).parents[2]
GRADIENTS = [f"model: {name}" for name in ("gradients", "slopes", "rounding", "slow way", "time")]


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


def test_what_clusters_need_is_named_with_its_extra(versions: Callable[..., None]):
    versions(bokeh="3.4", dask_jobqueue=None, dask_cuda=None)
    found = by_name(checks())
    names = ("bokeh", "dask-jobqueue", "dask-cuda")
    assert [found[name].state for name in names] == ["ok", "note", "note"]
    assert found["bokeh"].text == "3.4"
    assert found["dask-jobqueue"].text == "not installed; cluster.kind slurm needs it"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    versions(bokeh=None, dask_jobqueue=None, dask_cuda=None)
    for name in names:
        fix = by_name(checks())[name].fix
        extra = fix.partition("[")[2].removesuffix("]'")
        assert fix == f"pip install 'curate-data[{extra}]'"
        assert [need.partition(">")[0] for need in extras[extra]] == [name]


def test_every_extra_that_a_hint_names_exists():
    """In code, documents and examples."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    rooms = ("curate", "jobs", "mixers", "scorers", "docs", "configs")
    files = [file for room in rooms for file in (ROOT / room).rglob("*")]
    texts = [file.read_text() for file in files if file.suffix in (".py", ".md", ".yaml", ".j2")]
    named = {
        name.strip()
        for text in [*texts, (ROOT / "README.md").read_text()]
        for group in re.findall(r"curate-data\[([^\]]+)\]", text)
        for name in group.split(",")
    }
    assert {"cuda", "report", "s3"} <= named
    assert named - {"{extra}"} <= extras.keys()  # of the doctor, which the test above reads


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
    assert {check.state for check in found.values()} == {"ok"}
    assert list(found) == ["model: logits", "model: padding", "model: loss", *GRADIENTS, "model"]


def test_a_classifier_is_computed_right(tmp_path: Path):
    folder = save_classifier(tmp_path / "model")
    assert {check.state for check in check_model(str(folder), None)} == {"ok"}


def save_table_model(folder: Path) -> Path:
    torch.manual_seed(0)
    MLP(num_features=5, num_classes=3, hidden=(8,)).save_pretrained(folder)
    return folder


def save_image_model(folder: Path) -> Path:
    torch.manual_seed(0)
    CNN(channels=1, num_classes=4, widths=(8,)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("save", "kind"),
    [
        (save_table_model, None),
        (save_image_model, None),
        (save_classifier, "text-classification"),
        (save_language_model, "preference"),
    ],
)
def test_models_of_every_kind_of_task_are_checked(
    tmp_path: Path, save: Callable[[Path], Path], kind: str | None
):
    found = by_name(check_model(str(save(tmp_path / "model")), None, kind=kind))
    assert {check.state for check in found.values()} == {"ok"}, found
    assert set(GRADIENTS) <= set(found)
    assert found["model"].text.startswith("OK")


def test_every_kind_of_task_has_examples_made_up_for_it():
    """A kind that is added must be checked above."""
    assert set(TASKS) == {
        "text-classification", "tabular-classification", "image-classification", "causal-lm",
        "preference",
    }  # fmt: skip


def test_a_model_is_checked_on_given_examples(tmp_path: Path):
    folder = save_language_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "the cat"}\n{"text": "in the hat"}\n')
    found = by_name(check_model(str(folder), None, data=str(tmp_path / "rows.jsonl")))
    assert found["model: gradients"].text.startswith("norms of 2 examples")
    assert found["model"].state == "ok"


def test_a_norm_without_the_cross_term_of_repeated_tokens_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = save_language_model(tmp_path / "model")

    def wrong(form: Lookup) -> Tensor:
        return form.values.double().square().sum((1, 2))

    monkeypatch.setattr(squares, "lookup_squares", wrong)
    found = by_name(check_model(str(folder), None))
    assert found["model: gradients"].state == "bad"
    assert "do not use gradient scores" in found["model: gradients"].fix
    assert found["model: slopes"].state == "ok"  # inner products have no cross term
    assert found["model"] == Check(
        "model", "bad", "not OK: gradients, rounding", "do not use its scores before that is clear"
    )
    with pytest.raises(typer.Exit) as left:
        print_doctor(str(folder), None, task=None, data=None, as_json=False)
    assert left.value.exit_code == 1
    assert "not OK" in capsys.readouterr().out


def test_an_inner_product_of_the_wrong_sign_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = save_table_model(tmp_path / "model")
    right = Engine.measure

    def wrong(self: Engine, *args: Any, **kwargs: Any) -> Gradients:
        found = right(self, *args, **kwargs)
        return found._replace(inner={name: -values for name, values in found.inner.items()})

    monkeypatch.setattr(Engine, "measure", wrong)
    assert by_name(check_model(str(folder), None))["model: slopes"].state == "bad"


def test_parameters_that_go_the_slow_way_are_named(tmp_path: Path):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    found = by_name(check_model(str(tmp_path / "vit"), None))
    assert found["model: slow way"].state == "note"
    assert "cls_token" in found["model: slow way"].text
    assert found["model"].state == "ok"


def test_a_parameter_that_cannot_be_measured_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = save_table_model(tmp_path / "model")

    def refuse(*_: Any, **__: Any) -> Any:
        raise CurateError("the gradient of parameter places cannot be measured", fix="freeze it")

    monkeypatch.setattr("curate.models.gradient_pass.Engine.measure", refuse)
    found = by_name(check_model(str(folder), None))
    assert found["model: gradients"] == Check(
        "model: gradients", "bad", "the gradient of parameter places cannot be measured",
        "freeze it",
    )  # fmt: skip
    assert found["model"].state == "bad"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "causal-lm"}, "there is no model to check"),
        ({"config": Path("c.yaml"), "task": "causal-lm"}, "the settings say which task"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str):
    given = {"task": None, "data": None, **options}
    with pytest.raises(ConfigError, match=message):
        print_doctor(None, given.pop("config", None), **given, as_json=False)


def test_a_kind_of_task_that_does_not_exist_is_refused(tmp_path: Path):
    folder = save_language_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"no task 'causal_lm'(.|\n)*causal-lm"):
        list(check_model(str(folder), None, kind="causal_lm"))


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
    with pytest.raises(ConfigError, match="makes its model from scratch") as caught:
        list(check_model(None, config))
    assert f"`curate train {config}`" in caught.value.fix


def test_of_settings_without_a_saved_model_the_runs_last_checkpoint_is_checked(tmp_path: Path):
    for seed, step in ((0, 2), (0, 10), (1, 20)):
        save_checkpoint(
            tmp_path / "r" / "checkpoints",
            seed=seed,
            step=step,
            epoch=1.0,
            lr=0.1,
            write_model=lambda folder: save_language_model(folder),
        )
    values: dict[str, Any] = {
        "run": str(tmp_path / "r"),
        "sources": {"a": {"path": "x"}},
        "task": {"kind": "causal-lm"},
        "model": {"config": {"model_type": "llama"}},
        "checkpoints": {"train": {}},
    }
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(values))
    found = by_name(check_model(None, config))
    assert all(check.state == "ok" for check in found.values())
    assert "r/checkpoints/seed-0/step-000010, the last one" in found["model: checkpoint"].text
    named = str(tmp_path / "r" / "checkpoints" / "seed-0" / "step-000002")
    assert "model: checkpoint" not in by_name(check_model(named, config))
