"""Density ratio: how much likelier an example is under the target than under the pool, as a weight.

    r(x) = (n_s / n_t) pi(x) / (1 - pi(x))         pi(x): probability, by a classifier of target
                                                   against pool, that x is of the target
    w(x) = min(r(x), c) / mean of min(r, c)        c: the 99th percentile of r over the pool
    ESS  = (sum w)^2 / sum w^2                     effective examples that the weights leave

with n_s examples of the pool and n_t of the target in the fit. Weighted by r, a mean over the pool
estimates the mean over the target, which is what covariate shift asks for.

Source: Bickel, Brueckner and Scheffer, "Discriminative Learning Under Covariate Shift", JMLR 10,
2009; Sugiyama, Suzuki and Kanamori, "Density Ratio Estimation in Machine Learning", Cambridge
University Press, 2012. Calibration: Platt, "Probabilistic Outputs for Support Vector Machines",
1999, his smoothed targets included.

Departures: the classifier is a logistic regression fitted on folds, and each example is judged by
the one that saw neither it nor a copy of it; the two numbers of the calibration are common to all
folds and its slope is never negative, so that a classifier that tells nothing gives 1 everywhere.
Target examples that look less like the pool than any example of the pool are counted and named, as
no weight can stand for them (the two-sided half of double weighting).
Cost: `folds` logistic regressions on at most `fit_rows` examples of the pool and all of the target,
and one pass over vectors or texts; 8 bytes of memory for each example of the pool.
Shapes: N examples of the pool, T of the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Scale(NamedTuple):
    """What turns a log ratio into a weight."""

    cut: float
    """Largest log ratio that counts."""
    mean: float
    """Of exp(min(log r, cut) - cut) over the pool, in (0, 1]."""
    effective: float
    """Effective examples."""


def scale_of(log_ratios: Floats, *, clip: float) -> Scale:
    """Clipping point, mean and effective sample size over the pool.

    Args:
        log_ratios: (N,) finite, at least one.
        clip: quantile at which ratios are cut, in (0, 1].
    """
    cut = float(np.quantile(log_ratios, clip, method="lower"))
    # Relative to the largest, so that no ratio leaves the range of floats.
    relative = np.exp(np.minimum(log_ratios, cut) - cut)
    total = float(relative.sum())
    return Scale(cut, total / len(relative), total**2 / float(np.square(relative).sum()))


def weights_of(log_ratios: Floats, scale: Scale) -> Floats:
    """(N,) clipped ratios, of mean 1 over the pool that gave the scale; NaN stays NaN."""
    return np.exp(np.minimum(log_ratios, scale.cut) - scale.cut) / scale.mean


def is_supported(target: Floats, pool: Floats) -> Bools:
    """(T,) False where no example of the pool has so high a ratio.

    Args:
        target: (T,) log ratios of the target's examples, each by a model that did not see it.
        pool: (N,) log ratios, at least one.
    """
    return target <= pool.max()


@dataclass(frozen=True, slots=True, kw_only=True)
class DensityRatio:
    """Importance weights of the pool's examples for `target`, by a classifier."""

    __pydantic_config__: ClassVar = STRICT

    on: Literal["vectors", "ngrams"] = "vectors"
    """What the classifier reads: vectors of `curate embed`, or hashed counts of words and pairs of
    words in the texts."""
    vectors: str | None = None
    """Which representation; None where there is one."""
    words: Literal["words", "characters"] = "words"
    """With on: ngrams, what is counted; characters are for languages without spaces."""
    folds: int = 5
    """Parts of the data; each is judged by a model that was fitted on the others."""
    fit_rows: int = 50_000
    """Most examples of the pool that models are fitted on, and as many of the target."""
    penalty: float = 1.0
    """Weight of half the squared coefficients against the summed loss; features are scaled to a
    mean squared length of 1."""
    clip: float = 0.99
    """Quantile of the pool's ratios above which they are cut; 1 cuts nothing."""
    force: bool = False
    """Write weights that leave less than 5 % of the pool as effective examples all the same."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"density_ratio", "density_ratio_log", "density_ratio_probability"}
    )
    columns: ClassVar[Mapping[str, str]] = {
        "density_ratio": "clipped ratio of target to pool density, mean 1, at least 0: a weight",
        "density_ratio_log": "log of the ratio before it is clipped, any number; 0 is as likely in"
        " both, high is likelier in the target",
        "density_ratio_probability": "probability of the target at even odds, 0 to 1",
    }

    def __post_init__(self) -> None:
        if not 2 <= self.folds <= 100:
            raise ConfigError(f"folds is {self.folds}, not 2 to 100", fix="set it to 5")
        if not 0 < self.clip <= 1:
            raise ConfigError(f"clip is {self.clip}, outside (0, 1]", fix="set it to 0.99")
        if self.fit_rows < 1 or self.penalty <= 0:
            raise ConfigError(
                f"fit_rows is {self.fit_rows} and penalty {self.penalty}",
                fix="both are above 0: remove them to use the defaults",
            )

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: quantities[name] for name in self.columns}
