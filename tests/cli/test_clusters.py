"""Clusters on the command line: what is refused at once, what a dry run shows, which place wins."""

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Curate

from curate.errors import MissingDependencyError
from curate.models.devices import pick_device
from curate.models.elsewhere import run_elsewhere, run_here
from jobs.opening import saved_values

Config = Callable[..., Path]
SLURM = {"kind": "slurm", "workers": 4, "slurm": {"partition": "gpu", "gpus": 1}}


@pytest.fixture(autouse=True)
def here() -> Generator[None]:
    """Models run in this process again."""
    yield
    run_here()


def test_without_a_gpu_nothing_is_started_and_nothing_is_written(
    curate: Curate, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jobs.cluster_cuda._DEVICES", tmp_path)
    result = curate("run", config(cluster={"kind": "cuda"}), "--out", tmp_path / "out")
    assert result.code == 6
    assert "cluster.kind is cuda, but no NVIDIA GPU is visible and dask-cuda is not" in result.err
    assert not (tmp_path / "out").exists()


def test_without_bokeh_a_profile_is_refused_before_anything_is_started(
    curate: Curate, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jobs.cluster_profile.find_spec", lambda name: None)
    common = ("run", config(), "--out", tmp_path / "out", "--profile", tmp_path / "report.html")
    result = curate(*common, "--workers", 1)
    assert (result.code, "needs bokeh" in result.err) == (6, True)
    result = curate(*common)
    assert (result.code, "cluster.kind is inline" in result.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_script_of_a_job_and_starts_nothing(
    curate: Curate, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))  # on which there is no sbatch
    path = config(cluster=SLURM)
    common = ("run", path, "--dry-run", "--out", tmp_path / "out")
    script = json.loads(curate(*common, "--json").out)["job_script"]
    assert script in curate(*common).out
    assert "#SBATCH -p gpu\n" in script
    assert "--gres=gpu:1\n" in script
    assert not (tmp_path / "out").exists()
    result = curate("run", path, "--out", tmp_path / "out")
    assert (result.code, "no `sbatch` on this machine" in result.err) == (6, True)
    assert not (tmp_path / "out").exists()


def cluster_of(curate: Curate, *arguments: object) -> dict[str, Any]:
    """What the settings come to, None left out."""
    said = json.loads(curate(*arguments, "--dry-run", "--json").out)["settings"]
    found = {key.removeprefix("cluster."): entry["value"] for key, entry in said.items()
             if key.startswith("cluster.")}  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def test_another_kind_takes_the_former_ones_settings_out(
    curate: Curate, config: Config, tmp_path: Path
):
    path = config(cluster=SLURM)
    local = cluster_of(curate, "run", path, "--set", "cluster.kind=local")
    assert (local["kind"], local["workers"]) == ("local", 4)
    assert not [key for key in local if key.startswith("slurm")]
    assert cluster_of(curate, "run", path, "--set", "cluster.kind=inline")["kind"] == "inline"
    assert cluster_of(curate, "run", path, "--workers", 8)["kind"] == "slurm"
    assert cluster_of(curate, "run", config(), "--workers", 8)["kind"] == "local"
    over = tmp_path / "over.yaml"
    over.write_text("cluster: {kind: address, address: 'tcp://h:1'}\n")
    given = cluster_of(curate, "run", path, "-c", over)
    assert {"kind", "address", "threads"} <= set(given)
    assert "workers" not in given


def test_what_one_place_says_of_two_kinds_is_refused(
    curate: Curate, config: Config, tmp_path: Path
):
    result = curate("run", config(cluster={"address": "tcp://h:1", "kind": "local"}), "--dry-run")
    assert result.code == 2
    assert "cluster.address is set, but cluster.kind is local" in result.err
    result = curate("run", config(), "--dry-run", "--set", "cluster.workers=3")
    assert result.code == 2
    assert "set cluster.kind to local or cuda or slurm" in result.err


def test_a_run_folder_of_one_kind_goes_on_with_another(
    curate: Curate, config: Config, tmp_path: Path
):
    out = tmp_path / "out"
    assert curate("index", config(), "--out", out, "-q", "--workers", 1).code == 0
    saved = saved_values(out)
    assert saved is not None
    assert saved["cluster"]["workers"] == 1
    assert curate("run", out, "-q", "--set", "cluster.kind=inline").code == 0


def test_models_are_let_go_of_when_a_stage_is_over(
    curate: Curate, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forgotten: list[str] = []
    monkeypatch.setattr("jobs.cluster_workers.forget", lambda: forgotten.append("x"))
    path = config()
    assert curate("run", path, "-q", "--out", tmp_path / "out").code == 0
    assert len(forgotten) >= 3
    del forgotten[:]
    assert curate("run", path, "-q", "--out", tmp_path / "out").code == 0
    assert not forgotten


def test_devices_are_those_of_the_workers_where_they_are_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(MissingDependencyError):
        pick_device("cuda")
    run_elsewhere(has_gpus=False)
    assert (pick_device("auto").type, pick_device("cuda").type) == ("cpu", "cuda")
    run_elsewhere(has_gpus=True)
    assert pick_device("auto").type == "cuda"
