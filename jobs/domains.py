"""`curate domains`: the pool cut into domains by what the examples look like.

run/domains/centroids.npy    (k, d) float32, the largest cluster of the sample first
run/domains/names.json       name, words and nearest examples of each
run/domains/part-….parquet   key and domain of each example, over the index's own
run/domains/clusters.json    sizes and inertia too; its mark says that the domains are in use

All that reads an index's `domain` finds the clustered one, by `curate.data.tables`. It stays so
until the settings have no `domains` any more: see `jobs.domains_use`.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.config import plain
from curate.data.files import fingerprint, read_json
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, record_stage
from curate.data.partitions import remove_strays
from curate.errors import ConfigError, InputError, counted
from curate.vectors.domains import NO_VECTOR, Domains
from jobs.cluster import Pool
from jobs.domains_work import VERSION, centroids_output, fit_work, names_output, place_work
from jobs.representations import missing_vectors, representation
from jobs.run import Listener, StageState, Task, ignore, raise_failures, require, run_tasks
from jobs.settings import Settings

log = logging.getLogger(__name__)


def domains_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Cluster the training rows, name the clusters, and put every row into one.

    Returns:
        `domains`: name, rows and words of each, the largest first; `rows`, `without_vector`,
        `inertia` (mean squared distance to the centroid); how many partitions were `done` now or
        `skipped`.

    Raises:
        InputError: the index or the vectors are missing.
        ConfigError: the settings have no `domains`; there are fewer vectors than clusters; or there
            are several representations and none is named.
    """
    if settings.domains is None:
        raise ConfigError(
            "the settings do not ask for clustered domains", fix="add domains: {clusters: 20}"
        )
    started = time.monotonic()
    run = RunFolder(Path(settings.run))
    require(run.partitions(), stage="the index", command=f"curate index {run.root}")
    work = _Work.of(settings, settings.domains)
    fit = work.fit()
    if not fit.is_done() or not centroids_output(run).is_done(fit.fingerprint):
        names_output(run).remove()
    fitted = run_tasks("domains", [fit], fit_work, pool=pool)
    raise_failures("domains", fitted)
    tasks = work.tables()
    outcome = run_tasks("domains", tasks, place_work, pool=pool, listener=listener)
    strays = remove_strays(run.root / "domains", {part.name for part in run.partitions()})
    raise_failures("domains", outcome)
    is_new = _summarise(work, tasks)
    seconds = round(time.monotonic() - started, 3)
    if is_new or outcome.done or strays or "domains" not in load_manifest(run)["stages"]:
        outputs = [centroids_output(run), names_output(run), *(t.output for t in tasks),
                   run.clusters]  # fmt: skip
        facts = {"representation": work.name, "seed": work.seed}
        record_stage(run, "domains", outputs=outputs, seconds=seconds, facts=facts)
    summary = _shown(read_json(run.clusters.path))
    for note in summary.pop("notes"):
        log.warning("domains: %s", note)
    return {
        **summary,
        "done": len(outcome.done),
        "skipped": len(outcome.skipped),
        "seconds": seconds,
    }


def plan_domains(settings: Settings) -> StageState:
    """What `domains_run` would do; writes nothing."""
    run = RunFolder(Path(settings.run))
    if settings.domains is None:
        return StageState("domains", 0, 0)
    total = len(run.partitions()) + 2
    if not run.partitions():
        return StageState("domains", 0, 0, ("the index has not been made yet",))
    try:
        work = _Work.of(settings, settings.domains)
    except InputError as error:
        return StageState("domains", total, 0, (error.what,))
    fit = work.fit()
    if not fit.is_done():
        changed = fit.output.mark() is not None
        why = "settings or vectors have changed" if changed else "there are no clusters yet"
        return StageState("domains", total, 0, (why,))
    tasks = work.tables()
    due = sum(not task.is_done() for task in tasks)
    forms = ("partition has no domains yet", "partitions have no domains yet")
    why = (counted(due, *forms),) if due else ()
    if due or not run.clusters.is_done(_summary_stamp(work, tasks)):
        due += 1
    return StageState("domains", total, total - due, why or ("they are not in use",) * due)


@dataclass(frozen=True, slots=True)
class _Work:
    """What the domains are made from."""

    settings: Settings
    options: Domains
    run: RunFolder
    name: str
    """Of the representation."""
    seed: int
    vectors: list[str]
    """(P,) digests of the partitions' vectors."""
    fingerprint: str
    """Of the clusters."""

    @classmethod
    def of(cls, settings: Settings, options: Domains) -> "_Work":
        run = RunFolder(Path(settings.run))
        name = representation(settings, options.vectors)
        seed = settings.seed if options.seed is None else options.seed
        vectors: list[str] = []
        index: list[str | None] = []
        for part in run.partitions():
            mark = run.vectors(part, name).mark()
            if mark is None:
                raise missing_vectors(run, name)
            vectors.append(mark["digest"])
            index.append((run.examples(part).mark() or {}).get("digest"))
        made_from = fingerprint(
            stage="domains",
            version=VERSION,
            settings={**plain(options), "vectors": None, "seed": seed},
            vectors=vectors,
            index=index,  # whose split says which rows the clusters are found on
            threads=settings.cluster.threads,
        )
        return cls(settings, options, run, name, seed, vectors, made_from)

    @property
    def payload(self) -> dict[str, Any]:
        return {"settings": plain(self.settings), "name": self.name, "seed": self.seed,
                "clusters": self.fingerprint}  # fmt: skip

    def fit(self) -> Task:
        """The clusters and their names."""
        payload = {**self.payload, "fingerprint": self.fingerprint}
        return Task("clusters", payload, names_output(self.run), self.fingerprint)

    def tables(self) -> list[Task]:
        """A table for each partition."""
        found: list[Task] = []
        for part, vectors in zip(self.run.partitions(), self.vectors, strict=True):
            examples = (self.run.examples(part).mark() or {}).get("digest")
            stamp = fingerprint(clusters=self.fingerprint, vectors=vectors, examples=examples)
            payload = {**self.payload, "partition": asdict(part), "fingerprint": stamp}
            found.append(Task(part.name, payload, self.run.domains(part), stamp))
        return found


def _summarise(work: _Work, tasks: list[Task]) -> bool:
    """Write `clusters.json` unless it is there; returns whether it was written."""
    marks = [task.output.mark() or {} for task in tasks]
    made_from = _summary_stamp(work, tasks)
    if work.run.clusters.is_done(made_from):
        return False
    named = read_json(names_output(work.run).path)["clusters"]
    rows = [sum(counts) for counts in zip(*(mark["sizes"] for mark in marks), strict=True)]
    inertia = [sum(sums) for sums in zip(*(mark["inertia"] for mark in marks), strict=True)]
    total = sum(rows)
    values = {
        "schema_version": 1,
        "representation": work.name,
        "seed": work.seed,
        "rows": sum(mark["rows"] for mark in marks),
        "without_vector": {"domain": NO_VECTOR, "rows": sum(m["rows"] for m in marks) - total},
        "asked_for": work.options.clusters,
        "inertia": sum(inertia) / total if total else None,
        "clusters": [
            {**entry, "rows": size, "inertia": own / size if size else None}
            for entry, size, own in zip(named, rows, inertia, strict=True)
        ],
    }
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    work.run.clusters.write(
        lambda path: path.write_text(text, encoding="utf-8"), made_from, clusters=work.fingerprint
    )
    return True


def _summary_stamp(work: _Work, tasks: list[Task]) -> str:
    digests = [(task.output.mark() or {}).get("digest") for task in tasks]
    return fingerprint(clusters=work.fingerprint, tables=digests)


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """The clusters for people and `--json`."""
    without, found = values["without_vector"]["rows"], values["clusters"]
    notes: list[str] = []
    if without:
        notes.append(f"{counted(without, 'row has', 'rows have')} no vector: domain {NO_VECTOR}")
    if len(found) < values["asked_for"]:
        notes.append(f"{len(found)} of {values['asked_for']} clusters have rows")
    return {
        "domains": [
            {"domain": entry["domain"], "rows": entry["rows"], "words": entry["words"]}
            for entry in sorted(found, key=lambda entry: -entry["rows"])
        ],
        "rows": values["rows"],
        "without_vector": without,
        "inertia": values["inertia"],
        "notes": notes,
    }
