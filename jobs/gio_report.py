"""What the choice of `gio` is like beside the pool: domains, total variation, MMD.

Shapes: n points of a sample, p dimensions.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.tables import read_examples, read_table
from curate.vectors.clusters import assign, kmeans
from curate.vectors.store import Positions, Vectors
from jobs.gio import NAME, places_output, report_output, steps_output
from jobs.gio_work import Work, candidates, open_points, open_work, read_prepared
from jobs.run import Receipt
from jobs.target import target_folder
from scorers.gio_report import squared_mmd, total_variation

log = logging.getLogger(__name__)

_SAMPLE = 2000
_CELLS = 50
_APART = 0.9995
"""Total variation from here on is told as 1.000: no cell in common."""


def report_work(payload: dict[str, Any]) -> Receipt:
    """Compare pool and choice with the target, on samples of at most 2,000 points each."""
    work = open_work(payload)
    places = np.load(places_output(work.run).path)
    steps = read_table(steps_output(work.run).path)
    points = open_points(work)
    usable = points.usable()
    chosen = usable[np.isfinite(places[usable])]
    report: dict[str, Any] = {
        "examples": {"pool": len(usable), "chosen": len(chosen)},
        "steps": steps.height - 1,
        "divergence": {"before": steps["divergence"][0], "after": steps["divergence"][-1]},
        "domains": _domains(work, places),
        **_measures(work, points, usable, chosen, _weights(steps, places[chosen])),
    }
    report_output(work.run).write(lambda path: _write(path, report), work.stamp)
    if len(chosen) and "mmd" in report:
        log.info("%s: total variation from the target %.3f in the pool, %.3f chosen, %.3f with"
                 " weights; squared MMD %.4f, %.4f, %.4f", NAME,
                 *report["total_variation"].values(), *report["mmd"].values())  # fmt: skip
        _warn(report["total_variation"], report["mmd"])
    return {"chosen": len(chosen)}


def _warn(total_variation: dict[str, float], mmd: dict[str, float]) -> None:
    """Say so where the choice is no nearer to the target than the pool as a whole."""
    apart = min(total_variation["pool"], total_variation["chosen"]) >= _APART
    if mmd["chosen"] > mmd["pool"] or apart:
        log.warning(
            "%s: what was chosen is no nearer to the target than the pool: squared MMD %.4f in the"
            " pool and %.4f chosen, total variation %.3f and %.3f; the target may lie outside the"
            " pool, or the vectors not tell its kind", NAME, mmd["pool"], mmd["chosen"],
            total_variation["pool"], total_variation["chosen"],
        )  # fmt: skip


def _domains(work: Work, places: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Of each domain its examples in the pool and in the choice; shares of the target's own."""
    parts = work.run.partitions()
    domains = pl.concat([read_examples(work.run, part, ["domain"]) for part in parts])["domain"]
    may = np.concatenate([candidates(work, part) for part in parts])
    table = pl.DataFrame({"domain": domains, "chosen": np.isfinite(places)}).filter(may)
    counts = table.group_by("domain").agg(pl.len().alias("pool"), pl.col("chosen").sum())
    folder = target_folder(work.run)
    own = {
        name
        for part in folder.partitions()
        for name in read_examples(folder, part, ["domain"])["domain"].unique()
    }
    rows = counts.sort("domain").to_dicts()
    shares = {
        what: _share(rows, own, what) for what in ("pool", "chosen")
    } if own & {row["domain"] for row in rows} else None  # fmt: skip
    return {"counts": rows, "share_of_target_domains": shares}


def _share(rows: list[dict[str, Any]], own: set[str], what: str) -> float | None:
    total = sum(row[what] for row in rows)
    return sum(row[what] for row in rows if row["domain"] in own) / total if total else None


def _weights(
    steps: pl.DataFrame, places: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:  # fmt: skip
    step = np.searchsorted(np.cumsum(steps["examples"].to_numpy()), places, side="right")
    return steps["weight"].to_numpy()[step]


def _measures(
    work: Work, points: Vectors, usable: Positions, chosen: Positions,
    weights: npt.NDArray[np.float64],
) -> dict[str, Any]:  # fmt: skip
    """Total variation over cells and squared MMD of samples; nothing where nothing is chosen."""
    if not len(chosen) or not weights.sum():
        return {}
    draw = np.random.default_rng(work.seed("report"))

    def some(num: int) -> npt.NDArray[np.int64]:
        return np.sort(draw.choice(num, min(num, _SAMPLE), replace=False))

    target = read_prepared(work.run).target
    target = target[some(len(target))]
    pool = points.take(usable[some(len(usable))])
    picked = some(len(chosen))
    if not weights[picked].sum():
        return {}
    rows = points.take(chosen[picked])
    cells = kmeans(
        Vectors([target, pool]), min(_CELLS, len(target) + len(pool)), seed=work.seed("cells"),
        **work.engine,
    )  # fmt: skip
    worlds = [assign(Vectors([own]), cells, **work.engine).labels for own in (target, pool, rows)]
    doubles = [own.astype(np.float64) for own in (target, pool, rows)]
    weight = weights[picked]
    return {
        "total_variation": {
            "pool": total_variation(worlds[0], worlds[1]),
            "chosen": total_variation(worlds[0], worlds[2]),
            "weighted": total_variation(worlds[0], worlds[2], weight),
        },
        "mmd": {
            "pool": squared_mmd(doubles[0], doubles[1]),
            "chosen": squared_mmd(doubles[0], doubles[2]),
            "weighted": squared_mmd(doubles[0], doubles[2], weight),
        },
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
