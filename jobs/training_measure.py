"""What training will cost, from a few steps that are timed and thrown away."""

import math
import time
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from curate.data.example import TRAIN
from curate.data.tables import read_examples
from curate.models.epochs import Lengths, epoch_windows, random_permutation, random_seed
from curate.models.optimiser import Optimiser, own_random_state
from curate.models.tasks import Batch
from curate.models.training import run_steps
from curate.models.training_data import join
from curate.models.training_log import Losses, batch_losses
from jobs.settings import Settings
from jobs.training_work import (
    Workshop,
    encode_partition,
    make_workshop,
    open_optimiser,
    trained_lengths,
    training,
)

_SAMPLE_EXAMPLES = 2000
_WARM_UP = 2
_STEPS = 8
_LONGEST_SECONDS = 20.0
_LOG_BYTES = 16
"""Of one example's record in one epoch, compressed, about."""


def measure(settings: Settings, *, due: int) -> dict[str, Any]:
    """Seconds and bytes of the training runs that are due.

    Args:
        settings: of the run, its index and tokenizer finished.
        due: number of seeds that have not finished.
    """
    torch.set_num_threads(settings.cluster.threads)
    shop = make_workshop(settings)
    chosen = _sample(shop)
    started = time.monotonic()
    lengths = [trained_lengths(shop, shop.partitions[i], _split(shop, i)) for i in chosen]
    encode_seconds = time.monotonic() - started
    sampled = sum(int((part > 0).sum()) for part in lengths)
    total = sum(int((_split(shop, i) == TRAIN).sum()) for i in range(len(shop.partitions)))
    if not sampled:
        return {"seconds": 0.0, "size_bytes": 0, "steps": 0, "step_seconds": 0.0}
    share = total / sampled
    train = training(settings)
    windows = list(epoch_windows(lengths, seed=0, epoch=0, batch_tokens=train.batch_tokens))
    batches = sum(len(window.batches) for window in windows)
    steps = max(1, math.ceil(batches * share * train.epochs))
    steps = min(steps, train.max_steps or steps)
    optimiser = open_optimiser(shop, 0, steps)
    step_seconds = _time_steps(shop, optimiser, chosen, lengths)
    passes = 1 + math.ceil(train.epochs)  # lengths once, then each epoch reads the text again
    per_seed = steps * step_seconds + passes * share * encode_seconds
    at_once = settings.cluster.num_workers or 1
    return {
        "seconds": per_seed * math.ceil(due / at_once),
        "size_bytes": due * _size_bytes(optimiser, settings, steps / (batches * share), total),
        "steps": steps,
        "step_seconds": step_seconds,
    }


def _sample(shop: Workshop) -> list[int]:
    """A few partitions, chosen by the run's seed."""
    seed = random_seed(shop.settings.seed, "train", "measure")
    chosen: list[int] = []
    rows = 0
    for index in random_permutation(len(shop.partitions), seed):
        chosen.append(int(index))
        rows += int((_split(shop, int(index)) == TRAIN).sum())
        if rows >= _SAMPLE_EXAMPLES:
            break
    return sorted(chosen)


def _split(shop: Workshop, index: int) -> pl.Series:
    return read_examples(shop.run, shop.partitions[index], ["split"])["split"]


def _time_steps(
    shop: Workshop, optimiser: Optimiser, chosen: list[int], lengths: list[Lengths]
) -> float:
    """Seconds of a step: the mean of a few, the first ones left out."""
    encoded = join([encode_partition(shop, shop.partitions[index]) for index in chosen])
    budget = training(shop.settings).batch_tokens
    joined = np.concatenate(lengths)
    (window,) = epoch_windows([joined], seed=0, epoch=0, batch_tokens=budget)
    batches = ((shop.task.collate(encoded, indices), len(indices)) for indices in window.batches)
    times: list[float] = []
    with own_random_state(optimiser.device):
        started = time.monotonic()
        items = islice(batches, _WARM_UP + _STEPS)
        for _, result in run_steps(optimiser, items, partial(_losses, shop)):
            result.losses.mean.item()  # waits for a GPU
            now = time.monotonic()
            times.append(now - started)
            started = now
            if len(times) > _WARM_UP and sum(times) > _LONGEST_SECONDS:
                break
    counted = times[_WARM_UP:] or times
    return sum(counted) / len(counted)


def _losses(shop: Workshop, model: nn.Module, item: tuple[Batch, int]) -> Losses:
    device = next(model.parameters()).device
    moved = {key: value.to(device) for key, value in item[0].items()}
    return batch_losses(shop.task.logits_and_targets(model, moved), item[1])


def _size_bytes(optimiser: Optimiser, settings: Settings, epochs: float, examples: int) -> int:
    """Checkpoints, the state to resume from and the records of one seed."""
    train = training(settings)
    weights = sum(p.numel() * p.element_size() for p in optimiser.model.parameters())
    trained = sum(p.numel() * 4 for p in optimiser.model.parameters() if p.requires_grad)
    each = weights + (2 * trained if train.save_moments else 0)
    saved = max(1, math.ceil(epochs / train.save_every_epochs))
    return int(saved * each + 3 * trained + epochs * examples * _LOG_BYTES)
