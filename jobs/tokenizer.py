"""The tokenizer of a run: the model's own, one that is named, or one trained on the run's text."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from curate.data.example import TRAIN
from curate.data.files import fingerprint, replace_folder
from curate.data.layout import RunFolder
from curate.data.manifest import record_stage
from curate.data.partitions import Output
from curate.data.reading import read_fields
from curate.data.tables import read_examples
from curate.errors import ConfigError, InputError
from curate.models.settings import Tokenizer
from jobs.lengths import content_of, content_settings
from jobs.run import StageState, require
from jobs.settings import Settings, task_settings

VERSION = 1


def tokenizer_run(settings: Settings) -> dict[str, Any]:
    """Train the tokenizer that `model.tokenizer` asks for, on the training rows in canonical order.

    Returns:
        `vocab_size`, and `done`: whether it was trained now. Nothing where none is asked for.

    Raises:
        InputError: the index is missing, or there is no text to train on.
        ConfigError: the vocabulary is too small for the bytes.
        OutputError: the disk refuses the write.
    """
    asked = settings.model.tokenizer
    if not isinstance(asked, Tokenizer):
        return {}
    started = time.monotonic()
    run = RunFolder(Path(settings.run))
    require(run.partitions(), stage="the index", command=f"curate index {run.root}")
    output, mark = _output(run), _fingerprint(settings, run, asked)
    is_done = output.is_done(mark)
    if not is_done:
        _train(settings, run, asked, mark)
        record_stage(run, "tokenizer", outputs=[output], seconds=time.monotonic() - started)
    facts = output.mark() or {}
    return {"vocab_size": facts["vocab_size"], "done": not is_done}


def plan_tokenizer(settings: Settings) -> StageState:
    """What `tokenizer_run` would do; writes nothing."""
    asked = settings.model.tokenizer
    if not isinstance(asked, Tokenizer):
        return StageState("tokenizer", 0, 0)
    run = RunFolder(Path(settings.run))
    try:
        is_done = _output(run).is_done(_fingerprint(settings, run, asked))
    except InputError:
        return StageState("tokenizer", 1, 0, ("the index comes first",))
    if is_done:
        return StageState("tokenizer", 1, 1)
    why = "it is not trained yet"
    if _output(run).mark() is not None:
        why = "the data or model.tokenizer has changed"
    return StageState("tokenizer", 1, 0, (why,))


def run_tokenizer(settings: Settings) -> Any | None:
    """The tokenizer that the run's model reads with; None where the task needs none.

    Raises:
        InputError: it is missing; one that is trained in the run must have been trained.
        ConfigError: the model is made from scratch and no tokenizer is set.
    """
    from curate.models.load import model_folder, tokenizer_of
    from curate.models.tasks import task_class
    from curate.models.tokens import load_tokenizer

    model = settings.model
    if not task_class(task_settings(settings)).needs_tokenizer:
        return None
    if isinstance(model.tokenizer, Tokenizer):
        run = RunFolder(Path(settings.run))
        if _output(run).mark() is None:
            raise InputError(
                "the tokenizer has not been trained", fix=f"run `curate train {run.root}`"
            )
        return load_tokenizer(run.tokenizer)
    if isinstance(model.tokenizer, str):
        return load_tokenizer(model.tokenizer)
    if model.name is None:
        raise ConfigError(
            "the model is made from scratch, and no tokenizer is set",
            fix="set model.tokenizer: {train: bpe, vocab_size: 8192}, or name one that exists",
        )
    return tokenizer_of(model, model_folder(model))


def training_digests(run: RunFolder) -> list[str]:
    """Digest of each partition's keys, contents, labels and split: what training depends on.

    Finer than the digest of the index: another domain column changes the index, and no model.

    Raises:
        InputError: the index has not finished.
    """
    partitions = run.partitions()
    require(partitions, stage="the index", command=f"curate index {run.root}")
    digests = list[str]()
    for part in partitions:
        split = read_examples(run, part, ["split"])["split"]
        train = np.packbits((split == TRAIN).to_numpy()).tobytes()
        digest = xxhash.xxh3_128_hexdigest(train)
        digests.append(fingerprint(content=content_of(run, part), train=digest))
    return digests


def _output(run: RunFolder) -> Output:
    return Output(run.tokenizer / "tokenizer.json")


def _fingerprint(settings: Settings, run: RunFolder, asked: Tokenizer) -> str:
    return fingerprint(
        stage="tokenizer",
        version=VERSION,
        settings={"train": asked.train, "vocab_size": asked.vocab_size},
        sources={name: content_settings(source) for name, source in settings.sources.items()},
        inputs=training_digests(run),
    )


def _train(settings: Settings, run: RunFolder, asked: Tokenizer, mark: str) -> None:
    from curate.models.tokenizer_training import save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(_texts(settings, run), vocab_size=asked.vocab_size)
    replace_folder(run.tokenizer, lambda folder: save_tokenizer(tokenizer, folder))
    _output(run).adopt(mark, vocab_size=len(tokenizer))


def _texts(settings: Settings, run: RunFolder) -> Iterator[str]:
    """Text of the training rows, one partition in memory at a time."""
    from curate.models.tokenizer_training import texts_of

    for part in run.partitions():
        split = read_examples(run, part, ["split"])["split"]
        if (split == TRAIN).any():
            fields = read_fields(run, part, settings.sources[part.source])
            yield from texts_of(fields.filter(pl.Series(split == TRAIN)))
