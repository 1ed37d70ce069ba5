"""Pools with copies in them, and what `duplicates` makes of one."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import curate
from curate.data.example import KEY
from jobs.cluster import InlineExecutor, Pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
WORDS = [f"word{number}" for number in range(300)]


def sentence(seed: int, words: int = 12) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(path: Path, texts: Sequence[str], **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"text": texts, **columns}).write_parquet(path)


def settings_of(root: Path, run: str = "run", *, more: Any = None, **options: Any) -> Settings:
    """Two sources, `a` and `b`, in folders of their names; nothing is held out."""
    sources = {
        name: {"path": str(root / name), "text": "text"}
        for name in ("a", "b")
        if (root / name).is_dir()
    }
    values: dict[str, Any] = {
        "run": str(root / run),
        "sources": sources,
        "index": {"held_out": 0.0, "partition_rows": 7},
        "score": {"scorers": [{"duplicates": options}]},
        **(more or {}),
    }
    return parse_settings(values)


def scored(settings: Settings, pool: Pool = INLINE) -> pl.DataFrame:
    """Scores beside the index, in the order of the run."""
    index_run(settings, pool=pool)
    if settings.score.named["duplicates"].get("method") == "semantic":
        embed_run(settings, pool=pool)
    score_run(settings, pool=pool)
    opened = curate.open(settings.run)
    names = opened.examples.select(*KEY, "split", "num_chars", "content")
    return opened.scores.join(names, on=list(KEY)).sort(KEY).collect()


def groups_of(settings: Settings) -> pl.DataFrame:
    paths = Path(settings.run).glob("duplicates/groups/*.parquet")
    return pl.concat([pl.read_parquet(path) for path in paths]).sort(KEY)


def summary_of(settings: Settings) -> dict[str, Any]:
    return json.loads((Path(settings.run) / "duplicates" / "summary.json").read_text())


def by_content(texts: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        found.setdefault(text, []).append(place)
    return found


def write_copies(root: Path) -> list[str]:
    """60 texts in three files of two sources, in canonical order; some stand there again."""
    texts = [sentence(seed) for seed in range(60)]
    for place, original in ((9, 2), (33, 2), (59, 2), (20, 19), (45, 44), (58, 30)):
        texts[place] = texts[original]
    write(root / "a" / "one.parquet", texts[:25])
    write(root / "a" / "two.parquet", texts[25:40])
    write(root / "b" / "one.parquet", texts[40:])
    return texts


def write_clouds(root: Path) -> np.ndarray:
    """90 vectors in 30 clouds of three, some rows copied whole, two without a direction."""
    generator = np.random.default_rng(5)
    centres = np.repeat(generator.standard_normal((30, 6)), 3, axis=0)
    vectors = (centres + 0.12 * generator.standard_normal((90, 6))).astype(np.float32)
    texts = [sentence(seed) for seed in range(90)]
    for place, original in ((50, 4), (88, 4), (70, 69)):
        vectors[place], texts[place] = vectors[original], texts[original]
    vectors[10], vectors[11] = 0, np.nan
    write(root / "a" / "one.parquet", texts[:60], v=vectors[:60])
    write(root / "b" / "one.parquet", texts[60:], v=vectors[60:])
    return vectors


COLUMN = {"embed": {"given": {"kind": "column", "column": "v"}}}


def bytes_below(run: Path) -> dict[str, bytes]:
    paths = [*run.glob("scores/*/*.parquet"), *run.glob("quantities/*/*.parquet"),
             *run.glob("duplicates/**/*.safetensors"), *run.glob("duplicates/**/*.npy"),
             *run.glob("duplicates/**/*.parquet"), *run.glob("duplicates/*.json")]  # fmt: skip
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}
