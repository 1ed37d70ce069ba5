"""DataInf: the mean of inverses in place of the inverse of a mean; a check, not the product.

    H^-1 v ~ 1/(n lambda) sum_i ( v - g_i (g_i^T v) / (lambda + |g_i|^2) )
    lambda = share * mean_i |g_i|^2 / P          of one layer
    score(q, j) = g_j^T H^-1 g_q = 1/lambda ( D - Phi Phi^T diag(w) D / n )_jq
    D = Phi Phi_q^T,  w_i = 1 / (lambda + |phi_i|^2)

Source: Kwon, Wu, Wu and Zou, "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and
Diffusion Models", ICLR 2024, arXiv:2310.00902, equation 5.
Departures: none. H is the mean over examples of g_i g_i^T; exact where n = 1. The error grows with
n and with the layer; it is meant for LoRA's small ones, and ranks below EK-FAC where both fit.
Cost: n P for each query; `scores` never forms the (n, n) products.

Shapes: n examples, Q queries, P numbers of a layer's gradient or of its projection.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

DAMPING = 0.1


def layer_damping(gradients: Tensor, *, share: float = DAMPING) -> float:
    """lambda of one layer from its gradients (n, P)."""
    square = gradients.double().square().sum(1).mean()
    return share * float(square) / gradients.shape[1]


def inverse_product(gradients: Tensor, vector: Tensor, damping: float) -> Tensor:
    """(P,) or (Q, P) H^-1 v of one layer.

    Args:
        gradients: (n, P) of the training examples.
        vector: (P,) or (Q, P).
        damping: lambda, above 0.
    """
    weights = 1 / (damping + gradients.square().sum(1))  # (n,)
    along = (vector @ gradients.T) * weights
    return (vector - along @ gradients / len(gradients)) / damping


def scores(
    gradients: Mapping[str, Tensor],
    queries: Mapping[str, Tensor],
    *,
    share: float = DAMPING,
    block: int = 4096,
) -> Tensor:
    """(n, Q) sum over the layers of g_j^T H^-1 g_q, float64; positive: the example helps.

    Args:
        gradients: layer -> (n, P) of the training examples.
        queries: layer -> (Q, P).
        share: lambda as a share of a layer's mean squared number.
        block: examples at a time.
    """
    found: Tensor | None = None
    for name, own in gradients.items():
        asked = queries[name].double()
        damping = layer_damping(own, share=share)
        total = asked.new_zeros(asked.shape)  # (Q, P) sum of phi_i w_i (phi_i^T phi_q)
        for part in own.split(block):
            part = part.double()
            weights = 1 / (damping + part.square().sum(1)) if damping > 0 else part.new_ones(1)
            total += ((asked @ part.T) * weights) @ part
        solved = (asked - total / len(own)) / (damping if damping > 0 else 1.0)
        each = torch.cat([part.double() @ solved.T for part in own.split(block)])
        found = each if found is None else found + each
    assert found is not None
    return found
