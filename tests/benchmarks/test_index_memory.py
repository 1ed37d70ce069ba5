"""Memory of building a gradient index by the number of examples, the partitions being alike.

    pytest tests/benchmarks/test_index_memory.py -s -o addopts=--import-mode=importlib

Texts of 31 random letters are 32 tokens each for a language model of one layer and width 32. Each
size is built in a process of its own, whose resident memory at its highest is the kernel's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

SIZES = [int(n) for n in os.environ.get("CURATE_BENCH_SIZES", "50000,200000").split(",")]
PARTITION_ROWS = 5000


def build(root: Path, rows: int) -> dict[str, float]:
    """Build the index, and tell of time and memory; in a process of its own."""
    from gradient_ways import peak_mb, seconds

    from jobs.cluster import InlineExecutor, Pool
    from jobs.index import index_run
    from jobs.influence_build import build_tasks, build_work, pool_world
    from jobs.influence_sides import IndexOptions
    from jobs.measurers import measurers
    from jobs.run import raise_failures, run_tasks
    from jobs.settings import parse_settings

    settings = parse_settings(
        {
            "run": str(root / f"run-{rows}"),
            "sources": {"pool": {"path": str(root / f"{rows}.parquet"), "text": "text"}},
            "task": {"kind": "causal-lm", "max_tokens": 32},
            "model": {"name": str(root / "lm"), "device": "cpu"},
            "index": {"held_out": 0.0, "partition_rows": PARTITION_ROWS},
        }
    )
    pool = Pool(InlineExecutor(), 1)
    index_run(settings, pool=pool)
    tasks = build_tasks(pool_world(settings), measurers(settings), IndexOptions())
    spent: list[float] = []

    def work() -> None:
        spent.append(
            seconds(
                lambda: raise_failures(
                    "influence", run_tasks("influence", tasks, build_work, pool=pool)
                )
            )
        )

    above = peak_mb(work)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    files = list(Path(settings.run).rglob("*.vectors"))
    return {
        "rows": rows,
        "partitions": len(files),
        "mb": sum(path.stat().st_size for path in files) / 1e6,
        "cpu": spent[0],
        "peak": peak,
        "above": above,
    }


@pytest.mark.timeout(7200)
def test_memory_is_bounded_by_a_partition(tmp_path: Path):
    from tiny_models import save_language_model

    save_language_model(tmp_path / "lm", num_hidden_layers=1)
    found: list[dict[str, float]] = []
    for rows in SIZES:
        draw = np.random.default_rng(0)
        letters = draw.integers(97, 123, (rows, 31), dtype=np.uint8)  # a byte is a token
        texts = pl.Series("text", [bytes(line).decode() for line in letters])
        pl.DataFrame(texts).write_parquet(tmp_path / f"{rows}.parquet")
        root = Path(__file__).parents[2]
        paths = os.pathsep.join([str(root), str(root / "tests")])
        done = subprocess.run(
            [sys.executable, __file__, str(tmp_path), str(rows)],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\npartitions of {PARTITION_ROWS:,}\n")
    print("| examples | partitions | index MB | CPU s | peak MB | of these above the start |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for one in found:
        print(f"| {one['rows']:,} | {one['partitions']} | {one['mb']:,.0f} | {one['cpu']:.0f} |"
              f" {one['peak']:.0f} | {one['above']:.0f} |")  # fmt: skip
    assert found[-1]["peak"] <= 1.2 * found[0]["peak"]


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]), int(sys.argv[2]))))
