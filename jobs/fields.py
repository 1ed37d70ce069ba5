"""The examples of a partition as a task reads them, with what a reference model said of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.reading import read_fields
from curate.data.tables import meet, read_examples, read_table
from curate.errors import ConfigError, InputError
from curate.models.load import model_digest, model_folder
from curate.models.settings import Model
from curate.models.tasks import task_class
from curate.models.tasks.preference import REFERENCE
from curate.models.tokens import load_tokenizer, tokenizer_digest
from jobs.measurers import Measurer
from jobs.settings import Settings, task_settings


def example_fields(
    settings: Settings, run: RunFolder, part: Partition, *, is_sketch: bool = False
) -> pl.DataFrame:
    """Key and content of a partition's examples, what `Task.encode` takes.

    A task that compares with a reference also gets what that said of them, in the columns of
    `curate.models.tasks.preference.REFERENCE`.

    Args:
        settings: of the run; its sources hold that of the partition.
        run: the run folder.
        part: the partition.
        is_sketch: zeros will do where the reference has not measured: for timing.

    Raises:
        InputError: the file has changed, or the reference has not measured the partition.
    """
    keys = read_examples(run, part, KEY)
    fields = keys.hstack(read_fields(run, part, settings.sources[part.source]))
    reference = reference_of(settings)
    if reference is None:
        return fields
    output = run.quantities(part, reference.slug)
    if output.mark() is None and is_sketch:
        return fields.with_columns(pl.lit(0.0).alias(name) for name in REFERENCE)
    if output.mark() is None:
        raise InputError(
            f"the reference {reference.folder} has not measured {part.name} yet",
            fix=f"run `curate score {run.root}`",
        )
    known = read_table(output.path)
    meet(keys, known)
    return fields.hstack(known.drop(KEY))


def reference_of(settings: Settings) -> Measurer | None:
    """The model that answers are compared with, where the task has one.

    Raises:
        ConfigError: neither `task.reference` nor `model.name` says which, or its tokenizer is
            another than the model's.
        InputError: it is missing.
    """
    if not settings.task:
        return None
    kind = task_settings(settings)
    if not getattr(task_class(kind), "needs_reference", False):
        return None
    name = kind.reference or settings.model.name
    if name is None:
        raise ConfigError(
            "the answers are compared with a reference model, but none is named",
            fix="set task.reference, or model.name to the model that training starts from",
        )
    folder = model_folder(reference_model(settings))
    tokenizer = _tokenizer(settings, folder)
    for other in _others(settings):
        if tokenizer_digest(_tokenizer(settings, other)) != tokenizer_digest(tokenizer):
            raise ConfigError(
                f"the tokenizer of the reference {folder} is not that of {other}",
                fix="compare with a model of the same tokenizer",
            )
    digest = model_digest(folder, tokenizer)
    return Measurer(f"reference-{digest[:8]}", folder, 0, digest)


def reference_model(settings: Settings) -> Model:
    """Settings of the reference: the model that training starts from, without any adapter."""
    named: str | None = task_settings(settings).reference
    model = replace(settings.model, config=None, adapter=None, lora=None)
    return model if named is None else replace(model, name=named, revision=None)


def reference_facts(settings: Settings) -> dict[str, Any]:
    """What a fingerprint says of the reference; nothing where the task has none."""
    found = reference_of(settings)
    return {} if found is None else {"reference": found.digest}


def _others(settings: Settings) -> list[Path]:
    """Folders of the models that are compared with a named reference."""
    if task_settings(settings).reference is None or isinstance(settings.model.tokenizer, str):
        return []
    names = settings.checkpoints.paths or (settings.model.name,)
    return [model_folder(Model(name=name)) for name in names[:1] if name is not None]


def _tokenizer(settings: Settings, folder: Path) -> Any:
    named = settings.model.tokenizer
    return load_tokenizer(named if isinstance(named, str) else folder)
