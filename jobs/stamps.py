"""Has a stage that needs torch anything to do? Answered without loading torch.

What train and score depend on is only known in full to models and tokenizers, which take seconds
to load. So once such a stage has ended well, a stamp of everything that could change its answer is
kept: the settings, what was indexed, the files that the settings name, and the code itself. While
the stamp holds and all outputs are whole, a later stage need not ask. A stamp may change for no
good reason, as when a file is touched; then the stage itself is asked, as without a stamp.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from curate.config import plain
from curate.data.file_names import is_glob
from curate.data.files import fingerprint, read_document, write_json
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, software
from curate.data.partitions import Output
from curate.data.sources import InputFile, find_files
from curate.data.storage import local_stamp
from curate.errors import InputError
from jobs.settings import Settings

STAMPED = ("train", "embed", "score")

_FILE = ".stamps.json"
_PACKAGES = ("curate", "jobs", "scorers", "mixers")
_OTHERS = ("run", "mix", "shards", "compare", "attribution", "cluster", "index")
"""Settings that neither stage reads; of the index, what it made is looked at instead."""


def done_before(settings: Settings, stage: str) -> dict[str, Any] | None:
    """The summary of a stage that has nothing to do, for certain; else None."""
    run = RunFolder(Path(settings.run))
    kept = _kept(run).get(stage)
    if not isinstance(kept, dict) or not isinstance(kept.get("summary"), dict):
        return None
    if kept.get("stamp") != _stamp(settings, run, stage) or not _is_whole(run, stage):
        return None
    return {**kept["summary"], "done": 0}


def keep_stamp(settings: Settings, stage: str, summary: Mapping[str, Any]) -> None:
    """Note that a stage has ended well."""
    run = RunFolder(Path(settings.run))
    stamp = _stamp(settings, run, stage)
    kept = {name: entry for name, entry in _kept(run).items() if name != stage}
    if stamp is not None:
        kept[stage] = {"stamp": stamp, "summary": dict(summary)}
    if kept != _kept(run):
        write_json(run.root / _FILE, kept)


def tokenizer_stamp(place: str) -> str | None:
    """Of the files in a tokenizer's folder; None where `place` is a name on the hub."""
    found = file_stamps(Path(place))
    versions = {name: software().get(name) for name in ("transformers", "tokenizers")}
    return None if found is None else fingerprint(files=found, software=versions)


def known_tokenizer(run: RunFolder, stamp: str) -> str | None:
    """The digest of a tokenizer that this run has loaded before."""
    known = _kept(run).get("tokenizers")
    digest = known.get(stamp) if isinstance(known, dict) else None
    return digest if isinstance(digest, str) else None


def keep_tokenizer(run: RunFolder, stamp: str, digest: str) -> None:
    """Note a tokenizer's digest."""
    if known_tokenizer(run, stamp) != digest:
        write_json(run.root / _FILE, {**_kept(run), "tokenizers": {stamp: digest}})


def file_stamps(place: Path) -> list[list[str]] | None:
    """Name, size and time of a file, or of every file of a folder; None where there is nothing."""
    if place.is_file():
        return [["", local_stamp(place)]]
    if not place.is_dir():
        return None
    return [
        [(Path(folder) / name).relative_to(place).as_posix(), local_stamp(Path(folder) / name)]
        for folder, _, names in sorted(os.walk(place, followlinks=True))
        for name in sorted(names)
    ]


def _kept(run: RunFolder) -> dict[str, Any]:
    try:
        return read_document(run.root / _FILE) or {}
    except InputError:
        return {}


def _stamp(settings: Settings, run: RunFolder, stage: str) -> str | None:
    """Of all that the stage's answer depends on; None where that cannot be told."""
    values = {key: value for key, value in plain(settings).items() if key not in _OTHERS}
    values["plan"] = {"tokenizer": settings.plan.tokenizer}
    values["threads"] = settings.cluster.threads
    model = settings.model
    named = (model.name, model.tokenizer, settings.plan.tokenizer, *settings.checkpoints.paths)
    named += tuple(embed.model for embed in settings.embed.values() if embed.revision is None)
    names = [name for name in named if isinstance(name, str) and not Path(name).exists()]
    if names and (model.revision is None or names != [model.name]):
        return None  # a name on the hub that may stand for something else tomorrow
    data = ("sources", "target", "evaluation")
    texts = list(_texts({k: v for k, v in values.items() if k not in data}))
    if any("://" in text or is_glob(text) for text in texts):
        return None  # tables from outside
    if any(":" in name for name in settings.score.named) or ":" in str(settings.task.get("kind")):
        return None  # code of the user's own
    stages = load_manifest(run)["stages"]
    return fingerprint(
        stage=stage,
        settings=values,
        files={text: file_stamps(Path(text)) for text in texts if Path(text).is_absolute()},
        target=[[file.file, file.stamp] for file in _target_files(settings)],
        evaluation=[
            [name, file.file, file.stamp]
            for name, source in settings.evaluation.items()
            for file in find_files(name, source)
        ],
        made={name: stages.get(name, {}).get("files") for name in ("index", "tokenizer", stage)},
        before={
            name: stages.get(name, {}).get("files") for name in STAMPED[: STAMPED.index(stage)]
        },
        software=software(),
        code=_code(),
    )


def _target_files(settings: Settings) -> list[InputFile]:
    return find_files("target", settings.target) if settings.target is not None else []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _texts(entry)


def _code() -> list[list[str]]:
    """Stamps of the modules of curate: whoever changes a method wants it run."""
    root = Path(__file__).parents[1]
    return [
        [path.relative_to(root).as_posix(), local_stamp(path)]
        for package in _PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    ]


def _is_whole(run: RunFolder, stage: str) -> bool:
    """Whether every output of the stage is still there as the manifest knows it."""
    files: dict[str, Any] = load_manifest(run)["stages"].get(stage, {}).get("files", {})
    outputs = [(Output(run.root / file), mark) for file, mark in files.items()]
    return bool(outputs) and all(
        output.mark() == mark and output.is_done(mark["fingerprint"]) for output, mark in outputs
    )
