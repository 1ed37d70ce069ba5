"""What the plan says of the examples of one partition, as the arrays that writing needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.shard_layout import Component
from curate.data.tables import meet, read_examples, read_table

IntArray = npt.NDArray[np.int64]


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
        for component in self.distinct():
            copies = self.copies_of(component)
            found[component] = np.bincount(copies[copies > 0])[1:].tolist()
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
    plan = read_table(run.planned(part).path)
    examples = read_examples(run, part, [*KEY, "domain"])
    meet(plan, examples)
    keep = plan["keep"].fill_null(value=False).to_numpy()
    names = tuple(sorted(examples["domain"].unique().to_list()))
    tokens = None
    if tokenizer is not None:
        lengths = _read(run.lengths(part, tokenizer), [*KEY, "num_tokens"])
        meet(plan, lengths)
        tokens = lengths["num_tokens"].to_numpy().astype(np.int64)
    return Choice(
        rows=plan["row"].to_numpy().astype(np.int64),
        weights=plan["weight"].fill_null(0.0).to_numpy().astype(np.float32),
        domains=examples["domain"].cast(pl.Enum(names)).to_physical().to_numpy().astype(np.int64),
        names=names,
        copies=_copies(plan, keep),
        tokens=tokens,
    )


def _read(table: Output, columns: list[str]) -> pl.DataFrame:
    return read_table(table.path, columns)


def _copies(plan: pl.DataFrame, keep: npt.NDArray[np.bool_]) -> dict[int, IntArray]:
    """Copies per phase; phase 0 stands for all of training where there are no phases."""
    if "phases" not in plan.columns:
        return {0: np.where(keep, plan["copies"].fill_null(0).to_numpy(), 0).astype(np.int64)}
    num_phases = int(plan["phases"].list.len().max() or 0)  # pyright: ignore[reportArgumentType]
    found: dict[int, IntArray] = {}
    for phase in range(num_phases):
        copies = plan["phases"].list.get(phase, null_on_oob=True).fill_null(0).to_numpy()
        found[phase + 1] = np.where(keep, copies, 0).astype(np.int64)
    return found
