"""The sequences that proxies draw from: one task for each partition, and one for the target.

run/proxies/sequences/<key>/part-….safetensors   see `curate.models.sequences`
run/proxies/sequences/<key>/target.safetensors   the target, in two halves

The key stands for all that decides how an example becomes sequences, so that mixers with the same
proxy share them. Training examples fall into the parts `reference` and `proxy`, those of the
target into `target` and `target_held_out`, by their content.

What a worker does stands in `jobs.sequences_work`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.errors import ConfigError, InputError
from curate.models.sequences import Sequences
from curate.models.settings import CausalLM
from curate.models.tasks import task_class
from curate.models.tokens import tokenizer_digest
from jobs.domains_use import domain_digests
from jobs.lengths import content_settings
from jobs.run import Task, require
from jobs.settings import Settings, task_settings
from jobs.target import target_files, target_stamp
from jobs.training_work import Workshop, make_workshop

VERSION = 1
"""Raised when the same examples would become other sequences."""

TARGET = "target"
"""The one domain of the target's sequences."""


@dataclass(frozen=True, slots=True)
class SequenceTasks:
    """What there is to make; known before anything has run."""

    key: str
    """Of the folder; for `open_sequences` and `open_target`."""
    pool: list[Task]
    """One for each partition, for `make_sequences`. They follow those of the target."""
    target: list[Task]
    """One, for `make_target`; none where no target was asked for."""
    identity: str
    """Of tokenizer and index, for `jobs.training_work.open_workshop`."""


@dataclass(frozen=True, slots=True)
class How:
    """How examples become sequences."""

    packed: bool
    length: int | None
    """Tokens; None where examples have none."""
    exclude_target: bool


def sequence_tasks(
    settings: Settings,
    *,
    packed: bool,
    length: int | None,
    with_target: bool = False,
    exclude_target: bool = False,
) -> SequenceTasks:
    """What makes the sequences of the training pool, of what is held out, and of the target.

    Args:
        settings: of the run.
        packed: texts stand one behind the other in windows; for language models only, and of no
            effect for other tasks.
        length: tokens of a window, or of the longest text; by default `task.max_tokens`, or what
            the model reads where that is less.
        with_target: make those of the target too.
        exclude_target: examples of the pool that stand in the target too become none; the mark of
            each partition says how many, and `left_out` of all.

    Raises:
        ConfigError: the task cannot be cut into sequences, or there is no target.
        InputError: the index, the clustered domains or the tokenizer is missing.
    """
    run = RunFolder(Path(settings.run))
    require(run.partitions(), stage="the index", command=f"curate index {run.root}")
    _check(settings, with_target or exclude_target)
    shop = make_workshop(settings)
    how = _how(shop, packed, length, exclude_target)
    encoding = _encoding(shop, how)
    key = fingerprint(**encoding)[:12]
    digests = [(run.examples(part).mark() or {}).get("digest") for part in run.partitions()]
    identity = fingerprint(key=key, inputs=digests)
    payload = {
        "settings": plain(settings),
        "identity": identity,
        "key": key,
        "how": asdict(how),
    }
    pool = [_task(settings, run, part, encoding, payload) for part in run.partitions()]
    target: list[Task] = []
    if with_target or exclude_target:
        mark = fingerprint(
            stage="target sequences", encoding=encoding, index=target_stamp(settings)
        )
        output = target_output(run, key)
        target.append(Task("the target", payload | {"fingerprint": mark}, output, mark))
    return SequenceTasks(key, pool, target, identity)


def sequences_output(run: RunFolder, key: str, part: Partition) -> Output:
    """The sequences of a partition."""
    return Output(run.proxies / "sequences" / key / f"{part.name}.safetensors")


def target_output(run: RunFolder, key: str) -> Output:
    """The sequences of the target."""
    return Output(run.proxies / "sequences" / key / "target.safetensors")


def open_sequences(
    settings: Settings,
    key: str,
    parts: Sequence[str],
    *,
    domains: Sequence[str] | None = None,
) -> Sequences:
    """The sequences of the pool, of `reference`, `proxy`, `held_out` or several of them.

    Raises:
        InputError: they have not all been made.
    """
    run = RunFolder(Path(settings.run))
    paths = [sequences_output(run, key, part).path for part in run.partitions()]
    return Sequences.open(paths, parts=parts, domains=domains)


def open_target(
    settings: Settings, key: str, parts: Sequence[str], *, by_domain: bool = False
) -> Sequences:
    """The sequences of the target, of `target`, `target_held_out` or both.

    Args:
        settings: of the run.
        key: of the sequences.
        parts: which.
        by_domain: keep the target's own domains; else all are one, named `TARGET`.

    Raises:
        InputError: they have not been made.
    """
    path = target_output(RunFolder(Path(settings.run)), key).path
    return Sequences.open([path], parts=parts, as_one=None if by_domain else TARGET)


def left_out(settings: Settings, key: str) -> dict[str, int]:
    """Domain -> how many of its examples are no part of the sequences, as the target has them."""
    run = RunFolder(Path(settings.run))
    found: dict[str, int] = {}
    for part in run.partitions():
        mark = sequences_output(run, key, part).mark() or {}
        for domain, count in mark.get("excluded", {}).items():
            found[domain] = found.get(domain, 0) + count
    return dict(sorted(found.items()))


def check_mix_target(settings: Settings) -> None:
    """Refuse settings whose target is missing, for a mixer that reads one; needs no index.

    Raises:
        ConfigError: there is none, or its files are not there.
    """
    if settings.target is None:
        raise ConfigError(
            "the mixer looks at a target, and the settings name none",
            fix="set target: {path: ...} to examples of the kind that is wanted",
        )
    try:
        target_files(settings)
    except InputError as error:  # the setting is wrong: nothing that is made later mends it
        raise ConfigError(error.what, fix=error.fix) from error


def _check(settings: Settings, needs_target: bool) -> None:
    kind = task_settings(settings)
    if getattr(task_class(kind), "needs_reference", False):
        raise ConfigError(
            f"task {kind.kind} compares two answers: a proxy has no sequences to read",
            fix="train the proxy with task.kind: causal-lm on the chosen answers",
        )
    if getattr(kind, "window", None) is not None:
        raise ConfigError(
            "a proxy does not read windows that overlap, and task.window asks for them",
            fix="remove task.window; packed sequences lose no text",
        )
    if needs_target:
        check_mix_target(settings)


def _how(shop: Workshop, packed: bool, length: int | None, exclude_target: bool) -> How:
    kind = task_settings(shop.settings)
    # Rows of numbers and images have no tokens; a user's own task may cut its texts by itself.
    most = getattr(shop.task, "max_tokens", None) if hasattr(kind, "max_tokens") else None
    if length is None or most is None:
        length = most
    return How(packed and isinstance(kind, CausalLM), length, exclude_target)


def _encoding(shop: Workshop, how: How) -> dict[str, Any]:
    """All that decides how an example becomes sequences."""
    settings = shop.settings
    return {
        "stage": "sequences",
        "version": VERSION,
        **asdict(how),
        "task": {**plain(task_settings(settings)), "max_tokens": None},
        "facts": {**shop.task.facts(), "max_tokens": None},
        "tokenizer": None if shop.tokenizer is None else tokenizer_digest(shop.tokenizer),
        "domains": None if settings.domains is None else plain(settings.domains),
        "seed": settings.seed,
        "target": target_stamp(settings) if how.exclude_target else None,
    }


def _task(
    settings: Settings,
    run: RunFolder,
    part: Partition,
    encoding: dict[str, Any],
    payload: dict[str, Any],
) -> Task:
    index = run.examples(part).mark()
    if index is None:
        raise InputError(
            f"{part.source}/{part.file} has no index yet", fix=f"run `curate index {run.root}`"
        )
    mark = fingerprint(
        encoding=encoding,
        source=content_settings(settings.sources[part.source]),
        inputs=[index["digest"], *domain_digests(settings, part)],
    )
    own = payload | {"partition": asdict(part), "fingerprint": mark}
    return Task(part.name, own, sequences_output(run, payload["key"], part), mark)
