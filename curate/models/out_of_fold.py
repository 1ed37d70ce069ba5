"""Class probabilities of examples by simple models that did not see them.

Folds are drawn class by class over distinct contents, so that copies of an example share a fold.
Features are word counts (hashed, tf-idf) or standardised numbers; the model is a multinomial
logistic regression, scikit-learn's.

Shapes: N examples, F features, C classes, K folds.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64]
Folds = npt.NDArray[np.int8]
Numbers = npt.NDArray[np.float32]

ALL_FOLDS = -1
"""Fold of an example that no model is fitted on: all of them judge it."""
NOT_JUDGED = -2
"""Fold of an example without a label, or of a class that is too small."""

_HASHED = 1 << 18
_WEIGHT_BYTES = 1 << 29
"""Most memory that the coefficients of all folds may take; rare words go first."""
_STEPS = 200

Words = Literal["words", "characters"]
"""What is counted of a text: words and pairs of them, or runs of two to four characters."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which examples are fitted on, and which model judges which."""

    folds: Folds
    """(N,) in [0, K), or `ALL_FOLDS` or `NOT_JUDGED`."""
    is_fitted: npt.NDArray[np.bool_]
    """(N,) True for the examples that the models of other folds are fitted on."""
    small: dict[int, int]
    """Class -> its distinct examples, where there are fewer than K."""


def split_folds(
    labels: Labels,
    contents: npt.NDArray[np.uint64],
    is_train: npt.NDArray[np.bool_],
    *,
    num_folds: int,
    fit_rows: int,
    seed: int,
) -> Split:
    """Draw folds, and what is fitted on.

    Args:
        labels: (N,) classes; -1 where there is none.
        contents: (N,) content hashes: equal ones share a fold.
        is_train: (N,) False for held-out examples, which all models judge and none sees.
        num_folds: K.
        fit_rows: about how many examples to fit on; small classes are taken whole.
        seed: of the draw, which depends on contents and labels, and on no order.
    """
    known = is_train & (labels >= 0)
    pairs = np.unique(np.stack([labels[known].astype(np.uint64), contents[known]]), axis=1)
    classes, sizes = np.unique(pairs[0], return_counts=True)
    small = {int(c): int(n) for c, n in zip(classes, sizes, strict=True) if n < num_folds}
    judged = (labels >= 0) & ~np.isin(labels, list(small))
    judged &= np.isin(labels, classes.astype(np.int64))  # a class that is only held out is unknown
    usable = judged & is_train
    # Of a content with several labels the first class gives the fold.
    found = np.unique(contents[usable])
    lowest = np.full(len(found), np.iinfo(np.int64).max)
    places = np.searchsorted(found, contents[usable])
    np.minimum.at(lowest, places, labels[usable])
    order = np.lexsort((found, _draws(found, seed), lowest))
    ranks = np.empty(len(found), dtype=np.int64)
    starts = np.searchsorted(lowest[order], lowest[order])
    ranks[order] = np.arange(len(found)) - starts
    share = min(1.0, fit_rows / max(1, int(usable.sum())))
    counts = np.bincount(lowest, minlength=1) if len(found) else np.zeros(1, dtype=np.int64)
    quota = np.maximum(np.ceil(share * counts), np.minimum(counts, 10 * num_folds))
    folds = np.where(judged, ALL_FOLDS, NOT_JUDGED).astype(np.int8)
    # Shifted by the class, so that the first fold is not the largest.
    folds[usable] = ((ranks + lowest) % num_folds)[places]
    is_fitted = np.zeros(len(labels), dtype=bool)
    is_fitted[usable] = (ranks < quota[lowest])[places]
    return Split(folds, is_fitted, small)


def _draws(contents: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """A number from each content and the seed (the finaliser of splitmix64)."""
    mixed = contents ^ np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Features:
    """How examples become the rows of a matrix; fitted without their labels."""

    columns: npt.NDArray[np.int64] | None
    """(F,) hashes of the words that count, of texts; None for numbers."""
    shift: npt.NDArray[np.float32]
    """(F,) mean of each number; nothing for texts."""
    scale: npt.NDArray[np.float32]
    """(F,) one over the deviation of each number; of texts the inverse document frequency."""
    words: Words = "words"

    @classmethod
    def of_texts(
        cls, texts: Sequence[str], *, num_models: int, words: Words = "words"
    ) -> tuple[Self, Any]:
        """From texts; what stands in at least two of them.

        Args:
            texts: that models are fitted on.
            words: what is counted.
            num_models: folds times classes: bounds the number of words.

        Returns:
            The features, and the texts as a sparse matrix (N, F).
        """
        counts = _word_counts(texts, words)
        common = counts.getnnz(axis=0)
        most = max(1, _WEIGHT_BYTES // (4 * num_models))
        columns = np.flatnonzero(common >= min(2, len(texts)))
        if len(columns) > most:
            log.warning("label_issues: %d of %d words count, the most frequent ones",
                        most, len(columns))  # fmt: skip
            columns = np.sort(columns[np.argsort(-common[columns], kind="stable")[:most]])
        scale = np.log((1 + len(texts)) / (1 + common[columns])) + 1
        features = cls(columns, np.empty(0, np.float32), scale.astype(np.float32), words)
        return features, features.weigh(counts)

    @classmethod
    def of_numbers(cls, rows: Numbers) -> tuple[Self, Numbers]:
        """From rows of numbers (N, F), all finite; and these rows, standardised."""
        shift = rows.mean(axis=0, dtype=np.float64)
        deviation = rows.std(axis=0, dtype=np.float64)
        scale = np.where(deviation > 0, 1 / np.maximum(deviation, 1e-30), 0.0)
        features = cls(None, shift.astype(np.float32), scale.astype(np.float32))
        return features, features.apply(rows)

    def apply(self, values: Sequence[str] | Numbers) -> Any:
        """Texts, or rows of numbers, as a matrix (N, F)."""
        if isinstance(values, np.ndarray):
            return (values - self.shift) * self.scale
        return self.weigh(_word_counts(values, self.words))

    def weigh(self, counts: Any) -> Any:
        """Word counts (N, hashes) as tf-idf of unit length (N, F)."""
        from sklearn.preprocessing import normalize

        assert self.columns is not None
        chosen = counts[:, self.columns].astype(np.float32)
        chosen.data = (1 + np.log(chosen.data)) * self.scale[chosen.indices]
        return normalize(chosen, copy=False)

    def arrays(self) -> dict[str, np.ndarray]:
        """To be saved; see `from_arrays`."""
        columns = {} if self.columns is None else {"columns": self.columns}
        return {**columns, "shift": self.shift, "scale": self.scale}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], words: Words = "words") -> Self:
        return cls(arrays.get("columns"), arrays["shift"], arrays["scale"], words)


def _word_counts(texts: Sequence[str], words: Words) -> Any:
    """(N, hashes) counts, sparse."""
    from sklearn.feature_extraction.text import HashingVectorizer

    # One letter counts as a word too: in many scripts it is one.
    how: dict[str, Any] = (
        {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}
        if words == "words"
        else {"ngram_range": (2, 4), "analyzer": "char_wb"}
    )
    hashing: Any = HashingVectorizer(
        n_features=_HASHED, alternate_sign=False, norm=cast(Any, None), dtype=cast(Any, np.float32),
        **how,
    )  # fmt: skip
    return hashing.transform(texts).tocsr()


@dataclass(frozen=True, slots=True)
class Classifiers:
    """One logistic regression for each fold, fitted on the others."""

    weights: npt.NDArray[np.float32]
    """(K, C, F)."""
    biases: npt.NDArray[np.float32]
    """(K, C); minus infinity for a class that a model never saw."""

    def probabilities(self, matrix: Any, folds: Folds) -> npt.NDArray[np.float64]:
        """Probabilities by the model of each example's own fold, which did not see it.

        Args:
            matrix: (N, F) from `Features.apply`.
            folds: (N,) as in `Split.folds`.

        Returns:
            (N, C); the mean over all models for `ALL_FOLDS`, NaN for `NOT_JUDGED`.
        """
        num_folds, num_classes = self.biases.shape
        found = np.full((len(folds), num_classes), np.nan)
        for fold in range(num_folds):
            rows = np.flatnonzero(folds == fold)
            if len(rows):
                found[rows] = self._by_model(matrix[rows], fold)
        rows = np.flatnonzero(folds == ALL_FOLDS)
        if len(rows):
            each = [self._by_model(matrix[rows], fold) for fold in range(num_folds)]
            found[rows] = np.mean(each, axis=0)
        return found

    def _by_model(self, matrix: Any, fold: int) -> npt.NDArray[np.float64]:
        scores = np.asarray(matrix @ self.weights[fold].T, dtype=np.float64) + self.biases[fold]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return scores / scores.sum(axis=1, keepdims=True)


def fit_folds(
    matrix: Any,
    labels: Labels,
    folds: Folds,
    *,
    num_folds: int,
    num_classes: int,
    penalty: float,
) -> Classifiers:
    """Fit one model for each fold on the examples of the others.

    Args:
        matrix: (N, F) dense or sparse, the examples that are fitted on.
        labels: (N,) in [0, C); every fold's complement has at least two classes.
        folds: (N,) in [0, K).
        num_folds: K.
        num_classes: C.
        penalty: weight of half the squared coefficients against the summed loss.
    """
    weights = np.zeros((num_folds, num_classes, matrix.shape[1]), dtype=np.float32)
    biases = np.full((num_folds, num_classes), -np.inf, dtype=np.float32)
    for fold in range(num_folds):
        rows = np.flatnonzero(folds != fold)
        model = _fitted(matrix[rows], labels[rows], penalty)
        seen = model.classes_
        coefficients, intercepts = model.coef_, model.intercept_
        if len(seen) == 2:  # one row, of the second class against the first
            coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
            intercepts = np.concatenate([np.zeros_like(intercepts), intercepts])
        weights[fold, seen], biases[fold, seen] = coefficients, intercepts
    return Classifiers(weights, biases)


def _fitted(matrix: Any, labels: Labels, penalty: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / penalty, max_iter=_STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(matrix, labels)
    if caught:
        log.warning("label_issues: a fit stopped after %d steps, before it had converged", _STEPS)
    return model
