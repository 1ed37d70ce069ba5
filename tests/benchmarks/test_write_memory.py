"""Time and peak memory of index, plan and write against a plain pyarrow copy of the same rows.

    CURATE_BENCH_MB=2000 python -m pytest tests/benchmarks/test_write_memory.py -s -o addopts=

Each step runs in a process of its own. The copy reads one row group at a time, takes the rows and
writes them, which is the least memory that pyarrow alone needs; it makes no plan, no flush to disk
and no digests.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from curate.data.layout import RunFolder

SIZE_MB = float(os.environ.get("CURATE_BENCH_MB", "200"))
FILE_MB = 250.0
GOAL_MB = 1500.0

STAGE = """
import sys, yaml
from pathlib import Path
from importlib import import_module
from jobs.cluster import open_pool
from jobs.settings import parse_settings
settings = parse_settings(yaml.safe_load(Path(sys.argv[1]).read_text()))
module, name = sys.argv[2].split(":")
with open_pool(settings.cluster) as pool:
    getattr(import_module(module), name)(settings, pool=pool)
"""

COPY = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
files, rows, target = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
target.mkdir()
for path in sorted(files.glob("*.parquet")):
    wanted = np.load(rows / f"{path.name}.npy")
    source = pq.ParquetFile(path)
    with pq.ParquetWriter(target / path.name, source.schema_arrow, compression="zstd") as writer:
        first = 0
        for group in range(source.num_row_groups):
            table = source.read_row_group(group)
            inside = wanted[(wanted >= first) & (wanted < first + table.num_rows)] - first
            writer.write_table(table.take(pa.array(inside)))
            first += table.num_rows
"""


# The kernel's own count of this program alone: what a parent reads of a child's peak includes the
# parent's memory, which the child shares until it starts its program.
PEAK = """
import sys
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Measured:
    name: str
    wall: float
    cpu: float
    peak_mb: float


def measure(name: str, script: str, *arguments: str | Path) -> Measured:
    """Run a script in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script + PEAK, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(name, wall, cpu, int(done.stdout.split()[-1]) / 1024)


def generate(folder: Path) -> int:
    """Rows of shuffled lines of real Python text with columns of other types; returns the rows."""
    folder.mkdir(parents=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    lines = [
        line
        for path in sorted(library.glob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    generator = np.random.default_rng(0)
    written = rows = number = 0
    while written < SIZE_MB * 1e6:
        path = folder / f"file-{number:03d}.parquet"
        goal = min(FILE_MB * 1e6, SIZE_MB * 1e6 - written)
        with pq.ParquetWriter(path, schema(), compression="zstd") as writer:
            while path.stat().st_size < goal:
                table = block(lines, generator, 10_000)
                writer.write_table(table)
                rows += table.num_rows
        written += path.stat().st_size
        number += 1
    return rows


def schema() -> pa.Schema:
    return pa.schema(
        [
            ("text", pa.string()),
            ("url", pa.string()),
            ("kind", pa.string()),
            ("embedding", pa.list_(pa.float32())),
            ("meta", pa.struct([("year", pa.int32()), ("tags", pa.list_(pa.string()))])),
        ]
    )


def block(lines: list[str], generator: np.random.Generator, rows: int) -> pa.Table:
    lengths = generator.geometric(1 / 60, rows) + 3
    drawn = generator.integers(0, len(lines), int(lengths.sum()))
    ends = np.cumsum(lengths)
    texts = [
        "\n".join([lines[i] for i in drawn[end - length : end]])
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]
    vectors = generator.standard_normal(rows * 32).astype(np.float32)
    return pa.table(
        {
            "text": texts,
            "url": [
                f"https://example.org/{value:x}" for value in generator.integers(0, 1 << 60, rows)
            ],
            "kind": [f"kind {value}" for value in generator.integers(0, 6, rows)],
            "embedding": pa.ListArray.from_arrays(
                pa.array(np.arange(0, rows * 32 + 1, 32, dtype=np.int32)), pa.array(vectors)
            ),
            "meta": [
                {"year": 2000 + value % 26, "tags": [f"t{value % 7}"]}
                for value in generator.integers(0, 1000, rows).tolist()
            ],
        },
        schema=schema(),
    )


@pytest.mark.timeout(3600)
def test_peak_memory_and_time_against_a_plain_copy(tmp_path: Path):
    rows = generate(tmp_path / "data")
    config = tmp_path / "config.yaml"
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "sources": {"code": {"path": str(tmp_path / "data"), "text": "text", "domain": "kind"}},
        "index": {"held_out": 0.0},
        "plan": {"keep": 0.5},
    }
    config.write_text(yaml.safe_dump(values))
    measured = [
        measure(name, STAGE, config, f"jobs.{name}:{name}_run")
        for name in ("index", "plan", "write")
    ]
    kept = kept_rows(tmp_path)
    measured.append(
        measure("plain pyarrow copy", COPY, tmp_path / "data", tmp_path / "rows", tmp_path / "copy")
    )
    size = sum(path.stat().st_size for path in (tmp_path / "data").glob("*")) / 1e6
    print(table(measured, f"{size:,.0f} MB, {rows:,} rows, {kept:,} kept"))
    manifest = json.loads((tmp_path / "run" / "shards" / "manifest.json").read_text())
    assert manifest["rows"] == kept
    assert max(entry.peak_mb for entry in measured[:3]) < GOAL_MB
    shutil.rmtree(tmp_path)


def kept_rows(root: Path) -> int:
    """Write down which rows the plan keeps, for the copy; returns their number."""
    run = RunFolder(root / "run")
    (root / "rows").mkdir()
    found: dict[str, list[np.ndarray]] = {}
    for part in run.partitions():
        plan = pl.read_parquet(run.planned(part).path).filter(pl.col("keep"))
        found.setdefault(part.file, []).append(plan["row"].to_numpy())
    for file, rows in found.items():
        np.save(root / "rows" / f"{file}.npy", np.concatenate(rows))
    return sum(len(rows) for parts in found.values() for rows in parts)


def table(measured: list[Measured], title: str) -> str:
    copy = measured[-1]
    lines = [
        "",
        title,
        "",
        "| step | wall s | CPU s | peak MB | CPU / copy | peak / copy |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {m.name} | {m.wall:.1f} | {m.cpu:.1f} | {m.peak_mb:.0f} | {m.cpu / copy.cpu:.2f} |"
        f" {m.peak_mb / copy.peak_mb:.2f} |"
        for m in measured
    ]
    return "\n".join(lines)
