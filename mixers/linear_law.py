"""Linear law: a domain's loss as a weighted sum of the shares, by least squares.

    L_i(p) = c_i + sum_j b_ij p_j

Source: the baseline of Liu et al., "RegMix: Data Mixture as Regression for Language Model
Pre-training", ICLR 2025, arXiv:2407.01492.

Departures: of b only differences matter on the simplex, so that its mean over domains is 0.
It has no optimum inside the simplex: what looks best is always a corner, far from all runs (in
RegMix' own tables 73 % of Enron mails). Only caps and a penalty make a mixture of it.
Cost: none beside the runs.
Shapes: n runs, m domains of the mixture, q losses.
"""

from dataclasses import dataclass

import numpy as np

from mixers.laws import Floats, check_runs


@dataclass(frozen=True, slots=True)
class LinearLaw:
    """Losses of all targets, as linear functions of the mixture."""

    levels: Floats
    """(q,) c."""
    slopes: Floats
    """(q, m) b: below 0 where more of the domain lowers the loss; each row has the mean 0."""

    def losses(self, mixtures: Floats) -> Floats:
        """(n, q) predicted losses of mixtures (n, m)."""
        return self.levels + mixtures @ self.slopes.T

    def gradients(self, mixture: Floats) -> Floats:
        """(q, m) derivatives, the same at every mixture."""
        return self.slopes


def fit(mixtures: Floats, losses: Floats) -> LinearLaw:
    """The law by least squares.

    Args:
        mixtures: (n, m) rows on the simplex.
        losses: (n, q) nats.

    Raises:
        InputError: too few runs, a mixture that is none, or a loss that is no number.
    """
    check_runs(mixtures, losses, least=mixtures.shape[1])
    middle, level = mixtures.mean(0), losses.mean(0)
    # Centred rows add up to 0, so that the smallest solution has slopes that do too.
    slopes, *_ = np.linalg.lstsq(mixtures - middle, losses - level)
    return LinearLaw(level - middle @ slopes, slopes.T)
