"""Settings made exact: absolute local paths and the commits that hub names stood for."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from curate.data.example import Source
from curate.vectors.settings import Embed
from jobs.settings import Settings

log = logging.getLogger(__name__)


def resolved(settings: Settings, *, old: Mapping[str, Any] | None = None) -> Settings:
    """The same settings, such that they mean the same from any folder and on any day.

    Args:
        settings: as the user gave them.
        old: values of the run's last `config.yaml`; a revision pinned there stays.
    """
    old = old or {}
    before = old.get("sources") or {}
    sources = {name: _source(source, before.get(name)) for name, source in settings.sources.items()}
    target = settings.target and _source(settings.target, old.get("target"))
    known_sets = old.get("evaluation") or {}
    evaluation = {
        name: _source(source, known_sets.get(name)) for name, source in settings.evaluation.items()
    }
    model = settings.model
    if model.name is not None:
        name, revision = _model(model.name, model.revision, old.get("model"), "name")
        model = replace(model, name=name, revision=revision)
    known = old.get("embed") or {}
    embed = {name: _embed(entry, known.get(name)) for name, entry in settings.embed.items()}
    if isinstance(model.tokenizer, str):
        model = replace(model, tokenizer=_local(model.tokenizer))
    if model.adapter is not None:
        model = replace(model, adapter=_local(model.adapter))
    reference = settings.task.get("reference")
    task = dict(settings.task)
    if isinstance(reference, str):
        task["reference"] = _local(reference)
    checkpoints = replace(
        settings.checkpoints, paths=tuple(_local(path) for path in settings.checkpoints.paths)
    )
    scorers = tuple(
        entry if isinstance(entry, str) else {k: _options(k, v) for k, v in entry.items()}
        for entry in settings.score.scorers
    )
    plan = settings.plan
    if plan.tokenizer is not None:
        plan = replace(plan, tokenizer=_local(plan.tokenizer))
    compare = settings.compare
    if compare.results is not None:
        compare = replace(compare, results=_local(compare.results))
    arms = tuple(
        arm if isinstance(arm, str) or arm.run is None else replace(arm, run=_local(arm.run))
        for arm in compare.arms
    )
    cluster = settings.cluster
    paths = ("scheduler_file", "tls_ca_file", "tls_cert", "tls_key")
    named = {name: _input(path) for name in paths if (path := getattr(cluster, name)) is not None}
    attribution = settings.attribution
    matrices = {name: _local(path) for name, path in attribution.matrices.items()}
    return replace(
        settings,
        run=str(Path(settings.run).expanduser().absolute()),
        sources=sources,
        target=target,
        evaluation=evaluation,
        task=task,
        model=model,
        checkpoints=checkpoints,
        embed=embed,
        score=replace(settings.score, scorers=scorers),
        plan=plan,
        compare=replace(compare, arms=arms),
        attribution=replace(attribution, matrices=matrices),
        cluster=replace(cluster, **named),
    )


def _source(source: Source, old: Mapping[str, Any] | None) -> Source:
    path = source.path
    on_hub = source.format == "datasets" and isinstance(path, str) and not Path(path).exists()
    if on_hub:
        full: str | tuple[str, ...] = path
    else:
        full = _input(path) if isinstance(path, str) else tuple(_input(entry) for entry in path)
    revision = source.revision
    if isinstance(full, str) and (on_hub or full.startswith("hf://datasets/")) and not revision:
        name = "/".join(full.removeprefix("hf://datasets/").split("/")[:2])
        if "@" not in name:
            revision = _kept(old, "path", full) or _commit(name, kind="dataset")
    return replace(source, path=full, revision=revision)


def _embed(embed: Embed, old: Mapping[str, Any] | None) -> Embed:
    if embed.model is None:
        return embed
    name, revision = _model(embed.model, embed.revision, old, "model")
    return replace(embed, model=name, revision=revision)


def _model(
    given: str, revision: str | None, old: Mapping[str, Any] | None, key: str
) -> tuple[str, str | None]:
    """Folder, or name on the hub and the commit that it stands for."""
    name = _local(given)
    if name == given and not Path(name).is_absolute() and revision is None:
        revision = _kept(old, key, name) or _commit(name, kind="model")
    return name, revision


def _input(address: str) -> str:
    """An absolute local path, or an address with a scheme as it is."""
    return address if "://" in address else str(Path(address).expanduser().absolute())


def _local(name: str) -> str:
    """An absolute path where `name` is a local file or folder; else a hub id, as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _options(scorer: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of a scorer; the tables of `external`, any `path` or `probabilities` are inputs."""
    given = dict(options or {})
    if scorer == "external":
        return {
            name: _input(table) if isinstance(table, str) else _options(name, table)
            for name, table in given.items()
        }
    for name in ("path", "probabilities", "queries"):
        if isinstance(given.get(name), str):
            given[name] = _input(given[name])
    return given


def _kept(old: Mapping[str, Any] | None, key: str, name: str) -> str | None:
    """The revision that an earlier start of the run pinned for the same name."""
    return old.get("revision") if old and old.get(key) == name else None


def _commit(name: str, *, kind: str) -> str | None:
    """The commit that a hub name stands for now: from the hub, else from the local cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    # The bases are the errors of the HTTP library, another one in each version of the hub's client.
    kinds = (OSError, ValueError, *HfHubHTTPError.__bases__)
    expected = cast(tuple[type[Exception], ...], kinds)
    try:
        return HfApi().repo_info(name, repo_type=kind).sha
    except expected as error:
        # No network, or no such name: what loads it will say which.
        folder = f"{kind}s--{name.replace('/', '--')}"
        cached = Path(constants.HF_HUB_CACHE) / folder / "refs" / "main"
        if cached.is_file():
            return cached.read_text(encoding="utf-8").strip()
        log.debug("%s %s: no commit found: %s", kind, name, error)
        return None
