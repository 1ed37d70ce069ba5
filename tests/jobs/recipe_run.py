"""Shards with recipes, for the tests that execute them."""

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import scipy.stats
from data.planned_run import Row, planned_run

from jobs.cluster import open_pool
from jobs.settings import Settings
from jobs.write import write_run

LENGTHS = {"web": 10, "code": 40, "talk": 20}
"""Domain -> tokens of a row."""
WEIGHTS = (0.25, 0.5, 1.25, 2.0)


def decide(_source: str, _file: str, row: int) -> Row | None:
    """Three domains; some of their rows come twice, and have weights."""
    domain = ("web", "web", "web", "code", "talk")[row % 5]
    copies = 1 + (row % 3 == 0)
    return Row(domain, copies=copies, weight=WEIGHTS[row % 4], tokens=LENGTHS[domain])


def write_shards(
    root: Path, way: str, formats: Sequence[str], *, rows: int = 400, **shards: Any
) -> Path:
    """The shards folder of a run in which weights are written one way."""
    text = [f"{row} {'ab c' * (row % 7)}" for row in range(rows)]
    settings = planned_run(
        root,
        {"pool": {"x.parquet": pa.table({"text": text})}},
        decide,
        sources={"pool": {"path": str(root / "data" / "pool"), "text": "text"}},
        shards={"weights": way, "format": list(formats), "min_files": 4, **shards},
    )
    return rewrite(settings)


def rewrite(settings: Settings) -> Path:
    with open_pool(settings.cluster) as pool:
        write_run(settings, pool=pool)
    return Path(settings.run) / "shards"


def recipe(shards: Path, name: str) -> Any:
    """The recipe itself, imported from where it lies."""
    spec = importlib.util.spec_from_file_location(
        f"recipe_{name}", shards / "recipes" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def domains_of(shards: Path) -> dict[str, Any]:
    """Domain -> its entry in the mixture."""
    return json.loads((shards / "mixture.json").read_text())["phases"][0]["domains"]


def p_value(seen: Mapping[str, int], probabilities: Mapping[str, float]) -> float:
    """Of the chi-square test that domains were drawn with these probabilities."""
    assert seen.keys() <= probabilities.keys()
    total = sum(seen.values())
    names = sorted(probabilities)
    observed = [seen.get(name, 0) for name in names]
    expected = [probabilities[name] * total for name in names]
    return float(scipy.stats.chisquare(observed, expected).pvalue)


def effective(rows: Sequence[Mapping[str, Any]]) -> Counter[int]:
    """Number of an example -> sum of its weights over all that was read."""
    found = Counter[int]()
    for row in rows:
        found[int(row["curate_row"])] += float(row["curate_weight"])  # pyright: ignore[reportArgumentType]
    return found
