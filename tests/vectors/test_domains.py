import math

import numpy as np
import pytest

from curate.errors import ConfigError
from curate.vectors.domains import (
    NO_VECTOR,
    Domains,
    Words,
    find_clusters,
    names_of,
    place,
    words_of,
)
from curate.vectors.store import Vectors


def _blobs(num: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 30)) * 3
    labels = rng.choice(4, num, p=[0.1, 0.4, 0.3, 0.2])
    return (centres[labels] + rng.standard_normal((num, 30))).astype(np.float32), labels


def test_words_are_typical_by_their_contrast_to_the_pool():
    """By hand, from every text's own words."""
    texts = [
        ["the cat sat", "the cat ran", "a cat and the dog"],
        ["the dog ran", "the dog sat", "the dog ate a bone", "the dog barks"],
    ]
    shares = [0.25, 0.75]
    words = Words(2)
    for cluster, own in enumerate(texts):
        for text in own:
            words.add(cluster, text)
    rates = [
        {w: sum(w in t.split() for t in own) / len(own) for t in own for w in t.split()}
        for own in texts
    ]
    found = words.typical(shares, 2)
    for cluster, own in enumerate(rates):
        often = {w: r for w, r in own.items() if r * len(texts[cluster]) >= 2}
        rest = rates[1 - cluster]  # of two clusters the other one
        scores = {w: r * math.log(r / (rest.get(w, 0) + 0.5 / 7)) ** 2 for w, r in often.items()}
        scores = {w: s for w, s in scores.items() if often[w] > rest.get(w, 0) + 0.5 / 7}
        assert found[cluster] == sorted(scores, key=lambda w: (-scores[w], w))[:2]
    assert [own[0] for own in found] == ["cat", "dog"]
    assert not any("the" in own for own in found)


def test_one_long_text_names_nothing_and_plurals_stand_once():
    words = Words(2)
    for text in ("ship ships ship", "ship ships", "zebra " * 100 + "ships", "ship"):
        words.add(0, text)
    words.add(1, "other things")
    assert words.typical([0.5, 0.5], 5)[0] == ["ship"]


def test_words_of_any_script():
    assert words_of("It's naïve_code, 42 times; ÜBER") == {"it", "naïve", "code", "times", "über"}
    assert words_of("東京都は大きい") >= {"東京", "京都"}
    assert words_of("ภาษา") == {"ภา", "าษ", "ษา"}
    assert words_of("x" * 31 + " ok") == {"ok"}
    assert words_of("Привет мир") == {"привет", "мир"}


def test_names_differ():
    words = [["a1", "b1", "c1", "d1"], ["a1", "b1", "c1"], ["a1", "b1", "e1"], ["a1", "b1"], [], []]
    names = names_of(words, 2)
    assert names == ["a1-b1", "a1-b1-c1", "a1-b1-e1", "a1-b1-4", "cluster-5", "cluster-6"]
    assert names_of([["no", "vector"]], 2) != [NO_VECTOR]


def test_the_clusters_that_were_planted_are_found_the_largest_first():
    rows, labels = _blobs()
    for components in (None, 5, 64):
        options = Domains(clusters=4, components=components)
        centroids = find_clusters(rows, options, seed=0)
        placed = place(Vectors([rows]), centroids)
        assert placed.rows == sorted(np.bincount(labels).tolist(), reverse=True)
        pairs = set(zip(placed.labels.tolist(), labels.tolist(), strict=True))
        assert len(pairs) == 4
        assert find_clusters(rows, options, seed=0).tobytes() == centroids.tobytes()


def test_centroids_in_the_full_space_decide_like_those_along_the_components():
    rows, _ = _blobs()
    options = Domains(clusters=7, components=3)
    centroids = find_clusters(rows, options, seed=1)
    centred = rows - rows.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    seen, theirs = centred @ axes.T, (centroids - rows.mean(axis=0)) @ axes.T
    squares = ((seen[:, None] - theirs[None]) ** 2).sum(axis=2)
    assert (place(Vectors([rows]), centroids).labels == squares.argmin(axis=1)).mean() > 0.995


def test_sums_of_squares_are_those_of_all_rows():
    rows, _ = _blobs()
    rows[3] = np.nan
    centroids = rows[[0, 1]]
    placed = place(Vectors([rows]), centroids)
    squares = ((rows[:, None] - centroids[None]) ** 2).sum(axis=2)
    assert placed.labels[3] == -1
    assert sum(placed.rows) == len(rows) - 1
    assert sum(placed.inertia) == pytest.approx(np.nansum(squares.min(axis=1)), rel=1e-5)


def test_equal_rows_are_one_cluster_and_too_few_are_refused():
    assert len(find_clusters(np.ones((9, 4), np.float32), Domains(clusters=3), seed=0)) == 1
    with pytest.raises(ConfigError, match="3 clusters were asked for, but there are 2 rows"):
        find_clusters(np.ones((2, 4), np.float32), Domains(clusters=3), seed=0)
    with pytest.raises(ConfigError, match="must be positive"):
        Domains(clusters=0)
    with pytest.raises(ConfigError, match="sample is 5 for 20 clusters"):
        Domains(sample=5)
