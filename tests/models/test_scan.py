"""The scan of a gradient index: against brute force in numpy, one product at a time."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from curate.errors import ConfigError, InputError
from curate.models.index_rows import (
    Block,
    Header,
    RowsWriter,
    Storage,
    decode_rows,
    encode_rows,
    open_rows,
)
from curate.models.scan import (
    Found,
    ScanPart,
    mean_queries,
    measure_recall,
    merge,
    recall_of,
    scan,
    score_blocks,
)

BLOCKS = (Block("a.weight", 2, 3), Block("b.weight", 1, 4))
TYPES: list[Storage] = ["float32", "float16", "bfloat16", "int8"]


def part_of(values: Tensor, dtype: Storage = "float32", **more: Any) -> ScanPart:
    header = Header(
        dtype=dtype,
        num_rows=len(values),
        first_row=0,
        blocks=BLOCKS if values.shape[1] == 10 else (Block("w", 1, values.shape[1]),),
        projection={},
        model="m",
        tokenizer=None,
        reduction="mean",
    )
    found = encode_rows(values, header.blocks, dtype)
    return ScanPart(found.stored, header, found.scales, found.usable, **more)


def drawn(rows: int, *, seed: int = 0, width: int = 10) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def ranked(parts: list[ScanPart], queries: Tensor, num_best: int) -> list[list[tuple[int, float]]]:
    """Position and score of the best rows of each query, by sorting all."""
    rows: list[tuple[list[float], float]] = []
    for part in parts:
        values = decode_rows(part.stored, part.scales, part.header).double().tolist()
        usable = [True] * len(values) if part.usable is None else part.usable.tolist()
        factors = [1.0] * len(values) if part.factors is None else part.factors.tolist()
        for row, use, factor in zip(values, usable, factors, strict=True):
            rows.append((row, factor if use and all(map(math.isfinite, row)) else math.nan))
    found: list[list[tuple[int, float]]] = []
    for query in queries.double().tolist():
        scores = [
            (-factor * math.fsum(a * b for a, b in zip(row, query, strict=True)), place)
            for place, (row, factor) in enumerate(rows)
            if not math.isnan(factor)
        ]
        found.append([(place, -score) for score, place in sorted(scores)[:num_best]])
    return found


def check(found: Found, wanted: list[list[tuple[int, float]]]) -> None:
    for positions, scores, best in zip(found.positions, found.scores, wanted, strict=True):
        num_held = len(best)
        assert positions[:num_held].tolist() == [place for place, _ in best]
        assert scores[:num_held].tolist() == pytest.approx([score for _, score in best], rel=1e-12)
        assert (positions[num_held:] == -1).all()
        assert np.isnan(scores[num_held:]).all()


def same(one: Found, other: Found) -> bool:
    return np.array_equal(one.positions, other.positions) and np.array_equal(
        one.scores, other.scores, equal_nan=True
    )


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_best_rows_are_those_of_brute_force(dtype: Storage, approximate: bool):
    values = drawn(200)
    parts = [part_of(values[:90], dtype), part_of(values[90:], dtype)]
    queries = drawn(6, seed=1)
    found = scan(parts, queries, num_best=7, block_rows=32, approximate=approximate)
    check(found, ranked(parts, queries, 7))


def test_rows_are_read_from_a_mapped_file(tmp_path: Path):
    part = part_of(drawn(40), "int8")
    with RowsWriter(tmp_path / "part.vectors", part.header) as writer:
        writer.write(range(40), part.stored)
    rows = open_rows(tmp_path / "part.vectors")
    mapped = ScanPart(rows.stored, rows.header, part.scales)
    queries = drawn(3, seed=1)
    for approximate in (False, True):
        found = scan([mapped], queries, num_best=5, approximate=approximate)
        check(found, ranked([part], queries, 5))


@pytest.mark.parametrize("width", [10, 300])
def test_blocks_parts_and_threads_change_no_digit(width: int):
    values, queries = drawn(150, width=width), drawn(5, seed=1, width=width)
    wanted = scan([part_of(values)], queries, num_best=9)
    for block_rows in (1, 2, 7, 64, 1000):
        assert same(scan([part_of(values)], queries, num_best=9, block_rows=block_rows), wanted)
    parts = [part_of(piece) for piece in values.split([1, 0, 80, 69])]
    assert same(scan(parts, queries, num_best=9, block_rows=16), wanted)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert same(scan([part_of(values)], queries, num_best=9), wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block_rows", [1, 5, 1000])
def test_equal_rows_come_in_order_of_position(block_rows: int):
    values = drawn(3, width=300).repeat(40, 1)  # far more ties than results
    query = values[1:2]
    found = scan([part_of(values)], query, num_best=6, block_rows=block_rows)
    assert found.positions.tolist() == [[1, 4, 7, 10, 13, 16]]
    assert len(set(found.scores[0].tolist())) == 1


@pytest.mark.parametrize("block_rows", [8, 400])
def test_scores_that_float32_cannot_tell_apart_are_told_apart(block_rows: int):
    values = 1 + 1e-7 * drawn(400, width=300)  # 300 sums are rounded by more than they differ
    queries = drawn(8, seed=1, width=300)
    plain = (queries @ values.T).topk(5).indices.tolist()
    wanted = ranked([part_of(values)], queries, 5)
    assert plain != [[place for place, _ in best] for best in wanted]
    check(scan([part_of(values)], queries, num_best=5, block_rows=block_rows), wanted)


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("block_rows", [3, 100])
def test_rows_without_a_value_are_never_found(approximate: bool, block_rows: int):
    values = drawn(30)
    values[4] = 50.0
    values[9] = float("nan")
    values[11] = float("inf")
    clean = part_of(values)
    usable = np.ones(30, dtype=bool)
    usable[4] = False
    raw = clean._replace(stored=values.numpy(), usable=usable)
    query = torch.ones(1, 10)
    found = scan([raw], query, num_best=30, approximate=approximate, block_rows=block_rows)
    assert not {4, 9, 11} & set(found.positions[0].tolist())
    check(found, ranked([raw], query, 30))
    opposite = scan([raw], -query, num_best=30, approximate=approximate, block_rows=block_rows)
    assert opposite.positions[0, :27].tolist() == found.positions[0, 26::-1].tolist()


def test_rows_without_a_value_are_not_found_where_all_others_are_worse():
    values = -drawn(6).abs()
    usable = np.array([True, False, True, True, False, True])
    part = part_of(values)._replace(stored=np.where(usable[:, None], values.numpy(), 0))
    found = scan([part._replace(usable=usable)], torch.ones(1, 10), num_best=6)
    assert set(found.positions[0].tolist()) == {0, 2, 3, 5, -1}


@pytest.mark.parametrize("approximate", [False, True])
def test_fewer_rows_than_asked_for_leave_places_empty(approximate: bool):
    part, queries = part_of(drawn(3)), drawn(2, seed=1)
    check(scan([part], queries, num_best=8, approximate=approximate), ranked([part], queries, 8))
    for parts in ([], [part_of(drawn(0))]):
        empty = scan(parts, queries, num_best=2, approximate=approximate)
        assert empty.positions.tolist() == [[-1, -1]] * 2


@pytest.mark.parametrize("approximate", [False, True])
def test_factors_make_a_cosine(approximate: bool):
    values, queries = drawn(60), drawn(4, seed=1)
    values *= torch.logspace(-3, 3, 60)[:, None]
    values[5] = 0
    with np.errstate(divide="ignore"):
        factors = 1 / values.double().norm(dim=1).numpy()
    factors[5] = np.nan
    part = part_of(values, factors=factors)
    found = scan([part], queries, num_best=60, block_rows=9, approximate=approximate)
    assert np.nanmax(np.abs(found.scores / queries.norm(dim=1, keepdim=True).numpy())) < 1
    assert 5 not in found.positions
    own = scan([part], values[17:18], num_best=1, approximate=approximate)
    assert own.positions.tolist() == [[17]]
    check(found, ranked([part._replace(usable=np.isfinite(factors))], queries, 60))


@pytest.mark.parametrize("scale", [1e-44, 1e-20, 1e18, 1e38])
@pytest.mark.parametrize("query_scale", [1e-200, 1.0, 1e200])
def test_rows_of_any_size_are_ranked(scale: float, query_scale: float):
    values, queries = drawn(300) * scale, drawn(20, seed=1).double() * query_scale
    part = part_of(values)
    check(scan([part], queries, num_best=20, block_rows=30), ranked([part], queries, 20))


def test_float32_that_is_not_float32_is_not_trusted():
    values, queries = drawn(100, width=300), drawn(3, seed=1, width=300)
    wanted = scan([part_of(values)], queries, num_best=5)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert same(scan([part_of(values)], queries, num_best=5), wanted)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_query_of_zeros_finds_the_first_rows():
    found = scan([part_of(drawn(20))], torch.zeros(1, 10), num_best=3, block_rows=4)
    assert found.positions.tolist() == [[0, 1, 2]]
    assert found.scores.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_blocks_of_scores_are_the_whole_matrix(dtype: Storage):
    values, queries = drawn(50), drawn(4, seed=1)
    values[3] = float("nan")
    parts = [part_of(values[:20], dtype, factors=np.full(20, 2.0)), part_of(values[20:], dtype)]
    blocks = list(score_blocks(parts, queries, block_rows=8))
    assert [start for start, _ in blocks] == [0, 8, 16, 20, 28, 36, 44]
    matrix = np.concatenate([scores for _, scores in blocks], 1)
    assert np.isnan(matrix[:, 3]).all()
    for query, best in enumerate(ranked(parts, queries, 50)):
        assert len(best) == 49
        for place, score in best:
            assert matrix[query, place] == pytest.approx(score, rel=1e-10, abs=1e-14)


def test_scans_of_parts_merge_to_the_scan_of_all():
    values, queries = drawn(80), drawn(4, seed=1)
    values[70] = values[10]  # a tie between two of the scans
    queries[0] = values[10] * 5
    pieces = [part_of(piece) for piece in values.split([5, 45, 30])]
    found = [scan([piece], queries, num_best=9) for piece in pieces]
    merged = merge(found, [0, 5, 50])
    assert same(merged, scan(pieces, queries, num_best=9))
    order = merged.positions[0].tolist()
    assert order.index(70) == order.index(10) + 1


def test_recall_counts_what_was_found():
    exact = Found(np.array([[3, 1], [2, 0], [-1, -1]]), np.array([[9.0, 8], [5, 4], [np.nan] * 2]))
    found = Found(np.array([[3, 7], [0, 2], [-1, -1]]), np.array([[9.0, 7], [5, 4], [np.nan] * 2]))
    assert recall_of(found, exact).tolist() == pytest.approx([0.5, 1, np.nan], nan_ok=True)


def test_recall_falls_where_bfloat16_cannot_tell_rows_apart():
    parts, queries = [part_of(drawn(2000))], drawn(8, seed=1)
    assert measure_recall(parts, queries, num_best=20) == 1
    close = 1 + 1e-5 * drawn(300)
    assert measure_recall([part_of(close)], queries.abs(), num_best=5, most=4) < 0.5


def test_the_mean_of_queries_is_taken_for_each_group():
    rows = torch.tensor([[1.0, 2], [3, 4], [float("nan"), 0], [10, 20]])
    assert mean_queries(rows).tolist() == [[14 / 3, 26 / 3]]
    assert mean_queries(rows, np.array([0, 0, 1, 1])).tolist() == [[2, 3], [10, 20]]
    with pytest.raises(InputError, match="group 1 "):
        mean_queries(rows, np.array([0, 0, 1, 0]))
    with pytest.raises(InputError, match="group 0 "):
        mean_queries(torch.zeros(0, 2))


def test_what_makes_no_sense_is_refused():
    part = part_of(drawn(3))
    queries = drawn(2, seed=1)
    for num_best, block_rows in ((0, None), (1, 0)):
        with pytest.raises(ConfigError, match="nothing was asked for"):
            scan([part], queries, num_best=num_best, block_rows=block_rows)
    queries[1, 4] = float("inf")
    with pytest.raises(InputError, match="query 1 is not finite"):
        scan([part], queries, num_best=1)
