"""What was done in a few lines, and where it came from: versions, cost, how to make it again."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, software
from curate.data.mirror import shown_place
from curate.errors import CurateError, counted
from curate.report.document import Comparison, Fact, Provenance, Stage
from jobs.all_stages import failures, stages_for, state_of
from jobs.report_tables import PLAN_SCORE, Tables
from jobs.settings import Settings
from jobs.show import loading_lines

if TYPE_CHECKING:
    from jobs.chosen import Chosen

_CONFIG_CHARS = 100_000
_FEW = 6


def measures_of(settings: Settings) -> dict[str, str]:
    """Column, as `scorer.column` -> one line on its unit and its ends, as its scorer says it."""
    found: dict[str, str] = {}
    for entry in _chosen(settings):
        columns: Mapping[str, str] = getattr(entry.scorer, "columns", {})
        found |= {f"{entry.folder}.{column}": text for column, text in columns.items()}
    return found


def doubts_of(tables: Tables, notes: list[str]) -> dict[str, list[str]]:
    """Column -> what speaks against the model that measured it, for columns that take a model.

    Args:
        tables: of the run.
        notes: on its training, from `jobs.train_notes`.
    """
    if not notes:
        return {}
    needy = {entry.folder for entry in _chosen(tables.settings) if entry.needs_model}
    columns = {name: [name] for name in tables.columns}
    if tables.expression is not None:
        columns[PLAN_SCORE] = list(tables.expression.columns)
    return {
        column: notes
        for column, read in columns.items()
        if any(name.partition(".")[0] in needy for name in read)
    }


def _chosen(settings: Settings) -> Iterator["Chosen"]:
    """The run's scorers; one of the user's own that has gone is left out."""
    from jobs.chosen import chosen_scorers  # torch and all that comes with it

    for name, options in settings.score.named.items():
        with suppress(CurateError):
            yield from chosen_scorers({name: options})


def summary_of(
    tables: Tables,
    *,
    rows: int,
    held_out: int,
    domains: int,
    aside: Mapping[str, int],
    plan: Mapping[str, Any] | None,
    mixer: str | None,
    comparison: Comparison | None,
) -> list[str]:
    """What was done, in five lines or fewer.

    Args:
        tables: of the run.
        rows: of the index.
        held_out: of these.
        domains: how many there are.
        aside: reason -> rows set aside.
        plan: `plan/summary.json`; None before there is a plan.
        mixer: whose mixture there is.
        comparison: what `curate compare` found.
    """
    total = sum(aside.values())
    if not rows and total:
        return [f"No example could be used: {counted(total, 'row')} set aside."]
    if not rows:
        return ["Nothing has been indexed yet."]
    sources = counted(len(tables.settings.sources), "source")
    line = f"Looked at {counted(rows, 'example')} in {counted(domains, 'domain')} from {sources}"
    line += f"; {held_out:,} are held out" if held_out else ""
    found = [f"{line}; {counted(total, 'row')} set aside." if total else f"{line}."]
    found.append(_scored(tables))
    if mixer is not None:
        found.append(f"Found a mixture of {counted(domains, 'domain')} with {mixer}.")
    found.append(_kept(tables, plan) if plan else "No plan was made yet.")
    if comparison is not None and comparison.verdicts:
        first = next((v for v in comparison.verdicts if v.arm == "plan"), comparison.verdicts[0])
        found.append(f"Compared: {first.sentence}")
    elif shards := load_manifest(tables.run)["stages"].get("write"):
        found.append(
            f"Wrote {counted(shards.get('rows', 0), 'row')} in"
            f" {counted(shards.get('shards', 0), 'shard')}."
        )
    return found


def _scored(tables: Tables) -> str:
    own = (name for name in tables.columns if name != PLAN_SCORE)
    scorers = list(dict.fromkeys(name.partition(".")[0] for name in own))
    if not scorers:
        return "Nothing was scored."
    more = f" and {len(scorers) - _FEW} more" if len(scorers) > _FEW else ""
    line = f"Scored them by {', '.join(scorers[:_FEW])}{more}"
    summary = load_manifest(tables.run)["stages"].get("train", {}).get("summary")
    if summary and summary.get("checkpoints"):
        seeds = counted(summary.get("seeds", 1), "seed")
        line += f", with {counted(len(summary['checkpoints']), 'checkpoint')} of {seeds}"
    return f"{line}."


def _kept(tables: Tables, plan: Mapping[str, Any]) -> str:
    kept, training, rule = plan["kept"], plan["training"], tables.settings.plan
    line = f"Kept {kept['rows']:,} of {counted(training['rows'], 'training example')}"
    line += f" ({100 * (kept['row_share'] or 0):.1f} %)"
    if tables.unit != "examples" and kept.get("token_share") is not None:
        line += f", {100 * kept['token_share']:.1f} % of the {tables.unit}"
    if rule.score:
        words = {"hardest": "highest", "easiest": "lowest", "middle": "middle"}
        drawn = "" if rule.draw == "top" else f", drawn ({rule.draw})"
        line += f": the {words[rule.order]} by {rule.score}{drawn}, within {rule.within}"
    elif plan["reasons"].get("draw"):
        line += ", drawn at random"
    return f"{line}."


def provenance_of(settings: Settings) -> Provenance:
    """Run, cost, versions, how to load the shards, how to make them again."""
    run = RunFolder(Path(settings.run))
    manifest = load_manifest(run)
    stages = _stages(settings, manifest["stages"])
    config = run.config.read_text(encoding="utf-8")
    if len(config) > _CONFIG_CHARS:
        config = config[:_CONFIG_CHARS] + "\n# ... cut here: config.yaml in the run folder is whole"
    return Provenance(
        stages=stages,
        software=_software(manifest["stages"]),
        inputs=_inputs(settings, manifest["stages"]),
        disk=_disk(manifest["stages"]),
        load=loading_lines(run, None),
        reproduce=_reproduce(settings, manifest["stages"]),
        config=config,
        seed=settings.seed,
        seconds=round(sum(stage.seconds or 0.0 for stage in stages), 1),
    )


def _stages(settings: Settings, told: Mapping[str, Any]) -> list[Stage]:
    """What the manifest and the failures say; of the plan also whether it is as the settings ask.

    `curate status` looks at every output, which takes long for shards of very many domains.
    """
    names = [stage.name for stage in stages_for(settings, "run")]
    names += [name for name in told if name not in names]
    failed = failures(Path(settings.run))
    return [_stage(name, told.get(name, {}), failed.get(name)) for name in names]


def _stage(name: str, entry: Mapping[str, Any], failure: Mapping[str, Any] | None) -> Stage:
    num_failed = len(failure["tasks"]) or 1 if failure else 0
    why = [failure["what"], *failure.get("others", ())] if failure else []
    state = "done" if entry else "to do"
    return Stage(
        name=name,
        state="failed" if failure else state,
        done=len(entry.get("files", {})),
        failed=num_failed,
        remaining=0,
        finished=entry.get("finished"),
        seconds=entry.get("seconds"),
        why=why,
        summary=f"on {entry['device']}" if entry.get("device") else "",
    )


def stale_plan(settings: Settings) -> str | None:
    """Why the plan is not what settings and scores ask for now; None where it is."""
    try:
        return _due(settings, "plan")
    except CurateError as error:
        return error.what


def stale_shards(settings: Settings) -> str | None:
    """Why the shards are not those of the plan; None where they are, or nobody can tell."""
    written = "write" in load_manifest(RunFolder(Path(settings.run)))["stages"]
    with suppress(CurateError):
        return _due(settings, "write") if written else None


def stale_comparison(settings: Settings) -> str | None:
    """Why what was compared is not this plan; None where it is, or nobody can tell."""
    with suppress(CurateError):
        return _due(settings, "compare")


def _due(settings: Settings, name: str) -> str | None:
    """What a stage would do now, in words.

    Raises:
        CurateError: an input has gone, say.
    """
    stage = next((s for s in stages_for(settings, name) if s.name == name), None)
    state = state_of(stage, settings) if stage is not None else None
    if state is None or state.done == state.total:
        return None
    return "; ".join(state.why) or f"{state.total - state.done} of its tables are due"


def _software(stages: Mapping[str, Any]) -> list[Fact]:
    """Versions by name; where stages differ, all that there were."""
    found: dict[str, list[str]] = {}
    for entry in stages.values():
        for name, version in entry.get("software", {}).items():
            known = found.setdefault(name, [])
            known += [version] if version not in known else []
    return [Fact(name=name, value=", ".join(versions)) for name, versions in found.items()]


def _inputs(settings: Settings, stages: Mapping[str, Any]) -> list[Fact]:
    found = [
        Fact(name=name, value=_path(source.path, source.revision))
        for name, source in settings.sources.items()
    ]
    if settings.target is not None:
        found.append(Fact(name="target", value=_path(settings.target.path, None)))
    found += [
        Fact(name=f"evaluation {name}", value=_path(source.path, None))
        for name, source in settings.evaluation.items()
    ]
    files = stages.get("index", {}).get("summary", {}).get("files")
    if files is not None:
        found.append(Fact(name="files", value=f"{files:,}"))
    return found


def _path(path: str | Sequence[str], revision: str | None) -> str:
    paths = [path] if isinstance(path, str) else list(path)
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more + (f" at {revision}" if revision else "")


def _disk(stages: Mapping[str, Any]) -> list[Fact]:
    """Bytes of each part of the run folder, as the manifest has them."""
    sizes: dict[str, dict[str, int]] = {}
    for entry in stages.values():
        for path, mark in entry.get("files", {}).items():
            own = sizes.setdefault(path.partition("/")[0], {})
            own[path] = int(mark.get("size_bytes") or 0)
    totals = {name: sum(own.values()) for name, own in sizes.items()}
    order = sorted(totals, key=lambda name: -totals[name])
    return [Fact(name=name, value=_size(totals[name])) for name in order if totals[name]]


def _size(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def _reproduce(settings: Settings, stages: Mapping[str, Any]) -> list[str]:
    versions = {entry.get("software", {}).get("curate-data") for entry in stages.values()}
    version = next(iter(sorted(filter(None, versions))), software().get("curate-data", ""))
    config = shlex.quote(f"{shown_place(settings.run)}/config.yaml")
    lines = [
        f"pip install -e .  # in a clone of curate's repository at version {version}",
        f"curate run {config}",
    ]
    if "compare" in stages:
        lines.append(f"curate compare {config}")
    if "evaluate-attribution" in stages:
        lines.append(f"curate evaluate-attribution {config}")
    return lines
