"""`scores/`: quantities become columns, one light task for each scorer and partition."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curate.config import plain
from curate.data.example import KEY
from curate.data.files import digest_file, fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_examples, write_table
from curate.errors import ConfigError
from curate.models.quantities import MEASURED, QUANTITIES, TABLE
from curate.models.settings import TabularClassification
from jobs.lengths import CHARACTERS, content_of
from jobs.measurers import Measurer
from jobs.run import Task as Work
from jobs.settings import Settings, parse_settings, task_settings
from scorers.apply import columns_of, plain_columns
from scorers.catalog import EXTERNAL, SCORERS, build_scorer
from scorers.external import External, tables
from scorers.protocol import Scorer
from scorers.random import uniform

VERSION = 1
"""Of what is computed: raised when the same quantities would give other columns."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One scorer of a run, and the folder of its table."""

    name: str
    """As in the settings; of an external table, its name there."""
    options: dict[str, Any]
    scorer: Scorer | None
    """None for an external table."""
    table: External | None = None

    @property
    def folder(self) -> str:
        """Under `scores/`: the name, of a user's own class the class' name."""
        return self.name.rpartition(":")[2]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.scorer is None else self.scorer.needs

    @property
    def needs_model(self) -> bool:
        return not self.needs.isdisjoint(MEASURED)


def chosen_scorers(named: Mapping[str, Mapping[str, Any]]) -> list[Chosen]:
    """The scorers of `score.named`, in its order, their options checked.

    Raises:
        ConfigError: there is none, a name or an option is unknown, a scorer needs a quantity that
            does not exist, or two would write to the same folder.
    """
    found: list[Chosen] = []
    for name, options in named.items():
        if name == EXTERNAL:
            found += [
                Chosen(table, dict(options), None, entry)
                for table, entry in tables(dict(options)).items()
            ]
            continue
        scorer = build_scorer(name, options)
        for need in sorted(scorer.needs):
            if need not in QUANTITIES:
                raise ConfigError(
                    f"scorer {name} needs {need}, which nothing measures",
                    fix=f"use quantities among {', '.join(QUANTITIES)}",
                )
        found.append(Chosen(name, dict(options), scorer))
    folders = [entry.folder for entry in found]
    for entry in found:
        if folders.count(entry.folder) > 1 or (entry.table and entry.name in SCORERS):
            raise ConfigError(
                f"two scores would be called {entry.folder}",
                fix="give the external table another name",
            )
    if not found:
        raise ConfigError("score.scorers is empty", fix="name one, such as el2n")
    return found


def needed(chosen: Sequence[Chosen]) -> frozenset[str]:
    """Quantities that a model's pass must measure for these scorers."""
    return frozenset(name for entry in chosen for name in entry.needs if name in MEASURED)


def column_tasks(
    settings: Settings,
    chosen: Sequence[Chosen],
    measurers: Sequence[Measurer],
    *,
    lengths: str,
) -> list[Work]:
    """Tasks of all scorers for the partitions whose quantities are there.

    Args:
        settings: of the run.
        chosen: from `chosen_scorers`.
        measurers: whose quantities are averaged.
        lengths: digest of the tokenizer whose tokens `length` reads.
    """
    run = RunFolder(Path(settings.run))
    values = plain(settings)
    found: list[Work] = []
    for entry in chosen:
        used = list(measurers) if entry.needs_model else []
        table = digest_file(Path(entry.table.path)) if entry.table else None
        for part in run.partitions():
            inputs = _inputs(run, part, entry, used, lengths)
            if inputs is None:  # its own task failed, and said so
                continue
            stamp = fingerprint(
                stage="scores",
                version=VERSION,
                scorer=[entry.name, plain(entry.scorer or entry.table), table],
                own_version=getattr(entry.scorer, "version", 1),
                seeds=[measurer.seed for measurer in used],
                seed=settings.seed if "uniform" in entry.needs else None,
                single_source=len(settings.sources) == 1 if entry.table else None,
                inputs=inputs,
            )
            payload = {
                "settings": values,
                "partition": asdict(part),
                "folder": entry.folder,
                "measurers": [[measurer.slug, measurer.seed] for measurer in used],
                "lengths": lengths,
                "fingerprint": stamp,
            }
            output = run.scores(part, entry.folder)
            found.append(Work(f"{entry.name}, {part.name}", payload, output, stamp))
    return found


def column_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Compute the columns of one scorer for one partition."""
    settings = parse_settings(payload["settings"])
    run = RunFolder(Path(settings.run))
    part = Partition(**payload["partition"])
    chosen = chosen_scorers(settings.score.named)
    entry = next(entry for entry in chosen if entry.folder == payload["folder"])
    examples = read_examples(run, part, [*KEY, "id", "num_chars"])
    keys = examples.select(KEY)
    if entry.table is not None:
        table = entry.table.join(examples, single_source=len(settings.sources) == 1)
    elif entry.scorer is not None and entry.needs_model:
        frames = [_meeting(run.quantities(part, slug), keys) for slug, _ in payload["measurers"]]
        extra = _table_quantities(run, part, examples, entry.needs, settings, payload["lengths"])
        columns = columns_of(
            entry.scorer,
            [quantities_of(frame, entry.needs) | extra for frame in frames],
            [seed for _, seed in payload["measurers"]],
        )
        table = keys.hstack(columns)
        if not isinstance(task_settings(settings), TabularClassification):
            table = table.hstack(frames[0].select("num_scored"))
    elif entry.scorer is not None:
        found = _table_quantities(run, part, examples, entry.needs, settings, payload["lengths"])
        table = keys.hstack(plain_columns(entry.scorer, found))
    else:
        raise AssertionError(f"{entry.name} is neither a scorer nor a table")
    run.scores(part, entry.folder).write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height
    )
    return {"rows": table.height}


def quantities_of(frame: pl.DataFrame, needs: frozenset[str]) -> dict[str, np.ndarray]:
    """Measured quantities among `needs`, NaN for null."""
    return {
        name: frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        for name in sorted(needs & MEASURED.keys())
    }


def table_quantities(
    keys: Sequence[tuple[str, str, int]],
    num_chars: np.ndarray,
    num_tokens: np.ndarray | None,
    *,
    seed: int,
) -> dict[str, np.ndarray]:
    """All quantities that need no model; `num_tokens` is NaN where no tokenizer is set."""
    unknown = np.full(len(keys), np.nan)
    return {
        "num_chars": num_chars.astype(np.float64),
        "num_tokens": unknown if num_tokens is None else num_tokens.astype(np.float64),
        "uniform": uniform(keys, seed=seed).numpy(),
    }


def _table_quantities(
    run: RunFolder,
    part: Partition,
    examples: pl.DataFrame,
    needs: frozenset[str],
    settings: Settings,
    lengths: str,
) -> dict[str, np.ndarray]:
    if needs.isdisjoint(TABLE):
        return {}
    tokens = None
    if "num_tokens" in needs and lengths != CHARACTERS:
        counted = _meeting(run.lengths(part, lengths), examples.select(KEY))
        tokens = counted["num_tokens"].to_numpy()
    return table_quantities(
        examples.select(KEY).rows(), examples["num_chars"].to_numpy(), tokens, seed=settings.seed
    )


def _meeting(output: Output, keys: pl.DataFrame) -> pl.DataFrame:
    """A table of the same examples in the same order."""
    frame = pl.read_parquet(output.path)
    meet(keys, frame)
    return frame


def _inputs(
    run: RunFolder, part: Partition, entry: Chosen, used: Sequence[Measurer], lengths: str
) -> list[str] | None:
    """Digests of what a partition's columns are made from; None where something is missing."""
    outputs = [run.quantities(part, measurer.slug) for measurer in used]
    if "num_tokens" in entry.needs:
        outputs.append(run.lengths(part, lengths))
    marks = [output.mark() for output in outputs]
    if any(mark is None for mark in marks):
        return None
    # A table may name examples by the user's id, which is no part of the content.
    own = run.examples(part).mark() if entry.table else None
    index = own["digest"] if own else content_of(run, part)
    return [index, *(mark["digest"] for mark in marks if mark)]
