"""The same bytes inline, on one worker and on two."""

from pathlib import Path

import pytest
from e2e.small_run import bytes_of, curate, settings, write_config, write_inputs

CLUSTERS = {
    "inline": {"kind": "inline"},
    "one-worker": {"kind": "local", "workers": 1},
    "two-workers": {"kind": "local", "workers": 2},
}


@pytest.mark.slow
def test_inline_one_worker_and_two_workers_write_the_same_plan_and_shards(tmp_path: Path):
    write_inputs(tmp_path / "data")
    seen: dict[str, dict[str, str]] = {}
    for name, cluster in CLUSTERS.items():
        run = tmp_path / name
        values = settings(tmp_path / "data", run, cluster=cluster)
        curate("run", write_config(tmp_path / f"{name}.yaml", values))
        seen[name] = bytes_of(run, "examples", "quantities", "scores", "plan", "shards")
    assert len(seen["inline"]) > 40
    assert seen["one-worker"] == seen["inline"]
    assert seen["two-workers"] == seen["inline"]
