"""From quantities of several checkpoints to the columns of a score.

Shapes: N examples of a partition.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
import torch

from curate.models.gradients.groups import matching
from scorers.protocol import Scorer


def columns_of(
    scorer: Scorer, quantities: Sequence[Mapping[str, np.ndarray]], seeds: Sequence[int]
) -> pl.DataFrame:
    """Every column of a scorer, averaged, and how far the seeds disagree.

    A seed counts once, however many checkpoints it has: the mean is taken over a seed's checkpoints
    and then over the seeds, in float64. `<column>_std` is the standard deviation over the seeds'
    means (divided by their number less one), null with a single seed. An example that any
    checkpoint could not score is null throughout.

    Args:
        scorer: turns quantities into columns.
        quantities: one mapping for each checkpoint: quantity -> (N,), NaN where not scored.
        seeds: the training run that each checkpoint comes from.

    Returns:
        (N rows) `<column>` and `<column>_std` for each column, float32.
    """
    found: dict[str, dict[int, list[np.ndarray]]] = {}
    for measured, seed in zip(quantities, seeds, strict=True):
        tensors = {
            name: torch.from_numpy(np.array(measured[name], dtype=np.float64))
            for name in matching(scorer.needs, measured)
        }
        for column, values in scorer.score(tensors).items():
            found.setdefault(column, {}).setdefault(seed, []).append(values.double().numpy())
    result: dict[str, pl.Series] = {}
    for column, by_seed in found.items():
        means = np.stack([np.mean(values, axis=0) for _, values in sorted(by_seed.items())])
        result[column] = _series(means.mean(axis=0))
        spread = means.std(axis=0, ddof=1) if len(means) > 1 else np.full(means.shape[1], np.nan)
        result[f"{column}_std"] = _series(spread)
    return pl.DataFrame(result)


def plain_columns(scorer: Scorer, quantities: Mapping[str, np.ndarray]) -> pl.DataFrame:
    """Columns of a scorer that needs no model: nothing to average, no spread."""
    return columns_of(scorer, [quantities], [0]).select(list(scorer.columns))


def _series(values: np.ndarray) -> pl.Series:
    return pl.Series(values.astype(np.float32)).fill_nan(None)
