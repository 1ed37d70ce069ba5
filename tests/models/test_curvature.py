"""Curvature of projected gradients: against dense algebra in numpy and known figures."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from torch import Tensor

from curate.errors import ConfigError, InputError
from curate.models.curvature import Curvature, Structure, Sums, curvature_of
from curate.models.index_rows import Block, Header

SPANS = {"z.weight": slice(0, 3), "a.weight": slice(3, 7)}
WORKED = torch.tensor([[1.0, 0], [1, 1], [0, 2], [2, 1]])


def drawn(rows: int = 20, *, seed: int = 0, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing


def fitted(rows: Tensor, structure: Structure = "blocks", share: float = 0.1) -> Curvature:
    return curvature_of(Sums.empty(SPANS, structure).add(rows), share=share)


def dense(rows: Tensor, structure: Structure, share: float) -> np.ndarray:
    """The damped matrix of whole rows, entry by entry."""
    values = rows.numpy().astype(np.float64)
    groups = [range(7)] if structure == "full" else [range(3), range(3, 7)]
    found = np.zeros((7, 7))
    for group in groups:
        for i in group:
            for j in group:
                found[i, j] = sum(row[i] * row[j] for row in values) / len(values)
        mean = sum(found[i, i] for i in group) / len(group)
        for i in group:
            found[i, i] += share * mean
    return found


def test_the_worked_example_has_its_known_figures():
    sums = Sums.empty({"w": slice(0, 2)}, "blocks").add(WORKED)
    found = curvature_of(sums, damping=0.1)
    matrix = found.factors["w"] @ found.factors["w"].T
    assert matrix.numpy() == pytest.approx(np.array([[1.6, 0.75], [0.75, 1.6]]))
    lengths = found.whiten(WORKED).square().sum(1)
    assert lengths.tolist() == pytest.approx([0.801001, 0.851064, 3.204005, 2.503129], abs=1e-6)
    assert found.effective_dimension == pytest.approx(1.839800, abs=1e-6)
    assert found.damping == {"w": 0.1}


@pytest.mark.parametrize("structure", ["blocks", "full"])
def test_products_are_those_of_the_dense_inverse(structure: Structure):
    rows, queries = drawn(), drawn(4, seed=1)
    found = fitted(rows, structure, 0.3)
    inverse = np.linalg.inv(dense(rows, structure, 0.3))
    wanted = queries.double().numpy() @ inverse @ rows.double().numpy().T
    by_whitening = found.whiten(queries) @ found.whiten(rows).T
    by_preconditioning = found.precondition(queries) @ rows.double().T
    assert by_whitening.numpy() == pytest.approx(wanted, rel=1e-9)
    assert by_preconditioning.numpy() == pytest.approx(wanted, rel=1e-9)
    assert found.share == 0.3


@given(
    num_rows=st.integers(1, 12),
    share=st.floats(1e-4, 1e4),
    structure=st.sampled_from(["blocks", "full"]),
    scale=st.sampled_from([1e-18, 1.0, 1e18]),
)
@settings(max_examples=30, deadline=None)
def test_the_mean_self_product_is_the_effective_dimension(
    num_rows: int, share: float, structure: Structure, scale: float
):
    rows = scale * drawn(num_rows)  # down to one row: more numbers than rows
    found = fitted(rows, structure, share)
    mean = float(found.whiten(rows).square().sum(1).mean())
    assert mean == pytest.approx(found.effective_dimension, rel=1e-8)
    rank = sum(min(num_rows, span.stop - span.start) for span in found.spans.values())
    assert 0 < found.effective_dimension < rank


def test_the_worth_of_a_share_does_not_depend_on_the_scale_of_the_gradients():
    one, other = fitted(drawn()), fitted(1000 * drawn())
    assert one.effective_dimension == pytest.approx(other.effective_dimension, rel=1e-6)


@pytest.mark.parametrize("structure", ["blocks", "full"])
def test_sums_merge_to_those_of_all_rows(structure: Structure):
    rows = drawn()
    empty = Sums.empty(SPANS, structure)
    whole = empty.add(rows)
    first, second = empty.add(rows[:3]).add(rows[3:8]), empty.add(rows[8:])
    merged = first.plus(second)
    assert merged.num_rows == whole.num_rows == 20
    for name, total in whole.sums.items():
        assert merged.sums[name].numpy() == pytest.approx(total.numpy(), rel=1e-12)
        assert not empty.sums[name].any()


def test_rows_without_a_value_have_no_part():
    rows = drawn()
    spoilt = torch.cat([rows, torch.zeros(2, 7), torch.full((1, 7), float("nan"))])
    usable = np.array([True] * 20 + [False, False, True])
    found = Sums.empty(SPANS, "blocks").add(spoilt, usable)
    assert (found.num_rows, found.num_left_out) == (20, 3)
    assert curvature_of(found).effective_dimension == fitted(rows).effective_dimension


def test_an_example_whose_gradient_is_zero_counts():
    rows = torch.cat([drawn(), torch.zeros(20, 7)])
    assert Sums.empty(SPANS, "full").add(rows).num_rows == 40
    assert fitted(rows).damping["z.weight"] == pytest.approx(
        fitted(drawn()).damping["z.weight"] / 2
    )


def test_half_precision_is_summed_in_float64():
    rows = torch.full((3, 7), 60_000.0, dtype=torch.float16)
    total = Sums.empty(SPANS, "full").add(rows).sums["all"]
    assert float(total[0, 0]) == 3 * float(rows[0, 0]) ** 2


def test_a_layer_of_zeros_is_left_out_by_name(caplog: pytest.LogCaptureFixture):
    rows = drawn()
    rows[:, :3] = 0
    with caplog.at_level(logging.WARNING):
        found = fitted(rows)
    assert "z.weight" in caplog.text
    assert found.excluded == ("z.weight",)
    assert found.damping["z.weight"] == 0
    queries = drawn(2, seed=1)
    assert not found.whiten(queries)[:, :3].any()
    assert found.precondition(queries)[:, 3:].abs().min() > 0


def test_gradients_that_are_all_zero_are_refused():
    with pytest.raises(InputError, match="all 4 rows of the index are zero"):
        fitted(torch.zeros(4, 7))


def test_no_rows_are_refused():
    with pytest.raises(InputError, match=r"finite gradient \(2 are without one\)") as caught:
        fitted(torch.full((2, 7), float("nan")))
    assert "NaN or infinite" in caught.value.fix
    assert "model.dtype: float32" in caught.value.fix


@pytest.mark.parametrize("seed", range(5))
def test_more_numbers_than_rows_need_damping(seed: int):
    rows = drawn(2, seed=seed)
    with pytest.raises(ConfigError, match=r"'z\.weight' cannot be inverted"):
        fitted(rows, share=0)
    assert fitted(rows, share=1e-6).whiten(rows).isfinite().all()


def test_a_damping_beyond_all_numbers_is_to_be_lowered():
    with pytest.raises(ConfigError, match="more than a number can be") as caught:
        fitted(1e3 * drawn(), share=1e308)
    assert "lower the damping" in caught.value.fix


@pytest.mark.parametrize(("rows", "warned"), [(1, "1 row only"), (9, "9 rows only"), (10, None)])
def test_a_curvature_of_a_few_rows_is_noted(
    caplog: pytest.LogCaptureFixture, rows: int, warned: str | None
):
    fitted(drawn(rows))
    assert (f"the curvature stands on {warned}" in caplog.text) == (warned is not None)


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
def test_a_damping_that_is_none_is_refused(share: float):
    with pytest.raises(ConfigError, match="damping"):
        fitted(drawn(), share=share)


def test_curvature_comes_back_from_a_file():
    rows = drawn()
    rows[:, :3] = 0
    found = fitted(rows)
    arrays = found.arrays()
    assert all(array.flags.c_contiguous for array in arrays.values())
    back = Curvature.of_arrays(load(save(arrays)))
    assert list(back.spans.items()) == list(SPANS.items())
    assert back.excluded == found.excluded
    assert back.whiten(rows).equal(found.whiten(rows))
    facts = ("damping", "dimensions", "share", "num_rows", "num_left_out")
    assert all(getattr(back, fact) == getattr(found, fact) for fact in facts)


@pytest.mark.parametrize("structure", ["blocks", "full"])
def test_sums_come_back_from_a_file_and_go_on(structure: Structure):
    rows = drawn()
    first = Sums.empty(SPANS, structure).add(rows[:9])
    back = Sums.of_arrays(load(save(first.arrays())))
    assert list(back.spans) == list(first.spans)
    more, wanted = back.add(rows[9:]), first.add(rows[9:])
    assert more.num_rows == 20
    assert all(more.sums[name].equal(total) for name, total in wanted.sums.items())


def test_groups_are_the_blocks_of_an_index():
    header = Header(
        dtype="float32",
        num_rows=20,
        first_row=0,
        blocks=(Block("z.weight", 1, 3), Block("a.weight", 2, 2)),
        projection={},
        model="m",
        tokenizer=None,
        reduction="mean",
    )
    found = curvature_of(Sums.empty(header.spans(), "blocks").add(drawn()))
    assert found.effective_dimension == fitted(drawn()).effective_dimension
