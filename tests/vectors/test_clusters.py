import numpy as np
import pytest
from sklearn.cluster import KMeans

from curate.errors import ConfigError, InputError
from curate.vectors.clusters import assign, kmeans
from curate.vectors.store import Vectors


def _blobs(seed: int = 0, num: int = 600, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((6, 8)) * 4
    labels = rng.integers(0, 6, num)
    rows = centres[labels] + spread * rng.standard_normal((num, 8))
    return rows.astype(np.float32), labels


def _inertia(rows: np.ndarray, centroids: np.ndarray) -> float:
    squares = ((rows[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)
    return float(squares.min(axis=1).sum())


def test_the_objective_is_as_good_as_that_of_scikit_learn():
    rows, _ = _blobs(spread=2.0)
    theirs = KMeans(6, init="random", random_state=0)
    theirs.set_params(n_init=5).fit(rows)
    assert theirs.inertia_ is not None
    ours = kmeans(Vectors([rows]), 6, seed=0, iterations=50, redo=5)
    assert _inertia(rows, ours) <= 1.01 * float(theirs.inertia_)


def test_centroids_stay_where_a_step_of_lloyd_puts_them():
    rows, _ = _blobs()
    centroids = kmeans(Vectors([rows]), 6, seed=1, iterations=100)
    squares = ((rows[:, None] - centroids[None]) ** 2).sum(axis=2)
    labels = squares.argmin(axis=1)
    again = np.stack([rows[labels == c].mean(axis=0) for c in range(6)])
    np.testing.assert_allclose(centroids, again, atol=1e-4)


def test_every_row_gets_the_centroid_that_all_pairs_say():
    rows, _ = _blobs()
    rows[[5, 300]] = np.nan
    centroids = rows[[0, 1, 2, 0, 7]]  # the fourth is the first again
    whole = assign(Vectors([rows]), centroids)
    lengths = np.sqrt(((rows[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2))
    there = ~np.isnan(lengths).any(axis=1)
    np.testing.assert_array_equal(whole.labels[there], lengths[there].argmin(axis=1))
    np.testing.assert_allclose(whole.distances[there], lengths[there].min(axis=1), rtol=1e-6)
    assert whole.labels[[5, 300]].tolist() == [-1, -1]
    assert np.isnan(whole.distances[[5, 300]]).all()
    cut = assign(Vectors(np.split(rows, [3, 3, 400])), centroids, block_rows=17, threads=2)
    assert cut.labels.tobytes() == whole.labels.tobytes()
    assert cut.distances.tobytes() == whole.distances.tobytes()


def test_the_same_seed_gives_the_same_bytes_in_parts_and_with_threads():
    rows, _ = _blobs(num=3000)
    first = kmeans(Vectors([rows]), 5, seed=4, max_rows_per_centroid=50)
    for vectors, threads in ((Vectors([rows]), 1), (Vectors(np.split(rows, 7 * [9])), 2)):
        again = kmeans(vectors, 5, seed=4, max_rows_per_centroid=50, threads=threads)
        assert again.tobytes() == first.tobytes()
    other = kmeans(Vectors([rows]), 5, seed=5, max_rows_per_centroid=50)
    assert other.tobytes() != first.tobytes()


def test_rows_without_a_vector_do_not_count():
    rows, _ = _blobs()
    holes = np.insert(rows, [0, 10, 600], np.nan, axis=0)
    assert kmeans(Vectors([holes]), 6, seed=0).tobytes() == (
        kmeans(Vectors([rows]), 6, seed=0).tobytes()
    )


def test_spherical_centroids_have_length_one():
    rows, _ = _blobs()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    centroids = kmeans(Vectors([rows]), 6, seed=0, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)


def test_as_many_clusters_as_rows_are_the_rows_and_more_are_refused():
    rows = np.eye(4, dtype=np.float32)
    rows[3] = 0
    found = kmeans(Vectors([rows]), 4, seed=0)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, rows.tolist()))
    rows[2] = np.nan
    with pytest.raises(ConfigError, match="4 clusters were asked for, but there are 3 rows"):
        kmeans(Vectors([rows]), 4, seed=0)
    with pytest.raises(ConfigError, match="2 clusters were asked for, but there is 1 row"):
        kmeans(Vectors([rows[:1]]), 2, seed=0)
    with pytest.raises(ConfigError, match="0 clusters"):
        kmeans(Vectors([rows]), 0, seed=0)


def test_equal_rows_can_be_split_into_several_clusters():
    rows = np.zeros((20, 3), dtype=np.float32)
    centroids = kmeans(Vectors([rows]), 3, seed=0)
    np.testing.assert_allclose(centroids, 0, atol=1e-2)
    found = assign(Vectors([rows]), np.zeros((3, 3), np.float32))
    assert set(found.labels.tolist()) == {0}


def test_an_infinite_number_is_named():
    rows = np.ones((5, 3), dtype=np.float32)
    rows[3, 1] = np.inf
    with pytest.raises(InputError, match="vector 3 has an infinite number"):
        kmeans(Vectors([rows]), 2, seed=0)
