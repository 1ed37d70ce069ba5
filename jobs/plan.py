"""`curate plan`: which examples stay, how often, how much each counts, and why.

First the cuts, found over all partitions (`plan/thresholds.json`), then the table of each
partition, then the summary. Each is kept once it is whole, so that a rerun goes on from there.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.config import plain
from curate.data.choice import repeats_of
from curate.data.counts import EXAMPLES, counts_output
from curate.data.files import discard, fingerprint, misshapen, read_document
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, record_stage
from curate.data.partitions import Output, Partition, remove_strays
from curate.data.tables import write_table
from curate.errors import ConfigError, InputError, counted
from curate.plan.batches import Tables
from curate.plan.groups import PLACE
from curate.plan.mixture import Mixture, load_mixture
from curate.plan.plan import Arm, apply_plan, columns_read, make_plans
from curate.plan.rules import Thresholds
from curate.plan.stored import from_values, to_values
from curate.plan.summary import summarise
from curate.plan.yardsticks import yardstick_arms
from jobs.cluster import Pool
from jobs.domains_use import domain_digests
from jobs.leakage_report import read_report, report_is_due, report_output, write_report
from jobs.lengths import lengths_digest, lengths_run
from jobs.mix import mix_fingerprint, mixer_for, mixture_output
from jobs.plan_tables import (
    complete_scorers,
    open_tables,
    read_frame,
    read_summary,
    score_columns,
    score_digests,
)
from jobs.run import Listener, StageState, Task, ignore, raise_failures, require, run_tasks
from jobs.settings import Settings

if TYPE_CHECKING:
    from jobs.diverse import Diverse

log = logging.getLogger(__name__)

VERSION = 1
"""Of what is written: raised when the same settings and scores would give another plan."""


def plan_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Make the plan.

    Args:
        settings: of the run.
        pool: where the tables of the partitions are written.
        listener: told after each task.

    Returns:
        What `plan/summary.json` holds, without the groups; and how many partitions were `done` now
        or `skipped`.

    Raises:
        InputError: the index, the scores or the mixture are missing.
        ConfigError: the score is no expression over columns that were scored.
        CurateError: the plan hangs on a few examples, or tables do not belong together.
    """
    run = RunFolder(Path(settings.run))
    require(run.partitions(), stage="the index", command=f"curate index {run.root}")
    lengths = lengths_run(settings, pool=pool, listener=listener)["digest"]
    work = _Work.of(settings, lengths)
    if work.diverse is not None:
        from jobs.diverse import diverse_run

        diverse_run(work.diverse, pool=pool, listener=listener)
    tables = _open_tables(work)
    plans = _stored(work) or _make(work, tables)
    tasks = _tasks(work)
    outcome = run_tasks("plan", tasks, plan_work, pool=pool, listener=listener)
    strays = remove_strays(run.plan, {part.name for part in run.partitions()})
    raise_failures("plan", outcome)
    report_is_new = write_report(settings, work.fingerprint)
    summary_is_new = _summarise(work, plans, tables) or report_is_new
    if outcome.done or strays or summary_is_new or "plan" not in load_manifest(run)["stages"]:
        outputs = [*(task.output for task in tasks), *_documents(run)]
        record_stage(run, "plan", outputs=outputs, seconds=outcome.seconds)
    summary = read_summary(run) or {}
    for note in summary["notes"]:
        log.warning("plan: %s", note)
    del summary["groups"]
    leakage = read_report(run)
    told = {} if leakage is None else {"leakage": leakage}
    return {**summary, **told, "done": len(outcome.done), "skipped": len(outcome.skipped)}


def plan_plan(settings: Settings) -> StageState:
    """What `plan_run` would do; writes nothing."""
    run = RunFolder(Path(settings.run))
    total = len(run.partitions())
    if not total:
        return StageState("plan", 0, 0, ("the index has not been made yet",))
    try:
        work = _Work.of(settings, lengths_digest(settings))
    except (ConfigError, InputError) as error:  # what the scores lack may be made before
        return StageState("plan", total, 0, (error.what,))
    if _stored(work) is None:
        changed = _thresholds_output(run).mark() is not None
        why = "the settings of the plan, the mixture, the scores or the data have changed"
        return StageState("plan", total, 0, (why if changed else "there is no plan yet",))
    due = [task for task in _tasks(work) if not task.is_done()]
    forms = ("partition has no plan yet", "partitions have no plan yet")
    missing = (counted(len(due), *forms),) if due else ()
    if not due and not _summary_output(run).is_done(_summary_fingerprint(work)):
        missing = ("the summary is not up to date",)
    elif not due and report_is_due(settings, work.fingerprint):
        missing = ("the report on leakage is not up to date",)
    return StageState("plan", total, total - len(due), missing)


def plan_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Write the plan of one partition."""
    run = RunFolder(Path(payload["run"]))
    part = Partition(**payload["partition"])
    plan = _load(str(run.plan), payload["thresholds"])["plan"]
    frame = read_frame(run, part, payload["lengths"], payload["columns"])
    table, domains, domain, by_phase = apply_plan(frame, plan)
    kept, copies = int(table["keep"].sum()), int(table["copies"].sum())
    run.planned(part).write(
        lambda path: write_table(table, path),
        payload["fingerprint"],
        rows=table.height,
        kept=kept,
        copies=copies,
        repeats=repeats_of(domains, domain, by_phase),
    )
    return {"rows": table.height, "kept": kept, "copies": copies}


@dataclass(frozen=True, slots=True)
class _Work:
    """What the plan is made from."""

    settings: Settings
    run: RunFolder
    lengths: str
    mixture: Mixture | None
    columns: tuple[str, ...]
    """Score columns that decide, as `scorer.column`."""
    inputs: dict[str, list[str]]
    """Partition -> digests of its tables that decide."""
    fingerprint: str
    """Of the thresholds."""
    diverse: "Diverse | None"
    """The orders of a draw for diversity, where the plan has one."""

    @classmethod
    def of(cls, settings: Settings, lengths: str) -> "_Work":
        run = RunFolder(Path(settings.run))
        columns = columns_read(settings.plan, score_columns(run))
        mixture, digest = _mixture(settings, run, lengths)
        scorers = sorted({name.partition(".")[0] for name in columns if name != PLACE})
        inputs: dict[str, list[str]] = {}
        for part in run.partitions():
            tables = [run.examples(part).mark(), counts_output(run, part, lengths).mark()]
            if any(mark is None for mark in tables):
                raise InputError(
                    f"{part.source}/{part.file} has no index or no token counts yet",
                    fix=f"run `curate index {run.root}` and try again",
                )
            digests = [mark["digest"] for mark in tables if mark]
            digests += domain_digests(settings, part)
            inputs[part.name] = digests + score_digests(run, part, scorers)
        diverse = None
        if settings.plan.is_diverse:
            from jobs.diverse import Diverse, diverse_fingerprint, vector_digests

            vectors = vector_digests(settings)
            inputs = {part: [*digests, vectors[part]] for part, digests in inputs.items()}
            stamp = diverse_fingerprint(settings, [settings.seed, lengths, columns, digest, inputs])
            inputs = {part: [*digests, stamp] for part, digests in inputs.items()}
            diverse = Diverse(settings, lengths, mixture, stamp)
        made_from = fingerprint(
            stage="plan",
            version=VERSION,
            settings=plain(settings.plan),
            seed=settings.seed,
            lengths=lengths,
            columns=columns,
            mixture=digest,
            inputs=inputs,
        )
        return cls(settings, run, lengths, mixture, columns, inputs, made_from, diverse)


def _mixture(settings: Settings, run: RunFolder, lengths: str) -> tuple[Mixture | None, str | None]:
    """The mixture of the settings and the digest of its file."""
    if not settings.mix:
        return None, None
    name, _ = mixer_for(settings)
    output = mixture_output(run, name)
    if not output.is_done(mix_fingerprint(settings, lengths)):
        state = "was made from other data or settings" if output.mark() else "is missing"
        raise InputError(f"the mixture {name} {state}", fix=f"run `curate mix {run.root}` first")
    mark = output.mark()
    assert mark is not None
    return load_mixture(output.path), mark["digest"]


def _open_tables(work: _Work) -> Tables:
    """The tables, of which the first pass reads what the summary needs too."""
    tables = open_tables(work.run, work.lengths)
    columns = sorted({*work.columns, *_columns(_shown(work.run, tables))})
    with_labels = work.settings.plan.within == "label"
    tables.batches(columns, with_labels=with_labels, seed=work.settings.seed)
    return tables


def _shown(run: RunFolder, tables: Tables) -> dict[str, Sequence[str]]:
    """The columns of scorers that have finished, which the summary shows."""
    complete = complete_scorers(run)
    return {scorer: names for scorer, names in tables.scorers.items() if scorer in complete}


def _columns(scorers: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{scorer}.{name}" for scorer, names in scorers.items() for name in names]


def _make(work: _Work, tables: Tables) -> dict[str, Thresholds]:
    """The plan and its yardsticks, made and stored."""
    seed = work.settings.seed
    own = make_plans(tables, {"plan": Arm(work.settings.plan, work.mixture)}, seed=seed)
    beside = make_plans(tables, yardstick_arms(own["plan"]), seed=seed)
    plans = {**own, **beside}
    values, ranks = to_values(plans)
    ranks_output, thresholds = _ranks_output(work.run), _thresholds_output(work.run)
    discard(thresholds.mark_path)

    def save(path: Path) -> None:
        with path.open("wb") as file:  # a name without .npy would get one
            np.save(file, ranks)

    if len(ranks):
        ranks_output.write(save, work.fingerprint)
    else:
        ranks_output.remove()
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    thresholds.write(
        lambda path: path.write_text(text, encoding="utf-8"),
        work.fingerprint,
        ranks=len(ranks),
    )
    return plans


def _stored(work: _Work) -> dict[str, Thresholds] | None:
    """The plans of an earlier run, made from just the same."""
    output = _thresholds_output(work.run)
    mark = output.mark()
    if mark is None or not output.is_done(work.fingerprint):
        return None
    if mark["ranks"] and not _ranks_output(work.run).is_done(work.fingerprint):
        return None
    return _load(str(work.run.plan), mark["digest"])


@lru_cache(maxsize=2)
def _load(folder: str, digest: str) -> dict[str, Thresholds]:
    """The stored plans; `digest` is that of the file, so that a worker reads each only once."""
    ranks_path = Path(folder) / "ranks.npy"
    path = Path(folder) / "thresholds.json"
    values = read_document(path, plans=dict) or {"plans": {}}
    try:
        has_ranks = ranks_path.exists()
        ranks = np.load(ranks_path, mmap_mode="r") if has_ranks else np.zeros(0, np.float32)
    except (ValueError, EOFError) as error:
        raise misshapen(ranks_path, str(error)) from error
    try:
        return from_values(values, ranks)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise misshapen(path, f"{type(error).__name__}: {error}") from error


def _tasks(work: _Work) -> list[Task]:
    mark: Mapping[str, Any] = _thresholds_output(work.run).mark() or {}
    found: list[Task] = []
    for part in work.run.partitions():
        stamp = fingerprint(
            stage="plan",
            version=VERSION,
            thresholds=mark["digest"],
            inputs=work.inputs[part.name],
        )
        payload = {
            "run": str(work.run.root),
            "partition": asdict(part),
            "lengths": work.lengths,
            "columns": list(work.columns),
            "thresholds": mark["digest"],
            "fingerprint": stamp,
        }
        found.append(Task(part.name, payload, work.run.planned(part), stamp))
    return found


def _summarise(work: _Work, plans: Mapping[str, Thresholds], tables: Tables) -> bool:
    """Write the summary unless it is there; returns whether it was written."""
    output, made_from = _summary_output(work.run), _summary_fingerprint(work)
    if output.is_done(made_from):
        return False
    beside = {name: plan for name, plan in plans.items() if name != "plan"}
    shown = replace(tables, scorers=_shown(work.run, tables))
    summary = summarise(shown, plans["plan"], beside)
    head = {
        "schema_version": summary.pop("schema_version"),
        # Where examples are rows of numbers there are no tokens to speak of.
        "tokenizer": None if work.lengths == EXAMPLES else work.lengths,
        "mixer": None if work.mixture is None else work.mixture.mixer,
    }
    text = json.dumps({**head, **summary}, indent=1, ensure_ascii=False) + "\n"
    output.write(lambda path: path.write_text(text, encoding="utf-8"), made_from)
    return True


def _summary_fingerprint(work: _Work) -> str:
    scorers = complete_scorers(work.run)
    return fingerprint(
        stage="plan summary",
        version=VERSION,
        thresholds=work.fingerprint,
        scorers={
            part.name: dict(zip(scorers, score_digests(work.run, part, scorers), strict=True))
            for part in work.run.partitions()
        },
    )


def _documents(run: RunFolder) -> list[Output]:
    return [_thresholds_output(run), _ranks_output(run), _summary_output(run), report_output(run)]


def _thresholds_output(run: RunFolder) -> Output:
    return Output(run.plan / "thresholds.json")


def _ranks_output(run: RunFolder) -> Output:
    """The sorted values that `rank` in an expression looks up."""
    return Output(run.plan / "ranks.npy")


def _summary_output(run: RunFolder) -> Output:
    return Output(run.plan / "summary.json")
