from pathlib import Path

import numpy as np
import pytest

from curate.errors import InputError
from curate.vectors.store import Vectors, save


def _parts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 3)).astype(np.float32) for n in (5, 0, 1, 7)]
    parts[0][2] = np.nan
    parts[3][6] = np.nan
    return parts


def test_blocks_give_every_vector_once_with_its_position(tmp_path: Path):
    parts = _parts()
    whole = np.concatenate(parts)
    paths = [tmp_path / f"{number}.npy" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        save(path, part)
    for vectors in (Vectors(parts), Vectors.open(paths)):
        for rows in (1, 2, 100):
            found = list(vectors.blocks(rows))
            positions = np.concatenate([p for p, _ in found])
            np.testing.assert_array_equal(positions, [0, 1, 3, 4, *range(5, 12)])
            np.testing.assert_array_equal(np.concatenate([v for _, v in found]), whole[positions])
            assert max(len(p) for p, _ in found) <= rows
        np.testing.assert_array_equal(vectors.usable(), positions)
        assert (len(vectors), vectors.dim) == (13, 3)


def test_rows_are_taken_in_the_order_asked_for():
    vectors = Vectors(_parts())
    wanted = np.random.default_rng(1).integers(0, 13, 40)
    np.testing.assert_array_equal(vectors.take(wanted), np.concatenate(_parts())[wanted])
    assert vectors.take([]).shape == (0, 3)


def test_a_damaged_file_is_named(tmp_path: Path):
    path = tmp_path / "part.npy"
    save(path, _parts()[0])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"part\.npy"):
        Vectors.open([path])
    save(path, np.zeros(3, np.float32))
    with pytest.raises(InputError, match="not rows of floats"):
        Vectors.open([path])


def test_files_of_different_width_are_refused(tmp_path: Path):
    save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    save(tmp_path / "b.npy", np.zeros((2, 4), np.float16))
    with pytest.raises(InputError, match="4 dimensions, not 3"):
        Vectors.open([tmp_path / "a.npy", tmp_path / "b.npy"])
