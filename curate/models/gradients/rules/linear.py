"""Linear layers, and the Conv1D of transformers, which holds the transposed weight.

    y_t = W x_t + b       G_W = sum_t g_t x_t^T       G_b = sum_t g_t

Shapes: N examples, T positions, I inputs, O outputs.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from curate.models.gradients.forms import Form, Outer, Whole, raised
from curate.models.gradients.layout import Layout


def applies(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward or is_transposed(module)


def forms(
    module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, layout: Layout
) -> Iterator[tuple[str, Form]]:
    given, back = layout.rows(inputs[0]), layout.rows(grad)  # (N, T, I), (N, T, O)
    yield "weight", Outer(given, back) if is_transposed(module) else Outer(back, given)
    if getattr(module, "bias", None) is not None:
        yield "bias", Whole(raised(back).sum(1))


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is held as (I, O), so that its first side is the input's."""
    return (type(module).__module__, type(module).__name__) == (
        "transformers.pytorch_utils",
        "Conv1D",
    )
