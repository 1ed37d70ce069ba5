"""GIO on pools of up to 200,000 vectors of 384 numbers: seconds and peak memory by size.

    pytest tests/benchmarks/test_gio_scale.py -s -o addopts=--import-mode=importlib

Each size is a process of its own that indexes a pool with a column of vectors, embeds (copies) it
and scores it with `gio`, 1,500 clusters, 2,000 target rows, one thread. The passes of `gio` alone
are timed; the peak is the kernel's `VmHWM` of the whole process. `CURATE_BENCH_ROWS=25000,50000`
chooses the sizes. The cost is linear: the straight line through smallest and largest size passes
near the others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SIZES = [
    int(size)
    for size in os.environ.get("CURATE_BENCH_ROWS", "25000,50000,100000,200000").split(",")
]
DIM = 384
TARGET = 2000

SCRIPT = """
import json, re, sys, time
from pathlib import Path
from jobs.cluster import InlineExecutor, Pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.own_passes import own_passes, run_phases
from jobs.chosen import chosen_scorers
from jobs.run import ignore
from jobs.settings import parse_settings

settings = parse_settings(json.loads(sys.argv[1]))
pool = Pool(InlineExecutor(), 1)
index_run(settings, pool=pool)
embed_run(settings, pool=pool)
entry = chosen_scorers(settings.score.named)[0]
started, used = time.monotonic(), time.process_time()
own = own_passes(settings, "gio", entry.scorer)
found = run_phases({"gio": own}, pool=pool, listener=ignore)
assert not any(outcome.failures for outcome in found.values()), found
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
phases = {name.split(": ")[1]: outcome.seconds for name, outcome in found.items()}
print(json.dumps({"wall": time.monotonic() - started, "cpu": time.process_time() - used,
                  "peak": peak, "phases": phases}))
"""


def write(path: Path, num_rows: int, seed: int, groups: int, texts: str) -> None:
    """Rows of `groups` of 60 groups, length about 1, 10,000 at a time."""
    centres = np.random.default_rng(0).standard_normal((60, DIM), dtype=np.float32)
    draw = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    for start in range(0, num_rows, 10_000):
        size = min(10_000, num_rows - start)
        rows = np.float32(0.8) * draw.standard_normal((size, DIM), dtype=np.float32)
        rows += centres[draw.integers(0, groups, size)]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        flat = pa.array(rows.reshape(-1))
        table = pa.table(
            {
                "text": [f"{texts} {start + row}" for row in range(size)],
                "v": pa.FixedSizeListArray.from_arrays(flat, DIM),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


@pytest.mark.timeout(3600)
def test_cost_grows_with_the_pool_and_memory_does_not(tmp_path: Path):
    write(tmp_path / "target.parquet", TARGET, 1, 5, "goal")
    seconds: list[float] = []
    print("\n| rows | wall s | CPU s | peak MB | k-means | assignment | search |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in SIZES:
        pool = tmp_path / f"pool-{size}.parquet"
        write(pool, size, 2, 60, "row")
        settings = {
            "run": str(tmp_path / f"run-{size}"),
            "sources": {"pool": {"path": str(pool), "text": "text"}},
            "target": {"path": str(tmp_path / "target.parquet"), "text": "text"},
            "embed": {"given": {"kind": "column", "column": "v"}},
            "index": {"held_out": 0.0, "partition_rows": 20_000},
            "score": {"scorers": ["gio"]},
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(settings)], capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        phases = found["phases"]
        print(f"| {size:,} | {found['wall']:.1f} | {found['cpu']:.1f} | {found['peak']:.0f} |"
              f" {phases['k-means']:.1f} | {phases['assignment']:.1f} |"
              f" {phases['search']:.1f} |", flush=True)  # fmt: skip
        seconds.append(found["cpu"])
        assert found["wall"] < 600
        assert found["peak"] < 4096
        pool.unlink()
    if len(SIZES) > 2:
        line = np.interp(SIZES, [SIZES[0], SIZES[-1]], [seconds[0], seconds[-1]])
        print("CPU seconds over the straight line:", np.round(np.array(seconds) / line, 2).tolist())
        assert seconds[-1] / seconds[0] < 1.5 * SIZES[-1] / SIZES[0]
