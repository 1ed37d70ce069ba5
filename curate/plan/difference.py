"""What changed between two plans, or two data sets: pairs of rows, counted.

An example is the same where key and content are. One whose content is found under another key has
*moved*; one whose key stays while its content does not has *changed*; others were *added* or
*removed*. What a plan says of both rows of a pair is compared; a row that is not there at all has
the reason `absent`.

Shapes: N rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from curate.data.buckets import Buckets, key_hash
from curate.data.example import KEY
from curate.plan.weights import WeightSums, effective_size

ABSENT = "absent"

MATCHES = ("same", "moved", "changed", "added", "removed")

FACTS = pl.Schema(
    {
        "source": pl.String(),
        "file": pl.String(),
        "row": pl.Int64(),
        "content": pl.UInt64(),
        "domain": pl.String(),
        "keep": pl.Boolean(),
        "copies": pl.Int64(),
        "weight": pl.Float64(),
        "reason": pl.String(),
        "tokens": pl.Int64(),
        "place": pl.Int64(),
    }
)
"""What is known of a row on one side; `copies` and `weight` are 0 where it is not kept, `place` is
for the caller, who may want to find it again."""

_SIDES = ("a", "b")

_KEPT = {side: pl.col(f"keep_{side}").fill_null(value=False) for side in _SIDES}
_WEIGHTS_DIFFER = (pl.col("weight_a") - pl.col("weight_b")).abs() > 1e-6 * pl.max_horizontal(
    "weight_a", "weight_b"
)
_MATCH = pl.col("match")

KINDS: dict[str, pl.Expr] = {
    "kept in A only": _KEPT["a"] & ~_KEPT["b"],
    "kept in B only": ~_KEPT["a"] & _KEPT["b"],
    "copies changed": _KEPT["a"] & _KEPT["b"] & (pl.col("copies_a") != pl.col("copies_b")),
    "weight changed": _KEPT["a"] & _KEPT["b"] & _WEIGHTS_DIFFER,
    "domain changed": pl.col("domain_a") != pl.col("domain_b"),
    "moved": _MATCH == "moved",
    "changed": _MATCH == "changed",
    "added": _MATCH == "added",
    "removed": _MATCH == "removed",
}
"""What can have happened to an example; several may."""

Stretch = tuple[int, pl.DataFrame]
"""Rows of one file up to a row number, that one not included."""


def aligned(
    left: Iterable[Stretch], right: Iterable[Stretch]
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Rows of one file on both sides, cut at the same row numbers.

    Args:
        left: stretches in order; one of each side is in memory at a time.
        right: the same of the other side, cut elsewhere.
    """
    sides = (iter(left), iter(right))
    held, ends = [FACTS.to_frame(), FACTS.to_frame()], [-1.0, -1.0]
    while min(ends) < float("inf"):
        side = 0 if ends[0] <= ends[1] else 1
        following = next(sides[side], None)
        ends[side] = float("inf")
        if following is not None:
            ends[side] = following[0]
            held[side] = pl.concat([held[side], following[1]])
        if following is None or min(ends) >= 0:
            before = pl.col("row") < min(ends)
            ready = [frame.filter(before) for frame in held]
            held = [frame.filter(~before) for frame in held]
            if ready[0].height or ready[1].height:
                yield ready[0], ready[1]


def same_rows(
    left: pl.DataFrame, right: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Pairs of equal key and content, and what is left of each side, in its order.

    Args:
        left: (N,) rows of one file, with the columns `FACTS`.
        right: rows of the same file.
    """
    on = [*KEY, "content"]
    pairs = _pairs(left, right, on, "same")
    return pairs, left.join(right, on=on, how="anti", maintain_order="left"), right.join(
        left, on=on, how="anti", maintain_order="left"
    )  # fmt: skip


def moved_rows(
    left: pl.DataFrame, right: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Pairs of equal content under different keys, and what is left of each side.

    Of rows with equal content the first meets the first, the second the second.
    """
    nth = pl.int_range(pl.len()).over("content").alias("nth")
    left, right = left.with_columns(nth), right.with_columns(nth)
    on = ["content", "nth"]
    pairs = _pairs(left, right, on, "moved")
    return pairs, left.join(right, on=on, how="anti").drop("nth"), right.join(
        left, on=on, how="anti"
    ).drop("nth")  # fmt: skip


def remaining_rows(left: pl.DataFrame, right: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Pairs of equal keys, then rows that have no partner."""
    yield _pairs(left, right, KEY, "changed")
    alone_left = left.join(right, on=KEY, how="anti")
    alone_right = right.join(left, on=KEY, how="anti")
    yield _pairs(alone_left, right.clear(), KEY, "removed", how="left")
    yield _pairs(left.clear(), alone_right, KEY, "added", how="right")


def unmatched_pairs(content: Buckets, keys: Buckets) -> Iterator[pl.DataFrame]:
    """Pairs of all rows that no row of the same key and content was found for.

    Args:
        content: holds these rows, by content.
        keys: empty, by `key`, with the schema `KEYED`; takes up what content does not pair.
    """
    for left, right in content:
        pairs, *rest = moved_rows(left, right)
        yield pairs
        for side, frame in enumerate(rest):
            keys.add(side, frame.with_columns(key_hash().alias("key")))
    for left, right in keys:
        yield from remaining_rows(left.drop("key"), right.drop("key"))


KEYED = pl.Schema({**FACTS, "key": pl.UInt64()})


def _pairs(left: Any, right: Any, on: Any, match: str, *, how: Any = "inner") -> pl.DataFrame:
    """Rows side by side, all columns twice."""
    names = FACTS.names()
    by = [f"#{name}" for name in on]
    met = (
        left.with_columns(pl.col(name).alias(f"#{name}") for name in on)
        .rename({name: f"{name}_a" for name in names})
        .join(
            right.with_columns(pl.col(name).alias(f"#{name}") for name in on).rename(
                {name: f"{name}_b" for name in names}
            ),
            on=by,
            how=how,
        )
    )
    columns = [f"{name}_{side}" for side in _SIDES for name in names]
    return met.select(*columns, match=pl.lit(match))


# -- counting -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """Counts over all pairs."""

    examples: int = 3
    """How many pairs of each kind are kept to be shown."""
    matches: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MATCHES, 0))
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    kept_in_both: int = 0
    reasons: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """(reason in A, reason in B) -> examples."""
    domains: dict[str, dict[str, dict[str, int]]] = field(
        default_factory=dict[str, dict[str, dict[str, int]]]
    )
    """Domain -> side -> `rows` that are not held out, `kept` of them, `copies`, `tokens` of these,
    and `only`: kept on this side alone."""
    files: dict[tuple[str, str], dict[str, int]] = field(
        default_factory=dict[tuple[str, str], dict[str, int]]
    )
    """(source, file) -> rows in `a`, in `b`, and how many of these are the `same`."""
    weights: dict[str, WeightSums] = field(
        default_factory=lambda: {side: WeightSums() for side in _SIDES}
    )
    shown: dict[str, pl.DataFrame] = field(default_factory=dict[str, pl.DataFrame])
    """Kind -> some pairs, drawn by their content; the same in every run."""

    def add(self, pairs: pl.DataFrame) -> None:
        """Count pairs, as the functions above give them."""
        if not pairs.height:
            return
        match = str(pairs["match"][0])
        self.matches[match] += pairs.height
        self.kept_in_both += pairs.filter(_KEPT["a"] & _KEPT["b"]).height
        for kind, condition in KINDS.items():
            found = pairs.filter(condition)
            self.kinds[kind] += found.height
            if found.height and self.examples:
                self._show(kind, found)
        reasons = pairs.group_by(
            pl.col(f"reason_{side}").fill_null(ABSENT) for side in _SIDES
        ).len()
        for a, b, count in reasons.rows():
            self.reasons[a, b] = self.reasons.get((a, b), 0) + count
        for side, other in (("a", "b"), ("b", "a")):
            self._add_side(pairs, side, other, is_same=match == "same")

    def _add_side(self, pairs: pl.DataFrame, side: str, other: str, *, is_same: bool) -> None:
        there = pairs.filter(pl.col(f"source_{side}").is_not_null())
        copies = pl.col(f"copies_{side}")
        counts = there.group_by(pl.col(f"domain_{side}")).agg(
            rows=(pl.col(f"reason_{side}") != "held_out").sum(),
            kept=_KEPT[side].sum(),
            copies=copies.sum(),
            tokens=(copies * pl.col(f"tokens_{side}").fill_null(0)).sum(),
            only=(_KEPT[side] & ~_KEPT[other]).sum(),
        )
        for domain, *amounts in counts.rows():
            entry = self.domains.setdefault(domain, {s: dict.fromkeys(COUNTS, 0) for s in _SIDES})
            for name, amount in zip(COUNTS, amounts, strict=True):
                entry[side][name] += amount
        for source, file, rows in there.group_by(f"source_{side}", f"file_{side}").len().rows():
            entry = self.files.setdefault((source, file), {"a": 0, "b": 0, "same": 0})
            entry[side] += rows
            entry["same"] += rows if is_same and side == "a" else 0
        self.weights[side].add(
            there[f"weight_{side}"].to_numpy().astype(np.float64),
            there[f"copies_{side}"].to_numpy().astype(np.int64),
        )

    def _show(self, kind: str, found: pl.DataFrame) -> None:
        # Contents are hashes: the smallest are a draw from everywhere, the same each time.
        drawn = pl.coalesce("content_a", "content_b")
        place = [pl.coalesce(f"{name}_a", f"{name}_b") for name in KEY]
        before = [self.shown[kind]] if kind in self.shown else []
        few = found.bottom_k(self.examples, by=[drawn, *place])
        self.shown[kind] = pl.concat([*before, few]).sort(drawn, *place).head(self.examples)

    @property
    def is_same(self) -> bool:
        """Whether nothing differs in the rows and in what is said of them."""
        other = sum(count for (a, b), count in self.reasons.items() if a != b)
        return not other and not any(self.kinds.values())

    def effective(self, side: str) -> float:
        """Kish's effective number of the examples kept on one side."""
        return effective_size(self.weights[side].total, self.weights[side].square)

    def total(self, side: str, name: str) -> int:
        """Sum over all domains of one of `COUNTS`."""
        return sum(entry[side][name] for entry in self.domains.values())


COUNTS = ("rows", "kept", "copies", "tokens", "only")
