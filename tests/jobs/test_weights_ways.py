"""Shards of one plan, its weights written as a column, as copies, as probabilities of domains."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from data.planned_run import Row, planned_run

from curate.data.shard_layout import Component
from curate.data.shard_weights import ONE, uniform
from jobs.cluster import open_pool
from jobs.settings import Settings
from jobs.verify import verify_shards
from jobs.write import write_run

WAYS = ("column", "copies", "domains")
ROWS = 240
TABLES = {
    "a": {f"{n}.parquet": pa.table({"text": [f"{n} {i}" for i in range(ROWS)]}) for n in "xy"}
}
Key = tuple[str, int]


def decide(_source: str, file: str, row: int) -> Row | None:
    """Three domains whose rows differ in copies, weight and length."""
    if row % 8 == 7:
        return None
    domain = ("web", "code", "talk")[(0, 0, 0, 1, 0, 2)[row % 6]]
    weight = (0.3, 0.75, 1.0, 1.9)[(row + len(file)) % 4]
    tokens = {"web": 10, "code": 40, "talk": 20}[domain]
    return Row(domain, copies=(1, 2, 1, 0, 3)[row % 5], weight=weight, tokens=tokens)


def write(root: Path, way: str, *, partition_rows: int = 50, **more: Any) -> Settings:
    root.mkdir()
    settings = planned_run(
        root,
        TABLES,
        decide,
        partition_rows=partition_rows,
        weights=more.pop("asked", None),
        shards={"weights": way, **more.pop("shards", {})},
        **more,
    )
    with open_pool(settings.cluster) as pool:
        write_run(settings, pool=pool)
    return settings


def rows_of(settings: Settings) -> pl.DataFrame:
    return pl.read_parquet(Path(settings.run) / "shards" / "data" / "**" / "*.parquet")


def mixture_of(settings: Settings) -> dict[str, Any]:
    return json.loads((Path(settings.run) / "shards" / "mixture.json").read_text())


def effective(settings: Settings) -> dict[Key, float]:
    """Sum of what each example weighs in an epoch of the mixture, from what trainers read."""
    found = Counter[Key]()
    domains = mixture_of(settings)["phases"][0]["domains"]
    for row in rows_of(settings).iter_rows(named=True):
        repeat = domains[row["curate_domain"]]["repeat"]
        found[row["curate_file"], row["curate_row"]] += row["curate_weight"] * repeat
    return dict(found)


WANTED = {
    (file, row): decided.weight * decided.copies
    for file in TABLES["a"]
    for row in range(ROWS)
    if (decided := decide("a", file, row)) and isinstance(decided.copies, int) and decided.copies
}


def test_column_and_domains_give_every_example_what_the_plan_says(tmp_path: Path):
    assert effective(write(tmp_path / "c", "column")) == pytest.approx(WANTED, rel=1e-6)
    found = effective(write(tmp_path / "d", "domains"))
    # An epoch has a whole number of draws: a half more or less than the weights sum up to.
    assert found == pytest.approx(WANTED, rel=0.6 / sum(WANTED.values()))


@pytest.mark.parametrize("seed", [0, 7])
def test_copies_are_the_systematic_draw_over_all_of_a_domain(tmp_path: Path, seed: int):
    """By whole numbers over the rows in order, as if there were no partitions; that the draw is
    unbiased is shown in tests/data/test_shard_weights.py."""
    settings = write(tmp_path / "c", "copies", seed=seed, partition_rows=47)
    rows = rows_of(settings)
    assert rows["curate_weight"].unique().to_list() == [1.0]
    found = Counter(rows.select("curate_file", "curate_row").iter_rows())
    place = {domain: uniform(seed, Component(0, domain)) for domain in ("web", "code", "talk")}
    wanted = Counter[Key]()
    for file, row in WANTED:  # in order of file and row
        decided = decide("a", file, row)
        assert decided is not None
        before = place[decided.domain]
        assert isinstance(decided.copies, int)
        exact = Fraction(float(np.float32(decided.weight))) * decided.copies
        place[decided.domain] += round(exact * ONE)
        wanted[file, row] = place[decided.domain] // ONE - before // ONE
    assert found == +wanted
    assert all(abs(found[key] - worth) < 1 for key, worth in WANTED.items())
    assert len(set(found.values())) > 3


@pytest.mark.parametrize("way", WAYS)
def test_the_cut_into_partitions_makes_no_difference(tmp_path: Path, way: str):
    one = write(tmp_path / "one", way, partition_rows=240)
    two = write(tmp_path / "two", way, partition_rows=31)
    names = ["curate_domain", "curate_file", "curate_row", "curate_weight"]
    assert rows_of(one).sort(names).equals(rows_of(two).sort(names))


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_without_weights_gives_the_same_shards_in_all_ways(tmp_path: Path, way: str):
    settings: list[Settings] = []
    for name in ("column", way):
        (tmp_path / f"{name} of").mkdir()
        settings.append(
            planned_run(
                tmp_path / f"{name} of",
                TABLES,
                lambda _s, _f, row: Row("web" if row % 3 else "code"),
                shards={"weights": name},
            )
        )
        with open_pool(settings[-1].cluster) as pool:
            write_run(settings[-1], pool=pool)
        if way == "column":
            return
    paths = [sorted((Path(s.run) / "shards" / "data").rglob("*.parquet")) for s in settings]
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]
    first, second = (mixture_of(s)["phases"] for s in settings)
    assert first == second


def test_the_mixture_says_the_same_in_rows_tokens_and_bytes(tmp_path: Path):
    settings = write(tmp_path / "d", "domains")
    (phase,) = mixture_of(settings)["phases"]
    worth = Counter[str]()
    number = Counter[str]()
    for (file, row), weight in WANTED.items():
        decided = decide("a", file, row)
        assert decided is not None
        worth[decided.domain] += weight  # pyright: ignore[reportArgumentType]
        number[decided.domain] += 1
    assert phase["epoch_rows"] == round(worth.total())
    tokens = {"web": 10, "code": 40, "talk": 20}
    token_worth = {domain: worth[domain] * tokens[domain] for domain in worth}
    for domain, entry in phase["domains"].items():
        assert entry["rows"] == entry["examples"] == number[domain]
        assert entry["row_probability"] == pytest.approx(worth[domain] / worth.total())
        assert entry["draw"]["rows"] == entry["row_probability"]
        share = token_worth[domain] / sum(token_worth.values())
        assert entry["draw"]["tokens"] == pytest.approx(share)
        assert entry["realised"] == pytest.approx(share)
        assert entry["repeat"] == pytest.approx(worth[domain] / number[domain], rel=0.01)
    for unit in ("rows", "tokens", "bytes"):
        assert sum(e["draw"][unit] for e in phase["domains"].values()) == pytest.approx(1)


def test_with_limits_and_a_mixture_all_ways_weigh_alike(tmp_path: Path):
    """Where the plan could not give a domain what was asked, no way gives it more."""
    for way in WAYS:
        settings = write(tmp_path / way, way, asked=[{"web": 0.1, "code": 0.1, "talk": 0.8}])
        found = effective(settings)
        by_domain, wanted = Counter[str](), Counter[str]()
        for (file, row), worth in WANTED.items():
            decided = decide("a", file, row)
            assert decided is not None
            wanted[decided.domain] += worth  # pyright: ignore[reportArgumentType]
            by_domain[decided.domain] += found.get((file, row), 0)  # pyright: ignore[reportArgumentType]
        for domain, worth in wanted.items():
            assert by_domain[domain] == pytest.approx(worth, abs=1.01), (way, domain)


@pytest.mark.parametrize("way", ["column", "domains"])
def test_phases_keep_each_examples_weight(tmp_path: Path, way: str):
    """Copies of the second phase differ from those of the first; so do the means of the weights."""
    copies = [(1, 2), (2, 0), (0, 1), (1, 1)]
    settings = planned_run(
        tmp_path,
        {"a": {"x.parquet": pa.table({"text": [f"{i}" for i in range(60)]})}},
        lambda _s, _f, row: Row("web" if row % 3 else "code", copies=copies[row % 4],
                                weight=(0.5, 1.0, 1.5)[row % 5 % 3]),
        shards={"weights": way},
    )  # fmt: skip
    with open_pool(settings.cluster) as pool:
        write_run(settings, pool=pool)
    for number, phase in enumerate(mixture_of(settings)["phases"]):
        found = Counter[int]()
        for entry in phase["domains"].values():
            files = Path(settings.run) / "shards" / "data" / entry["folder"] / "*.parquet"
            for row in pl.read_parquet(files).iter_rows(named=True):
                found[row["curate_row"]] += row["curate_weight"] * entry["repeat"]
        wanted = {
            row: copies[row % 4][number] * (0.5, 1.0, 1.5)[row % 5 % 3]
            for row in range(60)
            if copies[row % 4][number]
        }
        assert dict(found) == pytest.approx(wanted, rel=0.6 / sum(wanted.values()))


@pytest.mark.parametrize("way", WAYS)
def test_verify_finds_the_shards_as_the_plan_says(tmp_path: Path, way: str):
    settings = write(tmp_path / "run", way)
    found = verify_shards(Path(settings.run))
    assert found["rows"] == len(rows_of(settings))
