"""The lists of the scorer `influence`: the training rows that help and hurt each sub-task most.

    run/influence/<name>/top.parquet    task, sign (1: helps, -1: hurts), rank from 1, key, score

Any way of scoring can make them: each partition leaves its own candidates, and the whole is merged
from these. Equal scores come in the pool's order.

Shapes: N examples of a partition, Q sub-tasks.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.example import KEY

HELPS, HURTS = 1, -1

SCHEMA = pl.Schema(
    {
        "task": pl.String(),
        "sign": pl.Int8(),
        "rank": pl.UInt32(),
        "source": pl.String(),
        "file": pl.String(),
        "row": pl.Int64(),
        "score": pl.Float64(),
    }
)
_LISTED = ["task", "sign"]


def candidates(
    keys: pl.DataFrame,
    scores: npt.NDArray[np.float64],
    names: Sequence[str],
    *,
    listed: npt.NDArray[np.bool_],
    count: int,
) -> pl.DataFrame:
    """The ends of one partition, ranked within it.

    Args:
        keys: of its rows.
        scores: (N, Q); NaN where a row has none.
        names: (Q,) of the sub-tasks.
        listed: (N,) rows that may stand in a list: those of training.
        count: of rows at each end.
    """
    found = [pl.DataFrame(schema=SCHEMA)]
    for query, name in enumerate(names):
        own = scores[:, query]
        usable = np.flatnonzero(listed & np.isfinite(own))
        for sign in (HELPS, HURTS):
            order = usable[np.argsort(-sign * own[usable], kind="stable")[:count]]
            part = keys[order].select(KEY).with_columns(score=pl.Series(own[order]))
            found.append(_ranked(part.with_columns(task=pl.lit(name), sign=pl.lit(sign, pl.Int8))))
    return pl.concat(found)


def merged(parts: Iterable[pl.DataFrame], *, count: int) -> pl.DataFrame:
    """The ends of the whole pool.

    Args:
        parts: from `candidates`, in the order of the pool.
        count: of rows at each end.
    """
    kept: dict[tuple[str, int], pl.DataFrame] = {}
    for part in parts:
        for (name, sign), own in part.group_by(_LISTED, maintain_order=True):
            key = str(name), int(sign)  # pyright: ignore[reportArgumentType]
            both = pl.concat([kept[key], own]) if key in kept else own
            order = np.argsort(-key[1] * both["score"].to_numpy(), kind="stable")[:count]
            kept[key] = both[order]
    found = [pl.DataFrame(schema=SCHEMA)]
    return pl.concat([*found, *(_ranked(own.drop("rank")) for own in kept.values())])


def _ranked(frame: pl.DataFrame) -> pl.DataFrame:
    ranks = pl.Series("rank", np.arange(1, frame.height + 1), dtype=pl.UInt32)
    return frame.with_columns(ranks).select(*SCHEMA).cast(SCHEMA)
