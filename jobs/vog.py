"""VoG: which checkpoints each seed has, and what there is to measure with them.

Three phases: raw scores, one task for each seed and partition; mean and deviation of each class
over the training rows of the whole pool, one task for each seed; the table that the columns are
made of. Only the first shows examples to a model.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.errors import ConfigError, InputError
from curate.models.load import pick_device
from curate.models.resident import other_architecture
from curate.models.saved import read_config
from curate.models.tasks import build_task, task_class
from curate.models.tokens import tokenizer_digest
from jobs.domains_use import domain_digests
from jobs.lengths import content_of, content_settings
from jobs.measurers import Measurer, measurer_tokenizer, measurers
from jobs.measuring import batch_tokens
from jobs.own_passes import OwnPasses, Phase
from jobs.run import Task
from jobs.settings import Settings, task_settings
from jobs.vog_work import gradients_work, groups_output, groups_work, tables_work
from scorers.protocol import Scorer
from scorers.vog import VoG

VERSION = 1
"""Of what is computed: raised when the same checkpoints and data would give other numbers."""

_STAGED = 3
"""Checkpoints of the stages early, middle and late, as in the authors' code."""


@dataclass(frozen=True, slots=True)
class _Run:
    """The checkpoints of one seed."""

    seed: int
    measurers: list[Measurer]

    @property
    def slug(self) -> str:
        return f"vog-seed-{self.seed}" if self.seed >= 0 else "vog-paths"

    @property
    def raw(self) -> str:
        return self.slug.replace("vog-", "vog-raw-", 1)


def passes(settings: Settings, scorer: Scorer) -> OwnPasses:
    """The passes of `vog`; writes nothing.

    Folders of `checkpoints.paths` that do not say which run they come from count as one training
    run, in the order given.

    Raises:
        ConfigError: a seed has too few checkpoints, they do not belong together, or an option does
            not suit the task.
        InputError: there is no index or no checkpoint yet.
    """
    options = cast(VoG, scorer)
    _check_options(options, settings)
    runs = _runs(settings, options)
    phases: dict[str, list[Task]] = {"gradients": [], "groups": [], "tables": []}
    for one in runs:
        for name, tasks in _tasks(settings, options, one).items():
            phases[name] += tasks
    return OwnPasses(
        phases=(
            Phase("vog gradients", phases["gradients"], gradients_work),
            Phase("vog groups", phases["groups"], groups_work),
            Phase("vog tables", phases["tables"], tables_work),
        ),
        tables=tuple((one.slug, one.seed) for one in runs),
    )


def check(settings: Settings, scorer: Scorer) -> None:
    """Refuse what is known to be too little, or not to suit the task, before a model is trained.

    Raises:
        ConfigError: at most one checkpoint of a seed is to come, or two of a stage, or an option
            does not suit the task.
    """
    options = cast(VoG, scorer)
    _check_options(options, settings)
    least = _least(options.stage)
    train, paths = settings.checkpoints.train, settings.checkpoints.paths
    if train is None:
        if len(paths) < least:
            raise _too_few(options.stage, f"there is {len(paths) or 1}")
        return
    # Saves that round to the same step are one: there may be fewer, never more.
    count = math.ceil(round(train.epochs / train.save_every_epochs, 9))
    count = count if train.max_steps is None else min(count, train.max_steps)
    named = settings.score.checkpoints
    if named == "last":
        count = 1
    elif named != "all":
        count = min(count, *Counter(name.partition("/")[0] for name in named).values())
    if count < least:
        raise _too_few(options.stage, f"training is to save at most {count} of each seed")


def _tasks(settings: Settings, options: VoG, one: _Run) -> dict[str, list[Task]]:
    """Phase -> tasks of one seed."""
    run = RunFolder(Path(settings.run))
    common = {"settings": plain(settings), "raw": one.raw, "table": one.slug}
    stamps = _stamps(settings, options, one)
    whole = fingerprint(
        stage="vog groups",
        raw=stamps,
        # Split and domain are no part of the content.
        index=[
            digest
            for part in run.partitions()
            for digest in (
                (run.examples(part).mark() or {}).get("digest"),
                *domain_digests(settings, part),
            )
        ],
    )
    output = groups_output(run, one.raw)
    name = f"seed {one.seed}" if one.seed >= 0 else "checkpoints.paths"
    found: dict[str, list[Task]] = {
        "gradients": [],
        "groups": [Task(name, {**common, "fingerprint": whole}, output, whole)],
        "tables": [],
    }
    models = [{**asdict(m), "folder": str(m.folder)} for m in one.measurers]
    more = {"options": plain(options), "measurers": models}
    for part in run.partitions():
        own = {**common, "partition": asdict(part)}
        stamp = stamps[part.name]
        label = f"{name}, {part.name}"
        found["gradients"].append(
            _task(label, {**own, **more}, run.quantities(part, one.raw), stamp)
        )
        table = fingerprint(stage="vog tables", raw=stamp, groups=whole)
        found["tables"].append(_task(label, own, run.quantities(part, one.slug), table))
    return found


def _task(name: str, payload: Mapping[str, Any], output: Output, stamp: str) -> Task:
    return Task(name, {**payload, "fingerprint": stamp}, output, stamp)


def _stamps(settings: Settings, options: VoG, one: _Run) -> dict[str, str]:
    """Partition -> fingerprint of its raw scores."""
    run = RunFolder(Path(settings.run))
    kind = task_settings(settings)
    device = pick_device(settings.model.device).type
    tokenizer = measurer_tokenizer(settings, one.measurers[0].folder)
    # `stage` shows in which models there are.
    how = {key: value for key, value in plain(options).items() if key != "stage"}
    common = {
        "stage": "vog gradients",
        "version": VERSION,
        "options": how,
        "models": [measurer.digest for measurer in one.measurers],
        "task": plain(kind),
        "facts": build_task(kind, tokenizer).facts(),
        "batch_tokens": batch_tokens(settings.score, device),
        "threads": settings.cluster.threads,
        "dtype": settings.model.dtype,
        "device": device,
    }
    return {
        part.name: fingerprint(
            **common,
            source=content_settings(settings.sources[part.source]),
            examples=content_of(run, part),
        )
        for part in run.partitions()
    }


def _runs(settings: Settings, options: VoG) -> list[_Run]:
    """The checkpoints that count, by seed."""
    by_seed: dict[int, list[Measurer]] = {}
    for measurer in measurers(settings):
        by_seed.setdefault(max(measurer.seed, -1), []).append(measurer)
    found: list[_Run] = []
    for seed, chosen in sorted(by_seed.items()):
        found.append(_Run(seed, _staged(chosen, options.stage)))
        _check_same(settings, found[-1].measurers)
    return found


def _staged(chosen: Sequence[Measurer], stage: str) -> list[Measurer]:
    """The checkpoints of a stage, in order."""
    if len(chosen) < _least(stage):
        names = ", ".join(measurer.name for measurer in chosen)
        raise _too_few(stage, f"there is {len(chosen)} ({names})")
    starts = {"early": 0, "middle": (len(chosen) - _STAGED) // 2, "late": len(chosen) - _STAGED}
    if stage == "complete":
        return list(chosen)
    return list(chosen[starts[stage] : starts[stage] + _STAGED])


def _least(stage: str) -> int:
    return 2 if stage == "complete" else _STAGED


def _too_few(stage: str, what: str) -> ConfigError:
    return ConfigError(
        f"vog compares checkpoints of one training run: stage {stage} takes {_least(stage)} or"
        f" more, and {what}",
        fix="save more with a smaller checkpoints.train.save_every_epochs or more epochs, or name"
        " more in checkpoints.paths; score.checkpoints: all takes them all",
    )


def _check_options(options: VoG, settings: Settings) -> None:
    kind = task_settings(settings)
    several = "windows" if getattr(kind, "window", None) is not None else ""
    several = "pairs of texts" if kind.kind == "preference" else several
    if several:
        raise ConfigError(
            f"vog takes one sequence for each example, and the task reads {several}",
            fix="remove task.window" if several == "windows" else "choose another scorer",
        )
    if options.target == "predicted" and not hasattr(kind, "num_classes"):
        raise ConfigError(
            f"vog's target: predicted is for classes, and the task is {kind.kind}",
            fix="remove target; the next tokens of the text are the target",
        )
    if options.reduce == "l2" and not task_class(kind).needs_tokenizer:
        raise ConfigError(
            f"vog's reduce: l2 takes norms of tokens, and the task is {kind.kind}",
            fix="remove reduce",
        )


def _check_same(settings: Settings, chosen: Sequence[Measurer]) -> None:
    """Refuse checkpoints that are no states of one model, before anything is loaded."""
    first = chosen[0]
    wanted, kind, words = _described(settings, first)
    for measurer in chosen[1:]:
        shapes, own_kind, own_words = _described(settings, measurer)
        if own_kind != kind:
            raise other_architecture(measurer.name, first.name, f"it is {own_kind}, not {kind}")
        for name in sorted(wanted.keys() & shapes.keys()):
            if wanted[name] != shapes[name]:
                fact = f"{name} is {shapes[name]}, not {wanted[name]}"
                raise other_architecture(measurer.name, first.name, fact)
        if not wanted.keys() & shapes.keys():
            raise other_architecture(measurer.name, first.name, "no weight has the same name")
        if own_words != words:
            raise ConfigError(
                f"checkpoint {measurer.name} has another tokenizer than {first.name}",
                fix="name checkpoints of one training run",
            )


def _described(
    settings: Settings, measurer: Measurer
) -> tuple[dict[str, tuple[int, ...]], str, str | None]:
    """Shapes of the weights in a checkpoint's folder, its model type, digest of its tokenizer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(measurer.folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except Exception as error:  # safetensors raises its own and plain OSErrors
            raise InputError(
                f"{path} cannot be read: {error}", fix="save or train the checkpoint again"
            ) from error
    tokenizer = measurer_tokenizer(settings, measurer.folder)
    words = None if tokenizer is None else tokenizer_digest(tokenizer)
    return shapes, str(read_config(measurer.folder).get("model_type")), words
