"""What is known of each row of the gradient index, as columns and as counts for the log.

Shapes: N examples of a partition.
"""

import logging

import numpy as np
import numpy.typing as npt
import polars as pl
from torch import Tensor

from curate.data.example import KEY
from curate.models.tasks import Encoded

log = logging.getLogger(__name__)


def row_columns(found: dict[str, Tensor], usable: npt.NDArray[np.bool_]) -> pl.DataFrame:
    """Columns (N,), null where they are not finite; no norm where there is no vector."""
    series: list[pl.Series] = []
    for name, values in found.items():
        counts = name in ("num_scored", "num_positions")
        column = pl.Series(name, values.numpy())
        if name == "squared_norm":
            column = pl.Series(name, np.where(usable, values.numpy(), np.nan))
        column = column.to_frame().select(
            pl.when(pl.all().is_finite()).then(pl.all()).otherwise(None)
        )[name]
        series.append(column.cast(pl.Int64) if counts else column)
    return pl.DataFrame(series)


def row_counts(encoded: Encoded, table: pl.DataFrame) -> dict[str, int]:
    """How many examples have no row, or were cut."""
    unscored = int((encoded.num_scored == 0).sum())
    broken = table["squared_norm"].null_count() - unscored
    if encoded.problems:
        first = min(encoded.problems)
        log.warning("%d examples have no gradient in the index; the first, %s: %s",
                    len(encoded.problems), table.select(KEY).row(first),
                    encoded.problems[first])  # fmt: skip
    if broken:
        log.warning("%d examples have a gradient that is not finite, and no row in the index",
                    broken)  # fmt: skip
    return {
        "unscored": unscored + broken,
        "truncated": int(encoded.truncated.sum()),
        "not_finite": broken,
    }
