"""Whether the rows of shards come in the order that their manifest states.

`input`: sources one after the other, files in the order of their names, rows rising but for second
and later copies, of which the first stands before. `domain-interleaved`, `scheduled`: every prefix
of a phase has its share of each domain, within the bound of `curate.data.shard_order`. `shuffled`:
any order is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from curate.data.shard_keys import Problems, key_rows
from curate.errors import counted

_MOST_OFF = 1.68
"""Rows by which a domain may be off its share in a prefix of a stream."""


class Watch(Protocol):
    """Sees all rows in the order in which they are to be read."""

    def see(self, shard: Mapping[str, Any], frame: pl.DataFrame, found: Problems) -> None:
        """A batch of a shard, with the columns `curate.data.shard_keys.COLUMNS`, none null."""
        ...


def order_watch(
    manifest: Mapping[str, Any], folder: Path, shards: Sequence[Mapping[str, Any]]
) -> Watch:
    """Who looks at the order of some shards."""
    order = manifest.get("order", "input")
    if order == "input":
        return _Input()
    if order in ("domain-interleaved", "scheduled"):
        return _Streams(folder, shards)
    return _Anything()


class _Anything:
    """Any order is a shuffled one."""

    def see(self, shard: Mapping[str, Any], frame: pl.DataFrame, found: Problems) -> None:
        pass


class _Input:
    """Rows rise within a file, files within a source; later copies come behind first ones."""

    def __init__(self) -> None:
        self._component: tuple[int, str] | None = None
        self._done = set[str]()
        self._at: tuple[str, str] | None = None
        self._seen = np.zeros(0, dtype=bool)
        self._last = -1

    def see(self, shard: Mapping[str, Any], frame: pl.DataFrame, found: Problems) -> None:
        component = (shard["phase"], shard["domain"])
        if component != self._component:
            self._component, self._at, self._done = component, None, set()
        if not frame.height:
            return
        ends = frame.select(
            (pl.struct("source", "file") != pl.struct("source", "file").shift(-1)).fill_null(True)
        ).to_series()
        start = 0
        for end in np.flatnonzero(ends.to_numpy()).tolist():
            piece = frame.slice(start, end + 1 - start)
            start = end + 1
            self._enter((piece["source"][0], piece["file"][0]), found)
            self._rise(piece["row"].to_numpy(), found)

    def _enter(self, place: tuple[str, str], found: Problems) -> None:
        if place == self._at:
            return
        source, file = place
        if self._at is not None and self._at[0] != source:
            self._done.add(self._at[0])
        is_back = self._at is not None and self._at[0] == source and self._at[1] > file
        if source in self._done or is_back:
            found.add("order", f"not in the order of the input: {source}/{file} comes too late")
        self._at, self._seen, self._last = place, np.zeros(0, dtype=bool), -1

    def _rise(self, rows: np.ndarray, found: Problems) -> None:
        if rows.min() < 0:
            found.add("row", f"curate_row is {int(rows.min())}")
            return
        size = int(rows.max()) + 1
        if size > len(self._seen):
            grown = np.zeros(max(size, 2 * len(self._seen)), dtype=bool)
            grown[: len(self._seen)] = self._seen
            self._seen = grown
        new = rows[~self._seen[rows]]
        _, first = np.unique(new, return_index=True)
        firsts = new[np.sort(first)]
        before = np.concatenate([[self._last], firsts[:-1]])
        late = np.flatnonzero(firsts <= before)
        if len(late):
            place = "/".join(self._at or ())
            found.add("order", f"not in the order of the input: {place}:{firsts[late[0]]} is late")
        self._seen[rows] = True
        self._last = max(self._last, int(firsts[-1]) if len(firsts) else -1)


class _Streams:
    """Every prefix of a stream has its share of each domain."""

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
        self._totals: dict[int, dict[str, int]] = {}
        self._so_far: dict[int, dict[str, int]] = {}
        for shard in shards:
            totals = self._totals.setdefault(shard["phase"], {})
            for frame in key_rows(folder / shard["file"], shard["format"], Problems()):
                for domain, number in frame["domain"].value_counts().rows():
                    totals[domain] = totals.get(domain, 0) + number

    def see(self, shard: Mapping[str, Any], frame: pl.DataFrame, found: Problems) -> None:
        phase = shard["phase"]
        totals = self._totals[phase]
        so_far = self._so_far.setdefault(phase, dict.fromkeys(totals, 0))
        everything, before = sum(totals.values()), sum(so_far.values())
        places = frame.select("domain", place=pl.int_range(before, before + pl.len()))
        for (domain,), rows in places.partition_by("domain", as_dict=True).items():
            at = rows["place"].to_numpy()
            share = totals[domain] / everything
            count = so_far[domain] + np.arange(len(at))  # of the domain, before each of its rows
            off = np.maximum(np.abs(at * share - count), np.abs((at + 1) * share - count - 1))
            if off.max() > _MOST_OFF + 1e-9 * everything * share:
                where = counted(int(at[off.argmax()]) + 1, "row")
                found.add(
                    "order",
                    f"domain {domain!r} is {off.max():.1f} rows off its share in the first {where}"
                    f" of {'the stream' if not phase else f'phase {phase}'}",
                )
            so_far[domain] += len(at)
