"""The store of sequences: against the arrays that were written, kept in plain lists here."""

import json
import subprocess
import sys
from collections.abc import Sequence as Many
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import byte_tokenizer

from curate.errors import ConfigError, InputError
from curate.models import sequence_files
from curate.models.sequence_files import check_layout, write_sequences
from curate.models.sequences import PARTS, Sequences, half_of
from curate.models.settings import CausalLM, TabularClassification
from curate.models.tasks import Encoded, build_task

CODE = {part: np.uint8(number) for number, part in enumerate(PARTS)}


def texts(rows: Many[Many[int]]) -> Encoded:
    """Padded texts of the given tokens; all but the first count."""
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    return Encoded(
        lengths=np.maximum(sizes, 1),
        num_scored=np.maximum(sizes - 1, 0),
        truncated=np.zeros(len(rows), dtype=np.bool_),
        arrays={
            "tokens": np.array([token for row in rows for token in row], dtype=np.int32),
            "starts": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            "counted": np.array([i > 0 for row in rows for i in range(len(row))], dtype=np.bool_),
        },
        problems={},
    )


def written(path: Path, rows: Many[Many[int]], domains: Many[str], parts: Many[str]) -> None:
    names = sorted(set(domains))
    write_sequences(
        path,
        texts(rows),
        domain=np.array([names.index(name) for name in domains], dtype=np.int32),
        part=np.array([CODE[part] for part in parts], dtype=np.uint8),
        names=names,
    )


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two files; sequence 100 has nothing that counts and is left out."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    written(
        one,
        [[10, 11], [20, 21, 22], [100], [30, 31, 32, 33], [40, 41]],
        ["b", "a", "a", "b", "c"],
        ["proxy", "reference", "proxy", "held_out", "proxy"],
    )
    written(
        two,
        [[50, 51, 52], [60, 61], [70, 71]],
        ["a", "b", "a"],
        ["proxy", "proxy", "reference"],
    )
    return [one, two]


def tokens_of(encoded: Encoded) -> list[list[int]]:
    starts = encoded.arrays["starts"]
    return [encoded.arrays["tokens"][start:stop].tolist() for start, stop in pairwise(starts)]


def all_of(data: Sequences) -> dict[str, list[list[int]]]:
    return {
        name: tokens_of(data.take([k] * int(size), range(int(size))).encoded)
        for k, (name, size) in enumerate(zip(data.domains, data.sizes, strict=True))
    }


def test_each_domain_has_its_sequences_of_the_chosen_parts(paths: list[Path]):
    data = Sequences.open(paths, parts=("reference", "proxy"))
    assert all_of(data) == {
        "a": [[20, 21, 22], [50, 51, 52], [70, 71]],
        "b": [[10, 11], [60, 61]],
        "c": [[40, 41]],
    }
    assert data.num_tokens.tolist() == [5, 2, 1]
    assert data.notes == ()


def test_a_batch_is_in_the_order_it_was_asked_for(paths: list[Path]):
    data = Sequences.open(paths, parts=("reference", "proxy"))
    taken = data.take(torch.tensor([1, 0, 2, 0, 1]), torch.tensor([1, 2, 0, 0, 1]))
    assert tokens_of(taken.encoded) == [[60, 61], [70, 71], [40, 41], [20, 21, 22], [60, 61]]
    assert taken.encoded.lengths.tolist() == [2, 2, 2, 3, 2]
    assert taken.encoded.num_scored.tolist() == [1, 1, 1, 2, 1]
    batch = build_task(CausalLM(), byte_tokenizer()).collate(taken.encoded, range(5))
    assert batch["input_ids"][3].tolist() == [20, 21, 22]
    assert batch["targets"][3].tolist() == [21, 22]


def test_a_sequence_keeps_its_number_whatever_parts_are_chosen(paths: list[Path]):
    known: dict[int, list[int]] = {}
    for parts in (("reference",), ("proxy",), ("held_out",), PARTS):
        data = Sequences.open(paths, parts=parts)
        for k, size in enumerate(data.sizes.tolist()):
            taken = data.take([k] * size, range(size))
            assert taken.numbers.tolist() == data.numbers_of(data.domains[k]).tolist()
            for number, row in zip(taken.numbers, tokens_of(taken.encoded), strict=True):
                assert known.setdefault(int(number), row) == row
    assert sorted(known) == list(range(7))
    assert Sequences.open(paths, parts=()).total == 7


def test_an_empty_half_is_replaced_by_the_other_and_it_is_said(paths: list[Path]):
    data = Sequences.open(paths, parts=("reference",))
    assert all_of(data) == {
        "a": [[20, 21, 22], [70, 71]],
        "b": [[10, 11], [60, 61]],  # both of the proxy's half
        "c": [[40, 41]],
    }
    assert data.borrowed == ("b", "c")
    assert data.num_tokens.tolist() == [3, 2, 1]
    (note,) = data.notes
    assert note.endswith("the other half stands for both: b, c")


def test_a_domain_without_sequences_is_dropped_and_it_is_said(paths: list[Path]):
    data = Sequences.open(paths, parts=("held_out",), domains=["c", "b", "nowhere"])
    assert all_of(data) == {"b": [[30, 31, 32, 33]]}
    assert data.missing == ("c", "nowhere")
    (note,) = data.notes
    assert note.endswith("c, nowhere")


def test_the_domains_come_in_the_order_that_was_given(paths: list[Path]):
    data = Sequences.open(paths, parts=("proxy",), domains=["c", "a"])
    assert all_of(data) == {"c": [[40, 41]], "a": [[50, 51, 52]]}


def test_all_domains_may_count_as_one(paths: list[Path]):
    data = Sequences.open(paths, parts=("proxy",), as_one="target")
    assert all_of(data) == {"target": [[10, 11], [40, 41], [50, 51, 52], [60, 61]]}


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux does")
def test_more_files_are_read_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import resource

    paths = [tmp_path / f"{number}.safetensors" for number in range(60)]
    for number, path in enumerate(paths):
        written(path, [[number, 7], [number, 8]], ["a", "a"], ["proxy", "proxy"])
    monkeypatch.setattr(sequence_files, "_OPEN", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken_handles = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(soft) if number not in taken_handles]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))  # the 20 below it are left
    try:
        data = Sequences.open(paths, parts=("proxy",))
        rows = np.arange(0, 120, 2)
        taken = data.take(np.zeros_like(rows), rows[::-1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert tokens_of(taken.encoded) == [[number, 7] for number in reversed(range(60))]


def test_limited_domains_have_fewer_sequences_and_the_fewer_are_among_the_more(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    written(path, [[i] * (2 + i % 3) for i in range(40)], ["a", "b"] * 20, ["proxy"] * 40)
    data = Sequences.open([path], parts=("proxy",))
    few, more = data.limited({"a": 3}, seed=1), data.limited({"a": 8}, seed=1)
    assert few.sizes.tolist() == [3, 20]
    assert set(few.numbers_of("a")) < set(more.numbers_of("a")) < set(data.numbers_of("a"))
    wanted = sum(len(row) - 1 for row in all_of(few)["a"])
    assert few.num_tokens.tolist() == [wanted, data.num_tokens[1]]
    assert set(data.limited({"a": 3}, seed=2).numbers_of("a")) != set(few.numbers_of("a"))
    assert data.sizes.tolist() == [20, 20]
    assert data.limited({"a": 100, "elsewhere": 1}, seed=1).sizes.tolist() == [20, 20]


def test_rows_of_numbers_and_labels_follow_the_sequence(tmp_path: Path):
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    encoded = Encoded(
        lengths=np.ones(6, dtype=np.int64),
        num_scored=np.array([1, 1, 0, 1, 1, 1]),
        truncated=np.zeros(6, dtype=np.bool_),
        arrays={"features": features, "labels": np.arange(6)},
        problems={},
    )
    check_layout(encoded, "tabular-classification")
    path = tmp_path / "x.safetensors"
    write_sequences(
        path,
        encoded,
        domain=np.zeros(6, np.int32),
        part=np.full(6, CODE["proxy"]),
        names=["only"],
    )
    data = Sequences.open([path], parts=("proxy",))
    assert data.total == data.num_tokens.tolist()[0] == 5
    taken = data.take([0, 0, 0], [4, 1, 2])
    task = build_task(TabularClassification(num_classes=6), None)
    batch = task.collate(taken.encoded, range(3))
    assert batch["labels"].tolist() == [5, 1, 3]
    np.testing.assert_array_equal(batch["features"], features[[5, 1, 3]])


def test_a_task_with_other_arrays_is_refused():
    encoded = texts([[1, 2], [3, 4]])
    check_layout(encoded, "causal-lm")
    encoded.arrays["chosen_starts"] = np.arange(3)
    with pytest.raises(ConfigError, match=r"task preference .* chosen_starts has 3 rows for 2"):
        check_layout(encoded, "preference")


def test_a_file_without_sequences_does_no_harm(tmp_path: Path, paths: list[Path]):
    empty = tmp_path / "empty.safetensors"
    written(empty, [[1], [2]], ["z", "z"], ["proxy", "proxy"])
    with_it = Sequences.open([paths[0], empty, paths[1]], parts=("reference", "proxy"))
    assert all_of(with_it) == all_of(Sequences.open(paths, parts=("reference", "proxy")))
    assert with_it.missing == ("z",)
    nothing = with_it.read(np.zeros(0, dtype=np.int64))
    assert nothing.arrays["starts"].tolist() == [0]
    assert len(nothing) == 0


def test_another_process_reads_what_was_written_and_the_library_does_too(paths: list[Path]):
    code = (
        "import json, sys; from pathlib import Path;"
        "from curate.models.sequences import Sequences;"
        "d = Sequences.open([Path(p) for p in sys.argv[1:]], parts=('reference', 'proxy'));"
        "t = d.take([0, 1], [2, 0]);"
        "print(json.dumps([d.domains, t.encoded.arrays['tokens'].tolist(), t.numbers.tolist()]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == [["a", "b", "c"], [70, 71, 10, 11], [6, 0]]
    saved = load_file(paths[1])
    assert saved["arrays.tokens"].tolist() == [50, 51, 52, 60, 61, 70, 71]
    assert saved["domain"].tolist() == [0, 1, 0]
    assert saved["part"].tolist() == [1, 1, 0]


def test_equal_sequences_give_equal_bytes(tmp_path: Path, paths: list[Path]):
    again = tmp_path / "again.safetensors"
    written(again, [[50, 51, 52], [60, 61], [70, 71]], ["a", "b", "a"],
            ["proxy", "proxy", "reference"])  # fmt: skip
    assert again.read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("harm", ["cut", "empty", "gone", "another"])
def test_a_damaged_file_is_named(paths: list[Path], harm: str):
    content = paths[1].read_bytes()
    if harm == "gone":
        paths[1].unlink()
    elif harm == "another":
        save_file({"x": np.zeros(3)}, paths[1])
    else:
        paths[1].write_bytes(content[:-2] if harm == "cut" else b"")
    with pytest.raises(InputError, match=r"two\.safetensors is missing or damaged"):
        Sequences.open(paths, parts=("proxy",))


def test_halves_are_about_equal_and_depend_on_content_and_seed_alone():
    draws = [half_of(content * 2**40, seed=0) for content in range(4000)]
    assert 1850 < draws.count("proxy") < 2150
    assert draws == [half_of(content * 2**40, seed=0) for content in range(4000)]
    others = [half_of(content * 2**40, seed=1) for content in range(4000)]
    assert 1850 < sum(a == b for a, b in zip(draws, others, strict=True)) < 2150
    assert half_of(2**64 - 1, seed=-1, halves=("x", "y")) in "xy"


def test_reading_a_few_sequences_of_a_large_file_takes_little_memory(tmp_path: Path):
    path, length, count = tmp_path / "large.safetensors", 1024, 8000  # 74 MB
    encoded = Encoded(
        lengths=np.full(count, length),
        num_scored=np.full(count, length - 1),
        truncated=np.zeros(count, dtype=np.bool_),
        arrays={
            "tokens": np.arange(count * length, dtype=np.int32),
            "starts": np.arange(count + 1, dtype=np.int64) * length,
            "counted": np.tile(np.arange(length) > 0, count),
            "positions": np.tile(np.arange(length, dtype=np.int32), count),
        },
        problems={},
    )
    write_sequences(path, encoded, domain=np.zeros(count, np.int32),
                    part=np.full(count, CODE["proxy"]), names=["a"])  # fmt: skip
    assert path.stat().st_size > 70e6
    code = (
        "import sys, psutil, numpy as np; from pathlib import Path;"
        "from curate.models.sequences import Sequences;"
        "own = lambda: (m := psutil.Process().memory_info()).rss - m.shared;"
        "before = own();"
        "d = Sequences.open([Path(sys.argv[1])], parts=('proxy',));"
        "rows = np.arange(0, 8000, 250);"
        "e = d.take(np.zeros_like(rows), rows).encoded;"
        "assert (e.arrays['tokens'].reshape(-1, 1024)[:, 0] == rows * 1024).all();"
        "print(own() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True,
                         check=True)  # fmt: skip
    # Pages of the map that lie in the system's cache are not counted: it may take them back.
    assert int(ran.stdout) < 6e6


def test_an_index_takes_eight_bytes_a_sequence(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    written(path, [[i, i] for i in range(500)], ["a"] * 500, ["proxy"] * 500)
    data = Sequences.open([path], parts=("proxy",))
    kept: Any = data
    assert sum(own.nbytes for own in kept._numbers.values()) == 8 * 500
    assert all(own.base is None for own in kept._numbers.values())
