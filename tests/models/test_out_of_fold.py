"""Folds, features and models that judge what they did not see."""

import logging
from typing import Any

import numpy as np
import pytest

from curate.models.out_of_fold import (
    ALL_FOLDS,
    NOT_JUDGED,
    Classifiers,
    Features,
    Split,
    fit_folds,
    split_folds,
)

GENERATOR = np.random.default_rng(0)


def split(labels: np.ndarray, contents: np.ndarray | None = None, **changes: Any) -> Split:
    if contents is None:
        contents = np.arange(len(labels)).astype(np.uint64) * np.uint64(977)
    how: dict[str, Any] = {"num_folds": 5, "fit_rows": 10**6, "seed": 0, **changes}
    is_train = how.pop("is_train", np.ones(len(labels), dtype=bool))
    return split_folds(labels, contents, is_train, **how)


def test_each_class_is_spread_evenly_over_the_folds():
    labels = np.repeat([0, 1, 2], [50, 7, 203])
    folds = split(labels).folds
    for label, size in ((0, 50), (1, 7), (2, 203)):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.sum() == size
        assert counts.max() - counts.min() <= 1


def test_copies_share_a_fold_whatever_their_labels():
    contents = GENERATOR.integers(0, 80, 400).astype(np.uint64)
    labels = GENERATOR.integers(0, 3, 400)
    folds = split(labels, contents).folds
    for content in np.unique(contents):
        assert len(set(folds[contents == content])) == 1


def test_folds_follow_from_content_label_and_seed_and_from_no_order():
    labels = GENERATOR.integers(0, 4, 300)
    contents = GENERATOR.permutation(300).astype(np.uint64)
    order = GENERATOR.permutation(300)
    one, two = split(labels, contents), split(labels[order], contents[order])
    assert one.folds[order].tolist() == two.folds.tolist()
    assert split(labels, contents, seed=1).folds.tolist() != one.folds.tolist()


def test_a_class_smaller_than_the_folds_and_rows_without_label_are_not_judged():
    labels = np.array([0] * 20 + [1] * 20 + [2] * 4 + [-1] * 3)
    found = split(labels)
    assert found.small == {2: 4}
    assert (found.folds[40:] == NOT_JUDGED).all()
    assert (found.folds[:40] >= 0).all()
    assert found.is_fitted.tolist() == [True] * 40 + [False] * 7


def test_copies_do_not_make_a_small_class_large():
    contents = np.array([*range(20), *[50, 51] * 10], dtype=np.uint64)
    found = split(np.repeat([0, 1], 20), contents)
    assert found.small == {1: 2}


def test_held_out_examples_are_judged_by_all_and_fitted_by_none():
    labels = np.tile([0, 1], 30)
    is_train = np.arange(60) >= 10
    found = split(labels, is_train=is_train)
    assert (found.folds[:10] == ALL_FOLDS).all()
    assert not found.is_fitted[:10].any()
    # A class that stands in the held-out part alone is known to no model.
    labels[0] = 7
    assert split(labels, is_train=is_train).folds[0] == NOT_JUDGED


def test_a_sample_takes_small_classes_whole():
    labels = np.repeat([0, 1], [5000, 30])
    found = split(labels, fit_rows=500)
    counts = np.bincount(labels[found.is_fitted])
    assert counts.tolist() == [498, 30]
    assert (found.folds >= 0).all()


def test_every_row_is_judged_by_the_model_that_did_not_see_it():
    """A row alone in a class-free corner is remembered by a model that saw it, and only by it."""
    labels = np.array([0, 1] * 30)
    rows = np.zeros((60, 60), dtype=np.float32)
    rows[np.arange(60), np.arange(60)] = 10  # each row has a feature of its own
    folds = split(labels).folds
    models = fit_folds(rows, labels, folds, num_folds=5, num_classes=2, penalty=0.01)
    own = models.probabilities(rows, folds)[np.arange(60), labels]
    seen = models.probabilities(rows, (folds + 1).astype(np.int8) % 5)[np.arange(60), labels]
    assert own == pytest.approx(np.full(60, 0.5), abs=0.02)
    assert (seen > 0.9).all()


def test_probabilities_are_the_library_s_own():
    from sklearn.linear_model import LogisticRegression

    for num_classes in (2, 4):
        rows = GENERATOR.normal(size=(200, 6)).astype(np.float32)
        labels = (rows[:, :num_classes]).argmax(axis=1)
        folds = split(labels, num_folds=3).folds
        models = fit_folds(rows, labels, folds, num_folds=3, num_classes=num_classes, penalty=2.0)
        found = models.probabilities(rows, folds)
        for fold in range(3):
            library = LogisticRegression(C=0.5, max_iter=200)
            library.fit(rows[folds != fold], labels[folds != fold])
            wanted = library.predict_proba(rows[folds == fold])
            np.testing.assert_allclose(found[folds == fold], wanted, atol=1e-5)
        everyone = np.full(200, ALL_FOLDS, dtype=np.int8)
        each = [models.probabilities(rows, np.full(200, f, dtype=np.int8)) for f in range(3)]
        np.testing.assert_allclose(models.probabilities(rows, everyone), np.mean(each, axis=0))


def test_a_class_that_a_model_never_saw_has_probability_0():
    rows = GENERATOR.normal(size=(40, 3)).astype(np.float32)
    labels = np.array([0, 3] * 20)
    folds = split(labels, num_folds=2).folds
    models = fit_folds(rows, labels, folds, num_folds=2, num_classes=5, penalty=1.0)
    found = models.probabilities(rows, folds)
    assert (found[:, [1, 2, 4]] == 0).all()
    assert found.sum(axis=1) == pytest.approx(np.ones(40))
    assert np.isnan(models.probabilities(rows[:1], np.array([NOT_JUDGED], np.int8))).all()


def test_texts_become_unit_vectors_of_words_that_occur_twice():
    texts = ["the cat sat", "the cat ran", "A dog sat", "x", ""]
    features, matrix = Features.of_texts(texts, num_models=10)
    assert matrix.shape == (5, 4)  # the, cat, sat, "the cat"
    lengths = np.asarray(matrix.power(2).sum(axis=1)).ravel()
    assert lengths == pytest.approx([1, 1, 1, 0, 0])
    assert (features.apply(texts) - matrix).nnz == 0
    # Smoothed inverse document frequency: ln((1 + 5) / (1 + 2)) + 1 for each of them.
    assert features.scale == pytest.approx(np.full(4, np.log(2) + 1))


def test_words_are_dropped_where_coefficients_would_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("curate.models.out_of_fold._WEIGHT_BYTES", 2 * 4 * 3)
    texts = ["one two", "one two", "one three", "one three"]
    with caplog.at_level(logging.WARNING):
        features, matrix = Features.of_texts(texts, num_models=2)
    assert matrix.shape == (4, 3)
    assert features.columns is not None
    assert "3 of 5 words count" in caplog.text
    assert np.asarray((matrix > 0).sum(axis=0)).max() == 4  # "one" stays


def test_characters_tell_words_without_spaces_apart():
    texts = ["ab", "ab", "cd", "cd"]
    _, matrix = Features.of_texts(texts, num_models=2, words="characters")
    assert matrix[0].multiply(matrix[2]).nnz == 0
    assert matrix[0].nnz > 1


def test_numbers_are_standardised_and_constant_ones_vanish():
    rows = np.array([[1, 5, 2], [3, 5, 2], [5, 5, 8]], dtype=np.float32)
    features, matrix = Features.of_numbers(rows)
    np.testing.assert_allclose(matrix.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(matrix.std(axis=0), [1, 0, 1], atol=1e-6)
    again = Features.from_arrays(features.arrays())
    np.testing.assert_array_equal(again.apply(rows), matrix)


def test_a_fit_that_did_not_converge_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("curate.models.out_of_fold._STEPS", 1)
    rows = GENERATOR.normal(size=(50, 4)).astype(np.float32)
    labels = (rows.sum(axis=1) > 0).astype(np.int64)
    with caplog.at_level(logging.WARNING):
        found = fit_folds(
            rows, labels, split(labels).folds, num_folds=5, num_classes=2, penalty=1e-4
        )
    assert isinstance(found, Classifiers)
    assert "before it had converged" in caplog.text
