"""Time and peak memory of index, plan and write against a plain pyarrow copy, and against others.

    CURATE_BENCH_ROWS=4000000 python -m pytest tests/benchmarks/test_write_speed.py -s -o addopts=

`CURATE_BENCH_ROUNDS` is how often everything is measured (3); `CURATE_BENCH_PYTHON` names the
Python of an environment that has polars, duckdb, datasets or datatrove: those that are there are
measured as well. Every step runs in a process of its own, one after the other in each round;
"plan and write" is one process that does both, as `curate run` does.

The copy is pyarrow alone: it reads row group by row group, takes the rows that the plan keeps and
writes them with the same codec. It plans nothing, and neither it nor the others flush to disk,
compute digests or deal the rows out by domain.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from curate.data.layout import RunFolder

ROWS = int(float(os.environ.get("CURATE_BENCH_ROWS", "400000")))
ROUNDS = int(os.environ.get("CURATE_BENCH_ROUNDS", "3"))
PEERS = os.environ.get("CURATE_BENCH_PYTHON", "")
FILE_ROWS = 400_000
GROUP_ROWS = 10_000
GOAL_MB = 500.0

STAGE = """
import sys, yaml
from pathlib import Path
from importlib import import_module
from jobs.cluster import open_pool
from jobs.settings import parse_settings
settings = parse_settings(yaml.safe_load(Path(sys.argv[1]).read_text()))
with open_pool(settings.cluster) as pool:
    for stage in sys.argv[2:]:
        module, name = stage.split(":")
        getattr(import_module(module), name)(settings, pool=pool)
"""

INDEX, PLAN, WRITE = "jobs.index:index_run", "jobs.plan:plan_run", "jobs.write:write_run"

COPY = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
files, masks, target = (Path(argument) for argument in sys.argv[1:4])
target.mkdir()
for path in sorted(files.glob("*.parquet")):
    kept = np.load(masks / f"{path.name}.npy")
    source = pq.ParquetFile(path)
    with pq.ParquetWriter(target / path.name, source.schema_arrow, compression="zstd",
                          compression_level=int(sys.argv[4])) as writer:
        first = 0
        for group in range(source.num_row_groups):
            table = source.read_row_group(group)
            inside = np.flatnonzero(kept[first : first + table.num_rows])
            writer.write_table(table.take(pa.array(inside)))
            first += table.num_rows
"""

POLARS = """
import sys
from pathlib import Path
import numpy as np, polars as pl
files, masks, target = (Path(argument) for argument in sys.argv[1:4])
target.mkdir()
for path in sorted(files.glob("*.parquet")):
    kept = pl.Series(np.load(masks / f"{path.name}.npy"))
    pl.read_parquet(path).filter(kept).write_parquet(
        target / path.name, compression="zstd", compression_level=1)
"""

DUCKDB = """
import sys
from pathlib import Path
import duckdb
files, masks, target = (Path(argument) for argument in sys.argv[1:4])
target.mkdir()
duckdb.sql("SET preserve_insertion_order = false")
duckdb.sql(f'''COPY (SELECT t.* EXCLUDE (filename, file_row_number)
  FROM read_parquet('{files}/*.parquet', filename = true, file_row_number = true) t
  SEMI JOIN (FROM '{masks}/kept.parquet') k
  ON t.file_row_number = k."row" AND parse_filename(t.filename) = k.file
) TO '{target}/all.parquet' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)''')
"""

DATASETS = """
import sys
from pathlib import Path
import numpy as np
from datasets import load_dataset
files, masks, target = (Path(argument) for argument in sys.argv[1:4])
target.mkdir()
paths = sorted(files.glob("*.parquet"))
kept = np.concatenate([np.load(masks / f"{path.name}.npy") for path in paths])
data = load_dataset("parquet", data_files=[str(path) for path in paths], split="train",
                    cache_dir=str(target / "cache"))
data.select(np.flatnonzero(kept)).to_parquet(target / "all.parquet")
"""

DATATROVE = """
import sys
from pathlib import Path
import numpy as np
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
files, masks, target = (Path(argument) for argument in sys.argv[1:4])
paths = sorted(files.glob("*.parquet"))
kept = iter(np.concatenate([np.load(masks / f"{path.name}.npy") for path in paths]).tolist())
LocalPipelineExecutor(
    pipeline=[ParquetReader(str(files), glob_pattern="*.parquet", id_key="url"),
              LambdaFilter(lambda document: next(kept)),
              ParquetWriter(str(target), compression="zstd")],
    tasks=1, workers=1, logging_dir=str(target / "logs")).run()
"""

OTHERS = {"polars": POLARS, "duckdb": DUCKDB, "datasets": DATASETS, "datatrove": DATATROVE}

# The kernel's own count of this program alone: what a parent reads of a child's peak includes the
# parent's memory, which the child shares until it starts its program.
PEAK = """
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Measured:
    wall: float
    cpu: float
    peak_mb: float


def measure(script: str, *arguments: str | Path, python: str = sys.executable) -> Measured:
    """Run a script in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        [python, "-c", script + PEAK, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if python != sys.executable else None,
        text=True,
        check=True,
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(wall, cpu, int(done.stdout.split()[-1]) / 1024)


SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("url", pa.string()),
        ("kind", pa.string()),
        ("embedding", pa.list_(pa.float32())),
        ("meta", pa.struct([("year", pa.int32()), ("tags", pa.list_(pa.string()))])),
    ]
)


def generate(folder: Path, rows: int) -> None:
    """Rows of shuffled lines of real Python text, about 530 bytes each on disk."""
    folder.mkdir(parents=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))]
    lines = pa.array([line for text in texts for line in text.splitlines() if line.strip()])
    generator = np.random.default_rng(0)
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        path = folder / f"file-{number:03d}.parquet"
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for start in range(first, min(rows, first + FILE_ROWS), GROUP_ROWS):
                writer.write_table(block(lines, generator, min(GROUP_ROWS, rows - start)))


def block(lines: pa.Array, generator: np.random.Generator, rows: int) -> pa.Table:
    ends = np.concatenate([[0], np.cumsum(generator.geometric(1 / 18, rows) + 3)])
    drawn = lines.take(pa.array(generator.integers(0, len(lines), int(ends[-1]))))
    texts = pc.call_function(
        "binary_join", [pa.ListArray.from_arrays(pa.array(ends, pa.int32()), drawn), "\n"]
    )
    years = generator.integers(0, 1000, rows)
    tags = pa.ListArray.from_arrays(
        pa.array(np.arange(rows + 1), pa.int32()),
        pa.array([f"t{tag}" for tag in range(7)]).take(pa.array(years % 7)),
    )
    vectors = generator.standard_normal(rows * 32).astype(np.float32)
    columns: list[Any] = [
        texts,
        [f"https://example.org/{value:x}" for value in generator.integers(0, 1 << 60, rows)],
        [f"kind {value}" for value in generator.integers(0, 6, rows)],
        pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * 32, pa.int32()), pa.array(vectors)),
        pa.StructArray.from_arrays(
            [pa.array(2000 + years % 26, pa.int32()), tags], fields=list(SCHEMA.field("meta").type)
        ),
    ]
    return pa.table(columns, schema=SCHEMA)


def configured(root: Path, level: int) -> Path:
    config = root / f"zstd-{level}.yaml"
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {"code": {"path": str(root / "data"), "text": "text", "domain": "kind"}},
        "index": {"held_out": 0.0},
        "plan": {"keep": 0.5},
        "shards": {"compression_level": level},
    }
    config.write_text(yaml.safe_dump(values))
    return config


def kept_rows(root: Path) -> int:
    """Write down which rows the plan keeps, for the others; returns their number."""
    run, masks = RunFolder(root / "run"), root / "masks"
    masks.mkdir()
    found: dict[str, list[pl.DataFrame]] = {}
    for part in run.partitions():
        table = pl.read_parquet(run.planned(part).path, columns=["file", "row", "keep"])
        found.setdefault(part.file, []).append(table)
    for file, tables in found.items():
        np.save(masks / f"{file}.npy", pl.concat(tables)["keep"].to_numpy())
    kept = pl.concat([table for tables in found.values() for table in tables]).filter("keep")
    kept.drop("keep").write_parquet(masks / "kept.parquet")
    return kept.height


def measured_round(root: Path) -> dict[str, Measured]:
    """Everything once, the copy first and last."""
    found: dict[str, Measured] = {}
    for level in (1, 3):
        config, target = configured(root, level), root / "copy"
        found[f"pyarrow copy, zstd-{level}"] = measure(
            COPY, root / "data", root / "masks", target, str(level)
        )
        shutil.rmtree(target)
        if level == 1:
            forget(root, "plan")
            found["plan"] = measure(STAGE, config, PLAN)
        forget(root, "shards", "shards.done")
        found[f"write, zstd-{level}"] = measure(STAGE, config, WRITE)
        forget(root, "plan", "shards", "shards.done")
        found[f"plan and write, zstd-{level}"] = measure(STAGE, config, PLAN, WRITE)
    for name, script in OTHERS.items():
        if is_there(name):
            target = root / "copy"
            found[name] = measure(script, root / "data", root / "masks", target, python=PEERS)
            shutil.rmtree(target)
    return found


def forget(root: Path, *folders: str) -> None:
    for folder in folders:
        shutil.rmtree(root / "run" / folder, ignore_errors=True)


def is_there(name: str) -> bool:
    if not PEERS:
        return False
    module = "datatrove.pipeline.filters" if name == "datatrove" else name  # needs `regex` too
    return subprocess.run([PEERS, "-c", f"import {module}"], capture_output=True).returncode == 0


def table(rounds: Sequence[Mapping[str, Measured]], title: str) -> str:
    """Medians over the rounds; ratios are within a round."""
    rows = [dict(each) for each in rounds]
    lines = ["", title, "", "| step | wall s | CPU s | peak MB | CPU / copy | wall / copy |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name in rows[0]:
        copies = [each[f"pyarrow copy, zstd-{3 if '-3' in name else 1}"] for each in rows]
        mine = [each[name] for each in rows]
        pairs = list(zip(mine, copies, strict=True))
        wall, cpu, peak, cpu_ratio, wall_ratio = (
            statistics.median(values)
            for values in (
                [m.wall for m in mine],
                [m.cpu for m in mine],
                [m.peak_mb for m in mine],
                [m.cpu / c.cpu for m, c in pairs],
                [m.wall / c.wall for m, c in pairs],
            )
        )
        lines.append(
            f"| {name} | {wall:.1f} | {cpu:.1f} | {peak:.0f} | {cpu_ratio:.2f} | {wall_ratio:.2f} |"
        )
    return "\n".join(lines)


@pytest.mark.timeout(7200)
def test_plan_and_write_against_a_plain_copy_and_others(tmp_path: Path):
    peaks: dict[int, float] = {}
    for rows in (ROWS // 10, ROWS):
        root = tmp_path / str(rows)
        generate(root / "data", rows)
        config = configured(root, 1)
        index = measure(STAGE, config, INDEX)
        measure(STAGE, config, PLAN)
        kept = kept_rows(root)
        rounds = [{"index": index, **measured_round(root)} for _ in range(ROUNDS)]
        size = sum(path.stat().st_size for path in (root / "data").glob("*")) / 1e6
        written = sum(p.stat().st_size for p in (root / "run" / "shards").rglob("*.parquet")) / 1e6
        title = f"{size:,.0f} MB, {rows:,} rows, {kept:,} kept; {written:,.0f} MB at zstd-3"
        print(table(rounds, title))
        manifest = json.loads((root / "run" / "shards" / "manifest.json").read_text())
        assert manifest["rows"] == kept
        names = [name for name in rounds[0] if name.startswith(("plan", "write"))]
        peaks[rows] = max(each[name].peak_mb for each in rounds for name in names)
        shutil.rmtree(root)
    assert max(peaks.values()) < GOAL_MB
    if ROWS >= 1_000_000:  # smaller ones fit into one piece
        assert peaks[ROWS] <= 1.2 * peaks[ROWS // 10]
