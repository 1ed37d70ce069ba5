"""What scoring will take, from a few timed batches."""

import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.tables import read_examples
from curate.models.batches import by_length, next_batch
from curate.models.load import LoadedModel
from curate.models.quantities import FORWARD, gradient_names, measure
from curate.models.tasks import Encoded, Task
from jobs.fields import example_fields
from jobs.measuring import batch_tokens, measurer_of, ready, wanted_of
from jobs.run import Task as Work
from jobs.settings import Settings

_MEASURED_BATCHES = 5
_MEASURED_SECONDS = 10.0


def estimate(settings: Settings, due: Sequence[Work]) -> dict[str, float]:
    """Seconds and bytes for all that is due, from a few timed batches of its first partition.

    Batches are taken at even distances over the lengths, and stand for the others by their padded
    tokens; other partitions stand by their characters.
    """
    if not due:
        return {"seconds": 0.0, "size_bytes": 0}
    run = RunFolder(Path(settings.run))
    part = Partition(**due[0].payload["partition"])
    measurer = measurer_of(due[0].payload["measurer"])
    started = time.perf_counter()
    task, loaded = ready(settings, measurer)
    loading = time.perf_counter() - started
    started = time.perf_counter()
    encoded = task.encode(example_fields(settings, run, part, is_sketch=True))
    encoding = time.perf_counter() - started
    budget = batch_tokens(settings.score, loaded.device.type)
    wanted = wanted_of(settings)
    seconds = encoding + _time_batches(task, loaded, encoded, budget, wanted)
    work = _work_of(run, due)
    share = sum(work) / max(1, work[0])
    workers = settings.cluster.num_workers or 1
    rows = sum((run.examples(_part(task)).mark() or {}).get("rows", 0) for task in due)
    num_columns = len(FORWARD) + len(gradient_names(wanted))
    return {
        "seconds": loading + seconds * share / workers,
        "size_bytes": rows * 4 * num_columns + 4096 * len(due),
    }


def _time_batches(
    task: Task, loaded: LoadedModel, encoded: Encoded, budget: int, wanted: frozenset[str]
) -> float:
    """Seconds for the whole partition, from a few of its batches."""
    scored = np.flatnonzero(encoded.num_scored > 0)
    order = scored[by_length(encoded.lengths[scored])]
    lengths = encoded.lengths[order]
    cuts = [0]
    while cuts[-1] < len(order):
        cuts.append(next_batch(lengths, cuts[-1], budget))
    if len(cuts) == 1:
        return 0.0
    costs = [int(lengths[a]) * (b - a) for a, b in pairwise(cuts)]
    picked = sorted({int(i) for i in np.linspace(0, len(costs) - 1, _MEASURED_BATCHES)})
    spent = timed = 0.0
    for warm_up, index in [(True, picked[-1]), *((False, index) for index in picked)]:
        started = time.perf_counter()
        members = order[cuts[index] : cuts[index + 1]]
        one = _subset(encoded, members)
        measure(loaded.model, task, one, batch_tokens=budget, device=loaded.device, wanted=wanted)
        if not warm_up:
            spent += time.perf_counter() - started
            timed += costs[index]
        if spent > _MEASURED_SECONDS:
            break
    return spent * sum(costs) / timed


def _subset(encoded: Encoded, members: np.ndarray) -> Encoded:
    """The same examples, of which only the members count."""
    scored = np.zeros_like(encoded.num_scored)
    scored[members] = encoded.num_scored[members]
    return Encoded(
        lengths=encoded.lengths,
        num_scored=scored,
        truncated=encoded.truncated,
        arrays=encoded.arrays,
        problems={},
    )


def _work_of(run: RunFolder, due: Iterable[Work]) -> list[float]:
    """Characters of each task's partition; 1 at least."""
    sizes: dict[str, float] = {}
    found: list[float] = []
    for task in due:
        part = _part(task)
        if part.name not in sizes:
            sizes[part.name] = float(read_examples(run, part, ["num_chars"])["num_chars"].sum())
        found.append(max(1.0, sizes[part.name]))
    return found


def _part(task: Work) -> Partition:
    return Partition(**task.payload["partition"])
