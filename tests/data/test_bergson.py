"""Folders as Bergson 2.5.1 writes them, read without it; what is truncated or odd is refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from curate.data.bergson import is_store, open_store, store_digest
from curate.errors import InputError

Array = npt.NDArray[Any]
SIZES = {"layers.0.weight": 6, "layers.1.weight": 4}
COUNTS = np.array([2, 0, 3, 1, 1, 2, 4])
"""Tokens of the seven examples, for folders of tokens."""
ENDS = np.concatenate([[0], np.cumsum(COUNTS)]).astype(np.int64)


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def as_bits(values: Array) -> Array:
    """bfloat16, towards zero."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_scores(
    folder: Path,
    values: Array,
    *,
    kind: str = "float32",
    written: Array | None = None,
    counts: Array | None = None,
) -> Path:
    """Records of a number and a flag, each pair at a multiple of the next power of two.

    Args:
        folder: to write.
        values: (rows, scores)
        kind: of a number, as info.json has it.
        written: (rows,) rows that were scored; all by default.
        counts: (examples,) tokens of each, if rows are tokens.
    """
    folder.mkdir(parents=True)
    size = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}[kind]
    pair = 1 << size.bit_length()  # size + 1 raised to a power of two
    number = values.shape[1]
    names, formats, offsets = [], [], []
    for place in range(number):
        names += [f"score_{place}", f"written_{place}"]
        formats += [kind, "bool"]
        offsets += [place * pair, place * pair + size]
    fields = {"names": names, "formats": formats, "offsets": offsets,
              "itemsize": -(-number * pair // 8) * 8}  # fmt: skip
    own: Any = {**fields, "formats": ["<u2" if f == "bfloat16" else f for f in formats]}
    records = np.zeros(len(values), np.dtype(own))
    flags = np.ones(len(values), bool) if written is None else written
    for place in range(number):
        column = as_bits(values[:, place]) if kind == "bfloat16" else values[:, place]
        records[f"score_{place}"] = np.where(flags, column, 0)
        records[f"written_{place}"] = flags
    records.tofile(folder / "scores.bin")
    info = {
        "attribute_tokens": counts is not None,
        "num_items": len(values) if counts is None else len(counts),
        "num_rows": len(values),
        "num_scores": number,
        "dtype": fields,
    }
    (folder / "info.json").write_text(json.dumps(info, indent=2))
    if counts is not None:
        np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]))
    return folder


def write_gradients(
    folder: Path,
    values: Array,
    *,
    kind: str = "float32",
    sizes: dict[str, int] | None = None,
    counts: Array | None = None,
) -> Path:
    folder.mkdir(parents=True)
    (as_bits(values) if kind == "bfloat16" else values.astype(kind)).tofile(
        folder / "gradients.bin"
    )
    info = {
        "attribute_tokens": counts is not None,
        "num_items": len(values) if counts is None else len(counts),
        "num_grads": len(values),
        "grad_sizes": sizes or SIZES,
        "base_dtype": kind,
    }
    (folder / "info.json").write_text(json.dumps(info, indent=2))
    if counts is not None:
        np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]))
    return folder


def sums_of(values: Array) -> Array:
    """(7, ...) sums over each example's tokens, NaN where it has none."""
    found = np.full((len(COUNTS), *values.shape[1:]), np.nan)
    for place, (first, end) in enumerate(pairwise(ENDS.tolist())):
        if end > first:
            found[place] = values[first:end].astype(np.float64).sum(0)
    return found


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("number", [1, 3])
def test_scores_of_every_type_are_read_and_what_was_not_written_is_not(
    tmp_path: Path, kind: str, number: int
):
    values = drawn(7, number)
    written = np.arange(7) != 5
    store = open_store(write_scores(tmp_path / "s", values, kind=kind, written=written))
    assert store.columns == (("score",) if number == 1 else ("score_0", "score_1", "score_2"))
    assert store.num_rows == 7
    wanted = np.where(written[:, None], values, np.nan)
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3}.get(kind, 0)
    np.testing.assert_allclose(store.read(0, 7), wanted, rtol=tolerance)
    np.testing.assert_allclose(store.read(4, 6), wanted[4:6], rtol=tolerance)
    assert store.read(3, 3).shape == (0, number)


def test_scores_of_tokens_are_added_up_for_each_example(tmp_path: Path):
    values = drawn(int(ENDS[-1]), 2)
    store = open_store(write_scores(tmp_path / "s", values, counts=COUNTS))
    assert store.num_rows == 7
    np.testing.assert_allclose(store.read(0, 7), sums_of(values), rtol=1e-6)
    np.testing.assert_allclose(store.read(1, 4), sums_of(values)[1:4], rtol=1e-6)


def test_an_example_with_a_token_that_was_not_scored_has_no_score(tmp_path: Path):
    written = np.arange(ENDS[-1]) != 3  # of example 2
    store = open_store(
        write_scores(tmp_path / "s", drawn(len(written), 1), counts=COUNTS, written=written)
    )
    assert np.isnan(store.read(0, 7)[:, 0]).tolist() == [False, True, True] + [False] * 4


def test_scores_of_chosen_rows_go_to_these_rows(tmp_path: Path):
    values = drawn(3, 1)
    folder = write_scores(tmp_path / "s", values)
    np.save(folder / "candidates.npy", np.array([8, 2, 5]))
    store = open_store(folder)
    assert (store.num_rows, store.last_row) == (None, 8)
    wanted = np.full(10, np.nan)
    wanted[[8, 2, 5]] = values[:, 0]
    np.testing.assert_allclose(store.read(0, 10)[:, 0], wanted)
    for first, end in ((3, 7), (4, 9)):
        np.testing.assert_allclose(store.read(first, end)[:, 0], wanted[first:end])


@pytest.mark.parametrize(("is_better", "sign"), [(True, 1), (False, -1), (None, 1)])
def test_a_positive_number_is_of_a_row_that_helps(tmp_path: Path, is_better: Any, sign: int):
    """Unrolled differentiation gives changes of the loss: its sign is turned."""
    values = drawn(4, 1)
    folder = write_scores(tmp_path / "s", values)
    if is_better is not None:
        flag = str(is_better).lower()
        (folder / "config.yaml").write_text(
            "steps:\n- score:\n    index_cfg: {run_path: x}\n"
            f"    score_cfg: {{query_path: q, higher_is_better: {flag}}}\n"
        )
    np.testing.assert_allclose(open_store(folder).read(0, 4), sign * values)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_an_index_gives_squared_norms_or_products_with_the_mean_of_another(
    tmp_path: Path, kind: str
):
    values, asked = drawn(7, 10), drawn(3, 10, seed=1)
    values[4] = 0  # an example that was skipped
    pool = write_gradients(tmp_path / "g", values, kind=kind)
    queries = write_gradients(tmp_path / "q", asked, kind=kind)
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[kind]
    squares = np.where(np.arange(7) == 4, np.nan, np.square(values.astype(float)).sum(1))
    store = open_store(pool)
    assert (store.columns, store.num_rows) == (("squared_norm",), 7)
    np.testing.assert_allclose(store.read(0, 7)[:, 0], squares, rtol=tolerance)
    store = open_store(pool, queries)
    assert store.columns == ("score",)
    products = np.where(np.arange(7) == 4, np.nan, values @ asked.mean(0))
    np.testing.assert_allclose(store.read(0, 7)[:, 0], products, rtol=tolerance, atol=tolerance)


def test_gradients_of_tokens_are_added_up_before_they_are_squared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = drawn(int(ENDS[-1]), 10)
    pool = write_gradients(tmp_path / "g", values, counts=COUNTS)
    wanted = np.square(sums_of(values)).sum(1)
    for piece in (1 << 20, 30, 1):  # down to one example at a time
        monkeypatch.setattr("curate.data.bergson._PIECE_NUMBERS", piece)
        np.testing.assert_allclose(open_store(pool).read(0, 7)[:, 0], wanted, rtol=1e-6)
        np.testing.assert_allclose(open_store(pool).read(2, 5)[:, 0], wanted[2:5], rtol=1e-6)
    mean = np.nanmean(sums_of(values), 0)
    plain = write_gradients(tmp_path / "p", drawn(4, 10, seed=2))
    np.testing.assert_allclose(
        open_store(plain, pool).read(0, 4)[:, 0], drawn(4, 10, seed=2) @ mean, rtol=1e-6
    )


def test_shards_follow_each_other(tmp_path: Path):
    values = drawn(9, 10)
    for number, (first, end) in enumerate([(0, 4), (4, 5), (5, 9)]):
        write_gradients(tmp_path / "g" / f"shard-{number}", values[first:end])
    (tmp_path / "g" / "other").mkdir()
    store = open_store(tmp_path / "g")
    assert is_store(tmp_path / "g")
    assert store.num_rows == 9
    wanted = np.square(values).sum(1)
    for first, end in ((0, 9), (3, 6), (5, 8), (4, 4)):
        np.testing.assert_allclose(store.read(first, end)[:, 0], wanted[first:end], rtol=1e-5)


def test_all_that_is_read_is_in_the_digest(tmp_path: Path):
    folder = write_scores(tmp_path / "s", drawn(7, 1))
    before = store_digest(folder)
    (folder / "notes.txt").write_text("x")
    assert store_digest(folder) == before
    np.save(folder / "candidates.npy", np.arange(7))
    assert store_digest(folder) != before


@pytest.mark.parametrize("cut", [1, 8, 50])
def test_truncated_numbers_are_refused(tmp_path: Path, cut: int):
    folders = (
        write_scores(tmp_path / "s", drawn(7, 1)),
        write_gradients(tmp_path / "g", drawn(7, 10)),
    )
    for folder in folders:
        (path,) = folder.glob("*.bin")
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(InputError, match=rf"{path.name} has .* bytes, .*truncated"):
            open_store(folder)
        path.unlink()
        with pytest.raises(InputError, match="is missing"):
            open_store(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("info.json", b"{", "info.json cannot be read"),
        ("info.json", b"[]", "nothing of scores or gradients"),
        ("info.json", b'{"num_scores": 1, "num_items": 7}', "dtype cannot be read"),
        ("info.json", b'{"num_grads": 7}', "no sizes or type"),
        ("offsets.npy", b"", "offsets.npy cannot be read"),
        ("candidates.npy", b"NUMPY", "candidates.npy cannot be read"),
        ("config.yaml", b"steps: 3", "whether a high score helps"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, words: str):
    folder = write_scores(tmp_path / "s", drawn(int(ENDS[-1]), 1), counts=COUNTS)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        open_store(folder)
    assert str(folder / name) in error.value.what


def test_folders_that_do_not_fit_are_refused(tmp_path: Path):
    scores = write_scores(tmp_path / "s", drawn(7, 1))
    pool = write_gradients(tmp_path / "g", drawn(7, 10))
    other = write_gradients(tmp_path / "o", drawn(7, 10), sizes={"layers.0.weight": 10})
    with pytest.raises(InputError, match="scores, of which nothing can be asked"):
        open_store(scores, pool)
    with pytest.raises(InputError, match=r"different modules: .*layers\.0\.weight', 6"):
        open_store(pool, other)
    with pytest.raises(InputError, match="no sizes or type"):
        open_store(pool, scores)
    with pytest.raises(InputError, match="is no folder of Bergson"):
        open_store(tmp_path)
    np.save(scores / "candidates.npy", np.array([1, 1, 2, 3, 4, 5, 6]))
    with pytest.raises(InputError, match="does not name 7 different rows"):
        open_store(scores)
    empty = write_gradients(tmp_path / "e", drawn(0, 10))
    with pytest.raises(InputError, match="holds no gradient"):
        open_store(pool, empty)
    assert open_store(empty).num_rows == 0
