"""What the plan says of the examples of one partition, as the arrays that writing needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from curate.data.counts import are_tokens, known_counts
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.shard_layout import Component
from curate.data.tables import examples_arrow, meet_arrow, read_arrow

IntArray = npt.NDArray[np.int64]

_MARKED_DOMAINS = 100
"""The mark of a plan's table says how much of each domain it keeps, for so many at most."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan of one partition; N examples, in their order."""

    rows: IntArray
    """(N,) positions in the file."""
    weights: npt.NDArray[np.float32]
    """(N,) loss weights."""
    domains: IntArray
    """(N,) indices into `names`."""
    names: tuple[str, ...]
    """Domains that occur in the partition, sorted."""
    copies: Mapping[int, IntArray]
    """Phase -> (N,) how often each example is written; 0 is not at all."""
    tokens: IntArray | None
    """(N,) or None where the task has no tokens."""
    phase_weights: Mapping[int, npt.NDArray[np.float32]] = field(
        default_factory=dict[int, npt.NDArray[np.float32]]
    )
    """Phase -> (N,) weights in place of `weights`, where they differ between phases."""

    def counts(self) -> dict[Component, int]:
        """Rows that each component gets, copies counted; no zeros."""
        found: dict[Component, int] = {}
        for phase, copies in self.copies.items():
            totals = np.zeros(len(self.names), dtype=np.int64)
            np.add.at(totals, self.domains, copies)
            for name, total in zip(self.names, totals.tolist(), strict=True):
                if total:
                    found[Component(phase, name)] = total
        return found

    def token_counts(self) -> dict[Component, int]:
        """Tokens that each component gets, copies counted; empty where there are none."""
        if self.tokens is None:
            return {}
        each = {phase: copies * self.tokens for phase, copies in self.copies.items()}
        return replace(self, copies=each).counts()

    def distinct(self) -> dict[Component, int]:
        """Examples that each component gets, copies not counted; no zeros."""
        once = {phase: np.minimum(copies, 1) for phase, copies in self.copies.items()}
        return replace(self, copies=once).counts()

    def repeats(self) -> dict[Component, list[int]]:
        """How many examples of each component are written once, how many twice, and so on."""
        found: dict[Component, list[int]] = {}
        for phase, copies in self.copies.items():
            width = int(copies.max(initial=0)) + 1
            cells = np.bincount(self.domains * width + copies, minlength=len(self.names) * width)
            table = cells.reshape(len(self.names), width)
            for name, numbers in zip(self.names, table[:, 1:], strict=True):
                if numbers.any():
                    found[Component(phase, name)] = np.trim_zeros(numbers, "b").tolist()
        return found

    def at(self, index: IntArray | slice) -> "Choice":
        """Some of the examples, by place."""
        return replace(
            self,
            rows=self.rows[index],
            weights=self.weights[index],
            domains=self.domains[index],
            copies={phase: copies[index] for phase, copies in self.copies.items()},
            tokens=self.tokens[index] if self.tokens is not None else None,
            phase_weights={phase: each[index] for phase, each in self.phase_weights.items()},
        )

    def components(self) -> list[Component]:
        """Every phase with every domain of the partition."""
        return [Component(phase, name) for phase in self.copies for name in self.names]

    def copies_of(self, component: Component) -> IntArray:
        """(N,) how often a component gets each example."""
        place = self.names.index(component.domain)
        return np.where(self.domains == place, self.copies[component.phase], 0)

    def in_phase(self, phase: int) -> "Choice":
        """The same examples with the weights of one phase."""
        if phase not in self.phase_weights:
            return self
        return replace(self, weights=self.phase_weights[phase], phase_weights={})


def everything(rows: IntArray) -> Choice:
    """The choice that takes every row of (N,) once."""
    return Choice(
        rows=rows,
        weights=np.ones(len(rows), dtype=np.float32),
        domains=np.zeros(len(rows), dtype=np.int64),
        names=("",),
        copies={0: np.ones(len(rows), dtype=np.int64)},
        tokens=None,
    )


def read_choice(run: RunFolder, part: Partition, *, tokenizer: str | None) -> Choice:
    """The plan of one partition.

    Args:
        run: the run folder.
        part: the partition.
        tokenizer: digest of the tokenizer whose counts are wanted; None counts nothing.

    Raises:
        CurateError: plan, index and token counts are not of the same examples.
    """
    plan = read_arrow(run.planned(part).path, [*KEY, "keep", "weight", "copies", "phases"])
    is_known = tokenizer is not None and not are_tokens(tokenizer)
    columns = [*KEY, "domain", *(["num_chars"] if is_known else [])]
    examples = examples_arrow(run, part, columns)
    meet_arrow(plan, examples)
    tokens = None
    if tokenizer is not None and is_known:
        tokens = known_counts(examples.column("num_chars").to_numpy(), tokenizer)
    elif tokenizer is not None:
        lengths = read_arrow(run.lengths(part, tokenizer).path, [*KEY, "num_tokens"])
        meet_arrow(plan, lengths)
        tokens = lengths.column("num_tokens").to_numpy().astype(np.int64)
    names, domains = _domains(examples.column("domain"))
    return Choice(
        rows=plan.column("row").to_numpy().astype(np.int64),
        weights=plan.column("weight").fill_null(0.0).to_numpy().astype(np.float32),
        domains=domains,
        names=names,
        copies=_copies(plan),
        tokens=tokens,
    )


def repeats_of(
    names: tuple[str, ...], domains: IntArray, copies: Mapping[int, IntArray]
) -> list[list[Any]]:
    """What `Choice.repeats` says of a partition, as JSON values for its plan's mark.

    Args:
        names: domains that occur in it, sorted.
        domains: (N,) indices into `names`.
        copies: phase -> (N,) how often each example is written.

    Returns:
        Phase, domain and numbers of each component with a row; empty also where there are too many
        for a mark.
    """
    rows, weights = np.zeros(0, np.int64), np.zeros(0, np.float32)
    choice = Choice(rows, weights, domains, names, copies, None)
    found = choice.repeats() if len(names) <= _MARKED_DOMAINS else {}
    return [[each.phase, each.domain, numbers] for each, numbers in found.items()]


def _domains(column: pa.ChunkedArray) -> tuple[tuple[str, ...], IntArray]:
    """The domains, sorted, and (N,) which of them each row has."""
    if not len(column):
        return (), np.zeros(0, dtype=np.int64)
    encoded: Any = column.chunk(0)
    codes = encoded.indices.to_numpy()
    values: list[str] = encoded.dictionary.to_pylist()
    present = np.flatnonzero(np.bincount(codes, minlength=len(values))).tolist()
    names = sorted(values[code] for code in present)
    places = {name: place for place, name in enumerate(names)}
    return tuple(names), np.array([places.get(value, -1) for value in values])[codes]


def _copies(plan: pa.Table) -> dict[int, IntArray]:
    """Copies per phase; phase 0 stands for all of training where there are no phases."""
    keep = plan.column("keep").fill_null(False).to_numpy()
    if "phases" not in plan.column_names:
        return {
            0: np.where(keep, plan.column("copies").fill_null(0).to_numpy(), 0).astype(np.int64)
        }
    phases = pl.Series(plan.column("phases"))
    num_phases = int(phases.list.len().max() or 0)  # pyright: ignore[reportArgumentType]
    found: dict[int, IntArray] = {}
    for phase in range(num_phases):
        copies = phases.list.get(phase, null_on_oob=True).fill_null(0).to_numpy()
        found[phase + 1] = np.where(keep, copies, 0).astype(np.int64)
    return found
