"""Influence the long way round: gradients one by one from autograd, linear algebra from numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn import functional

from curate.models.mlp import MLP

Rows = np.ndarray


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return functional.cross_entropy(logits, torch.tensor([label]))


def log_odds(logits: Tensor, label: int) -> Tensor:
    share = logits.softmax(1)[0, label]
    return torch.log(share / (1 - share))


def gradients(
    folder: Path, frame: pl.DataFrame, of: Callable[[Tensor, int], Tensor] = cross_entropy
) -> Rows:
    """(n, k) float64 gradients of all weights, biases left out, one example after the other."""
    model = MLP.from_pretrained(folder).double()
    found: list[Rows] = []
    for numbers, label in zip(frame["x"].to_numpy(), frame["label"], strict=True):
        model.zero_grad()
        of(model(torch.tensor(numbers, dtype=torch.float64)[None]), int(label)).backward()
        grads = [p.grad.flatten() for n, p in model.named_parameters()
                 if n.endswith("weight") and p.grad is not None]  # fmt: skip
        found.append(torch.cat(grads).numpy().copy())
    return np.stack(found)


def chances(folder: Path, frame: pl.DataFrame) -> Rows:
    """(n,) probability of each label."""
    model = MLP.from_pretrained(folder).double()
    with torch.no_grad():
        shares = model(torch.tensor(frame["x"].to_numpy()).double()).softmax(1).numpy()
    return shares[np.arange(frame.height), frame["label"].to_numpy()]


def damped(rows: Rows, blocks: list[int], share: float = 0.1) -> Rows:
    """(k, k) mean outer product of the rows, zero outside the blocks, a share of the mean
    eigenvalue of each added to its diagonal."""
    found = np.zeros((rows.shape[1], rows.shape[1]))
    start = 0
    for size in blocks:
        place = slice(start, start + size)
        own = rows[:, place].T @ rows[:, place] / len(rows)
        found[place, place] = own + share * np.linalg.eigvalsh(own).mean() * np.eye(size)
        start += size
    return found


def over_tasks(matrix: Rows, names: list[str], how: str) -> Rows:
    """(n,) from scores (n, m): mean within each name, mean or max over names."""
    means = [matrix[:, [i for i, own in enumerate(names) if own == name]].mean(1)
             for name in sorted(set(names))]  # fmt: skip
    return np.mean(means, 0) if how == "mean" else np.max(means, 0)
