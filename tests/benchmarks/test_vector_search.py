"""Exact and approximate search: time, recall, and memory when vectors do not fit.

    python -m pytest tests/benchmarks/test_vector_search.py -s -o addopts=--import-mode=importlib

Prints the tables of docs/benchmarks.md; about five minutes of CPU time. Each search has a process
of its own, so that its peak of memory is its own; pages of mapped files do not count, as the
system takes them back when it needs them. Two kinds of vectors of 384 numbers: random directions of
rank 48, in which neighbours mean little and cells help least; and real sentence vectors, repeated
with noise of a tenth of their length to the same number, where the folder CURATE_VECTORS has
`<set>/train.npy`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(3600)

VECTORS = Path(os.environ.get("CURATE_VECTORS", "no-vectors"))
ROWS = int(os.environ.get("CURATE_BENCH_ROWS", "100000"))
DIM = 384
QUERIES = 10_000
PARTS = 8

_SEARCH = """
import json, sys, threading, time
from pathlib import Path
from curate.vectors.search import nearest, nearest_approximate
from curate.vectors.store import Vectors

def own_megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

peak = 0.0

def watch():
    global peak
    while True:
        peak = max(peak, own_megabytes())
        time.sleep(0.02)

folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
vectors = Vectors.open(sorted(folder.glob("*.npy")))
queries = vectors.take(range(asked.pop("queries")))
threading.Thread(target=watch, daemon=True).start()
started = time.process_time()
if "probes" in asked:
    found, recall = nearest_approximate(queries, vectors, 10, recall_queries=200, **asked)
else:
    found, recall = nearest(queries, vectors, 10, **asked), 1.0
print(json.dumps({"cpu": time.process_time() - started, "recall": recall, "peak": peak,
                  "mapped": sum(p.stat().st_size for p in folder.glob("*.npy"))}))
"""


def test_exact_and_approximate_search(tmp_path: Path):
    print(f"\n{ROWS:,} x {DIM} float32, {QUERIES:,} queries, 10 neighbours, one thread")
    print("| vectors | search | cells | probes | recall | CPU s | ms a query | peak MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind in ("random", *(["sentences"] if VECTORS.is_dir() else [])):
        folder = tmp_path / kind
        _write(folder, kind, ROWS)
        exact = _search(folder, queries=QUERIES)
        _line(kind, "exact", "", "", exact, QUERIES)
        cells = round(ROWS**0.5)
        found = {}
        for probes in (4, 16, 64):
            found[probes] = _search(folder, queries=QUERIES, probes=probes, cells=cells)
            _line(kind, "cells", cells, probes, found[probes], QUERIES)
        assert found[4]["recall"] < found[16]["recall"] < found[64]["recall"]


def test_memory_does_not_grow_with_the_vectors(tmp_path: Path):
    print(f"\nexact search of 100 queries, blocks of 8,192 of {DIM} float32")
    print("| rows | vectors MB | CPU s | CPU s per million rows and 100 queries | peak MB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    peaks: list[float] = []
    for rows in (ROWS // 8, ROWS // 2, ROWS):
        folder = tmp_path / str(rows)
        _write(folder, "random", rows)
        found = _search(folder, queries=100, block_rows=8_192)
        per_million = found["cpu"] / rows * 1e6
        print(f"| {rows:,} | {found['mapped'] / 1e6:.0f} | {found['cpu']:.2f} | {per_million:.1f}"
              f" | {found['peak']:.0f} |")  # fmt: skip
        peaks.append(found["peak"])
    assert peaks[-1] < peaks[0] + 30


def _write(folder: Path, kind: str, rows: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((48, DIM), dtype=np.float32)
    real = None
    if kind == "sentences":
        paths = sorted(VECTORS.glob("*/train.npy"))
        real = np.concatenate([np.load(path) for path in paths])
        real = real[~np.isnan(real).any(axis=1)]
    for part in range(PARTS):
        count = rows // PARTS
        if real is None:
            made = rng.standard_normal((count, 48), dtype=np.float32) @ basis
        else:
            noise = rng.standard_normal((count, DIM), dtype=np.float32) * np.float32(DIM**-0.5)
            made = real[rng.integers(0, len(real), count)] + np.float32(0.1) * noise
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        np.save(folder / f"{part}.npy", made)


def _search(folder: Path, **asked: Any) -> dict[str, float]:
    command = [sys.executable, "-c", _SEARCH, str(folder), json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


def _line(
    kind: str, search: str, cells: object, probes: object, found: dict[str, float], queries: int
) -> None:
    each = 1000 * found["cpu"] / queries
    print(f"| {kind} | {search} | {cells} | {probes} | {found['recall']:.3f} | {found['cpu']:.0f}"
          f" | {each:.2f} | {found['peak']:.0f} |", flush=True)  # fmt: skip
