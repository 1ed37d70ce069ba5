"""RDS: how much an example looks like the target, and its turn when target rows choose in turn.

    rds(x) = max over target rows q of cos(h(q), h(x))
    h(x) = sum_t (t / sum_s s) H_t(x)          position-weighted mean of the last hidden states

and `rds_rank`, the order in which the lanes choose, each in its turn its best row that is still
there. With one target domain every target row is a lane; with several every domain is, its value
of a row being the largest over its target rows: scales of different domains never mix.

Source: Ivison, Zhang, Brahman, Koh and Dasigi, "Large-Scale Data Selection for Instruction
Tuning", 2025, arXiv:2503.01807 (RDS+).

Departures: any representation will do, the position-weighted one of a language model is the
published; behind the first `limit` rows the order is that of `rds`; a target row that stands in the
pool too may be left out (`copies: drop`).
Cost: no model beyond that of the vectors; N L d multiplications for each filling of the lists, of
which there is one for about 2^24 / L rows that are ranked; 300 MB and 25 bytes a row of memory.
Shapes: N rows of the pool, Q target rows, L lanes, d dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError

Positions = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

Fill = Callable[[Bools, int], Sequence[Positions]]
"""Of rows that are taken already (N,) and a length k: each lane's k best of the others, in order;
fewer only where there are no more."""

ENTRIES = 1 << 24
"""Of all lanes' lists together."""


class Turns(NamedTuple):
    """Who took what, in order."""

    rows: Positions
    """(n,) the rows in the order in which they were taken."""
    lanes: npt.NDArray[np.int32]
    """(n,) the lane that took each."""


def take_turns(
    fill: Fill, *, lanes: int, taken: Bools, limit: int, entries: int = ENTRIES
) -> Turns:
    """Lanes choose in turn: 0, 1, ..., L - 1, 0, ..., each its best row that is still there.

    Exact for any length of the lists: where one has come to its end, all are filled anew.

    Args:
        fill: gives the lists.
        lanes: L, at least 1.
        taken: (N,) rows that nobody may take; left as it is.
        limit: rows to be taken, at most.
        entries: of all lists together: fewer need less memory and more fillings.

    Returns:
        As many rows as `limit` says, or all that there are.
    """
    used = taken.copy()
    flags = used.view(np.uint8).data  # one byte a row, quick to look into
    rows = np.zeros(min(limit, int((~taken).sum())), dtype=np.int64)
    owners = np.zeros(len(rows), dtype=np.int32)
    done = 0
    while done < len(rows):
        left = len(rows) - done
        # Lanes that want the same rows go through their lists faster than one row a turn.
        depth = min(int((~used).sum()), max(1, entries // lanes), 1024 + 16 * -(-left // lanes))
        lists = [np.ascontiguousarray(own).data for own in fill(used, depth)]
        heads = [0] * lanes
        if not len(lists[done % lanes]):  # nothing has a value any more
            return Turns(rows[:done], owners[:done])
        while done < len(rows):
            lane = done % lanes
            own, at, size = lists[lane], heads[lane], len(lists[lane])
            while at < size and flags[own[at]]:
                at += 1
            if at == size:
                break
            row = own[at]
            flags[row] = 1
            rows[done], owners[done] = row, lane
            heads[lane] = at + 1
            done += 1
    return Turns(rows, owners)


def ranks(turns: Turns, values: npt.NDArray[np.float32], taken: Bools) -> Positions:
    """(N,) place of every row from 1: those that were taken in turn, then the rest by value.

    Args:
        turns: from `take_turns`.
        values: (N,) similarities, equal ones by position.
        taken: (N,) rows without a place, which get 0.
    """
    found = np.zeros(len(values), dtype=np.int64)
    found[turns.rows] = np.arange(1, len(turns.rows) + 1)
    rest = np.flatnonzero((found == 0) & ~taken)
    rest = rest[np.argsort(-values[rest], kind="stable")]
    found[rest] = np.arange(len(turns.rows) + 1, len(turns.rows) + len(rest) + 1)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RDS:
    """Similarity with the nearest row of `target`, and the order of the round-robin."""

    __pydantic_config__: ClassVar = STRICT

    vectors: str | None = None
    """The representation, a name under `embed`; by default the only one."""
    limit: int = 1_000_000
    """Rows that are chosen in turn; the others follow in order of similarity."""
    groups: Literal["auto", "rows", "domains"] = "auto"
    """Who chooses in turn: target rows, domains of the target, or (auto) these where there are
    several."""
    copies: Literal["keep", "drop"] = "keep"
    """Examples that stand in the target too: keep their score, or drop it (null)."""

    needs: ClassVar[frozenset[str]] = frozenset({"rds", "rds_rank", "rds_query"})
    columns: ClassVar[Mapping[str, str]] = {
        "rds": "largest cosine with a target row, -1 to 1; high looks like the target",
        "rds_rank": "place in the round-robin over all training rows, from 1; low is wanted",
        "rds_query": "number of the most similar target row, from 0",
    }

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ConfigError(f"limit is {self.limit}", fix="set it to 1_000_000")

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: quantities[name] for name in self.columns}
