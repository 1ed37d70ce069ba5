"""`spread`: choose a core set, measure it as a run of its own, test the spreading, apply it.

run/spread/<scorer>/choice.parquet         the core set
run/spread/<scorer>/data/<source>.parquet  its rows, with all columns
run/spread/<scorer>/core/                  a run folder: `curate show` opens it
run/spread/<scorer>/scores.parquet         what was measured
run/spread/<scorer>/fidelity.json          what cross-validation says
run/spread/<scorer>/gate.json              which columns are spread, and how
run/quantities/spread/                     scores of all examples
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from curate.config import plain, resolve
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.sources import find_files
from curate.errors import ConfigError
from curate.models.load import pick_device
from jobs import measuring, score_columns
from jobs.chosen import Chosen
from jobs.embedding import vectors_digest
from jobs.fields import reference_facts
from jobs.lengths import content_settings
from jobs.measurers import measurers
from jobs.own_passes import OWN, DrivenPhase, OwnPasses, Phase
from jobs.representations import representation
from jobs.run import Task
from jobs.score_check import check_scores
from jobs.settings import Settings, task_settings
from jobs.spread_apply import fidelity_work, gate_work, part_payload, tables_work
from jobs.spread_core import inner_scorer, inner_settings, measure_core, reads_checkpoints
from jobs.spread_work import NAME, choose_work, places, rows_work
from jobs.train import model_facts
from scorers.protocol import Scorer
from scorers.spread import Spread

VERSION = 1
"""Raised when the same data and settings would give other numbers."""

_OWN_MODELS = ("vog", "dvgs", "pvi")
"""Scorers with passes of their own that show examples to a model one by one: worth spreading."""


def check(settings: Settings, scorer: Scorer) -> None:
    """Refuse what cannot be spread, before anything is indexed.

    Raises:
        ConfigError: the inner scorer costs nothing by itself, has columns that depend on the
            model, or does not fit the settings; or the vectors are not among those of `embed`.
    """
    options = cast(Spread, scorer)
    entry = inner_scorer(options)
    _check_kind(settings, entry)
    if getattr(entry.scorer, "prefix", None) is not None:
        raise ConfigError(
            f"the columns of {options.name} depend on the model, and cannot be spread",
            fix=f"remove the option of {options.name} that asks for more of them, such as by_layer",
        )
    check_scores(inner_settings(settings, options))
    task_settings(settings)
    representation(settings, options.vectors)


def _check_kind(settings: Settings, entry: Chosen) -> None:
    why = ""
    if entry.kind == "plain":
        why = "needs no model: measuring all examples costs less than spreading"
    elif entry.wants_log and settings.checkpoints.train is not None:
        why = "is read from the log of a training that shows it all examples, and costs no more"
    elif entry.kind == "own" and entry.name not in _OWN_MODELS:
        why = "looks at all examples together, and means something else on a core set"
    if why:
        raise ConfigError(
            f"spread.scorer is {entry.name}, which {why}",
            fix=f"name {entry.name} under score.scorers itself",
        )


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """Core set, its rows, its scores, fidelity, gate, scores of all; writes nothing.

    Raises:
        ConfigError: the inner scorer or the representation does not fit.
        InputError: index, checkpoints or model are missing.
    """
    check(settings, scorer)
    options = cast(Spread, scorer)
    run = RunFolder(Path(settings.run))
    parts, here = run.partitions(), places(run, options)
    payload = {"settings": plain(settings), "options": plain(options)}
    stamps = _stamps(settings, options, run)

    def task(name: str, output: Any, mark: str, **more: Any) -> Task:
        return Task(name, {**payload, **more, "fingerprint": mark}, output, mark)

    rows: list[Task] = []
    for source in sorted({part.source for part in parts}):
        mark = fingerprint(choice=stamps["choice"], source=plain(settings.sources[source]))
        rows.append(task(source, here.rows(source), mark, source=source))
    tables = [
        task(part.name, run.quantities(part, NAME), stamps["tables"], **part_payload(part, index))
        for index, part in enumerate(parts)
    ]
    whole = "the core set"
    phases = (
        Phase(f"{NAME}: choice", [task(whole, here.choice, stamps["choice"])], choose_work),
        Phase(f"{NAME}: rows", rows, rows_work),
        DrivenPhase(f"{NAME}: core", [task(whole, here.scores, stamps["core"])], measure_core),
        Phase(f"{NAME}: fidelity", [task(whole, here.fit, stamps["fit"])], fidelity_work),
        Phase(f"{NAME}: gate", [task(whole, here.gate, stamps["gate"])], gate_work),
        Phase(f"{NAME}: all", tables, tables_work),
    )
    return OwnPasses(phases, ((NAME, 0),))


def _stamps(settings: Settings, options: Spread, run: RunFolder) -> dict[str, str]:
    """Fingerprint of each step, from the settings and the index."""
    own = plain(options)
    vectors = vectors_digest(settings, representation(settings, options.vectors), run)
    choice = fingerprint(
        stage=NAME,
        version=VERSION,
        **{key: own[key] for key in ("core", "choose", "clusters")},
        seeds=[settings.seed, options.seed],
        threads=settings.cluster.threads,
        vectors=vectors,
        # Labels and lengths count, not only contents.
        index=[[p.name, (run.examples(p).mark() or {}).get("digest")] for p in run.partitions()],
    )
    core = fingerprint(choice=choice, **_core_facts(settings, options))
    fit = fingerprint(core=core, **{k: own[k] for k in ("neighbours", "temperature", "method")})
    gate = fingerprint(fit=fit, **{k: own[k] for k in ("min_rank_correlation", "force")})
    tables = fingerprint(gate=gate, tables=True)
    return {"choice": choice, "core": core, "fit": fit, "gate": gate, "tables": tables}


def _core_facts(settings: Settings, options: Spread) -> dict[str, Any]:
    """Everything that the scores of the core set depend on, besides its rows."""
    entry = inner_scorer(options)
    inner = inner_settings(settings, options)
    device = pick_device(settings.model.device).type
    versions = [measuring.VERSION, score_columns.VERSION, getattr(entry.scorer, "version", 1)]
    more: dict[str, Any] = {}
    if entry.kind == "own":
        found = cast(Callable[..., OwnPasses], resolve(OWN, entry.name, what="scorer"))
        versions.append(getattr(sys.modules[found.__module__], "VERSION", 1))
    if reads_checkpoints(entry):
        more["models"] = [[one.digest, one.seed] for one in measurers(inner)]
    else:
        more["model"] = model_facts(settings)
        more["train"] = plain(settings.checkpoints.train)
        more["index"] = plain(settings.index)
    if settings.target is not None and not reads_checkpoints(entry):
        files = [[file.file, file.stamp] for file in find_files("target", settings.target)]
        more["target"] = [plain(settings.target), files]
    return {
        **more,
        **reference_facts(settings),
        "versions": versions,
        "scorer": [entry.name, plain(entry.scorer)],
        "task": plain(task_settings(settings)),
        "sources": {name: content_settings(one) for name, one in settings.sources.items()},
        "tokenizer": plain(settings.model)["tokenizer"],
        "dtype": settings.model.dtype,
        "device": device,
        "batch_tokens": measuring.batch_tokens(settings.score, device),
        "compile": settings.score.compile,
    }
