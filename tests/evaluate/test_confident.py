"""Confident learning against plain loops over the definitions, and by hand."""

import math

import numpy as np
import pytest

from curate.evaluate.confident import (
    ClassSums,
    Judged,
    Largest,
    calibrated_joint,
    class_sums,
    confident_classes,
    confident_joint,
    judge,
    thresholds,
)


def pool(
    num_examples: int, num_classes: int, *, seed: int, noise: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities around a true class, and labels of which some are wrong."""
    generator = np.random.default_rng(seed)
    true = generator.integers(num_classes, size=num_examples)
    logits = generator.normal(size=(num_examples, num_classes))
    logits[np.arange(num_examples), true] += 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    flipped = (true + generator.integers(1, num_classes, num_examples)) % num_classes
    labels = np.where(generator.random(num_examples) < noise, flipped, true)
    return probabilities, labels.astype(np.int64)


def whole(probabilities: np.ndarray, labels: np.ndarray, pieces: int = 1) -> Judged:
    """All steps, over the data in pieces."""
    parts = list(
        zip(np.array_split(probabilities, pieces), np.array_split(labels, pieces), strict=True)
    )
    num_classes = probabilities.shape[1]
    sums = ClassSums(np.zeros(num_classes), np.zeros(num_classes, dtype=np.int64))
    for part in parts:
        sums = sums.plus(class_sums(*part))
    limits = thresholds(sums)
    joint = np.zeros((num_classes, num_classes), dtype=np.int64)
    for part in parts:
        joint += confident_joint(*part, limits)
    largest = Largest(np.rint(calibrated_joint(joint, sums.counts)).astype(np.int64))
    for part in parts:
        largest.add(*part)
    return judge(probabilities, labels, limits, largest.cutoffs())


def by_loops(probabilities: np.ndarray, labels: np.ndarray) -> tuple[list[bool], list[bool]]:
    """Flags and off-diagonals, example by example, straight from the paper's formulas."""
    num_classes = len(probabilities[0])
    rows = [[float(p) for p in row] for row in probabilities]
    given = [int(label) for label in labels]
    limits: list[float] = []
    for j in range(num_classes):
        own = [row[j] for row, label in zip(rows, given, strict=True) if label == j]
        limits.append(sum(own) / len(own) if own else math.inf)
    sure: list[int | None] = []
    for row in rows:
        reached = [j for j in range(num_classes) if row[j] >= limits[j]]
        sure.append(max(reached, key=lambda j: row[j]) if reached else None)
    flagged = [False] * len(rows)
    for i in range(num_classes):
        mine = [n for n, label in enumerate(given) if label == i]
        in_row = sum(1 for n in mine if sure[n] is not None)
        for j in range(num_classes):
            if i == j or not in_row:
                continue
            count = sum(1 for n in mine if sure[n] == j)
            wanted = round(count / in_row * len(mine))
            ranked = sorted(mine, key=lambda n: rows[n][i] - rows[n][j])
            for n in ranked[:wanted]:
                flagged[n] = True
    for n, row in enumerate(rows):
        if row[given[n]] == max(row):
            flagged[n] = False
    off = [s is not None and s != label for s, label in zip(sure, given, strict=True)]
    return flagged, off


@pytest.mark.parametrize(("num_classes", "seed"), [(2, 0), (3, 1), (5, 2), (12, 3)])
@pytest.mark.parametrize("pieces", [1, 7])
def test_flags_are_those_of_a_plain_loop_over_the_definitions(
    num_classes: int, seed: int, pieces: int
):
    probabilities, labels = pool(400, num_classes, seed=seed)
    found = whole(probabilities, labels, pieces)
    flagged, off = by_loops(probabilities, labels)
    assert found.is_issue.tolist() == flagged
    assert found.is_off_diagonal.tolist() == off
    assert 0.05 < np.mean(flagged) < 0.6
    for n in range(400):
        own = probabilities[n, labels[n]]
        others = np.delete(probabilities[n], labels[n])
        assert found.self_confidence[n] == own
        assert found.margin[n] == own - others.max()
        assert found.likely[n] == probabilities[n].argmax()


def test_a_case_by_hand():
    """Two classes: thresholds (0.9 + 0.8 + 0.1) / 3 = 0.6 and (0.7 + 0.6 + 0.2) / 3 = 0.5."""
    first = np.array([0.9, 0.8, 0.1, 0.3, 0.4, 0.8])
    probabilities = np.stack([first, 1 - first], axis=1)
    labels = np.array([0, 0, 0, 1, 1, 1])
    sums = class_sums(probabilities, labels)
    limits = thresholds(sums)
    assert limits.tolist() == pytest.approx([0.6, 0.5])
    assert confident_classes(probabilities, limits).tolist() == [0, 0, 1, 1, 1, 0]
    joint = confident_joint(probabilities, labels, limits)
    assert joint.tolist() == [[2, 1], [1, 2]]
    assert calibrated_joint(joint, sums.counts).tolist() == [[2, 1], [1, 2]]
    found = whole(probabilities, labels)
    assert found.is_issue.tolist() == [False, False, True, False, False, True]
    assert found.margin.tolist() == pytest.approx([0.8, 0.6, -0.8, 0.4, 0.2, -0.6])


def test_calibration_scales_each_row_to_the_number_of_its_label():
    joint = np.array([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    counts = np.array([16, 5, 4])
    found = calibrated_joint(joint, counts)
    assert found.tolist() == [[12, 4, 0], [0, 5, 0], [1, 0, 3]]
    assert found.sum(axis=1).tolist() == counts.tolist()


def test_perfect_labels_have_no_issue():
    probabilities, _ = pool(200, 4, seed=5)
    found = whole(probabilities, probabilities.argmax(axis=1))
    assert not found.is_issue.any()
    assert (found.margin > 0).all()


def test_permuting_examples_or_classes_permutes_the_verdicts():
    probabilities, labels = pool(300, 4, seed=6)
    found = whole(probabilities, labels)
    generator = np.random.default_rng(0)
    order = generator.permutation(300)
    again = whole(probabilities[order], labels[order])
    assert again.is_issue.tolist() == found.is_issue[order].tolist()
    names = np.array([2, 0, 3, 1])  # new name of each class
    renamed = whole(probabilities[:, np.argsort(names)], names[labels])
    assert renamed.is_issue.tolist() == found.is_issue.tolist()
    assert renamed.likely.tolist() == names[found.likely].tolist()


def test_equal_examples_are_flagged_alike():
    probabilities, labels = pool(60, 3, seed=7)
    twice = whole(np.repeat(probabilities, 5, axis=0), np.repeat(labels, 5))
    assert (twice.is_issue.reshape(60, 5).sum(axis=1) % 5 == 0).all()
    assert twice.is_issue.any()


def test_a_class_that_no_example_is_given_is_never_a_verdict():
    probabilities, labels = pool(100, 3, seed=8)
    wide = np.concatenate([probabilities * 0.5, np.full((100, 1), 0.5)], axis=1)
    found = whole(wide, labels)
    limits = thresholds(class_sums(wide, labels))
    assert math.isinf(limits[3])
    assert not (confident_classes(wide, limits) == 3).any()
    assert found.self_confidence.max() <= 0.5
