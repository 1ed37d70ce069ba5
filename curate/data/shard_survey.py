"""What there is to write: counts from the plan, sizes from footers and a sample, the columns."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.data.choice import Choice, everything, read_choice
from curate.data.cutting import Footer, read_footer
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.payload import Payload
from curate.data.reading import payload_schema, resolve_address
from curate.data.shard_columns import shard_schema
from curate.data.shard_curriculum import Ordering, Phasing, find_phasing, read_phased
from curate.data.shard_formats.parquet import table_options
from curate.data.shard_layout import Component, Group, Kept, Shard, lay_out, slugs
from curate.data.shard_line import STREAMS, Line, Stretch, lay_out_line
from curate.data.shard_settings import Shards
from curate.data.shard_weights import Sum, Tally, Terms
from curate.data.shards import complete_rows
from curate.data.tables import read_examples
from curate.errors import ConfigError, CurateError, InputError

log = logging.getLogger(__name__)

_SAMPLE_BYTES = 4 << 20
_TWO_PASSES = 1.5
"""Time of both passes over that of writing in the order of the input."""


@dataclass(frozen=True, slots=True)
class Survey:
    """All that there is to write."""

    groups: list[Group]
    """In canonical order; none where there is a line."""
    line: Line | None
    """For all orders but the input's."""
    parts: dict[Component, tuple[int, int]]
    """Rows and tokens of each component, where domains share their files."""
    schemas: dict[str, pa.Schema]
    """Source -> columns of its shards; all equal where the columns of all sources agree."""
    is_uniform: bool
    """Whether they do."""
    examples: dict[Component, int]
    """Different examples of each component; copies not counted."""
    repeats: dict[Component, list[int]]
    """How many of these are written once, how many twice, and so on."""
    worth: dict[Component, Sum]
    """Of each component, copies times weight summed up; empty where weights are a column."""
    terms: dict[str, Terms]
    """Name of a partition -> what its weights need to know of the others."""
    phasing: Phasing | None
    """Of a curriculum."""
    names: dict[str, str]
    """Domain or source -> slug."""
    sources: dict[str, list[str]]
    """Source -> its domains with something to write."""
    size_bytes: float
    """Of all shards, estimated."""
    seconds: float
    """Of one process writing them, estimated."""

    @property
    def tasks(self) -> Sequence[Group | Stretch]:
        """Each makes some of the shards."""
        return self.groups if self.line is None else self.line.stretches

    @property
    def shards(self) -> list[Shard]:
        return [shard for task in self.tasks for shard in task.shards]

    @property
    def rows(self) -> dict[str, int]:
        """Name of each task -> rows of its shards."""
        return {task.name: sum(s.num_rows for s in task.shards) for task in self.tasks}


@dataclass(frozen=True, slots=True)
class _Counted:
    """What the plan takes from one partition."""

    partition: Partition
    rows: dict[Component, int]
    examples: dict[Component, int]


@dataclass(frozen=True, slots=True)
class _Sample:
    """What a source's rows need, for each byte that its files hold after decompression."""

    disk: float
    memory: float
    seconds: float


def survey(
    run: RunFolder,
    partitions: Sequence[Partition],
    settings: Shards,
    *,
    seed: int,
    tokenizer: str | None = None,
    ordering: Ordering | None = None,
) -> Survey:
    """Look through the plan; writes nothing.

    Args:
        run: the run folder.
        partitions: all of them, in canonical order, planned.
        settings: size, codec and level of the shards, and how weights reach the trainer.
        seed: of the run, for copies that are drawn and for the order of the rows.
        tokenizer: digest of the tokenizer that counted for the plan.
        ordering: of a curriculum; None: the phases are the plan's.

    Raises:
        CurateError: the plan keeps nothing.
        ConfigError: the rows cannot be put into the order, or the phases, that are asked for.
        InputError: an input file is gone, or its columns have no common type.
    """
    phasing = None if ordering is None else find_phasing(run, partitions, ordering)
    counted: list[_Counted] = []
    tally = Tally(settings.weights, seed)
    repeats: dict[Component, list[int]] = {}
    is_stream = settings.order in STREAMS
    tokens: dict[Component, int] = {}
    is_marked = settings.weights == "column" and phasing is None and not is_stream
    for part in partitions:
        found = _marked(run, part) if is_marked else {}
        if not found:
            planned = read_phased(run, part, phasing, tokenizer=tokenizer if is_stream else None)
            choice = tally.take(planned)
            for component, number in choice.token_counts().items():
                tokens[component] = tokens.get(component, 0) + number
            found = choice.repeats()
        if found:
            rows = {c: sum(n * times for times, n in enumerate(r, 1)) for c, r in found.items()}
            counted.append(_Counted(part, rows, {c: sum(r) for c, r in found.items()}))
            for component, numbers in found.items():
                both = zip_longest(repeats.get(component, ()), numbers, fillvalue=0)
                repeats[component] = [sum(pair) for pair in both]
    if not counted:
        raise CurateError(
            "the plan keeps no example, so there is nothing to write",
            fix="raise plan.keep, or look at the reasons with `curate show`",
        )
    schemas, conflict = _schemas(run, [entry.partition for entry in counted])
    _refuse_order(settings, [c for entry in counted for c in entry.rows], conflict)
    sources: dict[str, set[str]] = {}
    examples: dict[Component, int] = {}
    for entry in counted:
        for component, number in entry.examples.items():
            sources.setdefault(entry.partition.source, set()).add(component.domain)
            examples[component] = examples.get(component, 0) + number
    names = slugs([*sources, *(domain for domains in sources.values() for domain in domains)])
    samples: dict[str, _Sample] = {}
    sizes = _Sizes(run)
    kept: list[Kept] = []
    seconds = 0.0
    for entry in counted:
        part = entry.partition
        raw = sizes.of(part)
        if part.source not in samples:
            choice = read_choice(run, part, tokenizer=None)
            samples[part.source] = _sample(
                run, part, choice, raw, schema=schemas[part.source], settings=settings
            )
        sample = samples[part.source]
        kept.append(Kept(part, entry.rows, raw * sample.disk, raw * sample.memory))
        seconds += sum(entry.rows.values()) * raw * sample.seconds
    groups, line = _laid_out(kept, settings, names, seed)
    return Survey(
        groups=groups,
        line=line,
        parts=_parts(kept, tokens) if is_stream else {},
        schemas=schemas,
        is_uniform=not conflict,
        examples=dict(sorted(examples.items())),
        repeats=repeats,
        worth={component: tally.totals[component] for component in sorted(tally.totals)},
        terms={part.name: tally.terms(nth) for nth, part in enumerate(partitions)},
        phasing=phasing,
        names=names,
        sources={source: sorted(domains) for source, domains in sources.items()},
        size_bytes=sum(sum(entry.rows.values()) * entry.disk_bytes for entry in kept),
        seconds=seconds * (1 if line is None else _TWO_PASSES),
    )


def _marked(run: RunFolder, part: Partition) -> dict[Component, list[int]]:
    """`Choice.repeats` of a partition, where the mark of its plan says it; else nothing."""
    mark = run.planned(part).mark() or {}
    return {Component(phase, domain): numbers for phase, domain, numbers in mark.get("repeats", ())}


def _laid_out(
    kept: Sequence[Kept], settings: Shards, names: dict[str, str], seed: int
) -> tuple[list[Group], Line | None]:
    if settings.order != "input":
        return [], lay_out_line(kept, settings=settings, names=names, seed=seed)
    groups = lay_out(
        kept,
        size_bytes=settings.size_mb * 1e6,
        names=names,
        num_formats=len(settings.formats),
        min_files=settings.min_files,
        row_group_bytes=settings.row_group_mb * 1e6,
    )
    return groups, None


def _parts(
    kept: Sequence[Kept], tokens: Mapping[Component, int]
) -> dict[Component, tuple[int, int]]:
    rows: dict[Component, int] = {}
    for entry in kept:
        for component, number in entry.rows.items():
            rows[component] = rows.get(component, 0) + number
    return {component: (rows[component], tokens.get(component, 0)) for component in sorted(rows)}


def _refuse_order(settings: Shards, components: Sequence[Component], conflict: str) -> None:
    """Refuse an order that the plan or the columns, with what conflicts in them, do not allow."""
    if settings.order == "input":
        return
    if settings.order == "scheduled" and not any(component.phase for component in components):
        raise ConfigError(
            "shards.order is scheduled, but the plan has no phases",
            fix="set shards.order to domain-interleaved, or plan with a mixer that has phases,"
            " such as cooldown, or set shards.curriculum",
        )
    if conflict:
        # One table holds the rows of all sources between the two passes, whatever the files are.
        raise ConfigError(
            f"shards.order is {settings.order}, but the sources have no common columns: {conflict};"
            " every order but input needs them, also where each domain has files of its own and"
            " one source",
            fix="give the column one type, or set shards.order to input",
        )


def forecast(
    run: RunFolder, partitions: Sequence[Partition], settings: Shards
) -> tuple[float, float]:
    """Bytes and seconds if every indexed example were written once; for a run without a plan."""
    schemas, _ = _schemas(run, partitions)
    samples: dict[str, _Sample] = {}
    sizes = _Sizes(run)
    size = seconds = 0.0
    for part in partitions:
        raw, num_rows = sizes.of(part), read_examples(run, part, ["row"])
        if part.source not in samples and num_rows.height:
            choice = everything(num_rows["row"].to_numpy())
            samples[part.source] = _sample(
                run, part, choice, raw, schema=schemas[part.source], settings=settings
            )
        if sample := samples.get(part.source):
            size += num_rows.height * raw * sample.disk
            seconds += num_rows.height * raw * sample.seconds
    return size, seconds


class _Sizes:
    """How large a row of each partition is."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._footers: dict[str, Footer] = {}

    def of(self, part: Partition) -> float:
        """Bytes of a row after decompression, averaged over the row groups of a partition."""
        if part.address not in self._footers:
            address = resolve_address(self._run, part.address)
            self._footers[part.address] = read_footer(address, part.stamp)
        rows = size = first = 0
        for group in self._footers[part.address].groups:
            if first < part.first_row + part.num_rows and first + group.num_rows > part.first_row:
                rows += group.num_rows
                size += group.size_bytes
            first += group.num_rows
        return max(1.0, size / max(1, rows))


def _schemas(run: RunFolder, partitions: Sequence[Partition]) -> tuple[dict[str, pa.Schema], str]:
    """Columns of the shards of each source, and what keeps them from being the same for all."""
    by_source: dict[str, list[Partition]] = {}
    for part in partitions:
        by_source.setdefault(part.source, []).append(part)
    try:
        common = shard_schema(payload_schema(run, partitions))
    except InputError as error:
        if len(by_source) == 1:
            raise
        log.warning("%s; each source keeps its own columns", error.what)
        found = {name: shard_schema(payload_schema(run, own)) for name, own in by_source.items()}
        return found, error.what
    return dict.fromkeys(by_source, common), ""


def _sample(
    run: RunFolder,
    part: Partition,
    choice: Choice,
    raw: float,
    *,
    schema: pa.Schema,
    settings: Shards,
) -> _Sample:
    """Write the first kept rows of a source to memory, and see what they need.

    The codec of the input may be another, and columns that repeat a few values take far more
    memory than their footer says.
    """
    kept = np.flatnonzero(sum(copies > 0 for copies in choice.copies.values()))
    index = kept[: max(1, int(_SAMPLE_BYTES / raw))]
    started = time.perf_counter()
    tables: list[pa.Table] = []
    with Payload(run) as payload:
        batches = payload.batches(part, choice.rows[index], batch_rows=len(index))
        for start, batch in batches:
            inside = (choice.rows[index] >= start) & (choice.rows[index] < start + batch.num_rows)
            tables.append(complete_rows(batch, start, part, choice.at(index[inside]), schema))
    table = pa.concat_tables(tables).combine_chunks()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **table_options(settings, table))
    seconds = time.perf_counter() - started
    metadata = pq.read_metadata(pa.BufferReader(sink.getvalue()))
    size = sum(
        metadata.row_group(i).column(j).total_compressed_size
        for i in range(metadata.num_row_groups)
        for j in range(metadata.num_columns)
    )
    taken = raw * len(index)
    return _Sample(size / taken, table.nbytes / taken, seconds / taken)
