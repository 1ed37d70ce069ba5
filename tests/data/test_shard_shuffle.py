"""Two passes over the disk: what is dealt and written again is what was there."""

import datetime
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.planned_run import TOKENIZER, Decide, Row, Tables, planned_run
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Component, Kept
from curate.data.shard_line import lay_out_line
from curate.data.shard_settings import Shards
from curate.data.shard_shuffle import deal_rows, write_stretch
from curate.data.shard_survey import survey
from curate.errors import CurateError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets and what is held of the input are a few rows."""
    monkeypatch.setattr("curate.data.shard_line.BUCKET_BYTES", 5000)
    monkeypatch.setattr("curate.data.shard_shuffle._HELD_BYTES", 5000)
    monkeypatch.setattr("curate.data.shard_line._DEAL_BYTES", 9000)
    monkeypatch.setattr("curate.data.shard_layout._PIECE_BYTES", 3000)


def shuffle(
    root: Path,
    tables: Tables,
    decide: Decide,
    *,
    seed: int = 0,
    parts: int = 50,
    between: Callable[[Path], object] = lambda _: None,
    **options: Any,
) -> list[pa.Table]:
    """Both passes, one after the other; the files in the order of the line."""
    run = RunFolder(root / "run")
    planned_run(root, tables, decide, partition_rows=parts)
    shards = Shards(**options)
    found = survey(run, run.partitions(), shards, seed=seed, tokenizer=TOKENIZER)
    assert found.line is not None
    schema = next(iter(found.schemas.values()))
    dealt: list[Path] = []
    for deal in found.line.deals:
        dealt.append(root / deal.name)
        deal_rows(
            run,
            deal,
            found.line.places,
            dealt[-1],
            way=shards.weights,
            terms=found.terms,
            schema=schema,
            tokenizer=TOKENIZER,
        )
        between(dealt[-1])
    files: list[str] = []
    first = 0
    for stretch in found.line.stretches:
        receipts = write_stretch(
            run,
            stretch,
            dealt,
            first_bucket=first,
            schema=schema,
            context=Context(settings=shards, sources={}, tokenizer=None),
            tokenizer=TOKENIZER,
        )
        first += len(stretch.cuts) - 1
        files += [receipt["file"] for receipt in receipts]
        for shard, receipt in zip(stretch.shards, receipts, strict=True):
            assert receipt["rows"] == shard.num_rows
    return [pq.read_table(run.shards / file) for file in files]


def keys(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table["curate_file"].to_pylist(), table["curate_row"].to_pylist(), strict=True))


NUMBERS: Tables = {
    "a": {
        "x.parquet": pa.table({"n": range(700), "text": [f"row {i} {i**7}" for i in range(700)]}),
        "y.parquet": pa.table({"n": range(300), "text": [f"more {i} {i**7}" for i in range(300)]}),
    }
}


def two_domains(_source: str, file: str, row: int) -> Row | None:
    if row % 13 == 12:
        return None
    return Row("rare" if row % 5 == 0 else "common", copies=row % 4, tokens=row)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("order", ["shuffled", "domain-interleaved"])
def test_every_row_comes_as_often_as_planned_through_many_small_buckets(tmp_path: Path, order: str):
    tables = shuffle(tmp_path, NUMBERS, two_domains, order=order, size_mb=0.01)
    found = Counter(key for table in tables for key in keys(table))
    wanted = Counter[tuple[str, int]]()
    for file, size in (("x.parquet", 700), ("y.parquet", 300)):
        for row in range(size):
            if (decided := two_domains("a", file, row)) and decided.copies:
                wanted[file, row] = row % 4
    assert found == wanted
    for table in tables:
        for file, row, text in zip(
            table["curate_file"].to_pylist(),
            table["curate_row"].to_pylist(),
            table["text"].to_pylist(),
            strict=True,
        ):
            assert text == f"{'row' if file[0] == 'x' else 'more'} {row} {row**7}"


def test_the_order_is_random_and_copies_fall_apart(tmp_path: Path):
    (table,) = shuffle(
        tmp_path, NUMBERS, lambda _s, _f, _r: Row("a", copies=2), order="shuffled", size_mb=1
    )
    both = keys(table)
    place = {"x.parquet": 0, "y.parquet": 700}
    numbers = np.array([place[file] + row for file, row in both], dtype=float)
    assert abs(np.corrcoef(numbers, np.arange(2000))[0, 1]) < 4 / np.sqrt(2000)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 4 / np.sqrt(2000)
    assert sum(one == other for one, other in pairwise(both)) < 8  # one in the mean


@pytest.mark.usefixtures("small")
def test_the_order_depends_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def line(name: str, **options: Any) -> list[tuple[str, int]]:
        tables = shuffle(tmp_path / name, NUMBERS, two_domains, order="shuffled", **options)
        return [key for table in tables for key in keys(table)]

    small = line("small", size_mb=0.01)
    assert line("parts", size_mb=0.1, parts=33) == small
    monkeypatch.undo()
    assert line("large", size_mb=1) == small
    other = line("other", size_mb=1, seed=1)
    assert other != small
    assert Counter(other) == Counter(small)


TYPES = pa.table(
    {
        "text": ["plain", None, "日本語 🎉", "", "x" * 100_000, "end"],
        "ids": pa.array([[1, 2], [], None, [3], [None], [4]], pa.list_(pa.int16())),
        "image": pa.array(
            [{"bytes": bytes([i]) * 50, "path": None} for i in range(5)] + [None],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "kind": pa.array(["a", "b", None, "a", "c", "a"]).dictionary_encode(),
        "deep": pa.array(
            [[{"k": [["v"], None]}], [], None, [{"k": None}], [{"k": []}], [None]],
            pa.list_(pa.struct([("k", pa.list_(pa.list_(pa.large_string())))])),
        ),
        "map": pa.array([[("a", 1)], [], None, [("b", 2), ("c", None)], [], []],
                        pa.map_(pa.string(), pa.int8())),
        "when": pa.array([datetime.datetime(2026, 1, i + 1) for i in range(6)],
                         pa.timestamp("us", tz="UTC")),
        "nothing": pa.nulls(6),
        "0": [True, None, False, True, True, False],
        "place": [0.5, None, float("inf"), 1, 2, 3],
    }
)  # fmt: skip


@pytest.mark.parametrize("order", ["shuffled", "domain-interleaved"])
def test_every_type_survives_both_passes(tmp_path: Path, order: str):
    tables: Tables = {"a": {"x.parquet": TYPES}}
    parts = shuffle(
        tmp_path, tables, lambda _s, _f, row: Row(f"d{row % 2}", copies=1 + row % 2), order=order
    )
    whole = pa.concat_tables(parts)
    assert whole.schema.types[: len(TYPES.schema)] == TYPES.schema.types
    assert whole.num_rows == 9
    original = TYPES.to_pylist()
    for row in whole.to_pylist():
        assert {name: row[name] for name in TYPES.column_names} == original[row["curate_row"]]


def test_weights_of_each_phase_go_with_their_rows(tmp_path: Path):
    def phased(_source: str, _file: str, row: int) -> Row:
        return Row("even" if row % 2 == 0 else "odd", copies=(row % 3, 1), weight=1 + row % 7)

    tables: Tables = {"a": {"x.parquet": pa.table({"n": range(210)})}}
    parts = shuffle(tmp_path, tables, phased, order="shuffled", weights="domains", min_files=2)
    assert len(parts) == 8
    means = [np.mean(part["curate_weight"].to_numpy()) for part in parts]
    for first, second in zip(means[::2], means[1::2], strict=True):
        assert (first + second) / 2 == pytest.approx(1, abs=0.02)  # halves differ by one row
    by_phase = [
        {row["n"]: row["curate_weight"] for part in half for row in part.to_pylist()}
        for half in (parts[:4], parts[4:])
    ]
    assert set(by_phase[0]) == {row for row in range(210) if row % 3}
    ratio = by_phase[0][1] / by_phase[1][1]
    assert by_phase[0][4] / by_phase[1][4] == pytest.approx(ratio * 1, rel=0.2)
    assert by_phase[0][2] / by_phase[1][2] != pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("at", [100, -1])
def test_damage_between_the_passes_is_found(tmp_path: Path, at: int):
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    with pytest.raises(CurateError, match="deal-000000 is damaged") as caught:
        shuffle(tmp_path, NUMBERS, two_domains, order="shuffled", between=damage)
    assert "remove" in caught.value.fix
    with pytest.raises(CurateError, match="deal-000000 is damaged"):
        shuffle(tmp_path, NUMBERS, two_domains, order="shuffled", between=Path.unlink)


# -- the line -------------------------------------------------------------------------------------


def part(ordinal: int) -> Partition:
    return Partition(
        name=f"part-{ordinal:05d}",
        source="a",
        file="x.parquet",
        address="/x.parquet",
        first_row=ordinal * 100,
        num_rows=100,
        stamp="1",
    )


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 90), min_size=1), min_size=1
    ),
    st.sampled_from(["shuffled", "domain-interleaved", "scheduled"]),
    st.floats(1e3, 1e8),
    st.integers(1, 9),
)
@settings(max_examples=25)
def test_every_place_of_the_line_belongs_to_one_row_one_bucket_and_one_file(
    rows: list[dict[str, int]], order: Any, row_bytes: float, least: int
):
    kept = [
        Kept(part(i), {Component(1 + i % 2, d): n for d, n in each.items()}, row_bytes, row_bytes)
        for i, each in enumerate(rows)
    ]
    names = {name: name for name in "abcdef"}
    shards = Shards(order=order, min_files=least, size_mb=10)
    line = lay_out_line(kept, settings=shards, names=names, seed=3)
    total = sum(sum(each.values()) for each in rows)
    placer = line.places.placer()
    found: list[int] = []
    partitions: list[Partition] = []
    for deal in line.deals:
        numbers = list(deal.starts)
        partitions += deal.partitions
        for entry in kept[int(deal.partitions[0].name[5:]) :][: len(deal.partitions)]:
            for component, count in entry.rows.items():
                nth = placer.index[component]
                number = np.arange(count) + numbers[nth]
                numbers[nth] += count
                found += placer.places(np.full(count, nth), number).tolist()
    assert sorted(found) == list(range(total))
    assert partitions == [entry.partition for entry in kept]
    assert line.places.cuts[0] == 0
    assert line.places.cuts[-1] == total
    assert all(low < high for low, high in pairwise(line.places.cuts))
    at = 0
    for stretch in line.stretches:
        assert stretch.cuts[0] == at
        at += sum(shard.num_rows for shard in stretch.shards)
        assert stretch.cuts[-1] == at
        for low, high in pairwise(stretch.cuts):
            assert (high - low) * row_bytes <= (32 << 20) + row_bytes
    files = [(s.folder, s.number) for stretch in line.stretches for s in stretch.shards]
    assert len(set(files)) == len(files)
    outputs = Counter(s.component for stretch in line.stretches for s in stretch.shards)
    for component, number in outputs.items():
        own = sum(
            count
            for entry in kept
            for each, count in entry.rows.items()
            if each.phase == component.phase and component.domain in ("", each.domain)
        )
        assert number >= min(least, own)
