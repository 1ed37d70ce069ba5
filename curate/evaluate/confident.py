"""Confident learning: which given labels are probably wrong, by out-of-sample probabilities.

For the given label i of an example x and probabilities p(x) of a model that did not see it:

    t_j     = mean of p_j(x) over the examples with given label j                       (Eq. 2)
    C_ij    = #{x with label i : j = argmax of p_l(x) over the l with p_l(x) >= t_l}      (Eq. 1)
    Q_ij    = C_ij / sum_j C_ij * (number of examples with label i)     calibrated joint  (Eq. 3)

`C` is the confident joint: off its diagonal stand the examples that are confidently of another
class than they say. Pruning by noise rate flags, for each pair i != j, the Q_ij examples of label i
with the largest p_j - p_i (section 3.2, method 4).

Source: Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels",
JAIR 70, 2021, arXiv:1911.00068.

Departures: Q counts examples and is not divided by their number; Q_ij is rounded to the nearest
count. An example whose own label is the most probable one is never flagged, as in the authors' code
(the paper does not say so). Cut-offs are kept in place of ranks, so that equal examples are flagged
alike. A label that no example is confidently of, itself included, has nothing to flag.
Cost: three reads of the probabilities; memory O(C^2) and what is flagged.
Shapes: N examples, C classes.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class ClassSums(NamedTuple):
    """What the thresholds are made of; sums of pieces add up."""

    own: Floats
    """(C,) sum of p_j over the examples with label j."""
    counts: Counts
    """(C,) their number."""

    def plus(self, more: "ClassSums") -> "ClassSums":
        return ClassSums(self.own + more.own, self.counts + more.counts)


def class_sums(probabilities: Floats, labels: Counts) -> ClassSums:
    """Sums over some examples.

    Args:
        probabilities: (N, C), rows summing to 1.
        labels: (N,) given labels in [0, C).
    """
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    return ClassSums(
        np.bincount(labels, weights=own, minlength=num_classes).astype(np.float64),
        np.bincount(labels, minlength=num_classes),
    )


def thresholds(sums: ClassSums) -> Floats:
    """(C,) mean self-confidence of each class; infinity for a class without examples."""
    return np.where(sums.counts > 0, sums.own / np.maximum(sums.counts, 1), np.inf)


def confident_classes(probabilities: Floats, limits: Floats) -> Counts:
    """The class each example is confidently of: the most probable of those at their threshold.

    Args:
        probabilities: (N, C).
        limits: (C,) from `thresholds`.

    Returns:
        (N,) classes; -1 where no class reaches its threshold.
    """
    reached = np.where(probabilities >= limits, probabilities, -1.0)
    return np.where(reached.max(axis=1) < 0, -1, reached.argmax(axis=1))


def confident_joint(probabilities: Floats, labels: Counts, limits: Floats) -> Counts:
    """(C, C) examples by given label and confident class; pieces add up."""
    num_classes = len(limits)
    found = confident_classes(probabilities, limits)
    sure = found >= 0
    cells = labels[sure] * num_classes + found[sure]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def calibrated_joint(joint: Counts, counts: Counts) -> Floats:
    """The joint with rows scaled to the number of examples of each given label.

    Args:
        joint: (C, C) from `confident_joint`.
        counts: (C,) examples of each given label.

    Returns:
        (C, C) expected numbers of examples; a row without confident examples has all of its
        examples on the diagonal.
    """
    rows = joint.sum(axis=1, keepdims=True)
    scaled = joint / np.maximum(rows, 1) * counts[:, None]
    return np.where(rows > 0, scaled, np.diag(counts.astype(np.float64)))


class Largest:
    """The largest margins of each pair of given label and other class, over pieces of the data.

    Args:
        num_flagged: (C, C) how many of each pair to keep; the diagonal does not count.
    """

    def __init__(self, num_flagged: Counts) -> None:
        self._wanted = {
            (int(given), int(other)): int(num_flagged[given, other])
            for given, other in np.argwhere(num_flagged > 0)
            if given != other
        }
        self._kept = {pair: np.empty(0) for pair in self._wanted}
        self._num_classes = len(num_flagged)

    def add(self, probabilities: Floats, labels: Counts) -> None:
        """Look at more examples; see `class_sums`."""
        for (given, other), wanted in self._wanted.items():
            mine = probabilities[labels == given]
            both = np.concatenate([self._kept[given, other], mine[:, other] - mine[:, given]])
            self._kept[given, other] = -np.partition(-both, wanted - 1)[:wanted] if (
                len(both) > wanted
            ) else both  # fmt: skip

    def cutoffs(self) -> Floats:
        """(C, C) smallest margin that is flagged; infinity where nothing is."""
        found = np.full((self._num_classes, self._num_classes), np.inf)
        for pair, kept in self._kept.items():
            if len(kept):
                found[pair] = kept.min()
        return found


class Judged(NamedTuple):
    """What confident learning says of each example, all (N,)."""

    self_confidence: Floats
    """Probability of the given label."""
    margin: Floats
    """That, less the probability of the best other class, -1 to 1."""
    likely: Counts
    """The most probable class; the given one where two are equal."""
    is_issue: npt.NDArray[np.bool_]
    """Flagged by pruning by noise rate."""
    is_off_diagonal: npt.NDArray[np.bool_]
    """Confidently of another class than the given one."""


def judge(probabilities: Floats, labels: Counts, limits: Floats, cutoffs: Floats) -> Judged:
    """Judge examples.

    Args:
        probabilities: (N, C).
        labels: (N,) given labels.
        limits: (C,) from `thresholds`.
        cutoffs: (C, C) from `Largest.cutoffs`.
    """
    index = np.arange(len(labels))
    own = probabilities[index, labels]
    others = probabilities.copy()
    others[index, labels] = -1.0
    best = others.max(axis=1)
    is_other = best > own
    beyond = (probabilities - own[:, None] >= cutoffs[labels]).any(axis=1)
    sure = confident_classes(probabilities, limits)
    return Judged(
        self_confidence=own,
        margin=own - best,
        likely=np.where(is_other, others.argmax(axis=1), labels),
        is_issue=is_other & beyond,
        is_off_diagonal=(sure >= 0) & (sure != labels),
    )
