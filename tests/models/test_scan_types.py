"""Scans of rows of one type that read those of another again, and products of int8."""

import numpy as np
import pytest
import torch
from torch import Tensor

from curate.errors import ConfigError
from curate.models.index_rows import Block, Header, Storage, decode_rows, encode_rows
from curate.models.scan import ScanPart, measure_recall, recall_of, scan
from curate.models.scan_best import Candidates
from curate.models.scan_products import Queries, takes_int8

BLOCKS = (Block("a.weight", 16, 16), Block("b.weight", 8, 9), Block("c.weight", 4, 25))
WIDTH = 428


def drawn(rows: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, WIDTH)[torch.randperm(WIDTH, generator=generator)]
    return torch.randn(rows, WIDTH, generator=generator) * sizes


def part_of(
    values: Tensor, dtype: Storage, *, blocks: tuple[Block, ...] = BLOCKS, factors: bool = False
) -> ScanPart:
    header = Header(dtype=dtype, num_rows=len(values), first_row=0, blocks=blocks, projection={},
                    model="m", tokenizer=None, reduction="mean")  # fmt: skip
    found = encode_rows(values, blocks, dtype)
    lengths = values.double().norm(dim=1).numpy()
    return ScanPart(found.stored, header, found.scales, found.usable,
                    1 / lengths if factors else None)  # fmt: skip


def brute(values: Tensor, queries: Tensor, num_best: int) -> list[list[int]]:
    scores = values.double() @ queries.double().T
    order = torch.argsort(scores, dim=0, descending=True, stable=True)
    return order[:num_best].T.tolist()


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rows_of_a_finer_type_give_the_order_and_the_scores(dtype: Storage, factors: bool):
    values, queries = drawn(3000), drawn(12, seed=1)
    parts = [part_of(piece, dtype, factors=factors) for piece in values.split([1000, 2000])]
    finer = [part_of(piece, "float32", factors=factors) for piece in values.split([1000, 2000])]
    exact = scan(finer, queries, num_best=20)
    assert not np.array_equal(scan(parts, queries, num_best=20).positions, exact.positions)
    found = scan(parts, queries, num_best=20, approximate=True, finer=finer)
    assert recall_of(found, exact).mean() > 0.999
    assert np.array_equal(found.scores, exact.scores)
    if not factors:
        assert exact.positions.tolist() == brute(values, queries, 20)


def test_the_recall_of_rows_read_again_is_that_of_the_finer_rows():
    values, queries = drawn(2000), drawn(8, seed=1)
    coarse, finer = [part_of(values, "int8")], [part_of(values, "float32")]
    exact = scan(finer, queries, num_best=50)
    alone = scan(coarse, queries, num_best=50)  # the scores of int8 rows are not those of the truth
    shares = [
        len(set(one.tolist()) & set(other.tolist())) / 50
        for one, other in zip(alone.positions, exact.positions, strict=True)
    ]
    assert np.mean(shares) < 0.999
    assert measure_recall(coarse, queries, num_best=50, finer=finer) > 0.999


def test_the_product_of_int8_is_near_that_of_the_values():
    values, queries = drawn(300), drawn(5, seed=1)
    part = part_of(values, "int8")
    if not takes_int8(part.header, torch.device("cpu")):
        pytest.skip("this processor multiplies no int8")
    found = Queries(queries, "cpu").coarse(part)
    unit = queries.double() / queries.double().norm(dim=1, keepdim=True)
    wanted = (unit @ decode_rows(part.stored, part.scales, part.header).double().T).numpy()
    # Both sides are rounded by half a step of 127, a step being that of the largest of a block.
    steps = values.norm(dim=1).numpy() / 127
    assert np.abs(found - wanted).max(0) == pytest.approx(np.zeros(300), abs=float(steps.max()))
    assert 0 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.02


def test_queries_and_rows_of_zeros_in_a_block_are_multiplied():
    values, queries = drawn(200), drawn(3, seed=1)
    values[:, :256] = 0
    queries[0, 256:] = 0
    queries[1] = 0
    part = part_of(values, "int8")
    found = scan([part], queries, num_best=2, approximate=True)
    assert found.positions[:2].tolist() == [[0, 1]] * 2
    assert found.scores[:2].tolist() == [[0, 0]] * 2
    assert np.isfinite(found.scores).all()


def test_blocks_too_short_or_too_long_are_not_multiplied_as_int8():
    cpu = torch.device("cpu")
    for sizes in ([4, 4], [2**17]):
        blocks = tuple(Block(str(place), 1, size) for place, size in enumerate(sizes))
        assert not takes_int8(part_of(torch.ones(1, sum(sizes)), "int8", blocks=blocks).header, cpu)
    assert not takes_int8(part_of(drawn(2), "int8").header, torch.device("cuda"))
    assert not takes_int8(part_of(drawn(2), "float32").header, cpu)


def test_the_largest_block_of_int8_does_not_overflow():
    width = 2**16
    blocks = (Block("w", 1, width),)
    part = part_of(torch.ones(3, width), "int8", blocks=blocks)
    scores = Queries(torch.stack([torch.ones(width), -torch.ones(width)]), "cpu").coarse(part)
    assert scores == pytest.approx(np.outer([256.0, -256.0], np.ones(3)), rel=1e-5)


def test_rows_that_errors_cannot_tell_apart_are_settled_by_their_exact_scores():
    truth = np.random.default_rng(0).normal(size=400)
    asked: list[int] = []

    def settle(query: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked.append(len(positions))
        best = np.sort(positions[np.lexsort((positions, -truth[positions]))[:5]])
        return best, truth[best]

    kept = Candidates(1, 5, settle)
    for start in range(0, 400, 50):
        kept.add(start, np.zeros((1, 50)), np.full(50, 10.0))  # all alike, and far off
    ((positions, _),) = kept.best()
    assert set(np.argsort(-truth)[:5]) <= set(positions.tolist())
    assert asked
    assert max(asked) < 120  # not all of them are kept in memory


def test_finer_rows_of_another_index_are_refused():
    part = part_of(drawn(10), "int8")
    with pytest.raises(ConfigError, match="not those that are scanned"):
        scan([part], drawn(1), num_best=1, approximate=True, finer=[part_of(drawn(9), "float32")])
    with pytest.raises(ConfigError, match="no finer rows"):
        scan([part], drawn(1), num_best=1, finer=[part])
