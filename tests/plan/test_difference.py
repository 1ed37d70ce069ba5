"""Pairs of rows: however the data is cut, and wherever it is kept meanwhile, every example meets
its like, and everything is counted once."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from curate.data.buckets import Buckets
from curate.plan.difference import (
    ABSENT,
    FACTS,
    KEYED,
    Tally,
    aligned,
    same_rows,
    unmatched_pairs,
)

Rows = dict[tuple[str, str, int], dict[str, Any]]
"""Key -> content and plan."""


def frame_of(rows: Rows) -> pl.DataFrame:
    table = [
        {"source": s, "file": f, "row": r, "place": 0, **facts}
        for (s, f, r), facts in sorted(rows.items())
    ]
    return pl.DataFrame(table, schema=FACTS)


def random_rows(seed: int, contents: int = 60) -> Rows:
    draw = np.random.default_rng(seed)
    rows: Rows = {}
    for file in ("x", "y", "z"):
        for row in range(30):
            if draw.random() < 0.2:
                continue
            kept = bool(draw.random() < 0.5)
            reason = "kept" if kept else str(draw.choice(["score", "held_out"]))
            rows["web", file, row] = {
                "content": int(draw.integers(contents)) << 56,
                "domain": str(draw.choice(["law", "news"])),
                "keep": kept,
                "copies": int(draw.integers(1, 4)) if kept else 0,
                "weight": float(draw.choice([0.5, 1.0])) if kept else 0.0,
                "reason": reason,
                "tokens": int(draw.integers(1, 9)),
            }
    return rows


def nearby(rows: Rows, seed: int) -> Rows:
    """Most rows as they were; some edited, some dropped, and one file shifted by a row."""
    draw = np.random.default_rng(seed)
    other = random_rows(seed)
    found: Rows = {}
    for (source, file, row), facts in rows.items():
        chance = draw.random()
        if chance < 0.1:
            continue
        key = (source, file, row + (file == "y"))
        found[key] = facts if chance < 0.8 else other.get((source, file, row), facts)
    return found


def pair_up(left: Rows, right: Rows) -> list[tuple[str, Any, Any]]:
    """Brute force: (match, key in A, key in B)."""
    pairs: list[tuple[str, Any, Any]] = []
    rest = [sorted(side) for side in (left, right)]
    for key in [k for k in rest[0] if k in right and left[k]["content"] == right[k]["content"]]:
        pairs.append(("same", key, key))
        rest[0].remove(key)
        rest[1].remove(key)
    for key in list(rest[0]):
        like = [k for k in rest[1] if right[k]["content"] == left[key]["content"]]
        if like:
            pairs.append(("moved", key, like[0]))
            rest[0].remove(key)
            rest[1].remove(like[0])
    for key in list(rest[0]):
        if key in rest[1]:
            pairs.append(("changed", key, key))
            rest[0].remove(key)
            rest[1].remove(key)
    pairs += [("removed", key, None) for key in rest[0]]
    return pairs + [("added", None, key) for key in rest[1]]


def cut(frame: pl.DataFrame, file: str, at: list[int]) -> list[tuple[int, pl.DataFrame]]:
    rows = frame.filter(pl.col("file") == file)
    edges = [0, *at, 40]
    return [
        (high, rows.filter(pl.col("row").is_between(low, high, closed="left")))
        for low, high in pairwise(edges)
    ]


def tallied(
    left: Rows, right: Rows, folder: Path, *, most_rows: int, cuts: tuple[list[int], list[int]]
) -> tuple[Tally, list[tuple[str, Any, Any]]]:
    """The functions put together as the job does."""
    frames = [frame_of(side) for side in (left, right)]
    places = [folder / "content", folder / "key"]
    for place in places:
        place.mkdir(parents=True)
    content = Buckets(places[0], "content", (FACTS, FACTS), most_rows=most_rows)
    keys = Buckets(places[1], "key", (KEYED, KEYED), most_rows=most_rows)
    tally, found = Tally(2), list[tuple[str, Any, Any]]()

    def take(pairs: pl.DataFrame) -> None:
        tally.add(pairs)
        for row in pairs.to_dicts():
            key = [
                None if row[f"source_{s}"] is None
                else tuple(row[f"{name}_{s}"] for name in ("source", "file", "row"))
                for s in "ab"
            ]  # fmt: skip
            found.append((row["match"], key[0], key[1]))

    for file in ("x", "y", "z"):
        stretches = [cut(frame, file, at) for frame, at in zip(frames, cuts, strict=True)]
        for both in aligned(*stretches):
            pairs, *rest = same_rows(*both)
            take(pairs)
            for side, frame in enumerate(rest):
                content.add(side, frame)
    for pairs in unmatched_pairs(content, keys):
        take(pairs)
    return tally, found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("most_rows", [10_000, 7])
@pytest.mark.parametrize("cuts", [([], []), ([5, 10], [1, 2, 39])])
def test_every_example_meets_its_like_however_the_data_is_cut(
    tmp_path: Path, seed: int, most_rows: int, cuts: tuple[list[int], list[int]]
):
    left = random_rows(seed)
    right = nearby(left, seed + 10)
    _, found = tallied(left, right, tmp_path, most_rows=most_rows, cuts=cuts)
    wanted = pair_up(left, right)
    assert {match for match, _, _ in wanted} == {"same", "moved", "changed", "removed", "added"}
    assert sorted(map(str, found)) == sorted(map(str, wanted))


def test_counts_are_those_of_the_pairs_one_by_one(tmp_path: Path):
    left = random_rows(5)
    right = nearby(left, 6)
    tally, _ = tallied(left, right, tmp_path, most_rows=7, cuts=([9], [20]))
    nothing = {"keep": False, "copies": 0, "weight": 0.0, "reason": ABSENT, "domain": None}
    both = [
        (match, left[a] if a else nothing, right[b] if b else nothing)
        for match, a, b in pair_up(left, right)
    ]

    def count(condition: Callable[[str, Any, Any], bool]) -> int:
        return sum(condition(match, a, b) for match, a, b in both)

    assert tally.kinds["kept in A only"] == count(lambda _, a, b: a["keep"] and not b["keep"]) > 0
    assert tally.kinds["kept in B only"] == count(lambda _, a, b: b["keep"] and not a["keep"]) > 0
    assert tally.kept_in_both == count(lambda _, a, b: a["keep"] and b["keep"])
    for name, key in (("copies changed", "copies"), ("weight changed", "weight")):
        wanted = count(lambda _, a, b, k=key: a["keep"] and b["keep"] and a[k] != b[k])
        assert tally.kinds[name] == wanted > 0
    assert tally.reasons["kept", ABSENT] == count(
        lambda _, a, b: (a["reason"], b["reason"]) == ("kept", ABSENT)
    )
    assert sum(tally.reasons.values()) == len(both)
    for side, rows in (("a", left), ("b", right)):
        for domain in ("law", "news"):
            mine = [facts for facts in rows.values() if facts["domain"] == domain]
            entry = tally.domains[domain][side]
            assert entry["rows"] == sum(facts["reason"] != "held_out" for facts in mine)
            assert entry["kept"] == sum(facts["keep"] for facts in mine)
            assert entry["tokens"] == sum(facts["copies"] * facts["tokens"] for facts in mine)
        sums = [facts["copies"] * facts["weight"] for facts in rows.values()]
        wanted_size = sum(sums) ** 2 / sum(value**2 for value in sums)
        assert tally.effective(side) == pytest.approx(wanted_size)
    assert tally.files["web", "y"]["a"] == sum(file == "y" for _, file, _ in left)
    assert not tally.is_same


def test_what_is_shown_does_not_depend_on_how_the_data_is_cut(tmp_path: Path):
    left = random_rows(5)
    right = nearby(left, 6)
    one, _ = tallied(left, right, tmp_path / "1", most_rows=7, cuts=([9], [20]))
    two, _ = tallied(left, right, tmp_path / "2", most_rows=9999, cuts=([], [1, 2, 3]))
    assert one.shown.keys() == two.shown.keys() >= {"kept in A only", "moved", "changed"}
    for kind, shown in one.shown.items():
        assert shown.equals(two.shown[kind])
        assert shown.height <= 2


def test_equal_plans_are_the_same(tmp_path: Path):
    rows = random_rows(3)
    tally, found = tallied(rows, rows, tmp_path, most_rows=7, cuts=([9], [20]))
    assert tally.is_same
    assert {match for match, _, _ in found} == {"same"}
