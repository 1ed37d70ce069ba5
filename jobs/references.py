"""What the reference model says of every pair of answers, measured once and kept.

The reference does not change while a model is trained, so that its log-probabilities of both
answers are a table like any other: `quantities/reference-<digest>/`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from curate.config import plain
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import read_fields
from curate.data.tables import read_examples, write_table
from curate.models.batches import for_each_batch
from curate.models.load import LoadedModel, load_cached, pick_device
from curate.models.quantities import to_device
from curate.models.tasks import build_task
from curate.models.tasks.preference import REFERENCE, PreferenceTask
from curate.models.tokens import load_tokenizer
from jobs.cluster import Pool
from jobs.fields import reference_model, reference_of
from jobs.lengths import content_of, content_settings
from jobs.measuring import batch_tokens, measurer_of
from jobs.run import Listener, ignore, raise_failures, run_tasks
from jobs.run import Task as Work
from jobs.settings import Settings, parse_settings, task_settings

VERSION = 1


def references_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> None:
    """Measure both answers of every example with the reference, where the task has one.

    Raises:
        ConfigError: no reference is named.
        CurateError: a partition failed.
    """
    tasks = reference_tasks(settings)
    if tasks:
        outcome = run_tasks("reference", tasks, reference_work, pool=pool, listener=listener)
        raise_failures("reference", outcome)


def reference_tasks(settings: Settings) -> list[Work]:
    """One task for each partition; none where the task has no reference."""
    reference = reference_of(settings)
    if reference is None:
        return []
    run = RunFolder(Path(settings.run))
    kind = task_settings(settings)
    named = settings.model.tokenizer
    tokenizer = load_tokenizer(named if isinstance(named, str) else reference.folder)
    device = pick_device(settings.model.device).type
    values = plain(settings)
    found: list[Work] = []
    for part in run.partitions():
        stamp = fingerprint(
            stage="reference",
            version=VERSION,
            model=reference.digest,
            facts=build_task(kind, tokenizer).facts(),
            batch_tokens=batch_tokens(settings.score, device),
            threads=settings.cluster.threads,
            dtype=settings.model.dtype,
            device=device,
            source=content_settings(settings.sources[part.source]),
            examples=content_of(run, part),
        )
        payload = {
            "settings": values,
            "partition": asdict(part),
            "measurer": {**asdict(reference), "folder": str(reference.folder)},
            "fingerprint": stamp,
        }
        output = run.quantities(part, reference.slug)
        found.append(Work(f"{reference.name}, {part.name}", payload, output, stamp))
    return found


def reference_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Measure one partition with the reference."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    reference = measurer_of(payload["measurer"])
    torch.set_num_threads(settings.cluster.threads)
    kind = task_settings(settings)
    loaded = load_cached(
        reference_model(settings), kind, checkpoint=reference.folder, digest=reference.digest
    )
    keys = read_examples(run, part, KEY)
    fields = keys.hstack(read_fields(run, part, settings.sources[part.source]))
    budget = batch_tokens(settings.score, loaded.device.type)
    table = keys.hstack(reference_columns(loaded, kind, fields, budget=budget))
    run.quantities(part, reference.slug).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


def reference_columns(
    loaded: LoadedModel, kind: Any, fields: pl.DataFrame, *, budget: int
) -> pl.DataFrame:
    """The columns of `REFERENCE`, float64; null where an example cannot be scored.

    Args:
        loaded: the reference.
        kind: settings of the task.
        fields: the answers.
        budget: tokens of a batch, padding included.
    """
    task = build_task(kind, loaded.tokenizer, max_positions=loaded.max_positions)
    assert isinstance(task, PreferenceTask)
    encoded = task.encode(fields)
    found = torch.full((len(encoded), 2), torch.nan, dtype=torch.float64, device=loaded.device)
    scored = np.flatnonzero(encoded.num_scored > 0)

    def work(members: np.ndarray) -> None:
        chosen = scored[members]
        batch = to_device(task.collate(encoded, chosen), loaded.device)
        where = torch.from_numpy(chosen).to(loaded.device)
        found[where] = task.log_probabilities(loaded.model, batch)

    with torch.inference_mode():
        for_each_batch(encoded.lengths[scored], work, batch_tokens=budget)
    columns = found.cpu().numpy()
    return pl.DataFrame(
        [pl.Series(name, columns[:, side]) for side, name in enumerate(REFERENCE)]
    ).with_columns(pl.when(pl.all().is_finite()).then(pl.all()).otherwise(None))
