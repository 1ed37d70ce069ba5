"""What a proxy run showed on its way: weights and losses of each domain, as a table.

At most about a thousand stretches of steps are told apart, of many domains fewer; a row is the mean
over its stretch, the loss over all its tokens.

Shapes: K domains, R stretches.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from curate.data.files import replace
from curate.data.tables import write_table
from mixers.rules import Seen

_STRETCHES = 1000
_FEW_STRETCHES = 100
_ROWS = 200_000
"""Of the table, about: the whole of it is written each time that a state is."""


class Trajectory:
    """The record of one run.

    Args:
        domains: names.
        columns: of the rule, beside weight, loss and tokens.
        total_steps: of the run.
    """

    def __init__(self, domains: Sequence[str], columns: Sequence[str], total_steps: int) -> None:
        self._domains, self._columns, self._total = tuple(domains), tuple(columns), total_steps
        most = min(_STRETCHES, max(_FEW_STRETCHES, _ROWS // max(1, len(self._domains))))
        self._every = -(-total_steps // most)
        self._steps: list[int] = []
        self._rows: list[Tensor] = []
        self._empty()

    def add(self, step: int, seen: Seen) -> None:
        """One more step, from 1."""
        self._sums[0] += seen.weights
        self._sums[1] += seen.loss_sums
        self._sums[2] += seen.counts
        for place, name in enumerate(self._columns):
            value = seen.values[name].double()
            is_there = ~value.isnan()
            self._sums[3 + 2 * place] += torch.where(is_there, value, 0)
            self._sums[4 + 2 * place] += is_there
        self._num += 1
        if step % self._every == 0 or step == self._total:
            self._close(step)

    def state(self) -> dict[str, Tensor]:
        """All of it, for a resume."""
        empty = torch.zeros(0, *self._sums.shape, dtype=torch.float64)
        return {
            "rows": torch.stack(self._rows) if self._rows else empty,
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "sums": self._sums,
            "num": torch.tensor(self._num),
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Go back to what `state` gave."""
        self._rows = list(saved["rows"].unbind())
        self._steps = saved["steps"].tolist()
        self._sums, self._num = saved["sums"].clone(), int(saved["num"])

    def table(self, last_step: int) -> pl.DataFrame:
        """step, domain, weight, loss, num_tokens and the rule's columns; a stretch that is not
        over stands at the end, at `last_step`."""
        steps, rows = list(self._steps), list(self._rows)
        if self._num:
            steps.append(last_step)
            rows.append(self._closed())
        num = len(self._domains)
        empty = np.zeros((0, *self._sums.shape))
        values = torch.stack(rows).numpy() if rows else empty  # (R, C, K)
        columns: dict[str, pl.Series] = {
            "step": pl.Series(np.repeat(steps, num), dtype=pl.Int64),
            "domain": pl.Series(list(self._domains) * len(steps), dtype=pl.String),
            "weight": _column(values[:, 0]),
            "loss": _column(values[:, 1] / _nonzero(values[:, 2])),
            "num_tokens": pl.Series(values[:, 2].reshape(-1)).cast(pl.Int64),
        }
        for place, name in enumerate(self._columns):
            mean = values[:, 3 + 2 * place] / _nonzero(values[:, 4 + 2 * place])
            columns[name] = _column(mean)
        return pl.DataFrame(columns)

    def write(self, path: Path, last_step: int) -> None:
        """The table as a file, whole or not at all."""
        table = self.table(last_step)
        replace(path, lambda target: write_table(table, target))

    def _empty(self) -> None:
        size = 3 + 2 * len(self._columns)
        self._sums = torch.zeros(size, len(self._domains), dtype=torch.float64)
        self._num = 0

    def _close(self, step: int) -> None:
        self._rows.append(self._closed())
        self._steps.append(step)
        self._empty()

    def _closed(self) -> Tensor:
        row = self._sums.clone()
        row[0] /= self._num
        return row


def _nonzero(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Counts to divide by: where there are none the result is no number."""
    return np.where(counts > 0, counts, np.nan)


def _column(values: npt.NDArray[np.float64]) -> pl.Series:
    return pl.Series(values.reshape(-1), dtype=pl.Float64).fill_nan(None)
