"""`curate report`: gathers what a run's tables say, and writes it as one page.

The tables are gone through twice, partition by partition; memory is that of a partition and of a
sample of rows, and the document is of bounded size, whatever the size of the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from curate.data import files
from curate.data.manifest import load_manifest, software
from curate.data.mirror import address_in, shown_place
from curate.errors import CurateError, MissingDependencyError, OutputError
from curate.report.document import SECTIONS, Comparison, Document, Fact, Mixture, Provenance
from jobs.opening import load_settings
from jobs.plan_tables import read_summary
from jobs.report_compare import compared
from jobs.report_found import duplicates_of, quarantine_of
from jobs.report_labels import label_names
from jobs.report_leaks import find_leaks, leakage_of
from jobs.report_mixture import mixture_of
from jobs.report_plan import cuts_of, removed_of, shifts_of
from jobs.report_samples import Chosen, choose, of_reasons, samples_of
from jobs.report_scores import Counted, agreement_of, count, lengths_of, scores_of, weights_of
from jobs.report_stability import stability_of
from jobs.report_survey import Survey, survey
from jobs.report_tables import PLAN_SCORE, Tables, open_report_tables
from jobs.report_told import (
    doubts_of,
    measures_of,
    provenance_of,
    stale_plan,
    stale_shards,
    summary_of,
)
from jobs.settings import Settings
from jobs.show import domains_of, yardsticks_of
from jobs.store import at_hand
from jobs.train_notes import kept_training_notes

PAGE = "report.html"
EXAMPLES = 10
"""Of each end of a score, by default."""
_LEAKS = 12


def report(root: Path, out: Path | None = None, *, examples: int = EXAMPLES) -> Path:
    """Write the page of a run, and say where it is; see `write_report`."""
    return write_report(root, out, examples=examples)[0]


def write_report(
    root: Path, out: Path | None = None, *, examples: int = EXAMPLES
) -> tuple[Path, Document]:
    """Write the page of a run; it is whole or not there.

    Args:
        root: the run folder, or its address; the run may be unfinished.
        out: the file; by default `report.html` in the run folder, and of a run at an address
            `<its name>-report.html` in the current one.
        examples: how many of each end of a score are shown; 0 shows none at all.

    Returns:
        The file, and what it shows.

    Raises:
        RunFolderError: there is no run at `root`.
        MissingDependencyError: a package that draws the page is not installed.
        OutputError: the file cannot be written.
        CurateError: a table of the run is damaged.
    """
    from curate.report.page import render

    _check_installed()  # before the tables are gone through
    target = _target(root) if out is None else out.expanduser().absolute()
    if target.is_dir():
        raise OutputError(f"{target} is a folder", fix="name a file with --out")
    document = gather(root, examples=examples)
    text = render(document)
    files.replace(target, lambda path: path.write_text(text, encoding="utf-8"))
    return target, document


def _target(root: Path) -> Path:
    if address_in(root) is None:
        return root.absolute() / PAGE
    return Path.cwd() / f"{root.name}-{PAGE}"


def _check_installed() -> None:
    missing = [name for name in ("jinja2", "vl_convert") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"the page is drawn with {' and '.join(missing)}, which is not installed",
            fix="pip install 'curate-data[report]'",
        )


def gather(root: Path, *, examples: int = EXAMPLES) -> Document:
    """Everything that the page shows.

    Args:
        root: the run folder, or its address; the run may be unfinished.
        examples: how many of each end of a score are shown; 0 shows none at all.

    Raises:
        RunFolderError: there is no run at `root`.
        CurateError: a table of the run is damaged.
    """
    root = at_hand(root)
    settings = load_settings(root)
    tables = open_report_tables(settings)
    work = _Work(settings, tables, examples)
    work.training = work.part("training", lambda: kept_training_notes(tables.run)) or []
    provenance = provenance_of(settings)
    found = _sections(work) if tables.parts else {}
    comparison: Comparison | None = work.part("comparison", lambda: compared(settings))
    quarantine = work.part("quarantine", lambda: quarantine_of(root, count=min(5, examples)))
    counts = quarantine.counts if quarantine else {}
    mixture: Mixture | None = found.get("mixture")
    found |= {"comparison": comparison, "quarantine": quarantine}
    seen = work.survey
    domains = seen.domains.table().height if seen else 0
    return Document(
        run=shown_place(settings.run),
        title=shown_place(settings.run).rpartition("/")[2],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=software().get("curate-data", ""),
        task=str(settings.task.get("kind", "")),
        unit=tables.unit,
        summary=summary_of(
            tables,
            rows=seen.rows if seen else 0,
            held_out=seen.held_out if seen else 0,
            domains=domains,
            aside=counts,
            plan=work.summary if tables.has_plan else None,
            mixer=mixture.mixer if mixture else None,
            comparison=comparison,
        ),
        facts=_facts(seen, work.summary if tables.has_plan else None, domains, counts),
        notes=[*_failed(provenance), *_notes(work, mixture, comparison)],
        scores=found.get("scores"),
        agreement=found.get("agreement"),
        samples=found.get("samples"),
        mixture=mixture,
        shifts=found.get("shifts"),
        removed=found.get("removed"),
        duplicates=found.get("duplicates"),
        leakage=found.get("leakage"),
        quarantine=quarantine,
        weights=found.get("weights"),
        stability=found.get("stability"),
        comparison=comparison,
        provenance=provenance,
        missing=work.missing | _missing(work, found),
    )


@dataclass(slots=True)
class _Work:
    """What is at hand while a document is made."""

    settings: Settings
    tables: Tables
    examples: int
    summary: Mapping[str, Any] | None = None
    """`plan/summary.json`."""
    survey: Survey | None = None
    training: list[str] = field(default_factory=list[str])
    """What speaks against the scoring models."""
    missing: dict[str, str] = field(default_factory=dict[str, str])
    """Sections that could not be made."""

    def part(self, name: str, make: Any) -> Any:
        """A section; one whose own files are damaged is left out, and says so."""
        try:
            return make()
        except CurateError as error:
            self.missing[name] = f"{error.what}; {error.fix}"
            return None


def _sections(work: _Work) -> dict[str, Any]:
    """What is made of the tables of an index."""
    tables, settings = work.tables, work.settings
    work.summary = read_summary(tables.run)
    seen = work.survey = survey(tables, examples=work.examples)
    chosen = Chosen()
    picks = choose(seen, chosen) if work.examples else []
    leaks = work.part("leakage", lambda: find_leaks(tables, count=_LEAKS if work.examples else 0))
    leaked = chosen.add([leak.place for leak in leaks or []])
    reasons = of_reasons(seen.of_reason, chosen) if work.examples else {}
    names = label_names(load_manifest(tables.run))
    counted = count(seen, names, chosen.places)
    plan = work.summary if tables.has_plan else None
    mixer = settings.mix.get("mixer")
    has_scores = bool(tables.columns)
    found: dict[str, Any] = {
        "scores": scores_of(counted, _measures(work) if has_scores else {},
                            cuts_of(tables.run, settings.plan) if tables.has_plan else {},
                            doubts_of(tables, work.training)),
        "agreement": agreement_of(seen),
        "mixture": work.part("mixture", lambda: _mixture(work, counted, mixer)),
        "shifts": shifts_of(seen, lengths_of(counted), names, plan,
                            yardsticks_of(plan) if plan else {}),
        "removed": removed_of(seen, reasons, settings.plan, mixer),
        "duplicates": work.part("duplicates", lambda: duplicates_of(
            seen, with_texts=work.examples > 0)),
        "weights": weights_of(counted),
        "stability": work.part("stability", lambda: stability_of(seen)),
    }  # fmt: skip
    if "leakage" not in work.missing:
        found["leakage"] = work.part("leakage", lambda: leakage_of(tables, leaked))
    if work.examples:
        found["samples"] = samples_of(counted, chosen, picks, leaks or [])
    return found


def _measures(work: _Work) -> dict[str, str]:
    """What each column measures; the plan's expression says it itself."""
    told = f"the plan's score: {work.settings.plan.score}"
    return {PLAN_SCORE: told, **measures_of(work.settings)}


def _mixture(work: _Work, counted: Counted, mixer: str | None) -> Mixture | None:
    plan = work.summary if work.tables.has_plan else None
    realised = domains_of(plan) if plan else []
    tables = counted.survey.tables
    return mixture_of(tables.run, mixer, realised, unit=tables.unit)


def _facts(
    seen: Survey | None, plan: Mapping[str, Any] | None, domains: int, aside: Mapping[str, int]
) -> list[Fact]:
    if seen is None:
        return []
    facts = [
        Fact(name="examples", value=f"{seen.rows:,}"),
        Fact(name="domains", value=f"{domains:,}"),
        Fact(name="held out", value=f"{seen.held_out:,}"),
    ]
    if seen.tables.unit != "examples":
        facts.insert(1, Fact(name=f"training {seen.tables.unit}", value=f"{seen.tokens:,}"))
    if plan is not None:
        kept = plan["kept"]
        share = f" ({100 * (kept['row_share'] or 0):.1f} %)"
        facts.append(Fact(name="kept", value=f"{kept['rows']:,}{share}"))
        size = plan["weights"]["effective_size"]
        facts.append(Fact(name="effective sample size", value=f"{size:,.0f}"))
    if total := sum(aside.values()):
        facts.append(Fact(name="set aside", value=f"{total:,}"))
    return facts


def _failed(it: Provenance) -> list[str]:
    """Stages whose last run did not end well."""
    return [
        f"{stage.name} has failed: {'; '.join(stage.why)}"
        for stage in it.stages
        if stage.state == "failed"
    ]


def _notes(work: _Work, mixture: Mixture | None, comparison: Comparison | None) -> list[str]:
    """What a reader must not miss."""
    found = [*work.tables.notes, *work.training]
    if comparison is not None:
        found += [f"in the comparison, {text}" for text in comparison.doubts]
    if work.summary is not None and work.tables.has_plan:
        why = stale_plan(work.settings)
        found += [f"the plan is older than what it would be made from now: {why}"] if why else []
        why = stale_shards(work.settings)
        found += [f"the shards are not those of the plan as it is now: {why}"] if why else []
        found += work.summary["notes"]
    if mixture is not None:
        found += [note for note in mixture.notes if note not in found]
    return found


def _missing(work: _Work, found: Mapping[str, Any]) -> dict[str, str]:
    """Why sections are not there."""
    run = shown_place(work.settings.run)
    if not work.tables.parts:
        none = f"the run has no index yet: `curate index {run}` makes it"
        why: dict[str, str] = dict.fromkeys(SECTIONS, none)
    else:
        no_plan = f"there is no plan yet: `curate plan {run}` makes it"
        has_scores = bool(work.tables.columns)
        no_scores = f"nothing was scored yet: `curate score {run}` does"
        why = {
            "scores": no_scores,
            "agreement": "one column alone agrees with nothing" if has_scores else no_scores,
            "samples": "no examples were asked for",
            "mixture": "the settings ask for no mixture"
            if not work.settings.mix
            else f"the mixture was not found yet: `curate mix {run}` does",
            "shifts": no_plan,
            "removed": no_plan,
            "duplicates": "nobody looked: score.scorers has no duplicates",
            "leakage": "nobody looked: score.scorers has no leakage",
            "weights": "the plan keeps nothing" if work.tables.has_plan else no_plan,
            "stability": "no score was measured with several seeds" if has_scores else no_scores,
        }
    why["quarantine"] = "nothing was set aside"
    why["comparison"] = f"the plan was not put to the test: `curate compare {run}` does"
    return {name: text for name, text in why.items() if found.get(name) is None} | work.missing
