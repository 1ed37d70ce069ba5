"""Embeddings: G[id_t] += g_t.

Shapes: N examples, T positions, D width.
"""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from curate.models.gradients.forms import Form, Lookup
from curate.models.gradients.layout import Layout


def applies(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
    )


def forms(
    module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, layout: Layout
) -> Iterator[tuple[str, Form]]:
    ids, values = layout.rows(inputs[0], 0), layout.rows(grad)  # (N, T), (N, T, D)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        # torch gives this row no gradient, wherever it is looked up.
        values = values.masked_fill((ids == padding)[..., None], 0)
    yield "weight", Lookup(ids, values, len(cast(Tensor, module.weight)))
