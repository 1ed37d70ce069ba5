"""`lengths/`: how many tokens each example has, for one tokenizer."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from curate.config import plain
from curate.data.counts import CHARACTERS, EXAMPLES, are_tokens, counts_output, read_counts
from curate.data.example import KEY, Source
from curate.data.files import fingerprint
from curate.data.index import LATER_FIELDS, content_digest
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, record_stage
from curate.data.partitions import Partition, remove_strays
from curate.data.reading import read_fields
from curate.data.tables import read_examples, read_table, write_table
from curate.errors import InputError
from curate.models.settings import ImageClassification, TabularClassification, Tokenizer
from jobs.cluster import Pool
from jobs.run import Listener, StageState, Task, ignore, raise_failures, require, run_tasks
from jobs.settings import Settings, parse_settings, task_settings
from jobs.stamps import keep_tokenizer, known_tokenizer, tokenizer_stamp

log = logging.getLogger(__name__)

VERSION = 1
"""Of what is counted: raised when the same text and tokenizer would give another number."""

_CONTENT = ("text", "prompt", "response", "messages", "features")

_tokenizers: dict[str, Any] = {}


def tokenizer_for(settings: Settings) -> tuple[Any | None, str]:
    """The tokenizer whose tokens are counted, and its digest.

    `plan.tokenizer` if set (the trainer's), else the scoring model's: trained in the run, named by
    `model.tokenizer`, or beside the model or the first of the user's checkpoints. Without any the
    digest is `CHARACTERS`, for tables and images `EXAMPLES`, and there is no tokenizer.

    Raises:
        InputError: the tokenizer is missing, or is to be trained in this run and was not yet.
    """
    from curate.models.tokens import load_tokenizer, tokenizer_digest

    if _has_no_tokens(settings):
        return None, EXAMPLES
    place = tokenizer_place(settings)
    if place is None:
        return None, CHARACTERS
    revision = settings.model.revision if place == settings.model.name else None
    tokenizer = load_tokenizer(place, revision=revision)
    return tokenizer, tokenizer_digest(tokenizer)


def lengths_digest(settings: Settings) -> str:
    """The digest of `tokenizer_for`; a tokenizer that this run knows is not loaded for it.

    Raises:
        InputError: the tokenizer is missing, or is to be trained in this run and was not yet.
    """
    stamp = _stamp(settings)
    known = stamp and known_tokenizer(RunFolder(Path(settings.run)), stamp)
    return known or tokenizer_for(settings)[1]


def _stamp(settings: Settings) -> str | None:
    """Of the tokenizer's files, where there are any."""
    place = None if _has_no_tokens(settings) else tokenizer_place(settings)
    return None if place is None else tokenizer_stamp(place)


def lengths_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Count the tokens of every example; partitions that are counted already are skipped.

    Returns:
        `digest` and `tokenizer` (what the tokens are), `rows`, `tokens`, and how many partitions
        were `done` now or `skipped`.

    Raises:
        InputError: the index is missing, or the tokenizer.
    """
    run = RunFolder(Path(settings.run))
    partitions = run.partitions()
    require(partitions, stage="the index", command=f"curate index {run.root}")
    digest = lengths_digest(settings)
    if stamp := _stamp(settings):
        keep_tokenizer(run, stamp, digest)
    tasks = _tasks(run, settings, partitions, digest)
    outcome = run_tasks("lengths", tasks, lengths_work, pool=pool, listener=listener)
    remove_strays(run.root / "lengths" / digest, {part.name for part in partitions})
    facts = {
        "digest": digest,
        "tokenizer": _described(settings, digest),
        **_sums(run, partitions, digest),
    }
    known = load_manifest(run)["stages"].get("lengths", {}).get("summary")
    is_new = known is None or bool(outcome.done)
    done, skipped = len(outcome.done), len(outcome.skipped)
    if not tasks:
        is_new = known != facts
        done, skipped = (len(partitions), 0) if is_new else (0, len(partitions))
    summary = {
        **facts,
        "partitions": len(partitions),
        "done": done,
        "skipped": skipped,
        "seconds": round(outcome.seconds, 3),
    }
    if is_new:
        outputs = [task.output for task in tasks]
        record_stage(
            run, "lengths", outputs=outputs, seconds=outcome.seconds, facts={"summary": facts}
        )
    raise_failures("lengths", outcome)
    return summary


def plan_lengths(settings: Settings) -> StageState:
    """What `lengths_run` would do; writes nothing."""
    run = RunFolder(Path(settings.run))
    partitions = run.partitions()
    if not partitions:
        return StageState("lengths", 0, 0, ("the index has not been made yet",))
    try:
        digest = lengths_digest(settings)
    except InputError as error:
        return StageState("lengths", len(partitions), 0, (error.what,))
    tasks = _tasks(run, settings, partitions, digest)
    if not tasks:
        return StageState("lengths", len(partitions), len(partitions))
    due = [task for task in tasks if not task.is_done()]
    new = sum(task.output.mark() is None for task in due)
    counts = {
        f"partitions have no lengths yet for {_described(settings, digest)}": new,
        "partitions have changed data": len(due) - new,
    }
    why = tuple(f"{count} {what}" for what, count in counts.items() if count)
    return StageState("lengths", len(tasks), len(tasks) - len(due), why)


def lengths_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Count the tokens of one partition."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    digest: str = payload["digest"]
    counts = _counted(settings, run, part, digest)
    table = read_examples(run, part, KEY).with_columns(counts)
    run.lengths(part, digest).write(
        lambda path: write_table(table, path),
        payload["fingerprint"],
        rows=table.height,
        tokens=int(counts.sum()),
    )
    return {"rows": table.height, "num_tokens": int(counts.sum())}


def _sums(run: RunFolder, partitions: Sequence[Partition], digest: str) -> dict[str, int]:
    """Rows and tokens of all partitions that have been counted."""
    outputs = ((part, counts_output(run, part, digest)) for part in partitions)
    marks = [(part, mark) for part, output in outputs if (mark := output.mark())]
    known = {CHARACTERS: "num_counted", EXAMPLES: "rows"}.get(digest, "tokens")
    tokens = [
        mark[known] if known in mark else int(read_counts(run, part, digest)["num_tokens"].sum())
        for part, mark in marks
    ]
    return {"rows": sum(mark["rows"] for _, mark in marks), "tokens": sum(tokens)}


def _counted(settings: Settings, run: RunFolder, part: Partition, digest: str) -> pl.Series:
    """(N,) tokens, by a tokenizer that a worker loads once."""
    from curate.models.tokens import count_tokens

    if digest not in _tokenizers:
        _tokenizers.clear()
        _tokenizers[digest] = tokenizer_for(settings)[0]
    fields = read_fields(run, part, settings.sources[part.source])
    return pl.Series("num_tokens", count_tokens(fields, _tokenizers[digest]))


def length_tasks(settings: Settings, digest: str) -> list[Task]:
    """One task for each partition; none where the index knows the counts.

    Args:
        settings: of the run.
        digest: as `tokenizer_for` gave it.
    """
    run = RunFolder(Path(settings.run))
    return _tasks(run, settings, run.partitions(), digest)


def content_settings(source: Source) -> dict[str, Any]:
    """The settings of a source that say which columns hold what a model reads."""
    values = plain(source)
    more = {name: values[name] for name in LATER_FIELDS if values[name] is not None}
    return {name: values[name] for name in (*_CONTENT, "label", "classes")} | more


def content_of(run: RunFolder, part: Partition) -> str:
    """What `curate.data.index.content_digest` says of a partition's examples."""
    noted = (run.examples(part).mark() or {}).get("content_digest")
    return noted or content_digest(read_table(run.examples(part).path))


def _tasks(
    run: RunFolder, settings: Settings, partitions: Sequence[Partition], digest: str
) -> list[Task]:
    values = plain(settings)
    found: list[Task] = []
    for part in partitions if are_tokens(digest) else ():
        stamp = fingerprint(
            stage="lengths",
            version=VERSION,
            tokenizer=digest,
            source=content_settings(settings.sources[part.source]),
            examples=content_of(run, part),
        )
        payload = {
            "settings": values,
            "partition": asdict(part),
            "digest": digest,
            "fingerprint": stamp,
        }
        found.append(Task(part.name, payload, run.lengths(part, digest), stamp))
    return found


def _has_no_tokens(settings: Settings) -> bool:
    if settings.task:
        return isinstance(task_settings(settings), TabularClassification | ImageClassification)
    sources = settings.sources.values()
    return all(source.features is not None or source.image is not None for source in sources)


def tokenizer_place(settings: Settings) -> str | None:
    """Folder or hub id of the tokenizer whose tokens the plan counts; None where none is set.

    Raises:
        InputError: it is to be trained in this run and was not yet.
    """
    if settings.plan.tokenizer is not None:
        return settings.plan.tokenizer
    if isinstance(settings.model.tokenizer, Tokenizer):
        folder = RunFolder(Path(settings.run)).tokenizer
        if not folder.is_dir():
            raise InputError(
                "the tokenizer of this run has not been trained yet",
                fix=f"run `curate train {settings.run}`",
            )
        return str(folder)
    if settings.model.tokenizer is not None:
        return settings.model.tokenizer
    return settings.model.name or next(iter(settings.checkpoints.paths), None)


def _described(settings: Settings, digest: str) -> str:
    """What a token is here, for people."""
    if digest == CHARACTERS:
        return "characters, as no tokenizer is set"
    if digest == EXAMPLES:
        return "examples, as they are rows of numbers or images"
    place = tokenizer_place(settings)
    return (
        "trained in this run"
        if place == str(RunFolder(Path(settings.run)).tokenizer)
        else str(place)
    )
