"""Which models measure: checkpoints of this run, the user's own, or the model itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.data.files import fingerprint, read_json
from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError
from curate.models.adapters import (
    adapter_facts,
    base_folder,
    measurer_digest,
    tokenizer_folder,
)
from curate.models.checkpoints import list_checkpoints
from curate.models.load import model_folder
from curate.models.own import is_own
from curate.models.saved import read_config
from curate.models.settings import Model, Score
from curate.models.tasks import task_class
from curate.models.tokens import load_tokenizer, tokenizer_digest
from jobs.settings import Settings, task_settings


@dataclass(frozen=True, slots=True)
class Measurer:
    """One model that measures: a checkpoint, or the model of the settings itself."""

    name: str
    """`seed-0/step-000200`, the name of a folder, or `model`."""
    folder: Path
    seed: int
    """Training run it comes from; see `seeds_of` for the user's own."""
    digest: str

    @property
    def slug(self) -> str:
        """Name of its folder under `quantities/`."""
        return self.name.replace("/", "-")


def measurers(settings: Settings) -> list[Measurer]:
    """The models that the settings choose, sorted by seed and step.

    Raises:
        InputError: nothing was trained yet, or a named checkpoint or the model is missing.
        ConfigError: no model is set.
    """
    if settings.checkpoints.train is not None:
        found = _trained(settings)
    elif settings.checkpoints.paths:
        found = _own(settings)
    else:
        folder = model_folder(settings.model)
        found = [Measurer("model", folder, 0, _digest(settings, folder))]
    return _chosen(found, settings.score)


def measurer_tokenizer(settings: Settings, folder: Path) -> Any | None:
    """The tokenizer in a model's folder; None where task or model need none."""
    if not task_class(task_settings(settings)).needs_tokenizer:
        return None
    model = settings.model
    if is_own(read_config(base_folder(model, folder))):
        return None
    named = model.tokenizer
    return load_tokenizer(named if isinstance(named, str) else tokenizer_folder(model, folder))


def _digest(settings: Settings, folder: Path) -> str:
    return measurer_digest(settings.model, folder, measurer_tokenizer(settings, folder))


def _trained(settings: Settings) -> list[Measurer]:
    run = RunFolder(Path(settings.run))
    seeds = settings.checkpoints.train.seeds if settings.checkpoints.train else ()
    found = [
        Measurer(
            checkpoint.name,
            checkpoint.path,
            checkpoint.seed,
            # The weights were hashed when they were saved; hashing all again would cost minutes.
            fingerprint(weights=checkpoint.digest, rest=_rest(settings, checkpoint.path)),
        )
        for checkpoint in list_checkpoints(run.checkpoints)
        if checkpoint.seed in seeds
    ]
    missing = set(seeds) - {measurer.seed for measurer in found}
    if missing:
        raise InputError(
            f"there is no checkpoint of seed {min(missing)} yet",
            fix=f"run `curate train {run.root}`",
        )
    return found


def _rest(settings: Settings, folder: Path) -> str:
    """Digest of what belongs to a checkpoint beside its weights."""
    return fingerprint(
        **adapter_facts(settings.model, folder),
        config={k: v for k, v in read_config(folder).items() if k != "_name_or_path"},
        tokenizer=_tokenizer_digest(settings, folder),
    )


def _tokenizer_digest(settings: Settings, folder: Path) -> str | None:
    tokenizer = measurer_tokenizer(settings, folder)
    return None if tokenizer is None else tokenizer_digest(tokenizer)


def _own(settings: Settings) -> list[Measurer]:
    found: list[Measurer] = []
    folders = [model_folder(Model(name=name)) for name in settings.checkpoints.paths]
    for folder, seed in zip(folders, seeds_of(folders), strict=True):
        names = {measurer.name for measurer in found}
        short = folder.name
        if short in names:  # epoch-1 of several runs
            short = f"{folder.parent.name}-{short}"
        if short in names:
            raise ConfigError(
                f"two of checkpoints.paths end in {short}", fix="rename one of the folders"
            )
        found.append(Measurer(short, folder, seed, _digest(settings, folder)))
    return found


def seeds_of(folders: Sequence[Path]) -> list[int]:
    """The training run of each checkpoint: what its `checkpoint.json` says, else one of its own.

    Runs of its own have negative numbers.
    """
    facts: list[dict[str, Any]] = [read_json(path / "checkpoint.json") or {} for path in folders]
    return [int(entry.get("seed", -1 - index)) for index, entry in enumerate(facts)]


def _chosen(found: list[Measurer], score: Score) -> list[Measurer]:
    if score.checkpoints == "all":
        return found
    if score.checkpoints == "last":
        last = {measurer.seed: measurer for measurer in found}
        return [measurer for measurer in found if measurer is last[measurer.seed]]
    known = {measurer.name: measurer for measurer in found}
    for name in score.checkpoints:
        if name not in known:
            raise InputError(
                f"score.checkpoints names {name}, which does not exist",
                fix=f"use all, last, or names among {', '.join(known)}",
            )
    return [measurer for measurer in found if measurer.name in score.checkpoints]
