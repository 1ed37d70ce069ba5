"""Where rows, buckets and files lie when the rows are put into another order than the input's.

All rows of the output stand in one *line*, file after file. A place on it follows from a row's
component and its number there (`curate.data.shard_order`), so the first pass can deal the rows out
to *buckets*, stretches of the line that fit into memory, and the second makes files of them. Row
counts are exact, sizes are estimates, and nothing depends on the number of workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import xxhash

from curate.data.choice import IntArray
from curate.data.partitions import Partition
from curate.data.shard_layout import (
    Component,
    Kept,
    Part,
    Shard,
    cut_shards,
    folder_name,
    piece_rows,
)
from curate.data.shard_order import Interleaving, Shuffle
from curate.data.shard_settings import Shards

STREAMS = ("domain-interleaved", "scheduled")
"""Orders in which domains share their files."""

BUCKET_BYTES = 32 << 20
_DEAL_BYTES = 1 << 30
_FEWEST_DEALS = 16
_MOST_FILES = 500


@dataclass(frozen=True, slots=True)
class Deal:
    """One task of the first pass: consecutive partitions, read once."""

    name: str
    partitions: tuple[Partition, ...]
    piece_rows: tuple[int, ...]
    """For each partition, how many of its rows are held in memory at a time."""
    starts: tuple[int, ...]
    """For each component of the line, how many of its rows come in earlier deals."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """One task of the second pass: consecutive shards, and the buckets that hold their rows."""

    name: str
    shards: tuple[Shard, ...]
    cuts: tuple[int, ...]
    """Where its buckets begin on the line, and where the last one ends."""


@dataclass(frozen=True, slots=True)
class Places:
    """What it takes to put any row in its place."""

    order: str
    seed: int
    components: tuple[Component, ...]
    """Sorted."""
    rows: tuple[int, ...]
    """Of each component, copies counted."""
    cuts: tuple[int, ...]
    """Where each bucket begins on the line, and where the last one ends."""

    def placer(self) -> "Placer":
        return Placer(self)


@dataclass(frozen=True, slots=True)
class Line:
    """All that is written, in order."""

    places: Places
    deals: list[Deal]
    stretches: list[Stretch]


class Placer:
    """Places on the line; what is slow to set up is set up once."""

    def __init__(self, places: Places) -> None:
        rows = np.array(places.rows, dtype=np.int64)
        self.index = {component: nth for nth, component in enumerate(places.components)}
        keys = [_key(places.seed, component) for component in places.components]
        self._shuffle = Shuffle(rows, keys)
        phases = np.array([component.phase for component in places.components])
        # Where a component's part of the line begins: its own, or that of its phase.
        self._base = np.concatenate([[0], np.cumsum(rows)[:-1]])
        self._streams: list[tuple[int, int, Interleaving]] = []
        if places.order in STREAMS:
            for phase in np.unique(phases):
                first, last = np.searchsorted(phases, [phase, phase + 1])
                self._base[first:last] = self._base[first]
                self._streams.append((int(first), int(last), Interleaving(rows[first:last])))

    def places(self, component: IntArray, number: IntArray) -> IntArray:
        """(N,) places on the line of rows of components (N,), their numbers there (N,)."""
        place = self._shuffle.places(component, number)
        for first, last, stream in self._streams:
            mine = np.flatnonzero((component >= first) & (component < last))
            place[mine] = stream.places(component[mine] - first, place[mine])
        return place + self._base[component]


def lay_out_line(
    kept: Sequence[Kept], *, settings: Shards, names: Mapping[str, str], seed: int
) -> Line:
    """The line, its shards and the tasks of both passes.

    Args:
        kept: one entry for each partition with something to write, in canonical order.
        settings: order, sizes and formats of the shards.
        names: of `slugs`, for every domain.
        seed: of the run.
    """
    totals: dict[Component, Part] = {}
    for entry in kept:
        for component, rows in entry.rows.items():
            totals[component] = totals.get(component, Part()) + entry.part(rows)
    components = sorted(totals)
    shards, memory = _shards(totals, settings, names)
    stretches = _stretches(shards, memory)
    cuts = sorted({cut for stretch in stretches for cut in stretch.cuts})
    places = Places(
        settings.order,
        seed,
        tuple(components),
        tuple(totals[component].rows for component in components),
        tuple(cuts),
    )
    return Line(places, _deals(kept, components), stretches)


def _shards(
    totals: Mapping[Component, Part], settings: Shards, names: Mapping[str, str]
) -> tuple[list[Shard], list[float]]:
    """The shards, and the bytes of a row in memory in each."""
    is_stream = settings.order in STREAMS
    merged: dict[Component, Part] = {}
    for component, part in sorted(totals.items()):
        output = Component(component.phase, "") if is_stream else component
        merged[output] = merged.get(output, Part()) + part
    # A schedule is one run of numbers; otherwise every component has its own.
    cut = {
        output: cut_shards(
            part,
            size_bytes=settings.size_mb * 1e6,
            row_group_bytes=settings.row_group_mb * 1e6,
            least=settings.min_files,
        )
        for output, part in merged.items()
    }
    is_scheduled = settings.order == "scheduled"
    everything = sum(len(each) for each in cut.values())
    found, sizes = list[Shard](), list[float]()
    for output, each in cut.items():
        slug = "" if is_stream else names[output.domain]
        folder = "" if is_scheduled else folder_name(output, slug)
        for nth, row_groups in enumerate(each):
            number, total = (len(found), everything) if is_scheduled else (nth, len(each))
            found.append(Shard(output, folder, number, total, row_groups))
            sizes.append(merged[output].memory / merged[output].rows)
    return found, sizes


def _stretches(shards: Sequence[Shard], memory: Sequence[float]) -> list[Stretch]:
    """Large shards stand alone, in several buckets; small ones share one."""
    found: list[Stretch] = []
    current: list[Shard] = []
    start = end = 0
    held = 0.0
    for nth, (shard, row_bytes) in enumerate(zip(shards, memory, strict=True)):
        current.append(shard)
        end += shard.num_rows
        held += shard.num_rows * row_bytes
        is_last = nth + 1 == len(shards)
        upcoming = 0.0 if is_last else shards[nth + 1].num_rows * memory[nth + 1]
        if is_last or held + upcoming > BUCKET_BYTES or len(current) == _MOST_FILES:
            num_buckets = max(1, min(end - start, -int(-held // BUCKET_BYTES)))
            cuts = [start + i * (end - start) // num_buckets for i in range(num_buckets + 1)]
            found.append(Stretch(f"group-line-{len(found):06d}", tuple(current), tuple(cuts)))
            current, start, held = [], end, 0.0
    return found


def _deals(kept: Sequence[Kept], components: Sequence[Component]) -> list[Deal]:
    index = {component: nth for nth, component in enumerate(components)}
    sizes = [sum(entry.rows.values()) * entry.memory_bytes for entry in kept]
    target = max(float(BUCKET_BYTES), min(_DEAL_BYTES, sum(sizes) / _FEWEST_DEALS))
    starts = [0] * len(components)
    found: list[Deal] = []
    current: list[Kept] = []
    for nth, held in enumerate(accumulate(sizes)):
        current.append(kept[nth])
        if nth + 1 == len(kept) or held >= target * (len(found) + 1):
            parts = tuple(entry.partition for entry in current)
            pieces = tuple(piece_rows(entry) for entry in current)
            found.append(Deal(f"deal-{len(found):06d}", parts, pieces, tuple(starts)))
            for entry in current:
                for component, rows in entry.rows.items():
                    starts[index[component]] += rows
            current = []
    return found


def _key(seed: int, component: Component) -> int:
    """Seed of a component's order, the same in all orders."""
    name = f"{seed} {component.phase} {component.domain}"
    return xxhash.xxh3_64_intdigest(name.encode())
