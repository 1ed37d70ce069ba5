"""Shapes: Q queries, N vectors, d dimensions, k neighbours."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import ConfigError, MissingDependencyError
from curate.vectors import engine
from curate.vectors.search import Metric, Neighbours, nearest, nearest_approximate
from curate.vectors.store import Vectors, save


def _brute(
    queries: np.ndarray, rows: np.ndarray, k: int, metric: Metric, exclude: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs in float64, sorted one query at a time."""
    values = np.full((len(queries), k), np.nan)
    positions = np.full((len(queries), k), -1)
    for number, query in enumerate(queries.astype(np.float64)):
        found: list[tuple[float, int]] = []
        for position, row in enumerate(rows.astype(np.float64)):
            if exclude is not None and exclude[number] == position:
                continue
            worth = -float(query @ row) if metric == "inner" else float(np.linalg.norm(query - row))
            if not np.isnan(worth):
                found.append((worth, position))
        for place, (worth, position) in enumerate(sorted(found)[:k]):
            values[number, place] = -worth if metric == "inner" else worth
            positions[number, place] = position
    return values, positions


def _data(seed: int, num: int = 60, dim: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num, dim)).astype(np.float32)
    return rng.standard_normal((9, dim)).astype(np.float32), rows


def _same(found: Neighbours, values: np.ndarray, positions: np.ndarray) -> None:
    np.testing.assert_array_equal(found.positions, positions)
    np.testing.assert_allclose(found.values, values, rtol=1e-6, atol=1e-7)
    assert (found.values.dtype, found.positions.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("metric", ["inner", "l2"])
def test_the_nearest_are_those_of_all_pairs(metric: Metric):
    queries, rows = _data(0)
    rows[[3, 20]] = np.nan
    queries[4] = np.nan
    exclude = np.array([0, 1, 2, 3, 4, 5, 6, -1, 8])
    for k in (1, 4, 58, 70):
        for out in (None, exclude):
            found = nearest(queries, Vectors([rows]), k, metric=metric, exclude=out)
            _same(found, *_brute(queries, rows, k, metric, out))


@pytest.mark.parametrize("metric", ["inner", "l2"])
def test_equal_values_stand_by_position(metric: Metric):
    """Whole numbers, so that all ties are exact, and far more of them than candidates."""
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 2, (200, 3)).astype(np.float32)
    queries = np.concatenate([rows[:20], np.zeros((1, 3), np.float32)])
    exclude = np.arange(21)
    for k in (1, 5, 30):
        found = nearest(queries, Vectors([rows]), k, metric=metric, exclude=exclude)
        expected = _brute(np.round(queries), rows, k, metric, exclude)
        _same(found, *expected)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), k=st.integers(1, 12), block=st.integers(4, 50))
def test_parts_and_blocks_change_no_byte(seed: int, k: int, block: int):
    queries, rows = _data(seed)
    rows[seed % 7 :: 7] = rows[0]  # equal rows in many blocks
    whole = nearest(queries, Vectors([rows]), k, metric="l2")
    parts = np.split(rows, sorted(np.random.default_rng(seed).integers(0, 60, 8)))
    cut = nearest(queries, Vectors(parts), k, metric="l2", block_rows=block, threads=2)
    assert cut.values.tobytes() == whole.values.tobytes()
    assert cut.positions.tobytes() == whole.positions.tobytes()


def test_distances_of_near_copies_do_not_cancel():
    """Far from the origin a float32 expansion of the square loses all digits."""
    rng = np.random.default_rng(2)
    rows = (1000 + rng.standard_normal((300, 8)) * 1e-3).astype(np.float32)
    found = nearest(rows[:40], Vectors([rows]), 3, metric="l2", exclude=np.arange(40))
    _same(found, *_brute(rows[:40], rows, 3, "l2", np.arange(40)))


def test_vectors_are_searched_from_their_files(tmp_path: Path):
    queries, rows = _data(3)
    paths = [tmp_path / "0.npy", tmp_path / "1.npy", tmp_path / "2.npy"]
    for path, part in zip(paths, np.split(rows, [10, 10]), strict=True):
        save(path, part.astype(np.float16))
    _same(
        nearest(queries, Vectors.open(paths), 4),
        *_brute(queries, rows.astype(np.float16), 4, "inner", None),
    )


def test_no_query_and_no_vector_give_nothing():
    queries, rows = _data(4)
    assert nearest(queries[:0], Vectors([rows]), 3).positions.shape == (0, 3)
    none = Vectors([np.full((4, 5), np.nan, np.float32)])
    for found in (nearest(queries, none, 2), nearest_approximate(queries, none, 2)[0]):
        assert (found.positions == -1).all()
        assert np.isnan(found.values).all()
    one = nearest(queries, Vectors([rows[:1]]), 2, exclude=np.zeros(9, dtype=np.int64))
    assert (one.positions == -1).all()


def test_wrong_shapes_and_numbers_are_said():
    queries, rows = _data(5)
    with pytest.raises(ConfigError, match="0 neighbours"):
        nearest(queries, Vectors([rows]), 0)
    with pytest.raises(ConfigError, match=r"\(9, 4\) were given for vectors of 5 dimensions"):
        nearest(queries[:, :4], Vectors([rows]), 1)
    with pytest.raises(ConfigError, match="cells is 0"):
        nearest_approximate(queries, Vectors([rows]), 1, cells=0)


@pytest.mark.parametrize("metric", ["inner", "l2"])
def test_looking_into_every_cell_is_exact(metric: Metric):
    queries, rows = _data(6, num=300)
    rows[7] = np.nan
    exclude = np.arange(9)
    exact = nearest(queries, Vectors([rows]), 4, metric=metric, exclude=exclude)
    found, recall = nearest_approximate(
        queries, Vectors([rows]), 4, metric=metric, exclude=exclude, cells=6, probes=6
    )
    _same(found, exact.values, exact.positions)
    assert recall == 1


def test_the_recall_told_is_the_recall():
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((2000, 8)).astype(np.float32)
    queries = rng.standard_normal((150, 8)).astype(np.float32)
    vectors = Vectors(np.split(rows, 5))
    exact = nearest(queries, vectors, 10)
    recalls: list[float] = []
    for probes in (1, 4, 40):
        found, recall = nearest_approximate(
            queries, vectors, 10, cells=40, probes=probes, seed=3, block_rows=700
        )
        shared = [
            np.isin(a, b).mean() for a, b in zip(exact.positions, found.positions, strict=True)
        ]
        assert recall == pytest.approx(np.mean(shared), abs=1e-9)
        recalls.append(recall)
    assert recalls[0] < 0.7 < recalls[1] < recalls[2] == 1


def test_an_approximate_search_is_the_same_every_time():
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((3000, 6)).astype(np.float32)
    once, recall = nearest_approximate(rows[:50], Vectors([rows]), 5, probes=2, seed=1)
    again, same = nearest_approximate(rows[:50], Vectors([rows]), 5, probes=2, seed=1)
    assert once.positions.tobytes() == again.positions.tobytes()
    assert once.values.tobytes() == again.values.tobytes()
    assert recall == same


def test_no_more_than_a_block_is_searched_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Small parts are put together, large ones are cut."""
    rows = np.random.default_rng(9).standard_normal((4000, 4)).astype(np.float32)
    faiss, sizes = engine.faiss_module(), list[int]()
    search = faiss.knn

    def watched(queries: np.ndarray, block: np.ndarray, *given: Any, **more: Any) -> Any:
        sizes.append(len(block))
        return search(queries, block, *given, **more)

    monkeypatch.setattr(faiss, "knn", watched)
    for parts in ([rows], np.split(rows, 400)):
        sizes.clear()
        nearest(rows[:3], Vectors(parts), 2, block_rows=100)
        assert set(sizes) == {100}
        assert len(sizes) == 40


def test_a_machine_without_faiss_says_which_extra(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(engine, "import_module", absent)
    with pytest.raises(MissingDependencyError, match=r"pip install 'curate-data\[cpu\]'"):
        nearest(*_few(), 1)


def test_a_faiss_without_gpu_says_so(monkeypatch: pytest.MonkeyPatch):
    faiss = engine.faiss_module()
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    engine.gpu_resources.cache_clear()
    with pytest.raises(MissingDependencyError, match="built for CPUs only"):
        nearest(*_few(), 1, device="cuda")


def _few() -> tuple[np.ndarray, Vectors]:
    queries, rows = _data(10)
    return queries, Vectors([rows])


def test_a_gpu_finds_what_the_cpu_finds():
    faiss = engine.faiss_module()
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        pytest.skip("needs faiss-gpu and a GPU")
    rng = np.random.default_rng(11)
    rows = rng.standard_normal((5000, 32)).astype(np.float32)
    for metric in ("inner", "l2"):
        here = nearest(rows[:100], Vectors([rows]), 7, metric=metric)
        there = nearest(rows[:100], Vectors([rows]), 7, metric=metric, device="cuda")
        np.testing.assert_array_equal(there.positions, here.positions)
        _, recall = nearest_approximate(
            rows[:100], Vectors([rows]), 7, metric=metric, cells=20, probes=20, device="cuda"
        )
        assert recall == 1
