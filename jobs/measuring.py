"""`quantities/`: what each checkpoint measures, one task for each checkpoint and partition."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from curate.config import plain
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.tables import read_examples, write_table
from curate.models.load import LoadedModel, load_cached, pick_device
from curate.models.quantities import gradient_names, measure
from curate.models.settings import Score
from curate.models.tasks import Encoded, Task, build_task
from jobs.chosen import chosen_scorers, needed
from jobs.fields import example_fields, reference_facts
from jobs.lengths import content_of, content_settings
from jobs.measurers import Measurer, measurer_tokenizer
from jobs.run import Task as Work
from jobs.settings import Settings, parse_settings, task_settings

log = logging.getLogger(__name__)

VERSION = 1
"""Of what is measured: raised when the same model and data would give other numbers."""

_AUTO_BATCH_TOKENS = {"cpu": 16_384, "cuda": 65_536}


def measuring_tasks(settings: Settings, chosen: Sequence[Measurer]) -> list[Work]:
    """What there is to measure, checkpoint by checkpoint, so that a worker loads each once."""
    run = RunFolder(Path(settings.run))
    values = plain(settings)
    common = _common(settings, chosen)
    contents = {part.name: content_of(run, part) for part in run.partitions()}
    found: list[Work] = []
    for measurer in chosen:
        for part in run.partitions():
            stamp = fingerprint(
                **common,
                model=measurer.digest,
                source=content_settings(settings.sources[part.source]),
                examples=contents[part.name],
            )
            payload = {
                "settings": values,
                "partition": asdict(part),
                "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
                "fingerprint": stamp,
            }
            output = run.quantities(part, measurer.slug)
            found.append(Work(f"{measurer.name}, {part.name}", payload, output, stamp))
    return found


def measure_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Measure one partition with one checkpoint."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    measurer = measurer_of(payload["measurer"])
    task, loaded = ready(settings, measurer)
    keys = read_examples(run, part, KEY)
    encoded = task.encode(example_fields(settings, run, part))
    found, passed = measure(
        loaded.model,
        task,
        encoded,
        batch_tokens=batch_tokens(settings.score, loaded.device.type),
        device=loaded.device,
        wanted=wanted_of(settings),
        is_compiled=settings.score.compile,
    )
    table = keys.hstack(as_columns(found))
    counts = counts_of(encoded, table)
    if passed.halved:
        counts |= {"halved": passed.halved, "batch_tokens": passed.batch_tokens}
    run.quantities(part, measurer.slug).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height, **counts
    )
    return {"rows": table.height, **tokens_of(encoded), **counts}


def tokens_of(encoded: Encoded) -> dict[str, int]:
    """What a receipt says of the tokens that were read; nothing for tables and pictures."""
    tokens = encoded.arrays.get("tokens")
    return {} if tokens is None else {"num_tokens": len(tokens)}


def ready(settings: Settings, measurer: Measurer) -> tuple[Task, LoadedModel]:
    """Task and model in this process, which keeps the model for the next call."""
    import torch

    torch.set_num_threads(settings.cluster.threads)
    kind = task_settings(settings)
    loaded = load_cached(settings.model, kind, checkpoint=measurer.folder, digest=measurer.digest)
    return build_task(kind, loaded.tokenizer, max_positions=loaded.max_positions), loaded


def wanted_of(settings: Settings) -> frozenset[str]:
    """Quantities that the scorers of a run need from a model."""
    named = settings.score.named
    return needed(chosen_scorers(named)) if named else frozenset()


def as_columns(found: Mapping[str, Any]) -> pl.DataFrame:
    """Tensors (N,) as float32 columns; null where they are not finite."""
    columns = [pl.Series(name, values.numpy()) for name, values in found.items()]
    return pl.DataFrame(columns).with_columns(
        pl.when(pl.all().is_finite()).then(pl.all()).otherwise(None)
    )


def counts_of(encoded: Encoded, table: pl.DataFrame) -> dict[str, int]:
    """What a reader of the scores should know: how many examples have none or were cut."""
    unscored = int((encoded.num_scored == 0).sum())
    measured = pl.exclude(*KEY, "scored_share", "num_scored")
    broken = table.filter(pl.any_horizontal(measured.is_null())).height - unscored
    if encoded.problems:
        first = min(encoded.problems)
        log.warning("%d examples are not scored; the first, %s: %s", len(encoded.problems),
                    table.select(KEY).row(first), encoded.problems[first])  # fmt: skip
    if broken:
        log.warning("%d examples have a loss or a gradient that is not finite; they count as not"
                    " scored", broken)  # fmt: skip
    return {
        "unscored": unscored + broken,
        "truncated": int(encoded.truncated.sum()),
        "not_finite": broken,
    }


def batch_tokens(score: Score, device: str) -> int:
    """The budget of a batch, `auto` made a number."""
    return _AUTO_BATCH_TOKENS[device] if score.batch_tokens == "auto" else score.batch_tokens


def measurer_of(values: Mapping[str, Any]) -> Measurer:
    """The measurer in a task's payload."""
    return Measurer(values["name"], Path(values["folder"]), values["seed"], values["digest"])


def _common(settings: Settings, chosen: Sequence[Measurer]) -> dict[str, Any]:
    """Parts of the fingerprint that are the same for every partition."""
    kind = task_settings(settings)
    device = pick_device(settings.model.device).type
    tokenizer = measurer_tokenizer(settings, chosen[0].folder)
    # Gradients change what a table holds; the forward quantities are always all there.
    names = gradient_names(wanted_of(settings))
    more: dict[str, Any] = {"gradients": list(names)} if names else {}
    if settings.score.compile:
        more["compile"] = True
    return {
        **more,
        **reference_facts(settings),
        "stage": "quantities",
        "version": VERSION,
        "task": plain(kind),
        "facts": build_task(kind, tokenizer).facts(),
        "batch_tokens": batch_tokens(settings.score, device),
        "threads": settings.cluster.threads,
        "dtype": settings.model.dtype,
        "device": device,
    }
