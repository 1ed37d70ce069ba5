"""Which training examples help and hurt a query, from a run's index of gradients.

The query's gradient is taken with the checkpoints that the index was made with, projected on the
same sides, preconditioned with the saved curvature, and multiplied with every row. Nothing is
written.

Shapes: N examples of a partition, k numbers of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.example import KEY, TRAIN
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import read_fields
from curate.data.tables import read_examples
from curate.errors import ConfigError
from curate.models.scan import ScanPart, score_blocks
from jobs.contents import content_text
from jobs.influence import families_of
from jobs.influence_asked import Asked, asked_of
from jobs.influence_build import vectors_output
from jobs.influence_query import read_query
from jobs.influence_ready import (
    check_domain,
    check_index,
    check_query,
    check_weights,
    naming,
    options_of,
)
from jobs.influence_rows import Known, known_rows, whitened_output, whitened_part
from jobs.influence_top import HELPS, candidates, merged
from jobs.influence_work import Family
from jobs.opening import load_settings
from jobs.settings import Settings
from jobs.store import at_hand
from scorers.influence import Influence

_TEXT_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A training example."""

    rank: int
    score: float
    source: str
    file: str
    row: int
    domain: str
    text: str
    """Its content, cut; as it is: escape it before it reaches a terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a run says of a query."""

    run: str
    query: str
    """The row or file that it was read from, or what was typed, cut; not escaped."""
    metric: str
    checkpoints: list[str]
    loss: float
    """Of the query, nats for each counted position; mean over the checkpoints."""
    num_scored: int
    """Positions of the query that count."""
    notes: list[str]
    helps: list[Found]
    """Most helpful first: a step on them lowers the query's loss."""
    hurts: list[Found]
    """Most harmful first; their scores need not be negative."""


def ask(
    root: Path,
    given: str | Mapping[str, Any],
    *,
    examples: int = 3,
    domain: str | None = None,
) -> Answer:
    """The training examples that help and hurt a query most.

    Args:
        root: the run folder.
        given: see `jobs.influence_query`; a mapping is an example's fields.
        examples: how many of each end.
        domain: list examples of this one only.

    Raises:
        InputError: the run has no index, or it is damaged; the query cannot be scored.
        ConfigError: model, tokenizer or settings are not those of the index; there is no such
            domain; the query is no text and no example.
    """
    if isinstance(examples, bool) or not isinstance(cast(object, examples), int) or examples < 1:
        raise ConfigError(
            f"{examples!r} examples cannot be listed", fix="give a whole number from 1 up"
        )
    settings = load_settings(at_hand(root))
    run, options = RunFolder(Path(settings.run)), options_of(settings)
    if domain is not None:
        check_domain(run, domain)
    families, chosen, _ = families_of(settings, options)
    check_index(run, options, chosen)
    check_weights(settings, chosen)
    query = read_query(settings, given)
    asked: dict[str, Asked] = {}
    for measurer in chosen:
        asked[measurer.slug] = asked_of(settings, options, measurer, query)
    parts = [_ends(run, part, options, families, asked, examples, domain)
             for part in run.partitions()]  # fmt: skip
    listed = merged(parts, count=examples)
    first = asked[chosen[0].slug]
    notes: list[str] = []
    if first.encoded.truncated[0]:
        notes.append(
            f"the query is longer than the {int(first.encoded.lengths[0]):,} tokens that the task"
            " reads, and was cut: this is the influence on what is left"
        )
    found = _with_texts(run, settings, listed)
    return Answer(
        run=settings.run,
        query=query.name,
        metric=options.metric,
        checkpoints=[measurer.name for measurer in chosen],
        loss=float(np.mean([one.loss for one in asked.values()])),
        num_scored=int(first.encoded.num_scored[0]),
        notes=notes,
        helps=[one for sign, one in found if sign == HELPS],
        hurts=[one for sign, one in found if sign != HELPS],
    )


def _ends(
    run: RunFolder,
    part: Partition,
    options: Influence,
    families: Sequence[Family],
    asked: Mapping[str, Asked],
    count: int,
    domain: str | None,
) -> pl.DataFrame:
    """The ends of one partition."""
    keys = read_examples(run, part, [*KEY, "split", "domain"])
    listed = (keys["split"] == TRAIN).to_numpy()
    if domain is not None:
        listed = listed & (keys["domain"] == domain).to_numpy()
    total = np.zeros(keys.height)
    for family in families:
        own = np.zeros(keys.height)
        doubts: list[npt.NDArray[np.float64]] = []
        for slug, weight in zip(family.checkpoints, family.weights, strict=True):
            vectors = vectors_output(run, part, slug)
            with naming(run, options, vectors):
                known = known_rows(run, part, slug)
            check_query(run, known.header, asked[slug].header, vectors.path)
            scanned = _scanned(run, part, slug, known, options)
            for start, scores in score_blocks([scanned], asked[slug].values):
                own[start : start + scores.shape[1]] += weight * scores[0]
            doubts.append(known.doubts)
        if options.metric == "trak":
            own *= np.mean(doubts, axis=0)
        total += own / len(families)
    return candidates(keys, total[:, None], ["query"], listed=listed, count=count)


def _scanned(
    run: RunFolder, part: Partition, slug: str, known: Known, options: Influence
) -> ScanPart:
    if options.whiten:
        with naming(run, options, whitened_output(run, part, slug)):
            return whitened_part(run, part, slug, known)
    return known.scan_part(options.metric)


def _with_texts(
    run: RunFolder, settings: Settings, listed: pl.DataFrame
) -> list[tuple[int, Found]]:
    """Sign and example; each partition is read once."""
    texts: dict[tuple[Any, ...], tuple[str, str]] = {}
    wanted = set(listed.select(KEY).rows())
    files = {(source, file) for source, file, _ in wanted}
    for part in run.partitions():
        if (part.source, part.file) not in files:
            continue
        keys = read_examples(run, part, [*KEY, "domain"])
        places = [i for i, key in enumerate(keys.select(KEY).rows()) if key in wanted]
        if not places:
            continue
        fields = read_fields(run, part, settings.sources[part.source])
        for place in places:
            text = content_text(fields.row(place, named=True))[:_TEXT_CHARS]
            texts[keys.select(KEY).row(place)] = keys["domain"][place], text
    found: list[tuple[int, Found]] = []
    for row in listed.sort("sign", "rank", descending=[True, False]).to_dicts():
        domain, text = texts[tuple(row[name] for name in KEY)]
        own = {name: row[name] for name in ("rank", "score", *KEY)}
        found.append((row["sign"], Found(**own, domain=domain, text=text)))
    return found
