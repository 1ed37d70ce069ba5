"""Rows of a gradient index: what they lose in each type, and which files are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curate.errors import ConfigError, CurateError, InputError
from curate.models.index_rows import (
    PAGE_BYTES,
    Block,
    Header,
    RowsWriter,
    Storage,
    check_alike,
    decode_rows,
    encode_rows,
    header_bytes,
    open_rows,
    read_header,
)

BLOCKS = (Block("a.weight", 2, 3), Block("b.weight", 1, 4))
TYPES: list[Storage] = ["float32", "float16", "bfloat16", "int8"]


def header_of(dtype: Storage = "float16", rows: int = 5, **changes: Any) -> Header:
    values: dict[str, Any] = {
        "dtype": dtype,
        "num_rows": rows,
        "first_row": 40,
        "blocks": BLOCKS,
        "projection": {"seed": 0, "dim": 3, "digest": "d"},
        "model": "m",
        "tokenizer": "t",
        "reduction": "mean",
    }
    return Header(**{**values, **changes})


def drawn(rows: int = 5, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(rows, 10, generator=generator)


def back(values: Tensor, dtype: Storage) -> Tensor:
    header = header_of(dtype, len(values))
    found = encode_rows(values, BLOCKS, dtype)
    return decode_rows(found.stored, found.scales, header)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_come_back_from_the_disk(tmp_path: Path, dtype: Storage):
    values = drawn()
    found = encode_rows(values, BLOCKS, dtype)
    with RowsWriter(tmp_path / "x.vectors", header_of(dtype)) as writer:
        writer.write([3, 1], found.stored[[3, 1]])
        writer.write(np.array([0, 4]), found.stored[[0, 4]])
    header, stored = open_rows(tmp_path / "x.vectors")
    assert header == header_of(dtype) == read_header(tmp_path / "x.vectors")
    seen = decode_rows(stored, found.scales, header)
    wanted = values.clone()
    wanted[2] = 0
    size = {"float32": 0, "float16": 5e-4, "bfloat16": 4e-3, "int8": 1 / 254}[dtype]
    assert seen[2].abs().max() == 0
    assert ((seen - wanted).abs() <= size * wanted.abs().amax(1, keepdim=True)).all()
    assert (tmp_path / "x.vectors").stat().st_size == PAGE_BYTES + 50 * stored.itemsize


def test_bytes_are_those_of_the_plain_types(tmp_path: Path):
    """What another tool reads behind the header with nothing of ours."""
    values = drawn()
    cut = values.bfloat16().float().numpy().view("<u4") >> 16
    plain: dict[Storage, bytes] = {
        "float32": values.numpy().astype("<f4").tobytes(),
        "float16": values.numpy().astype("<f2").tobytes(),
        "bfloat16": cut.astype("<u2").tobytes(),
    }
    for dtype, wanted in plain.items():
        with RowsWriter(tmp_path / "x", header_of(dtype)) as writer:
            writer.write(range(5), encode_rows(values, BLOCKS, dtype).stored)
        content = (tmp_path / "x").read_bytes()
        assert content[PAGE_BYTES:] == wanted
        assert json.loads(content[:PAGE_BYTES])["dtype"] == dtype


def test_int8_has_a_scale_for_each_row_and_block():
    values = torch.tensor([[127.0, -63, 0, 1, 2, 3, 0.1, 0.2, -0.4, 0], [0] * 10])
    found = encode_rows(values, BLOCKS, "int8")
    assert found.scales is not None
    np.testing.assert_allclose(found.scales, [[1, 0.4 / 127], [0, 0]], rtol=1e-6)
    assert found.stored[0].tolist() == [127, -63, 0, 1, 2, 3, 32, 64, -127, 0]
    assert found.stored[1].tolist() == [0] * 10


@given(st.integers(-30, 38))
def test_no_magnitude_of_a_row_is_beyond_float16(power: int):
    """Largest numbers from 1e-30 to 1e38: never an infinity, never more lost than 11 bits hold."""
    values = drawn(3)
    values = values / values.abs().max() * 10.0**power
    seen = back(values, "float16")
    assert ((seen - values).abs() <= 5e-4 * values.abs() + 1e-9 * values.abs().max()).all()


def test_a_scale_of_float16_is_one_where_none_is_needed():
    plain, large, small = drawn(2), drawn(1) * 1e6, drawn(1) * 1e-6
    found = encode_rows(torch.cat([plain, large, small]), BLOCKS, "float16")
    assert found.scales is not None
    assert found.scales[:2].tolist() == [[1], [1]]
    assert found.scales[2] > 1
    assert found.scales[3] < 1
    mantissa, _ = np.frexp(found.scales)
    assert (mantissa == 0.5).all()  # powers of two: nothing is rounded


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_zeros_and_said(dtype: Storage, broken: float):
    values = drawn()
    values[2, 7] = broken
    found = encode_rows(values, BLOCKS, dtype)
    assert found.usable.tolist() == [True, True, False, True, True]
    assert not found.stored[2].any()
    assert found.stored[3].any()


def test_the_largest_float32_is_not_made_infinite_by_bfloat16():
    values = drawn()
    values[0, 0] = torch.finfo(torch.float32).max
    found = encode_rows(values, BLOCKS, "bfloat16")
    assert found.usable.tolist() == [False, True, True, True, True]


def test_many_layers_make_the_header_longer(tmp_path: Path):
    blocks = tuple(Block(f"model.layers.{n}.self_attn.q_proj.weight", 16, 16) for n in range(300))
    header = header_of("float32", 0, blocks=blocks)
    assert len(header_bytes(header)) % PAGE_BYTES == 0
    assert len(header_bytes(header)) > PAGE_BYTES
    RowsWriter(tmp_path / "x", header).close()
    assert open_rows(tmp_path / "x").header == header
    assert list(header.spans().values())[299] == slice(299 * 256, 300 * 256)


@pytest.mark.parametrize("cut", [1, 50, 4000, 4196])
def test_a_truncated_file_is_noticed(tmp_path: Path, cut: int):
    path = tmp_path / "x.vectors"
    with RowsWriter(path, header_of()) as writer:
        writer.write(range(5), encode_rows(drawn(), BLOCKS, "float16").stored)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    with pytest.raises(InputError, match=r"x\.vectors is damaged: it (has|ends)"):
        open_rows(path)


def test_files_of_others_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="No such file"):
        open_rows(tmp_path / "none")
    (tmp_path / "x").write_bytes(b"PAR1" * 2000)
    with pytest.raises(InputError, match="damaged"):
        open_rows(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"[1]".ljust(PAGE_BYTES - 1) + b"\n")
    with pytest.raises(InputError, match="does not begin with the header"):
        open_rows(tmp_path / "x")
    text = header_bytes(header_of(rows=0)).replace(b'"format":1', b'"format":9')
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(CurateError, match="is of format 9"):
        open_rows(tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"projection": {"seed": 1, "dim": 3, "digest": "d"}}, r"projection seed \(0 and 1\)"),
        ({"projection": {"seed": 0, "dim": 3, "digest": "e"}}, r"projection digest \(d and e\)"),
        ({"reduction": "sum"}, r"loss reduction \(mean and sum\)"),
        ({"blocks": (BLOCKS[0],)}, r"layers \(2 and 1\)"),
        ({"blocks": (BLOCKS[0], Block("c", 1, 4))}, r"layers \(b\.weight as 1 x 4 and c as 1 x 4"),
        ({"model": "n"}, r"model \(m and n\)"),
        ({"tokenizer": None}, r"tokenizer \(t and none\)"),
        ({"task": "other"}, "task"),
    ],
)
def test_indices_that_mean_different_things_are_refused(changes: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=f"the index of pool and that of target.*{named}") as e:
        check_alike(header_of(), header_of(**changes), names=("pool", "target"))
    assert e.value.what.count("(") == 1  # nothing else is said to differ


def test_rows_and_storage_may_differ():
    check_alike(header_of(), replace(header_of("int8", 9), first_row=0))
