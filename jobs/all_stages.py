"""The stages in order, what each needs first, and which settings each depends on.

A stage is found by its address and imported only when it runs, so that planning and writing load
neither torch nor a model.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from curate.data.files import read_document, write_json
from curate.data.mirror import shown_place
from curate.errors import CurateError, InputError, OutputError, TryAgainError
from curate.models.settings import Tokenizer
from jobs.cluster import Pool
from jobs.representations import is_read
from jobs.run import Listener, Progress, StageState, ignore
from jobs.run_failures import kept_failures
from jobs.run_place import Place, at_work
from jobs.settings import Settings
from jobs.stamps import STAMPED, done_before, keep_stamp

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step from raw data to shards."""

    name: str
    run: str
    """Address of `run(settings, *, pool, listener) -> summary`."""
    state: str
    """Address of `state(settings) -> StageState`, which writes nothing."""
    needs: tuple[str, ...]
    """Stages whose tables it reads, where the settings ask for them."""
    reads: tuple[str, ...]
    """Settings it depends on, besides those of the stages it needs."""
    measure: str | None = None
    """Address of `measure(settings) -> dict` with `seconds` and `size_bytes` for all that is due,
    from a few timed batches."""
    pooled: bool = True
    """Whether `run` takes a pool and a listener."""


STAGES = (
    Stage(
        name="index",
        run="jobs.index:index_run",
        state="jobs.index:plan_index",
        needs=(),
        reads=("sources", "index", "task.num_classes", "seed"),
    ),
    Stage(
        name="tokenizer",
        run="jobs.tokenizer:tokenizer_run",
        state="jobs.tokenizer:plan_tokenizer",
        needs=("index",),
        reads=("model.tokenizer",),
        pooled=False,
    ),
    Stage(
        name="train",
        run="jobs.train:train_run",
        state="jobs.train:plan_train",
        measure="jobs.train:measure_train",
        needs=("index", "tokenizer"),
        reads=("model", "checkpoints.train", "task", "seed", "cluster.threads"),
    ),
    Stage(
        name="embed",
        run="jobs.embedding:embed_run",
        state="jobs.embedding:plan_embed",
        needs=("index",),
        reads=("embed", "target", "model", "task", "cluster.threads"),
    ),
    Stage(
        name="domains",
        run="jobs.domains:domains_run",
        state="jobs.domains:plan_domains",
        needs=("index", "embed"),
        reads=("domains", "seed", "cluster.threads"),
    ),
    Stage(
        name="score",
        run="jobs.score:score_run",
        state="jobs.score:plan_score",
        measure="jobs.score:measure_score",
        needs=("index", "tokenizer", "train", "embed", "domains"),
        reads=("model", "checkpoints", "score", "task", "target", "seed", "cluster.threads"),
    ),
    Stage(
        name="lengths",
        run="jobs.lengths:lengths_run",
        state="jobs.lengths:plan_lengths",
        needs=("index", "tokenizer"),
        reads=("plan.tokenizer", "model.name", "model.tokenizer", "task.kind"),
    ),
    Stage(
        name="mix",
        run="jobs.mix:mix_run",
        state="jobs.mix:plan_mix",
        needs=("index", "domains", "lengths"),
        reads=("mix", "plan.keep"),
    ),
    Stage(
        name="plan",
        run="jobs.plan:plan_run",
        state="jobs.plan:plan_plan",
        needs=("index", "embed", "domains", "score", "lengths", "mix"),
        reads=("plan", "seed"),
    ),
    Stage(
        name="write",
        run="jobs.write:write_run",
        state="jobs.write:plan_write",
        measure="jobs.write:measure_write",
        needs=("plan",),
        reads=("shards",),
    ),
    Stage(
        name="compare",
        run="jobs.compare:compare_run",
        state="jobs.compare:plan_compare",
        needs=("plan",),
        reads=("compare", "model", "checkpoints.train", "task", "target", "cluster.threads"),
    ),
    Stage(
        name="evaluate-attribution",
        run="jobs.evaluate_attribution:evaluate_attribution_run",
        state="jobs.evaluate_attribution:plan_evaluate_attribution",
        needs=("index", "tokenizer", "score"),
        reads=("attribution", "model", "checkpoints.train", "task", "target", "cluster.threads"),
    ),
)

COMMANDS = {"tokenizer": "train", "lengths": "plan"}
"""Stages without a command of their own -> the command that runs them."""

_FAILURES = "failures.json"

_BY_NAME = {stage.name: stage for stage in STAGES}

_NO_EFFECT = ("run", "cluster.kind", "cluster.workers", "cluster.address", "model.device",
              "index.max_bad_rows", "index.max_bad_files",
              "checkpoints.train.resume_every_seconds")  # fmt: skip
"""Settings that change where and how fast, but no table."""


def stages_for(settings: Settings, command: str) -> list[Stage]:
    """The stages that `command` runs under these settings, in order.

    Args:
        settings: of the run.
        command: name of a stage, which comes last, or `run` for all.
    """
    if command == "run":
        return [stage for stage in STAGES if _is_asked_for(stage, settings, command)]
    wanted = {command}
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update(
                name for name in stage.needs if _is_asked_for(_BY_NAME[name], settings, command)
            )
    return [stage for stage in STAGES if stage.name in wanted]


def run_stages(
    settings: Settings,
    stages: Iterable[Stage],
    *,
    pool: Pool,
    listener: Listener = ignore,
    reuse: tuple[Path, ...] = (),
    retry_failed: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run stages one after the other; what is done is skipped by each.

    Args:
        settings: resolved, of an open run.
        stages: from `stages_for`.
        pool: where the tasks run.
        listener: told after each task.
        reuse: other run folders, from which matching scores are taken.
        retry_failed: run only the stages that have failed, and of their phases that have failed
            only the tasks that did.

    Returns:
        Stage name -> its summary.

    Raises:
        CurateError: a stage failed; those behind it are not run.
    """
    stages = list(stages)
    root = Path(settings.run)
    only = kept_failures(root) if retry_failed else None
    if retry_failed:
        noted = failures(root)
        stages = [stage for stage in stages if noted.get(stage.name, {}).get("tasks")]
        if not stages:
            log.info("nothing has failed that these stages would run again")
    summaries: dict[str, dict[str, Any]] = {}
    worked = set[str]()

    def tell(progress: Progress) -> None:
        worked.add(now)
        listener(progress)

    for stage in stages:
        now = stage.name
        comes_before = stage.name in STAMPED and stage is not stages[-1] and not retry_failed
        if comes_before and (summary := done_before(settings, stage.name)) is not None:
            summaries[stage.name] = summary
            _note_failure(settings, stage.name, None)
            log.info("%s: done already", stage.name)
            continue
        given: dict[str, Any] = {"pool": pool, "listener": tell} if stage.pooled else {}
        if stage.name == "score" and reuse:
            given["reuse"] = reuse
        place = Place(
            root=root,
            stage=stage.name,
            command=f"curate {COMMANDS.get(stage.name, stage.name)} {shown_place(root)}",
            stall_seconds=settings.cluster.stall_seconds,
            only=only,
        )
        try:
            with at_work(place):
                summaries[stage.name] = load(stage.run)(settings, **given) or {}
        except CurateError as error:
            _note_failure(settings, stage.name, error)
            if error.tasks:
                _tell_waiting(stage.name, stages)
            raise
        _note_failure(settings, stage.name, None)
        if stage.name in worked:
            pool.forget()
        if stage.name in STAMPED:
            keep_stamp(settings, stage.name, summaries[stage.name])
        if summaries[stage.name].get("done") == 0 and stage.name not in worked:
            log.info("%s: done already", stage.name)
    return summaries


def _tell_waiting(failed: str, stages: Sequence[Stage]) -> None:
    """Say which of the later stages cannot run without what a stage has left undone."""
    without = {failed}
    for stage in stages:
        if without.intersection(stage.needs):
            without.add(stage.name)
    waiting = [stage.name for stage in stages if stage.name in without - {failed}]
    if waiting:
        names = " and ".join(waiting)
        they = "it needs" if len(waiting) == 1 else "they need"
        log.error("%s did not run: %s all of what %s makes", names, they, failed)


def failures(root: Path) -> dict[str, dict[str, Any]]:
    """Stage -> `what` and `tasks` (names) of its last failure, where it has not succeeded since.

    `others`, where it is there, has a sentence for each further reason.
    """
    try:
        noted = read_document(root / _FAILURES) or {}
    except InputError:  # no more than a note for `curate status`
        return {}
    return {
        stage: entry
        for stage, entry in noted.items()
        if isinstance(entry, dict) and {"what", "tasks"} <= set(cast(dict[str, Any], entry))
    }


def _note_failure(settings: Settings, stage: str, error: CurateError | None) -> None:
    """Write down for `curate status` how the stage ended."""
    root = Path(settings.run)
    noted = failures(root)
    before = dict(noted)
    noted.pop(stage, None)
    if error is not None:
        noted[stage] = {"what": error.what, "tasks": list(error.tasks)}
        if isinstance(error, TryAgainError):
            noted[stage]["is_over"] = False  # the cluster went away: nothing of it has failed
        if error.others:
            noted[stage]["others"] = list(error.others)
    if noted != before:
        with suppress(OutputError):  # on a full disk the stage's own error counts
            write_json(root / _FAILURES, noted)


def state_of(stage: Stage, settings: Settings) -> StageState:
    """What of a stage is done and what is due; nothing is written."""
    return load(stage.state)(settings)


def affected(keys: Iterable[str]) -> list[str]:
    """Stages whose tables depend on one of the settings, in order.

    Args:
        keys: dotted names of settings, such as `plan.keep`.
    """
    touching = [
        key for key in keys if not key.startswith(_NO_EFFECT) and not key.endswith(".license")
    ]
    hit = set[str]()
    for stage in STAGES:
        own = any(_overlap(key, read) for key in touching for read in stage.reads)
        if own or hit.intersection(stage.needs):
            hit.add(stage.name)
    return [stage.name for stage in STAGES if stage.name in hit]


def load(address: str) -> Any:
    """The function or class at `module:name`."""
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)


def _is_asked_for(stage: Stage, settings: Settings, command: str) -> bool:
    """Whether a stage has anything to do in this run."""
    match stage.name:
        case "tokenizer":
            return isinstance(settings.model.tokenizer, Tokenizer)
        case "train":
            return settings.checkpoints.train is not None
        case "score":
            read = settings.plan.score or settings.plan.weights
            asked = command in ("run", "evaluate-attribution") or bool(read)
            return bool(settings.score.scorers) and asked
        case "mix":
            return bool(settings.mix)
        case "domains":
            return command == "domains" or settings.domains is not None
        case "embed":
            return command == "embed" or is_read(settings)
        case "compare" | "evaluate-attribution":
            return command == stage.name
        case _:
            return True


def _overlap(key: str, read: str) -> bool:
    """Whether one dotted name is the other or stands above it."""
    return f"{key}.".startswith(f"{read}.") or f"{read}.".startswith(f"{key}.")
