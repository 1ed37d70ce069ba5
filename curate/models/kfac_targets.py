"""The mean gradient of some target examples, which asks for all of them at once.

    G = 1/n sum over the examples q of dL_q / dW        layer by layer, the bias' beside it

One plain backward pass for each batch: no example's own gradient is formed. Preconditioning is
linear, so that the mean's answer is the mean of the answers.

Shapes: N examples of a partition, n chosen, O outputs and I inputs of a layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from curate.models.batches import for_each_batch
from curate.models.example_losses import ExampleLosses, Reduction
from curate.models.kfac_layers import Layer
from curate.models.quantities import to_device
from curate.models.tasks import Encoded, Task

_HALF_SCALE = 256.0
"""Loss scale of float16 models, whose small gradients would become 0; taken back out."""


class Total(NamedTuple):
    """Gradients of some examples, summed; those of two sets of examples add up."""

    gradients: dict[str, Tensor]
    """Layer -> (1, O, I) float64 on the CPU."""
    num: int
    """Examples that it is the sum of."""
    num_left_out: int
    """Examples whose gradient is not finite."""

    def plus(self, other: "Total") -> "Total":
        sums = {name: own + other.gradients[name] for name, own in self.gradients.items()}
        return Total(sums, self.num + other.num, self.num_left_out + other.num_left_out)

    def mean(self) -> dict[str, Tensor]:
        """Layer -> (1, O, I) float64; NaN of no examples."""
        return {name: own / self.num for name, own in self.gradients.items()}


def nothing(layers: Sequence[Layer]) -> Total:
    """The sum over no examples."""
    shapes = {layer.name: (1, layer.num_outputs, layer.num_inputs) for layer in layers}
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return Total(zeros, 0, 0)


def total_gradient(
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    chosen: np.ndarray,
    *,
    layers: Sequence[Layer],
    batch_tokens: int,
    device: torch.device,
    reduction: Reduction = "mean",
) -> Total:
    """The gradients of some examples' losses, summed.

    Args:
        model: in eval mode, on `device`.
        task: that encoded the examples.
        encoded: a partition.
        chosen: (n,) positions of examples that have something to score.
        layers: from `layers_of`.
        batch_tokens: budget of a batch, padding included.
        device: where the model is.
        reduction: of an example's loss over its counted positions.
    """
    names = [name for layer in layers for name in layer.parameters]
    known = dict(model.named_parameters())
    parameters = [known[name] for name in names]
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    modules = dict(model.named_modules())
    losses = ExampleLosses(
        task,
        reduction=reduction,
        keeps_logits=any(modules[layer.name] is head for layer in layers),
    )
    scale = _HALF_SCALE if parameters[0].dtype == torch.float16 else 1.0
    total = nothing(layers)

    def summed(members: np.ndarray) -> dict[str, Tensor]:
        batch = to_device(task.collate(encoded, chosen[members]), device)
        with torch.enable_grad():
            loss = losses(model, batch).sum() * scale
        found: Any = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(names, parameters, cast(tuple[Tensor | None, ...], found), strict=True)
        given = {n: torch.zeros_like(p) if grad is None else grad for n, p, grad in pairs}
        stacked = {name: grad[None].double().cpu() / scale for name, grad in given.items()}
        return {layer.name: layer.joined(stacked) for layer in layers}

    def work(members: np.ndarray) -> None:
        nonlocal total
        found = Total(summed(members), len(members), 0)
        if _is_finite(found):
            total = total.plus(found)
            return
        found = nothing(layers)
        for member in members[:, None]:
            one = Total(summed(member), 1, 0)
            found = found.plus(one if _is_finite(one) else nothing(layers)._replace(num_left_out=1))
        total = total.plus(found)

    for_each_batch(encoded.lengths[chosen], work, batch_tokens=batch_tokens)
    return total


def _is_finite(total: Total) -> bool:
    return all(bool(own.isfinite().all()) for own in total.gradients.values())
