"""Phases of a curriculum: the kept examples of each domain by a score, cut into equal parts.

Every example has a *position* of 64 bits: its score as a float32, made an integer that sorts alike,
above 32 bits of a seeded hash of its key. So ties are drawn, the same for any cut into partitions.
Of n kept examples of a domain, phase i of N takes those from place (i - 1) n / N to place i n / N
of their order, places rounded by a draw of the domain, so that domains of few examples do not all
stand in one phase. An example stands in one phase with all its copies. Examples without a score
stand in the last phase; where they are more than its part, they are all that it has of the domain,
and the others share the rest equally.

Cost: one pass over the plan that holds 8 bytes of each kept example; then N - 1 cuts of each domain
say everything. Two equal scores whose 32 bits agree stay together: within a domain of n examples of
one score, a phase is off by one with a probability of about n / 2^32.
Shapes: N examples of a partition, M kept ones of a domain.
"""

import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import xxhash

from curate.data.choice import Choice, IntArray, read_choice
from curate.data.counts import are_tokens, known_counts
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.shard_order import mixed
from curate.data.tables import examples_arrow, meet_arrow, read_arrow
from curate.errors import ConfigError

log = logging.getLogger(__name__)

_Positions = npt.NDArray[np.uint64]

UNSCORED = 0xFFFF_FFFF << 32
"""Positions from here on are of examples without a score: no number reaches them."""
_NEVER = (1 << 64) - 1
_SIGN = np.uint32(1 << 31)
_STEP = np.uint64(0x9E37_79B9_7F4A_7C15)


@dataclass(frozen=True, slots=True)
class Ordering:
    """How examples are put in order, and in how many phases."""

    column: str
    """`scorer.column`, `num_chars` or `num_tokens`."""
    tokenizer: str | None
    """Digest of the one that counted; needed for `num_tokens`."""
    steps: int
    first: Literal["easiest", "hardest"]
    seed: int

    @property
    def scorers(self) -> tuple[str, ...]:
        """Whose scores are read."""
        scorer, dot, _ = self.column.partition(".")
        return (scorer,) if dot else ()

    def positions(self, run: RunFolder, part: Partition) -> _Positions:
        """(N,) positions of the examples of a partition; at least `UNSCORED` without a score.

        Raises:
            ConfigError: the column holds no numbers.
            InputError: its table is missing or damaged.
            CurateError: scores and index are not of the same examples.
        """
        keys = examples_arrow(run, part, KEY)
        rows = keys.column("row").to_numpy().astype(np.uint64)
        start = _hash(f"{self.seed} {len(part.source)} {part.source}/{part.file}")
        drawn = mixed(np.uint64(start) + rows * _STEP) >> np.uint64(32)
        return _ordered(self._values(run, part, keys), self.first) << np.uint64(32) | drawn

    def _values(self, run: RunFolder, part: Partition, keys: pa.Table) -> npt.NDArray[np.float64]:
        scorer, dot, column = self.column.partition(".")
        if dot:
            table = read_arrow(run.scores(part, scorer).path, [*KEY, column])
        elif self.column == "num_chars" or self._known:
            column = "num_chars"
            table = examples_arrow(run, part, [*KEY, column])
        else:
            assert self.tokenizer is not None
            column = self.column
            table = read_arrow(run.lengths(part, self.tokenizer).path, [*KEY, column])
        meet_arrow(keys, table)
        values = pl.Series(table.column(column))
        if not (values.dtype.is_numeric() or isinstance(values.dtype, (pl.Boolean, pl.Null))):
            raise ConfigError(
                f"shards.curriculum.score is {self.column}, which holds no numbers",
                fix="name a score, such as el2n",
            )
        if self._known:
            return known_counts(values.to_numpy(), self._known).astype(np.float64)
        return values.cast(pl.Float64).to_numpy()

    @property
    def _known(self) -> str | None:
        """What the index counts, where that is asked for and no tokenizer counts."""
        is_known = self.column == "num_tokens" and self.tokenizer and not are_tokens(self.tokenizer)
        return self.tokenizer if is_known else None


@dataclass(frozen=True, slots=True)
class Phasing:
    """Which phase each example belongs to."""

    ordering: Ordering
    cuts: Mapping[str, Sequence[int]]
    """Domain -> the first position of each phase but the first; others are left out of what is
    written."""

    def choice(self, run: RunFolder, part: Partition, planned: Choice) -> Choice:
        """The plan of a partition, its copies dealt to phases 1, 2, ..."""
        if not len(planned.rows):
            return planned
        positions = self.ordering.positions(run, part)
        phases = np.zeros(len(planned.rows), np.int64)
        for domain, index in _by_domain(planned):
            if domain in self.cuts:
                cuts = np.array(self.cuts[domain], np.uint64)
                phases[index] = 1 + np.searchsorted(cuts, positions[index], side="right")
        (copies,) = planned.copies.values()
        numbers = range(1, self.ordering.steps + 1)
        return replace(planned, copies={n: np.where(phases == n, copies, 0) for n in numbers})

    def of(self, domains: Sequence[str]) -> "Phasing":
        """What tasks need that write these domains alone."""
        return replace(self, cuts={name: self.cuts[name] for name in sorted(set(domains))})

    def pack(self) -> dict[str, Any]:
        """As JSON values."""
        return {"ordering": asdict(self.ordering), "cuts": {n: [*c] for n, c in self.cuts.items()}}


def unpack_phasing(values: dict[str, Any] | None) -> Phasing | None:
    """What `Phasing.pack` packed."""
    return None if values is None else Phasing(Ordering(**values["ordering"]), values["cuts"])


def read_phased(
    run: RunFolder, part: Partition, phasing: Phasing | None, *, tokenizer: str | None
) -> Choice:
    """The plan of one partition, in phases of a curriculum where there is one."""
    planned = read_choice(run, part, tokenizer=tokenizer)
    return planned if phasing is None else phasing.choice(run, part, planned)


def find_phasing(run: RunFolder, partitions: Sequence[Partition], ordering: Ordering) -> Phasing:
    """The phases of a curriculum, from a pass over the plan.

    Args:
        run: the run folder.
        partitions: all of them, planned.
        ordering: of the examples.

    Raises:
        ConfigError: the plan has phases already, or no kept example has a score.
        InputError, CurateError: as `Ordering.positions`.
    """
    gathered: dict[str, array[int]] = {}
    for part in partitions:
        planned = read_choice(run, part, tokenizer=None)
        if any(planned.copies):
            raise ConfigError(
                f"shards.curriculum makes phases, but the plan has {len(planned.copies)} already,"
                " those of its mixture",
                fix="remove shards.curriculum, or plan with a mixture of one phase",
            )
        if not any(copies.any() for copies in planned.copies.values()):
            continue
        positions = ordering.positions(run, part)
        for domain, index in _by_domain(planned):
            gathered.setdefault(domain, array("Q")).frombytes(positions[index].tobytes())
    cuts: dict[str, tuple[int, ...]] = {}
    total = unscored = 0
    for domain in sorted(gathered):
        # In place: a second copy of the largest domain might not fit.
        held = np.frombuffer(gathered[domain], np.uint64)
        missing = int(np.count_nonzero(held >= np.uint64(UNSCORED)))
        cuts[domain] = _cuts(held, missing, ordering, domain)
        total, unscored = total + len(held), unscored + missing
    if total and unscored == total:
        raise ConfigError(
            f"shards.curriculum: none of the {total:,} kept examples has a {ordering.column}",
            fix="name a score that they have in shards.curriculum.score",
        )
    if unscored:
        log.warning(
            "%s of %s kept examples have no %s: they stand in the last phase",
            f"{unscored:,}",
            f"{total:,}",
            ordering.column,
        )
    return Phasing(ordering, cuts)


def _cuts(held: _Positions, missing: int, ordering: Ordering, domain: str) -> tuple[int, ...]:
    """The first position of each phase but the first, of (M,) positions; their order is lost."""
    steps, total = ordering.steps, len(held)
    draw = _hash(f"{ordering.seed} {domain}")
    places = [(nth * total + draw % steps) // steps for nth in range(1, steps)]
    scored = total - missing
    if places[-1] > scored:
        rest = steps - 1
        places = [(nth * scored + draw % rest) // rest for nth in range(1, rest)] + [scored]
    if inside := sorted({place for place in places if place < total}):
        held.partition(inside)
    return tuple(int(held[place]) if place < total else _NEVER for place in places)


def _ordered(values: npt.NDArray[np.float64], first: str) -> _Positions:
    """(N,) 32 bits that sort as the scores do, or against them; the largest without a score."""
    has = np.isfinite(values)
    with np.errstate(over="ignore"):
        narrow = np.where(has, values, 0.0).astype(np.float32) + np.float32(0)  # -0.0 is 0.0
    bits = narrow.view(np.uint32)
    bits = np.where(bits >= _SIGN, ~bits, bits | _SIGN)
    bits = ~bits if first == "hardest" else bits
    return np.where(has, bits, ~np.uint32(0)).astype(np.uint64)


def _by_domain(planned: Choice) -> Iterator[tuple[str, IntArray]]:
    """Each domain with a kept example, and where they stand."""
    (copies,) = planned.copies.values()
    kept = np.flatnonzero(copies)
    order = kept[np.argsort(planned.domains[kept], kind="stable")]
    ends = np.searchsorted(planned.domains[order], np.arange(len(planned.names) + 1))
    for name, low, high in zip(planned.names, ends[:-1], ends[1:], strict=True):
        if low < high:
            yield name, order[low:high]


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(f"shards.curriculum {text}".encode())
