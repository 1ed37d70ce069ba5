"""The settings of a run, put together from those of their owners."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from curate.config import STRICT, parse, resolve
from curate.data.example import Index, Source
from curate.data.shard_settings import Shards
from curate.errors import ConfigError
from curate.models.settings import TASKS, Checkpoints, Model, Score
from curate.plan.settings import Plan
from curate.vectors.domains import Domains
from curate.vectors.settings import Embed
from jobs.attribution_settings import Attribution
from jobs.cluster_settings import Cluster, without_foreign_defaults
from jobs.compare_settings import Compare


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a run needs; `config.yaml` of the run folder, with every default written out."""

    __pydantic_config__: ClassVar = STRICT

    run: str
    """The run folder, or the address of a run in a store: `s3://bucket/run`."""
    seed: int = 0
    """Seed of every random draw of the run."""
    sources: dict[str, Source]
    """Name -> input data set."""
    target: Source | None = None
    """What the user cares about; for the methods that need a target."""
    evaluation: dict[str, Source] = field(default_factory=dict[str, Source])
    """Name -> data that the model will be judged on, which must not stand in what is kept; for the
    scorer `leakage`."""
    task: dict[str, Any] = field(default_factory=dict[str, Any])
    """`kind` (see `curate methods`) and its options."""
    model: Model = field(default_factory=Model)
    """The model that measures."""
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    """Its checkpoints."""
    index: Index = field(default_factory=Index)
    """Partitions, split, quarantine."""
    embed: dict[str, Embed] = field(default_factory=dict[str, Embed])
    """Name -> representation; see `curate embed`. By default one, made of what there is."""
    domains: Domains | None = None
    """Cuts the pool into domains by clustering, in place of those of the index."""
    score: Score = field(default_factory=Score)
    """What is measured."""
    mix: dict[str, Any] = field(default_factory=dict[str, Any])
    """`mixer` (see `curate methods`) and its options; without it the mixture is as it falls."""
    plan: Plan = field(default_factory=Plan)
    """What stays."""
    shards: Shards = field(default_factory=Shards)
    """How it is written."""
    compare: Compare = field(default_factory=Compare)
    """How it is put to the test."""
    attribution: Attribution = field(default_factory=Attribution)
    """How attributions are put to the test."""
    cluster: Cluster = field(default_factory=Cluster)
    """Where it runs."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources is empty", fix="name at least one data set")
        for name in self.sources:
            if not name or "/" in name or name.startswith(".") or len(name.encode()) > 200:
                raise ConfigError(
                    f"sources: {name!r} is no good name",
                    fix="use letters, digits, _, and no more than 200 of them",
                )
        for where, names in {"embed": self.embed, "evaluation": self.evaluation}.items():
            for name in names:
                if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
                    raise ConfigError(
                        f"{where}: {name!r} is no good name", fix="use letters, digits and _"
                    )


def parse_settings(
    values: Mapping[str, Any], *, origins: Mapping[str, str] | None = None
) -> Settings:
    """Check a whole configuration, the options of task and mixer included.

    Those of the scorers are checked by `jobs.chosen.chosen_scorers`: they load torch, which
    index, plan and write do without.

    Args:
        values: what the files and options gave.
        origins: dotted key -> where it was set, for the messages.

    Raises:
        ConfigError: names the key and, where it is unknown, the nearest known one.
    """
    settings = parse(Settings, _inherited(values), origins=origins)
    if settings.task:
        task_settings(settings, origins=origins)
    if settings.mix:
        mixer_settings(settings, origins=origins)
    return settings


def _inherited(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, `attribution.train` filled up from `checkpoints.train`."""
    filled = dict(values)
    if "cluster" in filled:
        filled["cluster"] = without_foreign_defaults(filled["cluster"])
    own, shared = filled.get("attribution"), filled.get("checkpoints")
    if isinstance(own, dict) and isinstance(shared, dict):
        train, common = own.get("train"), shared.get("train")
        if isinstance(train, dict) and isinstance(common, dict):
            filled["attribution"] = {**own, "train": {**common, **train}}
    return filled


def task_settings(settings: Settings, *, origins: Mapping[str, str] | None = None) -> Any:
    """The settings class of the chosen task, filled in."""
    if "kind" not in settings.task:
        raise ConfigError("task.kind is missing", fix=f"set it to one of {', '.join(TASKS)}")
    kind = resolve(TASKS, str(settings.task["kind"]), what="task")
    return parse(kind, settings.task, where="task", origins=origins)


def mixer_settings(settings: Settings, *, origins: Mapping[str, str] | None = None) -> Any:
    """The chosen mixer, which is its own settings, filled in."""
    from mixers.catalog import MIXERS

    options = dict(settings.mix)
    name = options.pop("mixer", None)
    if not isinstance(name, str):
        raise ConfigError("mix.mixer is missing", fix=f"set it to one of {', '.join(MIXERS)}")
    kind = resolve(MIXERS, name, what="mixer")
    return parse(kind, options, where="mix", origins=origins)
