"""How long every arm trains: the same steps, and the same tokens as nearly as examples allow.

How many tokens a step holds depends on which lengths meet, so each arm gets its own `batch_tokens`,
chosen such that its steps come to the token budget.

Shapes: M rows trained on in a partition, copies counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_table
from curate.errors import InputError
from curate.models.epochs import Lengths, epoch_windows, plan_epochs, random_seed
from curate.models.settings import Checkpoints, Train
from jobs.compare_arms import folder_of
from jobs.settings import Settings

_TRIES = 8
_CLOSE = 0.001
"""Relative distance from the token budget at which the search for a batch size ends."""
_CLOSE_ENOUGH = 0.01
"""Distance above which more passes are shuffled together."""
_MOST_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class Budget:
    """What every arm trains for."""

    steps: int
    tokens: int
    """Padding left out; examples, for tables."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How a set is trained on."""

    batch_tokens: int
    together: int
    """Passes over the set that are shuffled as one."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a set trains on in one partition."""

    positions: npt.NDArray[np.int64]
    """(M,) rows of the partition's table, each as often as it is used."""
    lengths: Lengths
    """(M,) tokens of each."""
    weights: npt.NDArray[np.float32]
    """(M,) loss weights."""


def comparison_settings(settings: Settings) -> Settings:
    """The settings with `compare.train` in the place where training looks."""
    chosen = settings.compare.train or settings.checkpoints.train or Train()
    return replace(settings, checkpoints=Checkpoints(train=chosen))


def measured_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / "compare" / "lengths" / f"{part.name}.parquet")


def rows_of(run: RunFolder, name: str) -> list[Rows]:
    """What a set trains on, partition by partition."""
    found: list[Rows] = []
    for part in run.partitions():
        counted = read_table(measured_output(run, part).path)
        planned = read_table(folder_of(run, name).planned(part).path)
        meet(counted, planned)
        lengths = counted["num_tokens"].to_numpy().astype(np.int32)
        copies = np.where(lengths > 0, planned["copies"].to_numpy(), 0).astype(np.int64)
        positions = np.repeat(np.arange(len(copies), dtype=np.int64), copies)
        weights = planned["weight"].to_numpy().astype(np.float32)
        found.append(Rows(positions, lengths[positions], weights[positions]))
    return found


def training_draws(settings: Settings, seed: int) -> int:
    """Seed of weights and shuffles: the same for all arms of one seed."""
    return random_seed(settings.seed, "compare", seed)


def budget_of(settings: Settings, rows: Sequence[Rows]) -> Budget:
    """Steps and tokens for all arms, from what training makes of the plan.

    Args:
        settings: with `checkpoints.train` set.
        rows: of the plan.

    Raises:
        InputError: the plan has nothing to train on.
    """
    chosen, compare = settings.checkpoints.train, settings.compare
    assert chosen is not None
    lengths = [each.lengths for each in rows]
    draws = training_draws(settings, compare.seeds[0])
    if not any(len(each) for each in lengths):
        raise InputError("the plan has nothing to train on", fix="check plan.keep and the columns")
    steps = compare.steps
    if steps is None:
        schedule = plan_epochs(
            lengths,
            seed=draws,
            batch_tokens=chosen.batch_tokens,
            epochs=chosen.epochs,
            save_every_epochs=chosen.epochs,
            max_steps=chosen.max_steps,
        )
        steps = schedule.total_steps
    tokens = sum(_tokens_by_step(lengths, draws, steps, chosen.batch_tokens))
    if compare.tokens is not None:
        steps = max(1, round(steps * compare.tokens / tokens))
        return Budget(steps, round(compare.tokens))
    return Budget(steps, tokens)


def fit(lengths: Sequence[Lengths], draws: int, budget: Budget, start: int) -> Fit:
    """How a set is trained on so that its steps come nearest to the token budget.

    A small set fills a few batches and part of one more, and no size of batch may give the right
    mean; then several passes are shuffled together.

    Args:
        lengths: (M,) of each partition.
        draws: seed of the training run.
        budget: of all arms.
        start: the batch size to begin with.
    """
    tokens = sum(int(each.sum()) for each in lengths)
    most = max(1, min(_MOST_TOGETHER, budget.tokens // max(1, tokens)))
    found: list[tuple[float, Fit]] = []
    for together in range(1, most + 1):
        tiled = [np.tile(each, together) for each in lengths]
        size, gap = _fitting_batch(tiled, draws, budget, start)
        found.append((gap, Fit(size, together)))
        if gap <= _CLOSE_ENOUGH:
            break
    return min(found, key=lambda entry: (entry[0], entry[1].together))[1]


def tiled_rows(rows: Sequence[Rows], together: int) -> list[Rows]:
    """Each row so many times more often."""
    return [
        Rows(np.tile(r.positions, together), np.tile(r.lengths, together),
             np.tile(r.weights, together))
        for r in rows
    ]  # fmt: skip


def _fitting_batch(
    lengths: Sequence[Lengths], draws: int, budget: Budget, start: int
) -> tuple[int, float]:
    """The `batch_tokens` that fits best, and the relative distance that remains."""
    gaps: dict[int, float] = {}

    def gap(size: int) -> float:
        """Relative distance from the budget, its sign kept."""
        if size not in gaps:
            gaps[size] = (
                sum(_tokens_by_step(lengths, draws, budget.steps, size)) / budget.tokens - 1
            )
        return gaps[size]

    size = start
    for _ in range(_TRIES):  # in proportion
        if abs(gap(size)) <= _CLOSE:
            return size, abs(gap(size))
        size = max(1, round(size / max(0.1, 1 + gap(size))))
    # Another size shuffles otherwise, which moves the sum a little: look around.
    size = min(gaps, key=lambda tried: abs(gaps[tried]))
    step = max(1, size // 500)
    for distance in range(1, _TRIES + 1):
        for near in (size - distance * step, size + distance * step):
            if near >= 1 and abs(gap(near)) <= _CLOSE:
                return near, abs(gap(near))
    best = min(gaps, key=lambda tried: (abs(gaps[tried]), tried))
    return best, abs(gaps[best])


def _tokens_by_step(lengths: Sequence[Lengths], draws: int, steps: int, size: int) -> list[int]:
    """Tokens of each step, padding left out."""
    found: list[int] = []
    epoch = 0
    while len(found) < steps:
        before = len(found)
        for window in epoch_windows(lengths, seed=draws, epoch=epoch, batch_tokens=size):
            joined = np.concatenate([lengths[part] for part in window.parts])
            found += [int(joined[batch].sum()) for batch in window.batches]
            if len(found) >= steps:
                break
        if len(found) == before:
            break
        epoch += 1
    return found[:steps]
