"""Rows of the gradient index as scorers read them: whole, decoded, with what a metric needs.

run/influence/<checkpoint>/whitened/part-….vectors  z = L^-1 phi, where they are asked for

Shapes: N examples of a partition, k numbers of a row, n of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from curate.data.files import digest_file, misshapen
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_table
from curate.models.curvature import Curvature
from curate.models.index_rows import Header, decode_rows, open_rows
from curate.models.influence_scores import odds_factors, unit_factors, unlikeliness
from curate.models.scan import ScanPart
from jobs.influence_build import IndexPart, open_part, vectors_output
from jobs.influence_sides import FOLDER
from scorers.influence import Metric

Floats = npt.NDArray[np.float64]

_BLOCK_BYTES = 32 * 2**20


class Known(NamedTuple):
    """The index of one partition with one checkpoint."""

    opened: IndexPart
    usable: npt.NDArray[np.bool_]
    """(N,) whether a row has a value."""
    losses: Floats
    """(N,) loss of each example, nats: the mean or the sum, as the index reduces it."""

    @property
    def header(self) -> Header:
        return self.opened.header

    @property
    def mean_losses(self) -> Floats:
        """(N,) of the counted positions; NaN where there are none."""
        return column(self.opened.table, "loss")

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Float32 rows (n, k), a few at a time."""
        size = block_rows(self.header)
        for start in range(0, len(self.usable), size):
            rows = slice(start, start + size)
            yield rows, self.opened.values(rows)

    def factors(self, metric: Metric) -> Floats | None:
        """(N,) by which the products of rows and queries are multiplied."""
        if metric == "trak":
            return np.where(self.usable, odds_factors(self.losses), 1.0)
        if metric != "cosine":
            return None
        found = np.ones(len(self.usable))
        for rows, values in self.blocks():
            found[rows] = unit_factors(values)
        return found

    def factors_of(self, rows: slice, values: Tensor, metric: Metric) -> Tensor | None:
        """(n,) the same for the rows (n, k) of a block; 1 for those without a value."""
        if metric == "trak":
            found = odds_factors(self.losses[rows])
        elif metric == "cosine":
            found = unit_factors(values)
        else:
            return None
        return torch.from_numpy(np.where(self.usable[rows], found, 1.0))

    def scan_part(self, metric: Metric) -> ScanPart:
        """For `curate.models.scan`."""
        return ScanPart(
            self.opened.stored,
            self.header,
            _scales(self.opened.table, self.header),
            self.usable,
            self.factors(metric),
        )

    @property
    def doubts(self) -> Floats:
        """(N,) 1 - p."""
        return unlikeliness(self.losses)


def known_rows(run: RunFolder, part: Partition, slug: str) -> Known:
    """The index of a partition, checked to be what was written.

    Args:
        run: the run folder, or that of the target.
        part: of its partitions.
        slug: of the checkpoint.

    Raises:
        InputError: it is missing, truncated, or damaged.
    """
    found = open_part(run, part, slug)
    check_bytes(vectors_output(run, part, slug))
    losses = column(found.table, "loss")
    if found.header.reduction == "sum":
        losses = losses * column(found.table, "num_positions")
    usable = found.table["squared_norm"].is_not_null().to_numpy()
    return Known(found, usable, losses)


def whitened_output(run: RunFolder, part: Partition, slug: str) -> Output:
    """Whitened rows of one partition with one checkpoint."""
    return Output(run.root / FOLDER / slug / "whitened" / f"{part.name}.vectors")


def scales_output(run: RunFolder, part: Partition, slug: str) -> Output:
    """What whitened rows are multiplied by, beside them."""
    return Output(run.root / FOLDER / slug / "whitened" / f"{part.name}.parquet")


def whitened_part(run: RunFolder, part: Partition, slug: str, known: Known) -> ScanPart:
    """The whitened rows of a partition, for `curate.models.scan`."""
    output = whitened_output(run, part, slug)
    header, stored = open_rows(output.path)
    check_bytes(output)
    table = read_table(scales_output(run, part, slug).path)
    return ScanPart(stored, header, _scales(table, header), known.usable, None)


def part_blocks(part: ScanPart) -> Iterator[tuple[slice, Tensor]]:
    """Float32 rows (n, k), a few at a time."""
    size = block_rows(part.header)
    for start in range(0, len(part.stored), size):
        rows = slice(start, start + size)
        scales = None if part.scales is None else part.scales[rows]
        yield rows, decode_rows(part.stored[rows], scales, part.header)


def white_squares(known: Known, curvature: Curvature) -> Floats:
    """(N,) self-influence phi^T C^-1 phi = |L^-1 phi|^2; NaN where a row has no value."""
    found = np.full(len(known.usable), np.nan)
    for rows, values in known.blocks():
        found[rows] = curvature.whiten(values).square().sum(1).numpy()
    return np.where(known.usable, found, np.nan)


def check_bytes(output: Output) -> None:
    """Refuse a file that is not the one its mark stands for.

    Raises:
        InputError: it has changed.
    """
    mark = output.mark()
    if mark is None or mark["digest"] != digest_file(output.path):
        raise misshapen(output.path, "its bytes are not those that were written")


def block_rows(header: Header) -> int:
    """Rows at a time."""
    return max(1, _BLOCK_BYTES // (8 * max(header.width, 1)))


def column(table: pl.DataFrame, name: str) -> Floats:
    """(N,) float64, NaN for null."""
    return table[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _scales(table: pl.DataFrame, header: Header) -> npt.NDArray[np.float32] | None:
    return table["scales"].to_numpy() if header.num_scales else None
