"""A small corpus of three kinds of text, and a target of one, for scorers that read words."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import curate
from curate.cli import main
from curate.config import to_yaml
from curate.data.example import KEY
from curate.data.layout import RunFolder

WORDS = {
    "sea": "ship sail wave harbour anchor storm deck captain tide rope mast gull",
    "law": "court judge appeal clause party contract plea jury oath lawyer ruling brief",
    "food": "bread butter oven flour sugar salt soup pan knife onion plate spoon",
}
PLAIN = ["the", "a", "of", "and", "in", "to", "is", "was", "it", "for", "on", "with"]


def texts_of(kind: str, count: int, *, seed: int) -> list[str]:
    """Five to twenty words each, half of them of the kind; some with capitals and commas."""
    draw = np.random.default_rng(seed)
    own = WORDS[kind].split()
    found: list[str] = []
    for _ in range(count):
        size = int(draw.integers(5, 21))
        words = [str(draw.choice(own if draw.random() < 0.5 else PLAIN)) for _ in range(size)]
        found.append(", ".join([words[0].title(), " ".join(words[1:])]) + ".")
    return found


def pool(count: int = 60) -> pl.DataFrame:
    frames = [
        pl.DataFrame({"text": texts_of(kind, count, seed=n), "kind": kind})
        for n, kind in enumerate(WORDS)
    ]
    return pl.concat(frames).sample(fraction=1.0, shuffle=True, seed=1)


def write_world(
    root: Path, *, target: list[str] | None = None, frame: pl.DataFrame | None = None
) -> None:
    """Pool of two files, and the target, below `root`."""
    data = root / "data"
    data.mkdir(parents=True)
    frame = pool() if frame is None else frame
    half = (frame.height + 1) // 2
    frame[:half].write_parquet(data / "one.parquet")
    if frame.height > half:
        frame[half:].write_parquet(data / "two.parquet")
    rows = texts_of("sea", 30, seed=9) if target is None else target
    pl.DataFrame({"text": rows}).write_parquet(root / "target.parquet")


def values_of(root: Path, scorers: list[Any], run: str = "run", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": str(root / run),
        "sources": {"web": {"path": str(root / "data"), "text": "text", "domain": "kind"}},
        "target": {"path": str(root / "target.parquet"), "text": "text"},
        "index": {"held_out": 0.1, "partition_rows": 25},
        "score": {"scorers": scorers},
    }
    return values | changes


def write_config(root: Path, values: dict[str, Any]) -> Path:
    path = root / f"{Path(values['run']).name}.yaml"
    path.write_text(to_yaml(values), encoding="utf-8")
    return path


def scored(root: Path, scorers: list[Any], run: str = "run", **changes: Any) -> pl.DataFrame:
    """Scores by the command line, with the index and the text of each row."""
    values = values_of(root, scorers, run, **changes)
    code = main(["score", str(write_config(root, values))])
    assert code == 0, f"curate score ended with {code}"
    return table(root, run)


def table(root: Path, run: str = "run") -> pl.DataFrame:
    opened = curate.open(root / run)
    texts = pl.concat(
        pl.read_parquet(path).with_row_index("row").with_columns(file=pl.lit(path.name))
        for path in sorted((root / "data").glob("*.parquet"))
    ).select("file", pl.col("row").cast(pl.Int64), "text", "kind")
    examples = opened.examples.select(*KEY, "split", "domain")
    joined = opened.scores.join(examples, on=list(KEY)).collect()
    return joined.join(texts, on=["file", "row"]).sort("file", "row")


def score_bytes(root: Path, run: str) -> dict[str, bytes]:
    """Every score and quantity table of a run."""
    folder = root / run
    paths = [*folder.glob("quantities/*/*.parquet"), *folder.glob("scores/*/*.parquet")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def partitions(root: Path, run: str = "run") -> int:
    return len(RunFolder(root / run).partitions())
