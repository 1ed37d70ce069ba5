"""Do clusters find the domains that are there? Purity against true domains and intents.

    python -m pytest tests/benchmarks/test_domains_evidence.py -s -o addopts=--import-mode=importlib

Prints the tables of docs/domains.md; two to four minutes of CPU time. Sentence vectors are used
where the folder CURATE_VECTORS has them: `<set>/train.npy` and the rows they are of,
`<set>/train.parquet`; without it only hashed n-grams are tried, on all rows.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from curate.data.layout import RunFolder
from curate.data.tables import scan_examples
from jobs.cluster import InlineExecutor, Pool
from jobs.domains import domains_run
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.settings import parse_settings

DATA = Path(os.environ.get("CURATE_DATA", "no-data"))
VECTORS = Path(os.environ.get("CURATE_VECTORS", "no-vectors"))
pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not DATA.is_dir(), reason="needs real data: set CURATE_DATA to its folder"),
]

POOL = Pool(InlineExecutor(), 1)
SETS = {
    "domains_en": ("domain", (10, 20)),
    "clinc150": ("label_name", (150,)),
    "banking77": ("label_name", (77,)),
}
"""Set -> the column of the truth, and how many clusters are asked for."""
KINDS: dict[str, dict[str, Any]] = {
    "words": {"kind": "ngrams"},
    "characters": {"kind": "ngrams", "words": "characters", "ngrams": [3, 5]},
    "sentences": {"kind": "column", "column": "v"},
}


@pytest.mark.parametrize("name", SETS)
def test_purity_of_the_clusters(name: str, tmp_path: Path):
    truth, counts = SETS[name]
    frame, kinds = _data(name)
    frame.write_parquet(tmp_path / "pool.parquet")
    print("\n| set | rows | vectors | clusters | purity | NMI | ARI | seconds |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in kinds:
        for number, clusters in enumerate(counts):
            root = tmp_path / kind
            values: dict[str, Any] = {
                "run": str(root),
                "sources": {"pool": {"path": str(tmp_path / "pool.parquet"), "text": "text"}},
                "embed": {kind: KINDS[kind]},
                "domains": {"clusters": clusters},
            }
            settings = parse_settings(values)
            if not number:
                index_run(settings, pool=POOL)
                embed_run(settings, pool=POOL)
            started = time.process_time()
            domains_run(settings, pool=POOL)
            seconds = time.process_time() - started
            rows = scan_examples(RunFolder(root)).select("row", "domain").collect()
            true = frame[truth].gather(rows["row"].to_list())
            found = rows["domain"]
            print(
                f"| {name} | {len(rows):,} | {kind} | {clusters} | {_purity(true, found):.3f}"
                f" | {normalized_mutual_info_score(true, found):.3f}"
                f" | {adjusted_rand_score(true, found):.3f} | {seconds:.1f} |"
            )
            if name == "domains_en":
                _print_names(true, found)


def _data(name: str) -> tuple[pl.DataFrame, list[str]]:
    path = VECTORS / name / "train.npy"
    if not path.is_file():
        return pl.read_parquet(DATA / name / "train.parquet"), ["words", "characters"]
    frame = pl.read_parquet(path.with_suffix(".parquet"))
    vectors = pl.Series("v", np.load(path), dtype=pl.Array(pl.Float32, np.load(path).shape[1]))
    return frame.with_columns(vectors.arr.to_list()), list(KINDS)


def _purity(true: pl.Series, found: pl.Series) -> float:
    """Share of the rows that are of their cluster's most frequent truth."""
    counts = pl.DataFrame({"true": true, "found": found}).group_by("true", "found").len()
    most = counts.group_by("found").agg(pl.col("len").max())["len"]
    return float(most.sum()) / len(true)


def _print_names(true: pl.Series, found: pl.Series) -> None:
    frame = pl.DataFrame({"true": true, "found": found})
    table = frame.group_by("found").agg(
        pl.len(), pl.col("true").mode().sort().first(),
        (pl.col("true") == pl.col("true").mode().sort().first()).mean().alias("share"),
    )  # fmt: skip
    for name, rows, most, share in table.sort("len", descending=True).iter_rows():
        print(f"    {rows:>6,}  {name:<40} {most} ({100 * share:.0f} %)")
