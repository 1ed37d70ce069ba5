"""Every file in configs/ is complete, and says nothing that the code does not know."""

from pathlib import Path
from typing import get_args

import polars as pl
import pytest
from e2e.small_run import bytes_of

from curate.config import gather, put
from jobs.all_stages import run_stages, stages_for
from jobs.chosen import chosen_scorers
from jobs.cluster import open_pool
from jobs.cluster_settings import Kind
from jobs.cluster_slurm import job_script
from jobs.opening import open_run
from jobs.settings import parse_settings

FOLDER = Path(__file__).parents[1] / "configs"
COMPLETE = sorted(FOLDER.glob("*.yaml"))
CLUSTERS = sorted((FOLDER / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_a_configuration_is_valid_with_all_its_methods(path: Path):
    raw = gather([path])
    settings = parse_settings(raw.values, origins=raw.origins)
    chosen_scorers(settings.score.named)
    assert settings.run == f"runs/{path.stem}"
    assert settings.plan.score or path.stem == "local-files"


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_cluster_goes_over_any_of_them(path: Path):
    raw = gather([FOLDER / "quickstart.yaml", path])
    cluster = parse_settings(raw.values, origins=raw.origins).cluster
    assert f"kind: {cluster.kind}\n" in path.read_text()
    assert cluster.has_gpus == (path.stem in ("eight-gpus", "slurm"))
    if cluster.kind == "slurm":
        assert cluster.num_workers == cluster.workers
        assert f"#SBATCH -p {cluster.job.partition}\n" in job_script(cluster)


def test_the_clusters_are_of_every_kind_and_the_guide_names_each():
    kinds = {parse_settings(gather([FOLDER / "quickstart.yaml", path]).values).cluster.kind
             for path in CLUSTERS}  # fmt: skip
    assert kinds | {"inline"} == set(get_args(Kind))
    guide = (FOLDER.parent / "docs" / "clusters.md").read_text()
    for path in CLUSTERS:
        assert f"(../configs/cluster/{path.name})" in guide


def test_a_run_on_the_laptops_workers_is_that_of_one_process(tmp_path: Path):
    """The file with fewer workers, over a small run."""
    rows = [f"{row} some words " * (1 + row % 7) for row in range(60)]
    pl.DataFrame({"text": rows}).write_parquet(tmp_path / "rows.parquet")
    small = tmp_path / "small.yaml"
    small.write_text(f"sources: {{rows: {{path: {tmp_path}/rows.parquet, text: text}}}}\nrun: x\n")
    seen: list[dict[str, str]] = []
    for name, files in (("inline", [small]), ("dask", [small, FOLDER / "cluster" / "laptop.yaml"])):
        raw = gather(files, overrides=[f"run={tmp_path / name}", "plan.keep=0.5"])
        if name == "dask":
            put(raw, "cluster.workers", 2, "test")
        settings = parse_settings(raw.values)
        with open_run(settings) as full, open_pool(full.cluster) as pool:
            assert (pool.client is None) == (name == "inline")
            run_stages(full, stages_for(full, "run"), pool=pool)
        seen.append(bytes_of(tmp_path / name, "examples", "plan", "shards"))
    assert seen[0] == seen[1]
    assert len(seen[0]) > 2


def test_the_readme_lists_them_all():
    text = (FOLDER / "README.md").read_text()
    for path in COMPLETE:
        assert f"`{path.name}`" in text
    for path in CLUSTERS:
        assert f"(cluster/{path.name})" in text


def test_the_quickstart_needs_only_packages_that_every_python_has():
    values = gather([FOLDER / "quickstart.yaml"]).values
    packages = {source["path"].removeprefix("pkg://") for source in values["sources"].values()}
    optional = {"tkinter", "idlelib", "test", "lib2to3", "distutils", "ensurepip", "turtledemo"}
    assert len(packages) >= 10
    assert not packages & optional
    for package in packages:
        assert __import__(package)
