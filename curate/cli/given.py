"""From what the command line was given to settings: files, run folders, or bare data."""

import os
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from curate.cli.options import Common
from curate.config import Raw, gather, put
from curate.data.file_names import glob_pattern, is_glob, split_glob
from curate.data.mirror import address_in
from curate.errors import ConfigError, CurateError, InputError
from jobs.cluster_settings import ALL_KEYS, keys_of
from jobs.opening import saved_values
from jobs.settings import Settings, parse_settings
from jobs.store import at_hand, here, is_run_at

_COLUMNS = ("text", "label", "domain")
_TARGET_FIELDS = ("text", "prompt", "response", "messages", "chosen", "rejected", "features",
                  "image", "shape", "label", "classes")  # fmt: skip


def read_settings(command: str, common: Common) -> tuple[Settings, Raw]:
    """The checked settings, and where each value came from.

    Raises:
        InputError: there is nothing at the given path.
        ConfigError: a setting or an option is wrong.
    """
    given = _folder_of(command, common.config)
    paths = list(common.files or [])
    guesses: dict[str, Any] = {}
    home: Path | None = None
    if given.is_dir() and saved_values(given) is not None:
        home = given.absolute()
        paths.insert(0, given / "config.yaml")
    elif given.suffix in (".yaml", ".yml"):
        paths.insert(0, given)
    elif command == "score":
        from jobs.starter import guess_settings

        guesses = guess_settings(common.config, common.more)
    elif not given.exists():
        raise InputError(
            f"there is no settings file and no run folder {common.config}", fix="check the path"
        )
    else:
        raise ConfigError(
            f"{common.config} is neither settings (.yaml) nor a run folder",
            fix=f"write settings for it with `curate init {common.config}`",
        )
    raw = gather(
        paths,
        environment=os.environ,
        overrides=common.overrides or (),
        guesses=deepcopy(guesses),  # settings are merged into them
    )
    if home is not None:  # the folder may have moved since its settings were written
        put(raw, "run", str(home), str(home))
    for key, value in _options(common, raw).items():
        put(raw, key, value, "option")
    _drop_of_former_kind(raw)
    _drop_foreign_classes(raw, guesses)
    settings = here(parse_settings(raw.values, origins=raw.origins))
    _look_beside(settings, [path for path in paths if home is None])
    return settings, raw


def _drop_foreign_classes(raw: Raw, guesses: Mapping[str, Any]) -> None:
    """Guessed classes are those of the guessed label, and of no other that is set."""
    for name, guess in _at(guesses, "sources").items():
        source, key = _at(_at(raw.values, "sources"), name), f"sources.{name}.classes"
        if source.get("label") != guess.get("label") and raw.origins.get(key) == "guess":
            del source["classes"], raw.origins[key]


def _look_beside(settings: Settings, paths: Sequence[Path]) -> None:
    """Say where data lie that are missing, if that is beside the settings.

    Raises:
        InputError: they lie there, and the command runs in another folder.
    """
    places = {f"sources.{name}": source for name, source in settings.sources.items()}
    places |= {} if settings.target is None else {"target": settings.target}
    folders = [path.expanduser().absolute().parent for path in paths]
    for where, source in places.items():
        for path in [source.path] if isinstance(source.path, str) else source.path:
            if "://" in path or Path(path).expanduser().is_absolute() or _is_at(path):
                continue
            beside = next((folder for folder in folders if _is_at(str(folder / path))), None)
            if beside is not None:
                raise InputError(
                    f"{where}.path {path}: there is no {Path(path).absolute()}, but beside the"
                    f" settings there is {beside / path}",
                    fix="relative paths begin at the folder in which the command runs: run it in"
                    f" {beside}, or write the whole path",
                )


def _is_at(path: str) -> bool:
    """Whether there is a file, a folder, or what a glob stands for."""
    if not is_glob(path) or Path(path).exists():
        return Path(path).expanduser().exists()
    prefix, pattern = split_glob(path)
    root, takes = Path(prefix).expanduser(), glob_pattern(pattern)
    for folder, folders, names in os.walk(root):
        place = Path(folder).relative_to(root)
        if any(takes.fullmatch((place / name).as_posix()) for name in names):
            return True
        if "**" not in pattern and len(place.parts) == pattern.count("/"):
            folders.clear()  # no file further down can match
    return False


def _folder_of(command: str, given: str) -> Path:
    """The path that was given, or the working copy of the run at an address."""
    path = Path(given).expanduser()
    if address_in(given) is None or path.suffix in (".yaml", ".yml"):
        return path
    if command == "score" and not is_run_at(given):  # data
        return path
    return at_hand(given, data=False)


def _options(common: Common, raw: Raw) -> dict[str, Any]:
    """Dotted key -> value, for each flag that was given."""
    values = raw.values
    found: dict[str, Any] = {}
    if common.out is not None:
        found["run"] = address_in(common.out) or str(common.out)
    if common.workers is not None:
        kind = _at(values, "cluster").get("kind")
        kept = kind if kind in ("cuda", "slurm") else "local"
        found |= {"cluster.kind": kept, "cluster.workers": common.workers}
    if common.device is not None:
        found["model.device"] = common.device
    more = common.more
    if "scorer" in more:
        found |= _scorers(more["scorer"], raw)
    if "model" in more:
        found |= {"model.name": more["model"], "model.revision": None, "model.config": None}
    if "mixer" in more and _at(values, "mix").get("mixer") != more["mixer"]:
        found |= _section(raw, "mix", {"mixer": more["mixer"]})
    if "task" in more and _at(values, "task").get("kind") != more["task"]:
        found |= _section(raw, "task", {"kind": more["task"]})
    if "embed" in more:
        is_kind = more["embed"] in ("ngrams", "values")
        name, key = (more["embed"], "kind") if is_kind else ("model", "model")
        given = {name: {key: more["embed"]}}
        found |= _section(raw, "embed", given, flags=(f"{name}.{key}",))
    for key in ("metric", "better", "redrawn"):  # of compare
        if key in more:
            found[f"compare.{key}"] = more[key]
    if "weights" in more:
        found["shards.weights"] = more["weights"]
    sources = _at(values, "sources")
    for name in sources:
        found |= {f"sources.{name}.{key}": more[key] for key in _COLUMNS if key in more}
    if "target" in more:
        first = next(iter(sources.values()), {})
        same = {key: first[key] for key in _TARGET_FIELDS if key in first}
        name = next(iter(sources), "")
        if raw.origins.get(f"sources.{name}.label") == "guess" and _lacks(more["target"], same):
            same = {key: value for key, value in same.items() if key not in ("label", "classes")}
        found |= _section(raw, "target", {**same, "path": more["target"]}, flags=("path",))
    return found


def _section(
    raw: Raw, where: str, values: Mapping[str, Any], *, flags: Collection[str] = ()
) -> dict[str, Any]:
    """Dotted key -> value of a section that a flag replaces.

    What it had for something else would not fit; what `--set` says is meant for this one.

    Args:
        raw: the settings as they are.
        where: dotted key of the section.
        values: its new ones.
        flags: keys below the section that the flag itself says, beside which `--set` counts for
            nothing; by default those of `values`.
    """
    own = {f"{where}.{key}" for key in flags or values}
    more = {key: value for key, value in _set(raw, f"{where}.").items() if key not in own}
    return {where: dict(values), **more}


def _lacks(target: str, same: Mapping[str, Any]) -> bool:
    """Whether the target examples have no label column of the same name."""
    from jobs.starter_look import look_at

    try:
        return same["label"] not in look_at(target, "target").rows.column_names
    except CurateError:  # it will be told by who reads them
        return False


def _set(raw: Raw, prefix: str) -> dict[str, Any]:
    """Dotted key -> value of what `--set` gives below a prefix."""
    found: dict[str, Any] = {}
    for key in (key for key, by in raw.origins.items() if by == "--set" and key.startswith(prefix)):
        value: Any = raw.values
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


def _drop_of_former_kind(raw: Raw) -> None:
    """Where a later place has set another `cluster.kind`, take out what belonged to the former."""
    cluster = _at(raw.values, "cluster")
    places = list(raw.origins)  # in the order in which they were set
    if "cluster.kind" not in places:
        return
    own = keys_of(str(cluster.get("kind")))
    chosen, origin = places.index("cluster.kind"), raw.origins["cluster.kind"]
    for key in [key for key in cluster if key not in own and key in ALL_KEYS]:
        below = [name for name in places if f"{name}.".startswith(f"cluster.{key}.")]
        earlier = [name for name in below if places.index(name) < chosen]
        if below == earlier and all(raw.origins[name] != origin for name in below):
            del cluster[key]
            for name in below:
                del raw.origins[name]


def _scorers(names: Sequence[str], raw: Raw) -> dict[str, Any]:
    """What `--scorer` sets: each name with the options that it has already.

    Raises:
        ConfigError: `--set score.scorers` has other scorers.
    """
    given = _at(raw.values, "score").get("scorers")
    known: dict[str, Any] = {}
    for entry in cast(list[Any], given) if isinstance(given, list) else []:
        known |= cast(dict[str, Any], entry) if isinstance(entry, dict) else {str(entry): None}
    if raw.origins.get("score.scorers") == "--set":
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"--scorer {name} is none of those that --set score.scorers names",
                    fix=f"leave one of the two out, or write {name} into --set score.scorers",
                )
        return {}
    return {"score.scorers": [{name: known[name]} if known.get(name) else name for name in names]}


def _at(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}
