"""Duplicates: which examples repeat another one, and which of them is the one to keep.

    M_i = max over j before i of s(x_i, x_j)            an example is removed where M_i > t

with an order of precedence, best first, and a similarity s:

    exact      1 where the used fields are the same, byte by byte or but for case, space and
               punctuation; else 0
    near       the share of n-grams of words that two texts have in common (Jaccard), estimated by
               MinHash among the candidates that its bands find
    semantic   the cosine of two vectors of one k-means cell (SemDeDup); t = 1 - epsilon

Source: Abbas, Tirumala, Simig, Ganguli and Morcos, "SemDeDup: Data-efficient learning at web-scale
through semantic deduplication", 2023, arXiv:2303.09540; near: Broder, "On the Resemblance and
Containment of Documents", SEQUENCES 1997.

Departures: the rule is that of SemDeDup's published code: a row is compared with all rows before
it, those that are removed themselves included. In the text of the paper one of each group of
duplicates is kept, which is the same unless similarity is not transitive. Cells are of about 10,000
rows, as theirs were, whatever the size of the pool; up to 20,000 rows are one cell, and nothing is
missed at the borders. Rows of equal content are compared once, as one.
Cost: exact, a sort of 16 bytes a row; near, one pass over the texts and 480 bytes a row on disk;
semantic, k-means and about 10,000 products of vectors for each row.
Shapes: N examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError

Positions = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

FIRST, FAR, CENTRAL = "first", "far", "central"
"""Orders of precedence that are no expressions: by position; by distance from the cell's centre."""

_THRESHOLDS = {"exact": 0.5, "near": 0.7, "semantic": 0.95}


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """Groups of equal or similar examples; keep one, or share one's weight among them."""

    __pydantic_config__: ClassVar = STRICT

    method: Literal["exact", "near", "semantic"] = "exact"
    """The same content; many n-grams in common; or similar vectors. Each one includes the first."""
    normalize: bool = False
    """Of `exact`: whether texts are the same that differ in case, space and punctuation only."""
    threshold: float | None = None
    """Examples of a similarity above it are duplicates; by default 0.7 for `near` and 0.95 for
    `semantic`, 1 less the epsilon of SemDeDup."""
    keep_by: str | None = None
    """Which one stays: `first` in the input; `far` from the centre of its cell, or `central`; or
    the one with the highest value of a column or an expression, such as num_chars or quality. By
    default `far` for `semantic`, as published, and `first` for the others."""
    ngrams: int = 3
    """Of `near`: words, or characters, in a row that are compared; texts that are shorter are
    compared word by word."""
    words: Literal["words", "characters"] = "words"
    """Of `near`: of which an n-gram consists; characters are for languages without spaces."""
    vectors: str | None = None
    """Of `semantic`: which representation of `embed`; by default the only one."""
    cells: int | None = None
    """Of `semantic`: k of k-means; by default one for every 10,000 rows."""

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset(
        {"keep", "size", "similarity", "held_out_similarity"}
    )
    columns: ClassVar[Mapping[str, str]] = {
        "duplicate_keep": "1 for the example of its group that stays, 0 for the others",
        "duplicate_size": "examples in its group, itself included; 1 has no duplicate",
        "duplicate_weight": "1 / duplicate_size: the group counts as one example",
        "duplicate_similarity": "largest similarity to an example that takes precedence, 0 to 1;"
        " null where there is nothing to compare",
        "duplicate_held_out": "largest similarity to a held-out example, 0 to 1; null for those"
        " themselves",
    }

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ConfigError(
                f"threshold is {self.threshold}, outside [0, 1)",
                fix="set a similarity such as 0.95; for equal content use method: exact",
            )
        if self.threshold is not None and self.method == "exact":
            raise ConfigError(
                "threshold says how similar is similar enough, but method: exact knows no degrees",
                fix="remove it, or set method: near or semantic",
            )
        if self.keep_by in (FAR, CENTRAL) and self.method != "semantic":
            raise ConfigError(
                f"keep_by: {self.keep_by} is about cells of vectors, and method: {self.method} has"
                " none",
                fix="set keep_by: first, a column such as num_chars, or method: semantic",
            )
        if self.normalize and self.method != "exact":
            raise ConfigError(
                f"normalize is an option of method: exact; {self.method} knows no case anyway"
                if self.method == "near"
                else "normalize is an option of method: exact",
                fix="remove it",
            )
        if self.ngrams < 1 or (self.cells is not None and self.cells < 1):
            raise ConfigError("ngrams and cells start at 1", fix="remove them to use the defaults")

    @property
    def limit(self) -> float:
        """The paper's 1 - epsilon."""
        return _THRESHOLDS[self.method] if self.threshold is None else self.threshold

    @property
    def order(self) -> str:
        """`keep_by`, or what it is by default."""
        return self.keep_by or (FAR if self.method == "semantic" else FIRST)

    @property
    def reads_scores(self) -> bool:
        """Whether it can run only once the other scores are there."""
        return self.order not in (FIRST, FAR, CENTRAL, "num_chars")

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "duplicate_keep": quantities["keep"],
            "duplicate_size": quantities["size"],
            "duplicate_weight": 1 / quantities["size"],
            "duplicate_similarity": quantities["similarity"],
            "duplicate_held_out": quantities["held_out_similarity"],
        }


def leaders(keys: npt.NDArray[np.uint64], kinds: Bools, rank: Positions) -> Positions:
    """(N,) the first by precedence of all rows of a row's content and kind.

    Args:
        keys: (N, 2) equal where contents are.
        kinds: (N,) rows of different kinds do not lead each other.
        rank: (N,) place in the order of precedence, from 0.
    """
    order = np.lexsort((rank, kinds, keys[:, 1], keys[:, 0]))
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    new[1:] |= kinds[order[1:]] != kinds[order[:-1]]
    found = np.empty(len(order), dtype=np.int64)
    found[order] = order[new][np.cumsum(new) - 1]
    return found


def ranks_by(values: npt.NDArray[np.float64] | None, count: int) -> Positions:
    """(N,) places in the order of precedence: the highest value first, then the first position;
    rows without a value come last.

    Args:
        values: (N,) or None for the order of positions.
        count: N.
    """
    if values is None:
        return np.arange(count)
    order = np.lexsort((np.arange(count), np.nan_to_num(-values, nan=np.inf)))
    found = np.empty(count, dtype=np.int64)
    found[order] = np.arange(count)
    return found


class Grouped(NamedTuple):
    """What becomes of the rows."""

    groups: Positions
    """(N,) the row that stays of each row's group, by position: its own where it is that."""
    sizes: Positions
    """(N,) rows of that group."""


def grouped(earlier: Positions) -> Grouped:
    """Groups of rows that lead to the same one.

    Args:
        earlier: (N,) the row that a row gives way to; its own position where it stays. Following it
            never leads round in a circle.
    """
    roots = earlier
    while True:  # each round doubles the number of steps taken
        further = roots[roots]
        if np.array_equal(further, roots):
            break
        roots = further
    return Grouped(roots, np.bincount(roots, minlength=len(roots))[roots])
