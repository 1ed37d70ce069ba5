"""The fast ways of influence beside the damped exact one, on ten queries of a model's own data.

    exact        g_i^T (H + d)^-1 g_q       conjugate gradients on Gauss-Newton products
    ekfac        the same with EK-FAC's H, queries compressed to a rank
    fisher       phi_i^T (C + c trace(C) / k)^-1 phi_q, C layer by layer (projected gradients)
    datainf      the mean of inverses, on the projected gradients
    gradients    g_i^T g_q, no curvature at all

d is that of EK-FAC, layer by layer, for all but the projected ones, whose damping is a share of
their own mean eigenvalue. A factor common to all scores of a query is taken out first.

Cost: about two training steps over the sample for each iteration of each query, so that a few
hundred examples and a small model are meant.
Shapes: n training examples, Q queries, k numbers of a layer's projection.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from curate.models import datainf
from curate.models.example_losses import Reduction, draw_keys
from curate.models.gradients import Sides
from curate.models.influence_distance import QUERIES, Distance, distance, exact_scores
from curate.models.kfac import DAMPING, Curvature, basis_of, damped
from curate.models.kfac_layers import layers_of
from curate.models.kfac_pass import KFACPass
from curate.models.kfac_queries import query_directions
from curate.models.tasks import Encoded, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What is compared, and how."""

    num_queries: int = QUERIES
    """The last examples that can be scored; all others are the training examples."""
    rank: int = 32
    """Of EK-FAC's queries."""
    damping: float = DAMPING
    """Share of a layer's mean eigenvalue."""
    draws: int = 1
    """Labels that are drawn for each position."""
    reduction: Reduction = "sum"
    batch_tokens: int = 4096
    tolerance: float = 1e-4
    """Of the exact solution."""


def influence_distances(
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    *,
    device: torch.device,
    how: Check | None = None,
    sides: Mapping[str, Sides] | None = None,
    seed: int = 0,
    residuals: list[float] | None = None,
) -> dict[str, Distance]:
    """Way -> how far its scores are from the damped exact ones; see the head of this file.

    Args:
        model: in eval mode, on `device`; float32 or float64.
        task: that encoded the examples.
        encoded: a sample of a few hundred examples.
        device: where the model is.
        how: what is compared.
        sides: parameter -> what its gradient is projected on, as in the index; None: the projected
            ways are left out.
        seed: of the labels that are drawn.
        residuals: told how far each query's exact answer is from being one.
    """
    how = how or Check()
    scored = np.flatnonzero(encoded.num_scored > 0)
    chosen, queries = scored[: -how.num_queries], scored[-how.num_queries :]
    layers = layers_of(model)
    engine = KFACPass(
        model, task, layers, batch_tokens=how.batch_tokens, device=device, reduction=how.reduction
    )
    curvatures, damping = _fit(engine, encoded, chosen, how, seed)
    exact = exact_scores(
        model,
        task,
        encoded,
        chosen,
        queries,
        layers=layers,
        damping=damping,
        device=device,
        reduction=how.reduction,
        batch_tokens=how.batch_tokens,
        curvatures=curvatures,
        tolerance=how.tolerance,
        residuals=residuals,
    )
    asked = engine.gradients(encoded, queries)
    directions, _ = query_directions(asked, curvatures, layers, rank=how.rank)
    found = {"ekfac": distance(engine.scores(encoded, chosen, directions), exact)}
    plain = engine.parameter_gradients(encoded, queries)
    found["gradients"] = distance(engine.scores(encoded, chosen, plain), exact)
    if sides is not None:
        own = engine.projections(encoded, chosen, sides)
        other = engine.projections(encoded, queries, sides)
        found["fisher"] = distance(_fisher_scores(own, other, how.damping), exact)
        found["datainf"] = distance(datainf.scores(own, other, share=how.damping), exact)
    return found


def _fit(
    engine: KFACPass, encoded: Encoded, chosen: np.ndarray, how: Check, seed: int
) -> tuple[dict[str, Curvature], dict[str, float]]:
    """EK-FAC of the chosen examples, and d of each layer."""
    names = [str(number) for number in range(len(encoded))]
    rounds = [draw_keys(names, seed=seed + number) for number in range(how.draws)]
    sums = engine.factors(encoded, chosen, rounds[0])
    for draws in rounds[1:]:
        more = engine.factors(encoded, chosen, draws)
        sums = {name: own.plus(more[name]) for name, own in sums.items()}
    bases = {name: basis_of(own) for name, own in sums.items()}
    values: dict[str, Tensor] = {}
    # Labels that the axes were not fitted to: see `jobs.ekfac_work.eigenvalues_work`.
    others = [draw_keys([f"again\0{name}" for name in names], seed=seed + number)
              for number in range(how.draws)]  # fmt: skip
    for draws in others:
        for name, own in engine.eigenvalues(encoded, chosen, bases, draws).items():
            part = own / (len(chosen) * len(rounds))
            values[name] = values[name] + part if name in values else part
    curvatures = {name: damped(bases[name], own, share=how.damping) for name, own in values.items()}
    # A layer that nothing reaches has no damping of its own: any will do.
    damping = {name: how.damping * float(own.mean()) or 1.0 for name, own in values.items()}
    return curvatures, damping


def _fisher_scores(own: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> Tensor:
    """(n, Q) with the empirical Fisher matrix of each layer's projected gradients."""
    total: Tensor | None = None
    for name, rows in own.items():
        rows, asked = rows.double(), other[name].double()
        matrix = rows.T @ rows / len(rows)
        added = share * matrix.diagonal().mean()
        added = added if float(added) > 0 else torch.ones_like(added)
        matrix = matrix + added * torch.eye(len(matrix), dtype=matrix.dtype)
        found = rows @ torch.linalg.solve(matrix, asked.T)
        total = found if total is None else total + found
    assert total is not None
    return total
