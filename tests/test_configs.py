"""Every file in configs/ is complete, and says nothing that the code does not know."""

from pathlib import Path

import pytest

from curate.config import gather
from jobs.chosen import chosen_scorers
from jobs.settings import parse_settings

FOLDER = Path(__file__).parents[1] / "configs"
COMPLETE = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "workers.yaml")


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_a_configuration_is_valid_with_all_its_methods(path: Path):
    raw = gather([path])
    settings = parse_settings(raw.values, origins=raw.origins)
    chosen_scorers(settings.score.named)
    assert settings.run == f"runs/{path.stem}"
    assert settings.plan.score or path.stem == "local-files"


def test_the_overlay_goes_over_any_of_them():
    raw = gather([FOLDER / "quickstart.yaml", FOLDER / "workers.yaml"])
    assert parse_settings(raw.values).cluster.kind == "local"


def test_the_readme_lists_them_all():
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.yaml"):
        assert f"`{path.name}`" in text


def test_the_quickstart_needs_only_packages_that_every_python_has():
    values = gather([FOLDER / "quickstart.yaml"]).values
    packages = {source["path"].removeprefix("pkg://") for source in values["sources"].values()}
    optional = {"tkinter", "idlelib", "test", "lib2to3", "distutils", "ensurepip", "turtledemo"}
    assert len(packages) >= 10
    assert not packages & optional
    for package in packages:
        assert __import__(package)
