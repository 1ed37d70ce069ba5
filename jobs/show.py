"""What a run kept, its best and worst examples, and what was set aside; for `curate show`."""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl

from curate.data.card_configs import load_lines
from curate.data.counts import CHARACTERS, counts_output
from curate.data.example import KEY, TRAIN
from curate.data.files import misshapen, read_document
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest
from curate.data.mirror import shown_place
from curate.data.partitions import Partition
from curate.data.recipe import Written
from curate.data.shard_layout import Component
from curate.data.tables import damage_named, read_examples, read_table, scan_examples, table_paths
from curate.errors import ConfigError, InputError
from curate.plan.expression import INDEX_COLUMNS, TOKENS, Values, parse_expression
from curate.plan.groups import Grouping
from curate.plan.plan import run_together
from curate.plan.scoring import scoring_passes
from jobs.contents import content_text, read_contents
from jobs.lengths import lengths_digest
from jobs.opening import load_settings
from jobs.plan_tables import open_tables, read_summary, score_columns
from jobs.report_labels import label_names, shown_name
from jobs.settings import Settings
from jobs.status import set_aside
from jobs.store import at_hand
from jobs.train_notes import kept_training_notes

_TEXT_CHARS = 2000
_LIKELY = "likely_label"
"""Column of a scorer that names a class for each example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One line of the table of domains; shares are of tokens (of examples, for tables)."""

    domain: str
    rows: int
    """Training examples there are."""
    tokens: int
    natural_share: float
    """Of the pool."""
    asked_share: float | None = None
    """Of what is kept, by the mixture; None without one."""
    kept_rows: int | None = None
    kept_share: float | None = None
    random_share: float | None = None
    """What random keeps at the same number of tokens."""
    epochs: float | None = None
    """How often the kept tokens go through the domain's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One example."""

    source: str
    file: str
    row: int
    domain: str
    score: float
    reason: str | None
    """What the plan says of it; None before there is a plan."""
    text: str
    """Its content, cut; as it is: escape it before it reaches a terminal."""
    label: str | None = None
    """The class by name, or its number."""
    likely_label: str | None = None
    """The class that another model finds likelier; None where it is the given one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What `curate show` tells."""

    run: str
    unit: str
    """tokens, characters without a tokenizer, or examples where the task has neither."""
    training: dict[str, Any]
    """Training rows and tokens."""
    kept: dict[str, Any] | None
    """Rows, copies, tokens and their shares; None before there is a plan."""
    domains: list[Domain]
    yardsticks: dict[str, dict[str, Any]]
    """The plan, and what random and others would have kept at the same number of tokens; not for
    one domain."""
    notes: list[str]
    score: str | None
    highest: list[Shown]
    lowest: list[Shown]
    set_aside: dict[str, int]
    load: list[str]
    """Lines of Python that load the shards; empty before they are written."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Rows that were set aside."""

    counts: dict[str, int]
    rows: list[dict[str, Any]]
    """source, file, row, reason, detail: a few of each reason."""


def shown(
    root: Path, *, examples: int = 3, score: str | None = None, domain: str | None = None
) -> View:
    """Look at a run; it may still be unfinished.

    Args:
        root: the run folder.
        examples: how many of each end.
        score: column or expression; the plan's by default, else the first that was scored.
        domain: show only this one.

    Raises:
        RunFolderError: there is no run at `root`.
        InputError: it has no index yet.
        ConfigError: the score or the domain is unknown.
    """
    settings = load_settings(at_hand(root))
    run = RunFolder(Path(settings.run))
    summary = read_summary(run)
    domains = domains_of(summary) if summary else _from_index(run)
    if domain is not None:
        known = [entry.domain for entry in domains]
        domains = [entry for entry in domains if entry.domain == domain]
        if not domains:
            raise ConfigError(f"there is no domain {domain!r}", fix=f"use one of {_some(known)}")
    text, highest, lowest = _ends(settings, run, examples, score, domain)
    counted_by = summary["tokenizer"] if summary else None
    return View(
        run=shown_place(settings.run),
        unit={None: "examples", CHARACTERS: CHARACTERS}.get(counted_by, "tokens"),
        training={key: sum(getattr(e, key) for e in domains) for key in ("rows", "tokens")},
        kept=_kept(summary, domain) if summary else None,
        domains=domains,
        yardsticks=yardsticks_of(summary) if summary and domain is None else {},
        notes=[
            *kept_training_notes(run),
            *(summary["notes"] if summary else ["there is no plan yet: `curate plan` makes it"]),
        ],
        score=text,
        highest=highest,
        lowest=lowest,
        set_aside=set_aside(run),
        load=loading_lines(run, domain),
    )


def quarantined(root: Path, *, limit: int = 3) -> Quarantine:
    """Rows that were set aside, a few of each reason.

    Raises:
        RunFolderError: there is no run at `root`.
    """
    run = RunFolder(Path(load_settings(at_hand(root, data=False)).run))
    counts = set_aside(run)
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(run.quarantine.glob("part-*.parquet")):
        rows = read_table(path, ["source", "file", "row", "reason", "detail"])
        for row in rows.group_by("reason", maintain_order=True).head(limit).to_dicts():
            of_reason = found.setdefault(row["reason"], [])
            if len(of_reason) < limit:
                of_reason.append({key: row[key] for key in rows.columns})
    return Quarantine(counts, [row for rows in found.values() for row in rows])


def yardsticks_of(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The plan itself, and what others would have kept at the same number of tokens."""
    own = {
        "rows": summary["kept"]["rows"],
        "tokens": summary["kept"]["tokens"],
        "mean_score": summary["means"].get("plan.score", {}).get("kept"),
        "overlap": 1.0,
    }
    # Rows of numbers are all as long; without a mixture there are no proportions to compare.
    empty = {"longest"} if summary["tokenizer"] is None else set[str]()
    empty |= {"natural"} if summary["mixer"] is None else set()
    others = {
        name: {key: value for key, value in entry.items() if key != "domains"}
        for name, entry in summary["yardsticks"].items()
        if name not in empty
    }
    return {"plan": own, **others}


def domains_of(summary: Mapping[str, Any]) -> list[Domain]:
    """The domains as a plan's summary has them."""
    total = max(1, summary["training"]["tokens"])
    random = summary["yardsticks"].get("random")
    return [
        Domain(
            domain=name,
            rows=entry["rows"],
            tokens=entry["tokens"],
            natural_share=entry["tokens"] / total,
            asked_share=entry["token_share_asked"],
            kept_rows=entry["kept_rows"],
            kept_share=entry["token_share"],
            random_share=random["domains"][name]["tokens"] / max(1, random["tokens"])
            if random
            else None,
            epochs=entry["epochs"],
        )
        for name, entry in summary["domains"].items()
    ]


def _kept(summary: Mapping[str, Any], domain: str | None) -> dict[str, Any]:
    """What the plan keeps, of everything or of one domain."""
    if domain is None:
        return summary["kept"]
    entry = summary["domains"][domain]
    return {
        "rows": entry["kept_rows"],
        "copies": entry["copies"],
        "tokens": entry["kept_tokens"],
        "row_share": entry["kept_rows"] / max(1, entry["rows"]),
        "token_share": entry["kept_tokens"] / max(1, entry["tokens"]),
    }


def _from_index(run: RunFolder) -> list[Domain]:
    """Before there is a plan: examples count, tokens are not known to everybody yet."""
    if not run.partitions():
        raise InputError(f"{run.root} has no index yet", fix=f"run `curate index {run.root}`")
    train = scan_examples(run).filter(pl.col("split") == "train")
    with damage_named(table_paths(run, "examples")):
        counts = train.group_by("domain").len().sort("domain").collect().rows()
    total = sum(count for _, count in counts)
    return [
        Domain(domain=name, rows=count, tokens=count, natural_share=count / max(1, total))
        for name, count in counts
    ]


def _ends(
    settings: Settings, run: RunFolder, count: int, score: str | None, domain: str | None
) -> tuple[str | None, list[Shown], list[Shown]]:
    """The score that is shown, and the examples at its two ends."""
    scorers = score_columns(run)
    if score is None and not scorers and "lengths" not in load_manifest(run)["stages"]:
        return None, [], []
    first = next((f"{name}.{names[0]}" for name, names in scorers.items()), None)
    text = score or settings.plan.score or first
    if text is None or not count:
        return text, [], []
    expression = parse_expression(text, scorers, where="--score")
    tables = open_tables(run, _lengths(settings, run, is_needed=TOKENS in expression.columns))
    columns = [name for name in expression.columns if name not in INDEX_COLUMNS]
    grouping = Grouping(settings.plan.within, bool(settings.mix))
    with_labels = grouping.within == "label"
    batches = tables.batches(columns, with_labels=with_labels, seed=settings.seed)
    passes = {"score": scoring_passes(expression, grouping)}
    scoring = run_together(passes, lambda: batches)["score"]
    ends = _Ends(count)
    for part, batch in zip(run.partitions(), batches, strict=True):
        ends.add(part, read_examples(run, part, [*KEY, "domain", "split"]),
                 scoring.values(batch), domain)  # fmt: skip
    highest = _with_texts(run, settings, ends.highest())
    return text, highest, _with_texts(run, settings, ends.lowest())


def _lengths(settings: Settings, run: RunFolder, *, is_needed: bool) -> str | None:
    """Whose tokens are counted; None where they are not, as before there is a plan.

    Raises:
        InputError: they are not, and are needed.
    """
    try:
        digest = lengths_digest(settings)
    except InputError:
        if is_needed:
            raise
        return None
    if all(counts_output(run, part, digest).path.exists() for part in run.partitions()):
        return digest
    if is_needed:
        raise InputError(
            f"the tokens of {run.root} have not been counted yet",
            fix=f"run `curate plan {run.root}` first, or show a score without {TOKENS}",
        )
    return None


class _Ends:
    """The examples with the highest and the lowest scores, a few of each."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: dict[int, list[tuple[float, int, Partition, Shown]]] = {1: [], -1: []}
        self._number = 0

    def add(
        self, part: Partition, examples: pl.DataFrame, values: Values, domain: str | None
    ) -> None:
        """Add the scores (N,) of the training rows among the examples."""
        frame = examples.filter(pl.col("split") == TRAIN).drop("split")
        usable = np.isfinite(values)
        if domain is not None:
            usable &= (frame["domain"] == domain).to_numpy()
        order = np.flatnonzero(usable)[np.argsort(values[usable], kind="stable")]
        for sign, rows in ((1, order[-self._count :]), (-1, order[: self._count])):
            heap = self._found[sign]
            for index in rows.tolist():
                value = float(values[index])
                row: dict[str, Any] = frame.row(index, named=True)
                example = Shown(**row, score=value, reason=None, text="")
                self._number += 1
                heapq.heappush(heap, (sign * value, -self._number, part, example))
                if len(heap) > self._count:
                    heapq.heappop(heap)

    def highest(self) -> list[tuple[Partition, Shown]]:
        return [(part, example) for _, _, part, example in sorted(self._found[1], reverse=True)]

    def lowest(self) -> list[tuple[Partition, Shown]]:
        return [(part, example) for _, _, part, example in sorted(self._found[-1], reverse=True)]


def _with_texts(
    run: RunFolder, settings: Settings, found: list[tuple[Partition, Shown]]
) -> list[Shown]:
    """The examples with their content, and what the plan says of them."""
    complete: list[Shown] = []
    if not found:
        return complete
    names = label_names(load_manifest(run))
    judge = next((s for s, own in score_columns(run).items() if _LIKELY in own), None)
    for part, example in found:
        rows = read_examples(run, part, ["row", "label"])
        at = rows["row"].index_of(example.row)
        assert at is not None
        label, likely = _number(rows["label"][at]), None
        if judge and label is not None and run.scores(part, judge).path.exists():
            likely = _number(read_table(run.scores(part, judge).path, [_LIKELY])[_LIKELY][at])
        (fields,) = read_contents(run, part, settings.sources[part.source], [at])
        planned = run.planned(part).path
        reason = None
        if planned.exists():
            reason = read_table(planned, ["reason"])["reason"][at]
        # Of tables and images the content begins with the number of the class.
        text = content_text(fields).removeprefix(f"label {fields.get('label')}: ")
        complete.append(
            replace(
                example,
                reason=reason,
                text=text[:_TEXT_CHARS],
                label=None if label is None else shown_name(str(label), names),
                likely_label=None if likely in (None, label) else shown_name(str(likely), names),
            )
        )
    return complete


def _number(label: float | None) -> int | None:
    """Of a class; none where there is no label."""
    return None if label is None or math.isnan(label) else int(label)


def loading_lines(run: RunFolder, domain: str | None) -> list[str]:
    """How the shards are loaded: all of them, or those of one domain."""
    path = run.shards / "manifest.json"
    manifest = read_document(path, shards=list, domains=dict, columns=dict)
    if manifest is None:
        return []
    formats = cast(list[str], manifest.get("formats") or ["parquet"])
    is_stream = manifest.get("order") in ("domain-interleaved", "scheduled")
    shards = [
        shard
        for shard in cast(list[dict[str, Any]], manifest["shards"])
        if (is_stream or domain in (None, shard.get("domain")))
        and shard.get("format", "parquet") == formats[0]
    ]
    if not shards:
        return []
    written = Written(
        shards=shards,
        others=(),
        formats=formats,
        examples={},
        names=manifest["domains"],
        sources={},
        columns=manifest["columns"],
        mixer=None,
        asked=(),
        tokenizer=None,
    )
    try:
        if is_stream:
            written = replace(written, parts=_parts(manifest, domain))
        lines = load_lines(written, repr(shown_place(run.shards)))
    except (TypeError, KeyError, AttributeError) as error:
        raise misshapen(path, f"{type(error).__name__}: {error}") from error
    if domain is None or is_stream:
        return lines
    return [line for line in lines if not line.startswith(("everything", "#"))]


def _parts(manifest: Mapping[str, Any], domain: str | None) -> dict[Component, tuple[int, int]]:
    """Rows of each domain where domains share their files; tokens are not known."""
    found = {
        Component(entry["phase"], entry["domain"]): (
            sum(copies * number for copies, number in enumerate(entry["examples"], start=1)), 0
        )
        for entry in manifest["copies"]
    }  # fmt: skip
    return {c: rows for c, rows in found.items() if domain in (None, c.domain)} or found


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
