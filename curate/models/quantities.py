"""Everything one pass of a model says about an example.

The terms of each counted position are those of `curate.models.terms`; an example has their mean.

Departures from the paper's error norm (arXiv:2107.07075, Definition 2.3): for a sequence the mean
of its positions' norms, and beside it the norm of the whole (positions x vocabulary) error matrix.
Cost: one forward pass; with gradients, the way back too, in which no weight gradient is formed.

Shapes: N examples of a partition, B of a batch, M counted positions, V classes or tokens.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn

from curate.models.batches import Ahead, Passed, for_each_batch
from curate.models.compiling import compiled
from curate.models.gradient_pass import GradientPass
from curate.models.gradients.groups import SQUARES, parse_name
from curate.models.tasks import Batch, Encoded, Flat, Task
from curate.models.terms import Terms, error_norms, terms

__all__ = [
    "FORWARD",
    "GRADIENT",
    "LOG",
    "MEASURED",
    "QUANTITIES",
    "TABLE",
    "error_norms",
    "gradient_names",
    "is_measured",
    "measure",
    "summarise",
    "terms",
    "to_device",
]

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
    SQUARES: "squared length of the gradient of the example's loss, summed over its counted"
    " positions, with respect to all parameters; with [head], [REGEX] or /LAYER behind it, to some",
    "num_positions": "positions that the loss counts; 1 for a class",
}
"""Quantities of one forward and one backward pass, which gives those of `FORWARD` too; more names
of squared norms in `curate.models.gradients.groups`."""

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


def summarise(flat: Flat, num_examples: int) -> dict[str, Tensor]:
    """Per-example quantities (B,) in float64 of a batch whose logits are at hand.

    Args:
        flat: all counted positions of the batch.
        num_examples: B; an example without a counted position gets NaN.
    """
    rows = [(terms(flat.logits, flat.targets), flat.owner)]
    return _means(_add_up(rows, num_examples, flat.logits.device))


def is_measured(name: str) -> bool:
    """Whether a model measures a quantity of this name."""
    return name in MEASURED or parse_name(name) is not None


def gradient_names(wanted: Collection[str]) -> tuple[str, ...]:
    """What a pass that measures `wanted` is asked for beside the quantities of `FORWARD`, sorted.

    The columns of its table follow from these names and the model alone.
    """
    found = {name for name in wanted if name in GRADIENT or parse_name(name) is not None}
    return tuple(sorted(found | {"num_positions"})) if found else ()


def measure(
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    *,
    batch_tokens: int,
    device: torch.device,
    wanted: Collection[str] = frozenset(FORWARD),
    is_compiled: bool = False,
) -> tuple[dict[str, Tensor], Passed]:
    """Quantities of the examples of a partition, in their order.

    Args:
        model: in eval mode, on `device`.
        task: that encoded the examples.
        encoded: the partition; examples with `num_scored` 0 are not shown to the model.
        batch_tokens: budget of a batch, padding included; a quarter of it where gradients of more
            than the last layer are measured, as all activations are kept for them.
        device: where the model is; results stay there until the partition ends.
        wanted: names of quantities; those of `FORWARD` are always measured.
        is_compiled: the model's body is, where no gradients are measured.

    Returns:
        Quantity -> (N,) float32 on the CPU, NaN where nothing counts, and `scored_share` where
        examples are read in windows; and how the pass went.

    Raises:
        ConfigError: a selection of parameters is empty.
        CurateError: memory does not suffice, or a parameter's gradient cannot be measured.
    """
    names = gradient_names(wanted)
    has_squares = any(parse_name(name) for name in names)
    gradients = GradientPass(model, task, names) if has_squares else None
    columns = [*FORWARD, *(() if gradients is None else gradients.columns)]
    results = {
        name: torch.full((len(encoded),), torch.nan, dtype=torch.float32, device=device)
        for name in [*columns, *(("num_positions",) if names else ())]
    }
    scored = np.flatnonzero(encoded.num_scored > 0)

    def collate(members: np.ndarray) -> Batch:
        return pinned(task.collate(encoded, scored[members]), device)

    batches = Ahead(collate, is_threaded=device.type == "cuda")

    def work(members: np.ndarray) -> None:
        chosen = scored[members]
        batch = to_device(batches.take(members), device)
        more: dict[str, Tensor] = {}
        if gradients is None:
            pieces = task.pieces(model, batch)
            rows = ((terms(flat.logits, flat.targets), flat.owner) for flat in pieces)
            sums = _add_up(rows, len(chosen), device)
        else:
            measured = gradients.measure(batch, len(chosen))
            sums = _add_up([(measured.terms, measured.owner)], len(chosen), device)
            more = measured.squares
        if names:
            more = {**more, "num_positions": sums["positions"]}
        where = torch.from_numpy(chosen).to(device, non_blocking=True)
        for name, values in {**_means(sums), **more}.items():
            results[name][where] = values.float()

    is_heavy = gradients is not None and not gradients.is_light
    budget = max(1, batch_tokens // 4) if is_heavy else batch_tokens
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode() if gradients is None else torch.no_grad())
        stack.callback(batches.close)
        if is_compiled and gradients is None:
            stack.enter_context(compiled(model))
        passed = for_each_batch(
            encoded.lengths[scored], work, batch_tokens=budget, begin=batches.begin
        )
    on_cpu = {name: values.cpu() for name, values in results.items()}
    counts = torch.from_numpy(encoded.num_scored).float()
    on_cpu["num_scored"] = counts.masked_fill(counts == 0, torch.nan)
    if encoded.scored_share is not None:
        share = torch.from_numpy(encoded.scored_share).float()
        on_cpu["scored_share"] = share.masked_fill(counts == 0, torch.nan)
    return on_cpu, passed


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch in memory that a GPU copies from by itself; as it is for any other device."""
    if device.type != "cuda":
        return batch
    return {key: value.pin_memory() for key, value in batch.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; to a GPU by way of pinned memory, without waiting."""
    batch = pinned(batch, device)  # a pinned tensor is not copied again
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _add_up(
    rows: Iterable[tuple[Terms, Tensor]], num_examples: int, device: torch.device
) -> Mapping[str, Tensor]:
    """Sums over each example's positions, (B,) float64; `positions` counts them."""
    names = ("loss", "error_norms", "margin", "entropy", "correct", "squares", "positions")
    sums = torch.zeros(len(names), num_examples, dtype=torch.float64, device=device)
    for found, owner in rows:
        columns = [found.loss, found.error, found.margin, found.entropy, found.correct]
        columns += [found.error.square(), torch.ones_like(found.loss)]
        sums.index_add_(1, owner, torch.stack(columns).double())
    return dict(zip(names, sums, strict=True))


def _means(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    positions = sums["positions"]  # 0 / 0 gives NaN: nothing to score
    names = ("loss", "error_norms", "margin", "entropy", "correct")
    found = {name: sums[name] / positions for name in names}
    found["error_frob"] = (sums["squares"] * positions / positions).sqrt()
    return found
