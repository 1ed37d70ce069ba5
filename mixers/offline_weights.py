"""An offline approximation of loss-based reweighting: static weights from one checkpoint's losses.

    h = rank of the loss within its domain, from -1 to 1;   w = exp(f(h) / r), scaled to mean 1

Source: ours. The method itself (`mixers.loss_weights`, Sow et al. 2025) weighs every batch anew as
the model learns; weights that stay miss its point and must not be presented as the paper's.

Cost: a sort. Shapes: N examples.
"""

import torch
from torch import Tensor

from mixers.loss_weights import Strategy, strategy_values


def offline_weights(
    losses: Tensor,
    *,
    strategy: Strategy = "linupper",
    temperature: float = 1.0,
    domains: Tensor | None = None,
) -> Tensor:
    """An approximation for data that is weighted once, before training; not the paper's method.

    The method weighs the examples of a batch anew at every step, as the model learns. These weights
    come from one checkpoint: h is the rank of the loss within the domain, from -1 to 1, and
    w = exp(f(h) / r) is scaled to mean 1 within the domain, so that it says nothing about domains.

    Args:
        losses: (N,) of all examples under one model, nats per token; finite.
        strategy: the paper's f.
        temperature: the paper's r.
        domains: (N,) indices; None for one domain.

    Returns:
        (N,) float64 weights above 0, of mean 1 in every domain; equal losses have equal weights.
    """
    values = losses.detach().double()
    of = torch.zeros(len(values)) if domains is None else domains.to(values.device)
    found = torch.ones_like(values)
    for domain in of.unique():
        rows = (of == domain).nonzero().flatten()
        ordered, back = values[rows].unique(return_inverse=True)
        counts = torch.bincount(back, minlength=len(ordered)).double()
        # Ties share the middle of the ranks that they take up.
        ranks = counts.cumsum(0) - (counts + 1) / 2
        standing = 2 * ranks / (len(rows) - 1) - 1 if len(rows) > 1 else torch.zeros_like(ranks)
        powers = (strategy_values(standing, strategy) / temperature).exp()[back]
        found[rows] = powers / powers.mean()
    return found
