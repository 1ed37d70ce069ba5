import numpy as np
import pytest
from sklearn.decomposition import PCA

from curate.errors import ConfigError
from curate.vectors.projection import fit_pca
from curate.vectors.store import Vectors


def _rows(num: int = 500) -> np.ndarray:
    rng = np.random.default_rng(0)
    scales = np.array([5, 3, 2, 1, 0.5, 0.1])
    return (rng.standard_normal((num, 6)) * scales @ rng.standard_normal((6, 6)) + 7).astype(
        np.float32
    )


def test_components_are_those_of_the_singular_values():
    rows = _rows()
    found = fit_pca(Vectors([rows]), 3, seed=0)
    theirs = PCA(3, svd_solver="full").fit(rows.astype(np.float64))
    assert theirs.components_ is not None
    assert theirs.explained_variance_ is not None
    turned = (
        theirs.components_ * np.sign((theirs.components_ * found.components).sum(axis=1))[:, None]
    )
    np.testing.assert_allclose(found.components, turned, atol=1e-6)
    np.testing.assert_allclose(found.mean, theirs.mean_, rtol=1e-9)
    np.testing.assert_allclose(found.variances, theirs.explained_variance_ * 499 / 500, rtol=1e-6)
    expected = (rows - theirs.mean_) @ turned.T
    np.testing.assert_allclose(found.apply(rows), expected, rtol=1e-4, atol=1e-4)
    largest = np.abs(found.components).argmax(axis=1)
    assert (found.components[np.arange(3), largest] > 0).all()


def test_parts_and_blocks_and_rows_without_vector_change_nothing():
    rows = _rows()
    whole = fit_pca(Vectors([rows]), 4, seed=0)
    holes = np.insert(rows, [0, 60, 500], np.nan, axis=0)
    cut = fit_pca(Vectors(np.split(holes, [100, 100, 333])), 4, seed=0, block_rows=500)
    assert cut.components.tobytes() == whole.components.tobytes()
    small = fit_pca(Vectors([rows]), 4, seed=0, block_rows=13)
    np.testing.assert_allclose(small.components, whole.components, atol=1e-9)
    assert np.isnan(whole.apply(holes)[0]).all()


def test_a_sample_is_drawn_by_the_seed():
    rows = _rows()
    first, again, other = (fit_pca(Vectors([rows]), 2, seed=s, sample=50) for s in (1, 1, 2))
    assert first.mean.tobytes() == again.mean.tobytes()
    assert first.mean.tobytes() != other.mean.tobytes()
    errors = np.sqrt(rows.var(axis=0) / 50)  # of a mean of 50 rows
    assert (np.abs(first.mean - rows.mean(axis=0)) < 4 * errors).all()


def test_fewer_directions_than_asked_for_are_said():
    with pytest.raises(ConfigError, match="7 components of 500 vectors with 6 dimensions"):
        fit_pca(Vectors([_rows()]), 7, seed=0)
    with pytest.raises(ConfigError, match="1 component of 0 vectors"):
        fit_pca(Vectors([np.full((3, 2), np.nan, np.float32)]), 1, seed=0)
    one = fit_pca(Vectors([_rows(1)]), 2, seed=0)
    np.testing.assert_allclose(one.apply(_rows(1)), 0, atol=1e-12)
