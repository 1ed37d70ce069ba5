"""A run folder in its own data would be read by the next run of the index."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from curate.errors import ConfigError
from jobs.dry_run import describe
from jobs.nesting import refuse_nesting
from jobs.opening import open_run
from jobs.settings import Settings, parse_settings


def settings(run: Path | str, **source: Any) -> Settings:
    return parse_settings({"run": str(run), "sources": {"a": source}})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    pl.DataFrame({"text": ["a"]}).write_parquet(folder / "x.parquet")
    return folder


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("data", {}),
        ("data/**/*.parquet", {}),
        ("data/*/*/*.parquet", {}),
        ("data", {"include": "**/*.json"}),
        ("data", {"format": "text"}),  # the card of the shards ends in .md
        ("link", {}),
    ],
)
def test_a_run_folder_in_its_own_data_is_refused_before_it_is_made(
    tmp_path: Path, data: Path, path: str, more: dict[str, Any]
):
    (tmp_path / "link").symlink_to(data)
    given = settings(data / "run", path=str(tmp_path / path), **more)
    with (
        pytest.raises(ConfigError, match=r"lies in its own data, sources\.a\.path"),
        open_run(given),
    ):
        pass
    with pytest.raises(ConfigError, match="lies in its own data"):
        describe("index", given, {}, measure=False)
    assert not (data / "run").exists()


def test_a_source_in_the_run_folder_is_refused(tmp_path: Path):
    for path in ("run", "run/shards/*.parquet", "run/x.parquet"):
        with pytest.raises(ConfigError, match="lies in the run folder"):
            refuse_nesting(settings(tmp_path / "run", path=str(tmp_path / path)))
    both = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"a": {"path": str(tmp_path / "a.parquet")}},
            "target": {"path": str(tmp_path / "run" / "target.parquet")},
        }
    )
    with pytest.raises(ConfigError, match=r"^target\.path"):
        refuse_nesting(both)


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("data/*.parquet", {}),
        ("data/x.parquet", {}),
        ("data", {"include": "*.parquet"}),
        ("data", {"format": "csv"}),
        ("other", {}),
        ("s3://bucket/data", {}),
        ("hf://datasets/owner/name", {}),
    ],
)
def test_a_run_folder_that_no_source_reads_is_fine(
    tmp_path: Path, data: Path, path: str, more: dict[str, Any]
):
    place = path if "://" in path else str(tmp_path / path)
    refuse_nesting(settings(data / "run", path=place, **more))
    refuse_nesting(settings(data.with_name("data-run"), path=str(data)))


def test_the_shards_of_another_run_beside_this_one_are_data(tmp_path: Path):
    refuse_nesting(settings(tmp_path / "second", path=str(tmp_path / "first" / "shards")))
