"""What an index holds, and the sides that its gradients are projected on.

run/influence/<checkpoint>/sides.safetensors  principal axes, where they are asked for
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import xxhash

from curate.config import STRICT, parse, plain
from curate.data.example import KEY
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples
from curate.errors import InputError
from curate.models.gradients import Sides
from curate.models.index_rows import Storage
from curate.models.load import LoadedModel, pick_device
from curate.models.principal import Moments, load_sides, save_sides
from curate.models.projection import Projection, choose_parameters, draw_sides
from curate.models.tasks import build_task
from jobs.fields import example_fields, reference_facts
from jobs.lengths import content_of, content_settings
from jobs.measurers import Measurer, measurer_tokenizer
from jobs.measuring import batch_tokens, measurer_of, ready
from jobs.run import Receipt
from jobs.run import Task as Work
from jobs.settings import Settings, parse_settings, task_settings

VERSION = 1
"""Of the index: raised when the same settings and data would give other rows."""

FOLDER = "influence"

_SAMPLED_PARTITIONS = 64

_last: dict[str, dict[str, Sides]] = {}
"""The sides of the last model: drawn once per process, not per partition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """What an index holds."""

    __pydantic_config__: ClassVar = STRICT

    projection: Projection = field(default_factory=Projection)
    dtype: Storage = "float16"
    """Of the rows on disk."""
    reduction: Literal["sum", "mean"] = "mean"
    """What an example's loss is of those of its counted positions."""
    norms: bool = False
    """Exact squared norms of the gradients before they are projected, `grad_sq_norm`, too."""
    adam: Literal["none", "exact", "diagonal", "factored"] = "none"
    """Rows of the updates that Adam would make of the gradients; a target's are of gradients."""


def sides_output(run: RunFolder, slug: str) -> Output:
    """Principal axes of one checkpoint, in the folder of the run for the target too."""
    return Output(run.root / FOLDER / slug / "sides.safetensors")


def sides_tasks(
    settings: Settings, chosen: Sequence[Measurer], options: IndexOptions
) -> list[Work]:
    """What comes before the rows: one task for each checkpoint, none where sides are random.

    Args:
        settings: of the run.
        chosen: checkpoints.
        options: of the index.
    """
    if options.projection.init == "random":
        return []
    run = RunFolder(Path(settings.run))
    stamps = sides_stamps(settings, chosen, options)
    return [
        Work(
            f"{measurer.name}, principal axes",
            {
                "settings": plain(settings),
                "options": plain(options),
                "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
                "fingerprint": stamps[measurer.name],
            },
            sides_output(run, measurer.slug),
            stamps[measurer.name],
        )
        for measurer in chosen
    ]


def sides_work(payload: dict[str, Any]) -> Receipt:
    """Find the principal axes of one checkpoint."""
    settings = parse_settings(payload["settings"])
    options = parse(IndexOptions, payload["options"])
    run = RunFolder(Path(settings.run))
    measurer = measurer_of(payload["measurer"])
    task, loaded = ready(settings, measurer)
    moments = Moments(loaded.model, task, drawn_sides(loaded, options), reduction=options.reduction)
    budget = batch_tokens(settings.score, loaded.device.type)
    total = 0
    for part, rows in sample_rows(run, options.projection):
        encoded = task.encode(example_fields(settings, run, part)[rows])
        moments.add(encoded, batch_tokens=budget, device=loaded.device)
        total += len(rows)
    output = sides_output(run, measurer.slug)
    facts = {"rows": total}
    output.write(lambda path: save_sides(moments.sides(), path), payload["fingerprint"], **facts)
    return facts


def sample_rows(run: RunFolder, projection: Projection) -> list[tuple[Partition, list[int]]]:
    """Examples of partitions all over the run, by a draw of their keys."""
    parts = [part for part in run.partitions() if part.num_rows]
    if len(parts) > _SAMPLED_PARTITIONS:
        places = np.linspace(0, len(parts) - 1, _SAMPLED_PARTITIONS).round().astype(int)
        parts = [parts[place] for place in places.tolist()]
    share = min(1.0, projection.sample / max(1, sum(part.num_rows for part in parts)))
    found: list[tuple[Partition, list[int]]] = []
    for part in parts:
        keys = read_examples(run, part, KEY).rows()
        draws = [
            xxhash.xxh3_64_intdigest(f"{projection.seed}/{source}/{file}/{row}".encode())
            for source, file, row in keys
        ]
        size = math.ceil(share * len(keys))
        found.append((part, sorted(np.argsort(draws, kind="stable")[:size].tolist())))
    return found


def sides_of(
    loaded: LoadedModel,
    options: IndexOptions,
    *,
    place: Output | None = None,
    stamp: str | None = None,
) -> dict[str, Sides]:
    """The sides of an index, on the model's device; other gradients must be projected on the same.

    Args:
        loaded: the model.
        options: of the index.
        place: of its principal axes, where it has such.
        stamp: their fingerprint, to read them again when they have changed.

    Raises:
        InputError: the axes are missing.
    """
    projection = options.projection
    key = fingerprint(
        model=loaded.digest, device=str(loaded.device), options=plain(projection), axes=stamp
    )
    if key not in _last:
        drawn = drawn_sides(loaded, options)
        if projection.init == "pca":
            assert place is not None
            drawn = load_sides(place.path, list(drawn), drawn)
        _last.clear()
        _last[key] = drawn
    return _last[key]


def drawn_sides(loaded: LoadedModel, options: IndexOptions) -> dict[str, Sides]:
    """Random sides."""
    projection = options.projection
    return draw_sides(
        loaded.model,
        dim=projection.dim,
        seed=projection.seed,
        layers=choose_parameters(loaded.model, projection),
        entries=projection.entries,
    )


def common_facts(
    settings: Settings, chosen: Sequence[Measurer], options: IndexOptions
) -> dict[str, Any]:
    """Parts of the fingerprint that are the same for every partition."""
    if not chosen:
        raise InputError("there is no checkpoint to index with", fix="set score.checkpoints")
    kind = task_settings(settings)
    device = pick_device(settings.model.device).type
    tokenizer = measurer_tokenizer(settings, chosen[0].folder)
    # What makes a loss: gradients of another task cannot be compared.
    task = fingerprint(
        task=plain(kind), facts=build_task(kind, tokenizer).facts(), **reference_facts(settings)
    )
    return {
        "stage": "gradient index",
        "version": VERSION,
        "options": plain(options),
        "task_digest": task,
        "batch_tokens": batch_tokens(settings.score, device),
        "threads": settings.cluster.threads,
        "dtype": settings.model.dtype,
        "device": device,
    }


def sides_stamps(
    settings: Settings, chosen: Sequence[Measurer], options: IndexOptions
) -> dict[str, str]:
    """Checkpoint -> fingerprint of its principal axes, where the sides are such."""
    if options.projection.init == "random":
        return {}
    run = RunFolder(Path(settings.run))
    common = common_facts(settings, chosen, options)
    # Type and norms of the rows do not matter to them.
    common |= {
        "stage": "principal axes",
        "options": [plain(options.projection), options.reduction],
        "examples": [content_of(run, part) for part in run.partitions()],
        "sources": {name: content_settings(each) for name, each in settings.sources.items()},
    }
    return {each.name: fingerprint(**common, model=each.digest) for each in chosen}
