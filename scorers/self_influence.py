"""Self-influence: how much an example helps itself; large for what can only be learned by heart.

    SI(i) = sum over checkpoints c of eta_c |g_i(theta_c)|^2     metric identity (TracIn, q = i)
    SI(i) = g_i^T H^-1 g_i at the last checkpoint                metric ekfac
    SI(i) = phi_i^T C^-1 phi_i = |L^-1 phi_i|^2, at the last one   metric whitened
    residual = log SI - (a + b log n),  a and b by least squares over the training rows

g_i the gradient of the example's loss, the mean or the sum over its n counted positions; eta_c the
learning rate then in force, 1 where the checkpoints do not say it; H the damped Fisher matrix, see
`curate.models.kfac`; phi_i the projected gradient and C = L L^T its damped second moments, see
`curate.models.curvature`: the mean over the training rows is C's effective dimension. High values:
wrong labels, corrupted, rare or, with sums, long examples.

Source: Pruthi, Liu, Kale and Sundararajan, "Estimating Training Data Influence by Tracing Gradient
Descent", NeurIPS 2020, arXiv:2002.08484, section 4; Feldman and Zhang, arXiv:2008.03703, for what
it measures; for EK-FAC Grosse et al., arXiv:2308.03296; whitened Choe et al., arXiv:2405.13954.
Departures: the mean over the counted positions is the default, as a sum ranks mostly by length; the
residual is ours. The learning rate of a checkpoint is the mean of its own and the one before.
Cost: identity: one forward and one backward pass for each checkpoint, in which no weight gradient
is formed. EK-FAC: two such passes over a sample, eigenvectors of each layer, and one pass at up to
twice a plain forward and backward. Whitened: one pass, and k numbers of disk for each example.
Shapes: N examples of a partition, E checkpoints.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError

Reduction = Literal["mean", "sum"]

_SMALLEST = 1e-30
"""Below it the logarithm is that of this number: an example without any gradient."""
_NO_SPREAD = 1e-9
"""Variance of the log lengths below which they count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfInfluence:
    """Squared gradient length, or the Fisher metric's, of every example."""

    __pydantic_config__: ClassVar = STRICT

    needs: ClassVar[frozenset[str]] = frozenset({"value", "residual", "mean_loss"})
    columns: ClassVar[Mapping[str, str]] = {
        "self_influence": "gain in its own loss by a step on the example, 0 and up; higher is"
        " harder, rarer or wrong",
        "self_influence_residual": "log of the same less what its length explains; around 0",
        "self_influence_loss": "mean cross-entropy in the same pass, nats, to compare with",
    }

    metric: Literal["identity", "ekfac", "whitened"] = "identity"
    """identity: squared gradient lengths over all checkpoints; ekfac: in the metric of the Fisher
    matrix at the last checkpoint of each seed, which takes a fit; whitened: in that of projected
    gradients, from the index that the scorer `influence` reads."""
    reduction: Reduction = "mean"
    """Of an example's loss over its counted positions; sum grows with the length."""
    parameters: str = "all"
    """all, or a regular expression that is found in a parameter's name. EK-FAC takes layers whose
    weight is a matrix, and a language model's head only where the expression names it; whitened
    takes matrices without head and embeddings for all."""
    labels: Literal["sampled", "dataset"] = "sampled"
    """ekfac: sampled from the model, the true Fisher matrix; dataset: the empirical one."""
    damping: float = 0.1
    """ekfac, whitened: what is added to the eigenvalues, as a share of a layer's mean."""
    dim: int = 16
    """whitened: p, at most p x p numbers of each matrix."""
    fit_examples: int = 2048
    """ekfac: training examples that the curvature is measured on, about."""
    fit_tasks: int = 4
    """ekfac: parts of that sample that are measured side by side; each leaves its sums on disk."""
    groups: int = 1
    """ekfac: parts of the model that are fitted one after the other, where memory does not suffice
    for the factors of all layers."""

    def __post_init__(self) -> None:
        for name, least in (("fit_examples", 1), ("fit_tasks", 1), ("groups", 1), ("dim", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"self_influence.{name} is {getattr(self, name)}", fix=f"use {least} or more"
                )
        if not self.damping > 0:
            raise ConfigError(
                f"self_influence.damping is {self.damping}, and without any the inverse does not"
                " exist",
                fix="use a share above 0, such as 0.1",
            )
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise ConfigError(
                f"self_influence.parameters is {self.parameters!r}, which is no regular"
                f" expression: {error}",
                fix="use all, or an expression such as self_attn",
            ) from error

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "self_influence": quantities["value"],
            "self_influence_residual": quantities["residual"],
            "self_influence_loss": quantities["mean_loss"],
        }


class Moments(NamedTuple):
    """What a least-squares line needs; those of two sets of examples add up."""

    num: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def plus(self, values: npt.NDArray[np.float64], lengths: npt.NDArray[np.float64]) -> "Moments":
        """With more examples; values of 0 say nothing of their logarithm and are left out.

        Args:
            values: (N,) self-influence, NaN where not scored.
            lengths: (N,) counted positions.
        """
        known = np.isfinite(values) & (values > _SMALLEST) & (lengths > 0)
        x, y = np.log(lengths[known]), np.log(values[known])
        return Moments(
            self.num + len(x),
            self.x + float(x.sum()),
            self.y + float(y.sum()),
            self.xx + float((x * x).sum()),
            self.xy + float((x * y).sum()),
        )


class Line(NamedTuple):
    """log SI = intercept + slope log n."""

    intercept: float = 0.0
    slope: float = 0.0

    def residuals(
        self, values: npt.NDArray[np.float64], lengths: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """(N,) log SI less what the length explains; NaN stays."""
        explained = self.intercept + self.slope * np.log(np.maximum(lengths, 1))
        return np.log(np.maximum(values, _SMALLEST)) - explained


def fitted(moments: Moments) -> Line:
    """The line; where all lengths are equal the mean, and (0, 0) without examples."""
    if not moments.num:
        return Line()
    x, y = moments.x / moments.num, moments.y / moments.num
    spread = moments.xx / moments.num - x * x
    if spread <= _NO_SPREAD * max(1.0, x * x):
        return Line(y, 0.0)
    slope = (moments.xy / moments.num - x * y) / spread
    return Line(y - slope * x, slope)


def interval_rates(rates: Sequence[float | None]) -> list[float]:
    """(E,) learning rate of each checkpoint's interval; all 1 where one is not known.

    Args:
        rates: at each checkpoint, in order of step: a schedule that ends at 0 would otherwise
            leave the last one out.
    """
    known = [rate for rate in rates if rate is not None and math.isfinite(rate)]
    if len(known) < len(rates) or not any(known):
        return [1.0] * len(rates)
    return [known[0], *((a + b) / 2 for a, b in pairwise(known))]
