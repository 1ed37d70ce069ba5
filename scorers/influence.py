"""Influence: how much a step on an example lowers the loss of the target's examples.

    dot        I(i, q) = sum over checkpoints c of eta_c <phi_q, phi_i>                    TracIn
    cosine     I(i, q) = sum over c of (eta_c / sum eta) cos(phi_q, phi_i)                   LESS
    influence  I(i, q) = phi_q^T C^-1 phi_i,  C = (1/n) Phi^T Phi + lambda I                LoGra
    trak       I(i, q) = mean over c of f_q^T (F^T F + n lambda I)^-1 f_i, times mean of 1 - p_i
    ekfac      I(i, q) = g_q^T H^-1 g_i,  H the Fisher matrix in the form of EK-FAC
    I(i)       = mean or max over sub-tasks of the mean over the sub-task's q

phi the projected gradient of an example's loss (docs/influence_index.md), eta_c the learning rate
then in force, 1 where the checkpoints do not say it, f = grad log(p / (1 - p)) with p = exp(-loss).
Positive: training on i lowers the loss of q. To leave i out of n examples raises it by about I / n
with `influence` and `ekfac`; the log odds of q fall by about I with `trak`.

Source: Pruthi, Liu, Kale and Sundararajan, "Estimating Training Data Influence by Tracing Gradient
Descent", NeurIPS 2020, arXiv:2002.08484 (dot); Xia et al., "LESS: Selecting Influential Data for
Targeted Instruction Tuning", ICML 2024, arXiv:2402.04333 (cosine); Choe et al., "What is your data
worth to GPT?", 2024, arXiv:2405.13954 (influence); Park et al., "TRAK: Attributing model behavior
at scale", ICML 2023, arXiv:2303.14186 (trak); Grosse et al., arXiv:2308.03296 (ekfac).

Departures: gradients are projected on both sides of each matrix; lambda is a share of the mean
eigenvalue, in TRAK too, whose reference code damps nothing and has no scale; TRAK's soft threshold
is left out; LESS' moments of Adam are an option, its warm-up a run of one's own.
Cost: one forward and backward pass of pool and target for each checkpoint, without weight
gradients; k numbers of disk for each example; then 2 N k products for each sub-task.
Shapes: N examples of a partition, k numbers of a projected gradient.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError

Metric = Literal["dot", "cosine", "influence", "trak", "ekfac"]

_HELP = "positive: training on it lowers the target's loss"
_MATRICES = "matrices"
_COUNTS = {
    "dim": 1,
    "sample": 1,
    "top": 0,
    "rank": 1,
    "fit_examples": 1,
    "fit_tasks": 1,
    "groups": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Influence:
    """Influence of every example on the target, from an index of gradients of both."""

    __pydantic_config__: ClassVar = STRICT

    metric: Metric = "influence"
    """dot and cosine add up all checkpoints of a seed; influence and ekfac take the last one of
    each seed; trak averages over all checkpoints, which should be trained independently."""
    curvature: Literal["blocks", "full"] = "blocks"
    """influence and trak: of each layer by itself, or of whole rows, which takes k^2 numbers."""
    damping: float = 0.1
    """influence, trak, ekfac: lambda as a share of the mean eigenvalue."""
    whiten: bool = False
    """influence: keep L^-1 phi beside the index, C = L L^T, so that questions asked later are
    plain inner products."""
    adam: Literal["none", "exact", "diagonal", "factored"] = "none"
    """dot and cosine: gradients of the pool as Adam would step, by the moments that the checkpoints
    kept; the target's stay as they are."""
    layers: str = _MATRICES
    """matrices, all, or a regular expression that is found in a parameter's name."""
    head: bool = False
    """With `matrices`: the output layer of a language model too."""
    embedding: bool = False
    """With `matrices`: embeddings too."""
    dim: int = 16
    """p: at most p x p numbers of each matrix."""
    seed: int = 0
    """Of the projection."""
    entries: Literal["signs", "gaussian"] = "signs"
    """Of the projection."""
    init: Literal["random", "pca"] = "random"
    """pca: project on the principal axes of `sample` examples, for an extra pass over these."""
    sample: int = 10_000
    """Examples of that pass."""
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    """Of the rows on disk."""
    reduction: Literal["mean", "sum"] = "mean"
    """Of an example's loss over its counted positions; with sum long examples weigh more."""
    aggregate: Literal["mean", "max"] = "mean"
    """Over sub-tasks; within a sub-task it is the mean."""
    tasks: str | None = None
    """Column of the target's files that names a row's sub-task; its domain unless given."""
    top: int = 100
    """Most helpful and most harmful training rows that are listed for each sub-task."""
    matrix: bool = False
    """Every example's score with every target example, too."""
    rank: int = 32
    """ekfac: of each layer's preconditioned query."""
    labels: Literal["sampled", "dataset"] = "sampled"
    """ekfac: sampled from the model, the true Fisher matrix; dataset: the empirical one."""
    fit_examples: int = 2048
    """ekfac: training examples that the curvature is measured on, about."""
    fit_tasks: int = 4
    """ekfac: parts of that sample that are measured side by side."""
    groups: int = 1
    """ekfac: parts of the model that are fitted one after the other."""

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"influence.{name} is {getattr(self, name)}", fix=f"use {least} or more"
                )
        if not 0 < self.damping < float("inf"):
            raise ConfigError(
                f"influence.damping is {self.damping}, and without any the inverse need not exist",
                fix="use a share above 0, such as 0.1",
            )
        try:
            re.compile(self.layers)
        except re.error as error:
            raise ConfigError(
                f"influence.layers is {self.layers!r}, which is no regular expression: {error}",
                fix="use matrices, all, or an expression such as self_attn",
            ) from error
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Options that would be passed over in silence."""
        if self.whiten and self.metric != "influence":
            raise ConfigError(
                f"influence.whiten is for the metric influence, and this one is {self.metric}",
                fix="leave whiten out, or set metric: influence",
            )
        if self.adam != "none" and self.metric not in ("dot", "cosine"):
            raise ConfigError(
                f"influence.adam is for the metrics dot and cosine, and this one is {self.metric}",
                fix="leave adam out, or set metric: cosine",
            )
        if self.layers != _MATRICES and (self.head or self.embedding):
            raise ConfigError(
                f"influence.layers is {self.layers!r}, which says by itself whether head and"
                " embedding are among them",
                fix="leave head and embedding out, or set layers: matrices",
            )

    @property
    def uses_index(self) -> bool:
        """Whether the scores come from rows of an index: all but ekfac."""
        return self.metric != "ekfac"

    @property
    def has_curvature(self) -> bool:
        """Whether queries are preconditioned by sums over the rows of the pool."""
        return self.metric in ("influence", "trak")

    @property
    def needs(self) -> frozenset[str]:
        own = {"self_value"} if self.metric == "influence" else set[str]()
        return frozenset({"value", "mean_loss", *own})

    @property
    def columns(self) -> Mapping[str, str]:
        found = {
            "influence": f"{_HELP}; any number, in the units of the metric",
            "influence_loss": "mean cross-entropy in the same pass, nats, to compare with",
        }
        if self.metric == "influence":
            found["influence_self"] = (
                "influence on itself, 0 and up, its mean the effective dimension; higher is harder,"
                " rarer or wrong"
            )
        return found

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {"influence": quantities["value"], "influence_loss": quantities["mean_loss"]}
        if self.metric == "influence":
            found["influence_self"] = quantities["self_value"]
        return found
