"""A comparison that is killed at any moment and run again ends in the same table."""

from pathlib import Path

import pytest
import yaml
from evaluate.compared_digits import compare, digits_settings, write_digits
from killed import curate_command, found, is_killed

from curate.config import plain
from jobs.settings import Settings

_COMPARE = {"seeds": [0, 1, 2], "steps": 150, "arms": ["plan", "random"], "plot": "none"}
_TRAIN = {"lr": 1e-2, "batch_tokens": 16, "resume_every_seconds": 0.01}


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_table(tmp_path: Path):
    pool, target = write_digits(tmp_path, rows=400)
    undisturbed, killed = (
        digits_settings(tmp_path / name, pool, target, compare=_COMPARE,
                        checkpoints={"train": _TRAIN})
        for name in ("undisturbed", "killed")
    )  # fmt: skip
    compare(undisturbed)
    runs = 0
    for finished, delay in ((0, 0.0), (2, 0.3), (4, 0.1), (7, 0.2)):
        if _run_until(killed, tmp_path / "killed.yaml", finished, delay):
            runs += 1
    assert runs >= 3  # it was still at work when it was killed
    trained = Path(killed.run) / "compare" / "trained"
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*/result.json")}
    assert 2 <= len(before) < 9
    summary = compare(killed)
    assert summary["done"] == 9 - len(before)  # what was finished is kept
    assert {path: path.stat().st_mtime_ns for path in before} == before
    tables = [Path(s.run) / "compare" / "table.parquet" for s in (undisturbed, killed)]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def _run_until(settings: Settings, config: Path, finished: int, delay: float) -> bool:
    """Start the command and kill it once so many runs are finished; whether it was killed."""
    config.write_text(yaml.safe_dump(plain(settings)))
    trained = Path(settings.run) / "compare" / "trained"

    def moment() -> bool:
        begun = found(trained, "*") > 0
        return begun and found(trained, "*/.done/result.json.json") >= finished

    return is_killed(curate_command("compare", config), moment, delay=delay)
