"""What a worker does for `vog`: raw scores of a partition, statistics of the pool, the table."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from curate.config import plain
from curate.data.example import KEY, TRAIN
from curate.data.files import fingerprint, read_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition, remove_strays
from curate.data.reading import read_fields
from curate.data.tables import meet, read_examples, read_table, write_table
from curate.models.input_gradients import How
from curate.models.input_spread import Spread, gradient_spread
from curate.models.load import load_cached
from curate.models.resident import Resident
from curate.models.tasks import Encoded, build_task
from curate.models.tasks import Task as Kind
from jobs.measurers import Measurer
from jobs.measuring import as_columns, batch_tokens, measurer_of, tokens_of
from jobs.settings import Settings, parse_settings, task_settings
from scorers.vog import Statistics, VoG, combined, statistics

log = logging.getLogger(__name__)

_GROUP = ("domain", "group")

_open: dict[str, tuple[Resident, Kind, torch.device]] = {}
"""The checkpoints that this process has at hand: those of the last task."""


def groups_output(run: RunFolder, raw: str) -> Output:
    """Mean and deviation of each class; `raw` is the folder of the raw scores."""
    return Output(run.root / "quantities" / raw / "groups.json")


def gradients_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Raw scores of one partition with all checkpoints of one seed."""
    settings = parse_settings(payload["settings"])
    run, part = RunFolder(Path(settings.run)), Partition(**payload["partition"])
    options = VoG(**payload["options"])
    models, task, device = _opened(settings, [measurer_of(one) for one in payload["measurers"]])
    keys = read_examples(run, part, KEY)
    fields = read_fields(run, part, settings.sources[part.source])
    encoded = task.encode(keys.hstack(fields))
    found = gradient_spread(
        models,
        task,
        encoded,
        how=How(**{key: getattr(options, key) for key in How.__dataclass_fields__}),
        batch_tokens=batch_tokens(settings.score, device.type),
        device=device,
    )
    has_classes = hasattr(task_settings(settings), "num_classes")
    table = keys.hstack(_raw_columns(encoded, found, has_classes=has_classes))
    facts = _facts(encoded, found, table)
    run.quantities(part, payload["raw"]).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height, **facts
    )
    return {"rows": table.height, **tokens_of(encoded), **facts}


def groups_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Mean and deviation of each group over the training rows of the whole pool."""
    _open.clear()  # the models have done their part
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    trained: dict[tuple[str, int], Statistics] = {}
    scored: dict[tuple[str, int], int] = {}
    for part in run.partitions():
        table = _grouped(settings, run, part, payload["raw"]).drop_nulls("vog_raw")
        for (domain, group), mine in table.group_by(_GROUP, maintain_order=True):
            key = str(domain), int(str(group))
            scored[key] = scored.get(key, 0) + mine.height
            raw = mine.filter(split=TRAIN)["vog_raw"].cast(pl.Float64).to_numpy()
            if len(raw):
                own = statistics(raw)
                trained[key] = combined(trained[key], own) if key in trained else own
    groups = [
        {"domain": domain, "group": group, "count": own.num, "mean": own.mean, "std": own.std}
        for (domain, group), own in sorted(trained.items())
    ]
    flat = [key for key in sorted(scored) if key not in trained or trained[key].std == 0]
    facts = {"flat_groups": len(flat), "flat_examples": sum(scored[key] for key in flat)}
    if flat:
        log.warning("vog: %d of %d groups have one training example, none, or no spread; their %d"
                    " examples get 0", len(flat), len(scored), facts["flat_examples"])  # fmt: skip
    text = json.dumps({"schema_version": 1, "groups": groups, **facts}, indent=1) + "\n"
    groups_output(run, payload["raw"]).write(
        lambda path: path.write_text(text, encoding="utf-8"), payload["fingerprint"], **facts
    )
    remove_strays(run.root / "quantities" / payload["raw"], {p.name for p in run.partitions()})
    return facts


def tables_work(payload: dict[str, Any]) -> dict[str, Any]:
    """The table of one partition that the columns are made of."""
    settings = parse_settings(payload["settings"])
    run, part = RunFolder(Path(settings.run)), Partition(**payload["partition"])
    saved = read_json(groups_output(run, payload["raw"]).path)
    rows = [
        (one["domain"], one["group"], one["mean"], one["std"])
        for one in (saved or {}).get("groups", [])
    ]
    known = pl.DataFrame(
        rows,
        schema={
            "domain": pl.String,
            "group": pl.Int64,
            "group_mean": pl.Float64,
            "group_std": pl.Float64,
        },
        orient="row",
    )
    table = (
        _grouped(settings, run, part, payload["raw"])
        .join(known, on=_GROUP, how="left", maintain_order="left")
        # A group without a training row has no spread.
        .with_columns(pl.col("group_mean", "group_std").fill_null(0.0))
        .select(*KEY, "vog_raw", "group_mean", "group_std", "num_scored")
    )
    run.quantities(part, payload["table"]).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


def _opened(settings: Settings, measurers: list[Measurer]) -> tuple[Resident, Kind, torch.device]:
    """Checkpoints and task in this process, which keeps them for the next call."""
    torch.set_num_threads(settings.cluster.threads)
    kind = task_settings(settings)
    key = fingerprint(
        model=plain(settings.model),
        task=plain(kind),
        digests=[measurer.digest for measurer in measurers],
    )
    if key not in _open:
        _open.clear()

        def load(index: int) -> Any:
            one = measurers[index]
            return load_cached(settings.model, kind, checkpoint=one.folder, digest=one.digest)

        # No variable holds a model beyond this line: two may not fit.
        facts = load(0)
        task = build_task(kind, facts.tokenizer, max_positions=facts.max_positions)
        device = facts.device
        del facts
        names = [measurer.name for measurer in measurers]
        _open[key] = Resident(names, lambda index: load(index).model), task, device
    return _open[key]


def _raw_columns(encoded: Encoded, found: Spread, *, has_classes: bool) -> pl.DataFrame:
    """`vog_raw`, the group to compare with (class, or length as a power of two), `num_scored`."""
    columns = as_columns({"vog_raw": found.mean_deviation.float()})
    counts = pl.Series("num_scored", encoded.num_scored, pl.Float32)
    length = np.floor(np.log2(encoded.lengths)).astype(np.int64)
    group = found.chosen.numpy() if has_classes else length
    return columns.with_columns(
        pl.Series("group", group, pl.Int64),
        pl.when(counts > 0).then(counts).alias("num_scored"),
    )


def _facts(encoded: Encoded, found: Spread, table: pl.DataFrame) -> dict[str, Any]:
    """What a reader of the scores should know, for the mark."""
    unscored = int((encoded.num_scored == 0).sum())
    broken = table["vog_raw"].null_count() - unscored
    if encoded.problems:
        first = min(encoded.problems)
        log.warning("%d examples are not scored; the first, %s: %s", len(encoded.problems),
                    table.select(KEY).row(first), encoded.problems[first])  # fmt: skip
    if broken:
        log.warning("%d examples have an input gradient that is not finite; they are not scored",
                    broken)  # fmt: skip
    facts: dict[str, Any] = {
        "unscored": unscored + broken,
        "truncated": int(encoded.truncated.sum()),
        "not_finite": broken,
    }
    if found.moved is not None:
        facts["embeddings_moved"] = found.moved
    if found.passed.halved:
        facts |= {"halved": found.passed.halved, "batch_tokens": found.passed.batch_tokens}
    return facts


def _grouped(settings: Settings, run: RunFolder, part: Partition, raw: str) -> pl.DataFrame:
    """Raw scores with split and group: the class, or domain by length where there is none."""
    output = run.quantities(part, raw)
    table = read_table(output.path)
    examples = read_examples(run, part, [*KEY, "split", "domain"])
    meet(examples, table)
    has_classes = hasattr(task_settings(settings), "num_classes")
    domain = pl.lit("") if has_classes else examples["domain"].fill_null("")
    return table.with_columns(examples["split"], domain.alias("domain"))
