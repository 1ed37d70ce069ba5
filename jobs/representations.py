"""Which representations a run has, who reads them, and how they are opened; loads no model."""

from collections.abc import Mapping

from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError
from curate.vectors.settings import Embed
from curate.vectors.store import Vectors
from jobs.settings import Settings

READS_VECTORS = {"gio", "rds", "density_ratio", "duplicates", "spread"}
"""Scorers that read vectors; an option `vectors` names a representation."""
READS_TARGET = {"gio", "rds", "dsir", "bm25", "density_ratio"}
"""Scorers that compare with the target."""

_WITHOUT_VECTORS: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "duplicates": ("method", (None, "exact", "near")),
    "density_ratio": ("on", ("ngrams",)),
}
"""Scorer -> option and its values with which it reads none after all."""


_PLAIN_TASKS = ("image-classification", "tabular-classification")
"""Of examples that are numbers, whichever column the index takes them from."""


def representations(settings: Settings) -> Mapping[str, Embed]:
    """Name -> representation; one by default, where the settings have none.

    Numbers and images stand for themselves; texts are read by `model.name`, and where that is not
    set are hashed n-grams.
    """
    if settings.embed:
        return settings.embed
    sources = settings.sources.values()
    is_plain = settings.task.get("kind") in _PLAIN_TASKS
    if is_plain or any(source.features or source.image for source in sources):
        return {"values": Embed(kind="values")}
    if settings.model.name is not None:
        return {"model": Embed()}
    return {"ngrams": Embed(kind="ngrams")}


def representation(settings: Settings, name: str | None) -> str:
    """The representation that something reads.

    Args:
        settings: of the run.
        name: as its options say; None takes the only one.

    Raises:
        ConfigError: there is none of that name, or several and none is named.
    """
    known = list(representations(settings))
    if name is None and len(known) == 1:
        return known[0]
    if name is None:
        raise ConfigError(
            f"there are several representations: {', '.join(known)}",
            fix="name one with the option vectors",
        )
    if name not in known:
        raise ConfigError(
            f"there is no representation {name!r}",
            fix=f"use one of {', '.join(known)}, or add it under embed",
        )
    return name


def check_representations(settings: Settings) -> None:
    """Refuse names of representations that do not exist, wherever the settings have them.

    Raises:
        ConfigError: as `representation`.
    """
    for name, options in settings.score.named.items():
        if name in READS_VECTORS and (options or {}).get("vectors") is not None:
            representation(settings, str(options["vectors"]))
    if settings.domains is not None:
        representation(settings, settings.domains.vectors)
    if settings.plan.is_diverse:
        representation(settings, settings.plan.vectors)


def names_wanted(settings: Settings) -> list[str]:
    """Representations that are made: all, but none where only the target's texts are read."""
    if not settings.embed and not reads_vectors(settings) and reads_target(settings):
        return []
    return list(representations(settings))


def reads_vectors(settings: Settings) -> bool:
    """Whether anything in the settings reads vectors."""
    if settings.domains is not None or settings.plan.is_diverse:
        return True
    for name, options in settings.score.named.items():
        option, values = _WITHOUT_VECTORS.get(name, ("", ()))
        if name in READS_VECTORS and (options or {}).get(option, None) not in values:
            return True
    return False


def reads_target(settings: Settings) -> bool:
    """Whether a scorer, or a mixer that starts from it, reads the indexed target."""
    scored = any(name in READS_TARGET for name in settings.score.named)
    return scored or settings.mix.get("start") == "target"


def wants_target(settings: Settings) -> bool:
    """Whether `curate embed` looks at the target: for a scorer that reads it, or, where nothing
    reads vectors either and the stage was asked for by itself, for the user."""
    return settings.target is not None and (reads_target(settings) or not reads_vectors(settings))


def is_read(settings: Settings) -> bool:
    """Whether a stage reads what `curate embed` makes: vectors, or the index of the target."""
    return reads_vectors(settings) or reads_target(settings)


def open_vectors(run: RunFolder, name: str) -> Vectors:
    """The vectors of all examples of a run, or of the target's folder, in canonical order.

    Raises:
        InputError: they are missing or damaged.
    """
    parts = run.partitions()
    missing = [part for part in parts if run.vectors(part, name).mark() is None]
    if missing or not parts:
        raise missing_vectors(run, name)
    return Vectors.open([run.vectors(part, name).path for part in parts])


def missing_vectors(run: RunFolder, name: str) -> InputError:
    """The error of vectors that have not been made."""
    where = run.root / "vectors" / name
    return InputError(
        f"{where}: vectors are missing", fix="run `curate embed` on the settings first"
    )
