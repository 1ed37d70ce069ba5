"""What the logits of one position say, each term exact to rounding however sure the model is.

For the logits z and the target y, with p = softmax(z), o the log-sum-exp of the other logits and
d = o - z_y:

    loss      -ln p_y             = softplus(d)
    miss      1 - p_y             = sigmoid(d)
    error     ||p - onehot(y)||_2 = sqrt(miss^2 + miss^2 * sum_{k != y} r_k^2)
    entropy   -sum_k p_k ln p_k   = binary entropy of miss + miss * entropy of r
    margin    z_y - max_{k != y} z_k

where r is the softmax over the other classes alone. No term is a difference of two that nearly
agree, so that 1 - p_y = 1e-12 is as exact as 0.5; `|p|^2 - 2 p_y + 1` in float32 would give 0.

Source of the stable error norm: Paul, Ganguli and Dziugaite, arXiv:2107.07075, Definition 2.3.
Cost: about six reads of the logits, a bounded piece of them at a time.

Shapes: M counted positions, V classes or tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_ROWS_NUMBERS = 1 << 19
"""Logits worked on at a time on a CPU: 2 MB, which its cache holds."""


class Terms(NamedTuple):
    """Per counted position, each (M,), float32 or float64 as the logits."""

    loss: Tensor
    error: Tensor
    margin: Tensor
    entropy: Tensor
    correct: Tensor


def terms(logits: Tensor, targets: Tensor) -> Terms:
    """All per-position quantities.

    Args:
        logits: (M, V), V at least 2; half precision is raised to float32.
        targets: (M,) in [0, V).
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if logits.is_cuda or len(logits) == 0:
        return _terms(logits, targets)
    # Three sweeps over a piece that stays in the cache cost less than one over memory.
    size = max(1, _ROWS_NUMBERS // logits.shape[1])
    pieces = [
        _terms(logits[start : start + size], targets[start : start + size])
        for start in range(0, len(logits), size)
    ]
    return Terms(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))


def error_norms(logits: Tensor, labels: Tensor) -> Tensor:
    """Length of the softmax error vector of each position.

    Args:
        logits: (M, V), any float dtype; half precision is raised to float32.
        labels: (M,) class indices in [0, V).

    Returns:
        (M,) norms in [0, sqrt(2)]; 0 is a perfect prediction.
    """
    return terms(logits, labels).error


def exact_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(M,) cross-entropies whose gradient is as exact as they are.

    That of `cross_entropy` is p_y - 1 for the target: in float32 nothing of it is left once the
    model is sure to seven digits.

    Args:
        logits: (M, V), float32 or float64, with a graph.
        targets: (M,) in [0, V).
    """
    index = targets[:, None]
    others = logits.scatter(1, index, -torch.inf)
    return functional.softplus(others.logsumexp(1) - logits.gather(1, index)[:, 0])


def _terms(logits: Tensor, targets: Tensor) -> Terms:
    index = targets[:, None]
    target = logits.gather(1, index)  # (M, 1)
    others = logits.scatter(1, index, -torch.inf)
    largest = others.amax(1, keepdim=True)
    others -= largest
    weights = others.exp()  # (M, V) of the other classes, relative to the largest; 0 at y
    others.scatter_(1, index, 0)  # 0 * -inf would be NaN below
    total = weights.sum(1)
    squares = torch.linalg.vecdot(weights, weights)
    spread = total.log() - torch.linalg.vecdot(weights, others) / total  # entropy of r
    odds = largest[:, 0] + total.log() - target[:, 0]  # d
    loss, surprise = functional.softplus(odds), functional.softplus(-odds)
    miss, hit = odds.sigmoid(), (-odds).sigmoid()
    return Terms(
        loss=loss,
        error=miss * (1 + squares / total.square()).sqrt(),
        margin=(target - largest)[:, 0],
        entropy=hit * loss + miss * surprise + miss * spread,
        correct=(target > largest)[:, 0].to(loss.dtype),
    )
