"""Everything one forward pass says about an example, all of it from that one pass.

For the logits z and the target y of a counted position, with p = softmax(z), o the log-sum-exp of
the other logits and d = o - z_y:

    loss      -ln p_y             = softplus(d)
    miss      1 - p_y             = sigmoid(d)
    error     ||p - onehot(y)||_2 = sqrt(miss^2 + miss^2 * sum_{k != y} r_k^2)
    entropy   -sum_k p_k ln p_k   = binary entropy of miss + miss * entropy of r
    margin    z_y - max_{k != y} z_k

where r is the softmax over the other classes alone. No term is a difference of two that nearly
agree, so that 1 - p_y = 1e-12 is as exact as 0.5; `|p|^2 - 2 p_y + 1` in float32 would give 0.

Source of the stable error norm: Paul, Ganguli and Dziugaite, arXiv:2107.07075, Definition 2.3.
Departures: for a sequence the mean of its positions' norms, and beside it the norm of the whole
(positions x vocabulary) error matrix.
Cost: one forward pass and about six reads of the logits, a bounded piece of them at a time.

Shapes: N examples of a partition, B of a batch, M counted positions, V classes or tokens.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.models.batches import Passed, for_each_batch
from curate.models.gradient_pass import GradientPass
from curate.models.tasks import Batch, Encoded, Flat, Task

FORWARD = {
    "loss": "mean cross-entropy of the counted positions, nats",
    "error_norms": "mean length of the softmax error vectors, 0 to sqrt(2)",
    "error_frob": "length of all error vectors of the example together; grows with its tokens",
    "margin": "mean of target logit minus largest other logit; below 0 where it is wrong",
    "entropy": "mean entropy of the prediction, nats",
    "correct": "share of positions where the target has the largest logit; a tie is wrong",
    "num_scored": "tokens that the score stands on, after the cut at max_tokens",
}
"""Quantities of one forward pass; all are measured together."""

TABLE = {
    "num_tokens": "tokens of the whole example, nothing cut",
    "num_chars": "characters of the example",
    "uniform": "a number in [0, 1) drawn from the run's seed and the example's key",
}
"""Quantities that need no model."""

GRADIENT = {
    "grad_sq_norm": "squared length of the gradient of the example's loss, summed over its counted"
    " positions, with respect to all parameters",
    "num_positions": "positions that the loss counts; 1 for a class",
}
"""Quantities of one forward and one backward pass, which gives those of `FORWARD` too."""

LOG = {
    "loss_by_epoch": "mean cross-entropy each time the example was trained on, nats",
    "correct_by_epoch": "share of its positions that were right each time, 0 to 1",
    "margin_by_epoch": "mean lead of the target logit each time; below 0 where it was beaten",
}
"""Quantities of a whole training run, (E, N): a row for each time that the examples were shown."""

MEASURED = FORWARD | GRADIENT
"""Quantities that need a model."""

QUANTITIES = MEASURED | TABLE | LOG
"""Name -> what it is; what a scorer's `needs` may hold, beside what its own passes measure."""

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


def summarise(flat: Flat, num_examples: int) -> dict[str, Tensor]:
    """Per-example quantities (B,) in float64 of a batch whose logits are at hand.

    Args:
        flat: all counted positions of the batch.
        num_examples: B; an example without a counted position gets NaN.
    """
    return _means(_add_up([flat], num_examples, flat.logits.device))


def measure(
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    *,
    batch_tokens: int,
    device: torch.device,
    wanted: Collection[str] = frozenset(FORWARD),
) -> tuple[dict[str, Tensor], Passed]:
    """Quantities of the examples of a partition, in their order.

    Args:
        model: in eval mode, on `device`.
        task: that encoded the examples.
        encoded: the partition; examples with `num_scored` 0 are not shown to the model.
        batch_tokens: budget of a batch, padding included; a quarter of it where gradients are
            measured, as all activations are kept for them.
        device: where the model is; results stay there until the partition ends.
        wanted: names in `MEASURED`; those of `FORWARD` are always measured, those of `GRADIENT`
            all together or not at all.

    Returns:
        Quantity -> (N,) float32 on the CPU, NaN where nothing counts; and how the pass went.

    Raises:
        CurateError: memory does not suffice, or a parameter's gradient cannot be measured.
    """
    has_gradients = not GRADIENT.keys().isdisjoint(wanted)
    results = {
        name: torch.full((len(encoded),), torch.nan, dtype=torch.float32, device=device)
        for name in (MEASURED if has_gradients else FORWARD)
    }
    scored = np.flatnonzero(encoded.num_scored > 0)
    gradients = GradientPass(model, task) if has_gradients else None

    def work(members: np.ndarray) -> None:
        chosen = scored[members]
        batch = to_device(task.collate(encoded, chosen), device)
        if gradients is None:
            sums = _add_up(task.pieces(model, batch), len(chosen), device)
            found = _means(sums)
        else:
            flat, squares = gradients.measure(batch, len(chosen))
            sums = _add_up([flat], len(chosen), device)
            found = {**_means(sums), "grad_sq_norm": squares, "num_positions": sums["positions"]}
        where = torch.from_numpy(chosen).to(device, non_blocking=True)
        for name, values in found.items():
            results[name][where] = values.float()

    budget = max(1, batch_tokens // 4) if has_gradients else batch_tokens
    with torch.no_grad() if has_gradients else torch.inference_mode():
        passed = for_each_batch(encoded.lengths[scored], work, batch_tokens=budget)
    on_cpu = {name: values.cpu() for name, values in results.items()}
    counts = torch.from_numpy(encoded.num_scored).float()
    on_cpu["num_scored"] = counts.masked_fill(counts == 0, torch.nan)
    if encoded.scored_share is not None:
        share = torch.from_numpy(encoded.scored_share).float()
        on_cpu["scored_share"] = share.masked_fill(counts == 0, torch.nan)
    return on_cpu, passed


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; to a GPU by way of pinned memory, without waiting."""
    if device.type != "cuda":
        return batch
    return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}


def _add_up(pieces: Any, num_examples: int, device: torch.device) -> Mapping[str, Tensor]:
    """Sums over each example's positions, (B,) float64; `positions` counts them."""
    names = ("loss", "error_norms", "margin", "entropy", "correct", "squares", "positions")
    sums = torch.zeros(len(names), num_examples, dtype=torch.float64, device=device)
    for flat in pieces:
        found = terms(flat.logits, flat.targets)
        columns = [found.loss, found.error, found.margin, found.entropy, found.correct]
        columns += [found.error.square(), torch.ones_like(found.loss)]
        sums.index_add_(1, flat.owner, torch.stack(columns).double())
    return dict(zip(names, sums, strict=True))


def _means(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    positions = sums["positions"]  # 0 / 0 gives NaN: nothing to score
    names = ("loss", "error_norms", "margin", "entropy", "correct")
    found = {name: sums[name] / positions for name in names}
    found["error_frob"] = (sums["squares"] * positions / positions).sqrt()
    return found
