"""The lines of `curate show` that load the shards, in orders and formats that have no pattern."""

from pathlib import Path

import pyarrow as pa
import pytest
from data.planned_run import Row, planned_run

from curate.data.layout import RunFolder
from jobs.cluster import open_pool
from jobs.show import loading_lines
from jobs.write import write_run


@pytest.mark.parametrize("order", ["domain-interleaved", "scheduled"])
def test_a_stream_is_shown_with_lines_that_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
):
    tables = {"pool": {"x.parquet": pa.table({"text": [f"text {n}" for n in range(60)]})}}
    even = {"web": 0.5, "code": 0.5}
    settings = planned_run(
        tmp_path / "run",
        tables,
        lambda _s, _f, row: Row("web" if row % 3 else "code", copies=(1, 2)),
        weights=[even, even],
        shards={"order": order},
    )
    with open_pool(settings.cluster) as pool:
        write_run(settings, pool=pool)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found: dict[str, list[int]] = {}
    exec("\n".join(loading_lines(RunFolder(Path(settings.run)), None)), found)
    assert len(found["everything"]) == 180
    assert len(found["one_phase"]) == 120


def test_lines_of_one_domain_hold_their_imports(tmp_path: Path):
    tables = {"pool": {"x.parquet": pa.table({"text": [f"text {n}" for n in range(60)]})}}
    settings = planned_run(
        tmp_path,
        tables,
        lambda _s, _f, row: Row("web" if row % 3 else "code"),
        shards={"format": "arrow"},
    )
    with open_pool(settings.cluster) as pool:
        write_run(settings, pool=pool)
    found: dict[str, list[int]] = {}
    exec("\n".join(loading_lines(RunFolder(Path(settings.run)), "code")), found)
    assert len(found["one_domain"]) == 20
