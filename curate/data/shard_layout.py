"""Which shards there will be: their names, rows and row groups, before a byte is written.

A *component* is what gets files of its own: a domain, in one phase of training. A *group* is the
unit of work: consecutive partitions of one source, read once and dealt out to the components. All
sizes are estimates from the inputs' footers, all row counts are exact, and nothing depends on the
number of workers; so the names are final before the first group starts.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from curate.data.partitions import Partition

_SLUG_CHARS = 60
_RESERVED = re.compile(r"default|train|phase-\d+.*", re.IGNORECASE)

_OPEN_FILES = 200
_BUFFER_BYTES = 64 << 20
_LEAST_BUFFER = 1 << 20
_PIECE_BYTES = 16 << 20
_ROW_GROUPS = 4
_FEWEST_GROUPS = 16
_LARGEST_GROUP = 16
"""In shards."""


@dataclass(frozen=True, slots=True, order=True)
class Component:
    """Rows that get files of their own."""

    phase: int
    """1, 2 ... in the order of training; 0 where the mixture has no phases."""
    domain: str


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one component."""

    rows: int = 0
    disk: float = 0.0
    """Bytes in shards, estimated."""
    memory: float = 0.0
    """Bytes while they are handled, estimated."""

    def __add__(self, other: "Part") -> "Part":
        return Part(self.rows + other.rows, self.disk + other.disk, self.memory + other.memory)


@dataclass(frozen=True, slots=True)
class Kept:
    """What the plan takes from one partition."""

    partition: Partition
    rows: dict[Component, int]
    """Rows to write, copies counted; no zeros."""
    disk_bytes: float
    """Of a row in a shard, estimated."""
    memory_bytes: float
    """Of a row while it is handled, estimated."""

    def part(self, rows: int) -> Part:
        """Some of the rows."""
        return Part(rows, rows * self.disk_bytes, rows * self.memory_bytes)


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file."""

    component: Component
    folder: str
    """Of `folder_name`."""
    number: int
    """From 0, within the component."""
    total: int
    """How many shards the component has."""
    row_groups: tuple[int, ...]
    """Rows of each row group."""

    @property
    def stem(self) -> str:
        """Name of a file, without its suffix."""
        return f"train-{self.number:05d}-of-{self.total:05d}"

    def path(self, root: str, name: str) -> str:
        """A file of the shard, relative to the shards folder; `root` is the format's."""
        return "/".join(part for part in (root, self.folder, name) if part)

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True, slots=True)
class Group:
    """One task of the write stage."""

    name: str
    partitions: tuple[Partition, ...]
    piece_rows: tuple[int, ...]
    """For each partition, how many of its rows are held in memory at a time."""
    shards: tuple[Shard, ...]
    """In the order in which the rows of each component come."""


def slugs(domains: Iterable[str]) -> dict[str, str]:
    """Domain -> name of its folder and of its configuration in the card.

    Letters, digits, dot, dash and underscore of ASCII stay. A name that would be empty, too long,
    reserved, or the same as another's on a file system that ignores case gets a hash of the whole
    domain name behind it; so a slug does not depend on the order in which domains are met.
    """
    names = sorted(set(domains))
    found = _slugs(names, digits=8)
    if len({slug.casefold() for slug in found.values()}) < len(names):
        found = _slugs(names, digits=32)  # a domain that is called like another's slug and hash
    return found


def _slugs(names: list[str], *, digits: int) -> dict[str, str]:
    plain = {name: _plain_slug(name) for name in names}
    takers: dict[str, list[str]] = {}
    for name in names:
        takers.setdefault(plain[name].casefold(), []).append(name)
    chosen: dict[str, str] = {}
    for name in names:
        slug, rivals = plain[name], takers[plain[name].casefold()]
        exact = [rival for rival in rivals if plain[rival] == rival]
        alone = len(rivals) == 1 or exact == [name]
        usable = 0 < len(slug) <= _SLUG_CHARS and not _RESERVED.fullmatch(slug)
        if not (alone and usable):
            digest = xxhash.xxh3_128_hexdigest(name.encode())[:digits]
            slug = f"{slug[:_SLUG_CHARS].rstrip('-._') or 'domain'}-{digest}"
        chosen[name] = slug
    return chosen


def lay_out(
    kept: Sequence[Kept],
    *,
    size_bytes: float,
    names: Mapping[str, str],
    num_formats: int = 1,
    min_files: int = 1,
    row_group_bytes: float = 16e6,
) -> list[Group]:
    """All groups and their shards, in canonical order.

    Args:
        kept: one entry for each partition with something to write, in canonical order.
        size_bytes: target size of a shard.
        names: of `slugs`, for every domain.
        num_formats: in how many formats each shard is written; each has a file open.
        min_files: shards of each component at the least, where it has as many rows.
        row_group_bytes: largest row group in memory.
    """
    rows: dict[Component, int] = {}
    for entry in kept:
        for component, number in entry.rows.items():
            rows[component] = rows.get(component, 0) + number
    groups: list[tuple[list[Kept], bool]] = []
    sizes: list[dict[Component, list[tuple[int, ...]]]] = []
    for share in _cut(kept, size_bytes):
        parts = _parts(share)
        buffer = max(_LEAST_BUFFER, _BUFFER_BYTES / min(_OPEN_FILES, len(parts)))
        bundles = _bundles(parts, size_bytes, row_group_bytes, _OPEN_FILES // num_formats)
        for bundle in bundles:
            groups.append((share, len(bundles) > 1))
            sizes.append(
                {
                    component: cut_shards(
                        parts[component],
                        size_bytes=size_bytes,
                        row_group_bytes=min(buffer, row_group_bytes),
                        # Rounded up, the files of all groups are at least as many as asked.
                        least=-(-min_files * parts[component].rows // rows[component]),
                    )
                    for component in bundle
                }
            )
    totals: dict[Component, int] = {}
    for per_component in sizes:
        for component, cuts in per_component.items():
            totals[component] = totals.get(component, 0) + len(cuts)
    given: dict[Component, int] = {}
    found: list[Group] = []
    for (share, bundled), per_component in zip(groups, sizes, strict=True):
        bundle = list(per_component)
        shards = list[Shard]()
        for component, cuts in per_component.items():
            for row_groups in cuts:
                number = given.get(component, 0)
                given[component] = number + 1
                place = folder_name(component, names[component.domain])
                shards.append(Shard(component, place, number, totals[component], row_groups))
        name = share[0].partition.name.removeprefix("part-")
        if bundled:
            name += f"-{xxhash.xxh3_64_hexdigest(repr(bundle[0]).encode())[:8]}"
        found.append(_group(f"group-{name}", share, bundle, shards))
    return found


def _group(
    name: str, share: Sequence[Kept], bundle: Sequence[Component], shards: Sequence[Shard]
) -> Group:
    read = [entry for entry in share if not entry.rows.keys().isdisjoint(bundle)]
    pieces = tuple(piece_rows(entry) for entry in read)
    return Group(name, tuple(entry.partition for entry in read), pieces, tuple(shards))


def piece_rows(entry: Kept) -> int:
    """How many rows of a partition are held in memory at a time."""
    return max(1, int(_PIECE_BYTES / entry.memory_bytes))


def folder_name(component: Component, slug: str) -> str:
    """Folder of a component's files within that of a format.

    A stream of all domains has no slug: its files lie above the folders of domains.
    """
    return "/".join(
        part for part in (f"phase-{component.phase}" if component.phase else "", slug) if part
    )


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """`parts` counts that differ by at most one and sum to `total`; no zeros."""
    parts = max(1, min(parts, total))
    return tuple((i + 1) * total // parts - i * total // parts for i in range(parts))


def _cut(kept: Sequence[Kept], size_bytes: float) -> list[list[Kept]]:
    """Consecutive partitions of one source whose largest component is about one shard."""
    by_source: dict[str, list[Kept]] = {}
    for entry in kept:
        by_source.setdefault(entry.partition.source, []).append(entry)
    return [share for entries in by_source.values() for share in _cut_source(entries, size_bytes)]


def _cut_source(entries: Sequence[Kept], size_bytes: float) -> list[list[Kept]]:
    """`_cut` for one source."""
    sizes: dict[Component, float] = {}
    for entry in entries:
        for component, rows in entry.rows.items():
            sizes[component] = sizes.get(component, 0.0) + rows * entry.disk_bytes
    total = sum(sizes.values())
    # Domains usually lie mixed: then a group must be several shards large for its largest
    # component to fill one. But there should be groups for several workers, and none so large
    # that repeating it hurts.
    limit = max(2, min(_LARGEST_GROUP, total / (_FEWEST_GROUPS * size_bytes)))
    worth = min(limit, total / max(sizes.values()))
    num_groups = max(1, round(total / (size_bytes * worth)))
    cut, current, seen = list[list[Kept]](), list[Kept](), 0.0
    for entry in entries:
        current.append(entry)
        seen += sum(entry.rows.values()) * entry.disk_bytes
        if seen >= total * (len(cut) + 1) / num_groups:
            cut.append(current)
            current = []
    return [*cut, current] if current else cut


def _parts(share: Sequence[Kept]) -> dict[Component, Part]:
    """What each component has in a group, sorted."""
    found: dict[Component, Part] = {}
    for entry in share:
        for component, rows in entry.rows.items():
            found[component] = found.get(component, Part()) + entry.part(rows)
    return dict(sorted(found.items()))


def _bundles(
    parts: Mapping[Component, Part], size_bytes: float, row_group_bytes: float, most: int
) -> list[list[Component]]:
    """Components that are written in one round over the rows of a group.

    One with several row groups has its files open all the time; a small one is held in memory
    until it is complete, and many of those weigh no more than a row group.
    """
    found, room = list[list[Component]](), 0.0
    for component, part in parts.items():
        is_small = part.memory <= min(_LEAST_BUFFER, row_group_bytes) and part.disk < size_bytes / 2
        weight = part.memory / _LEAST_BUFFER if is_small else 1.0
        if not found or weight > room:
            found.append([])
            room = max(1, most)
        found[-1].append(component)
        room -= weight
    return found


def cut_shards(
    part: Part, *, size_bytes: float, row_group_bytes: float, least: int = 1
) -> list[tuple[int, ...]]:
    """Row groups of each shard that some rows of one component get.

    Args:
        part: the rows.
        size_bytes: target size of a shard.
        row_group_bytes: largest row group in memory.
        least: shards at the least, where there are as many rows.
    """
    wanted = round(part.disk / size_bytes) if part.disk > 1.5 * size_bytes else 1
    counts = split_evenly(part.rows, max(least, wanted))
    fewest = _ROW_GROUPS if part.disk / len(counts) > size_bytes / 2 else 1
    per_row = part.memory / part.rows
    return [
        split_evenly(rows, max(fewest, -int(-rows * per_row // row_group_bytes))) for rows in counts
    ]


def _plain_slug(domain: str) -> str:
    text = unicodedata.normalize("NFKD", domain)
    text = "".join(char for char in text if not unicodedata.combining(char))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
