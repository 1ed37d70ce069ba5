from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.data.partitions import Partition
from curate.data.shard_formats.parquet import PARQUET
from curate.data.shard_layout import (
    Component,
    Kept,
    Part,
    Shard,
    cut_shards,
    lay_out,
    slugs,
    split_evenly,
)


def kept(
    ordinal: int, rows: dict[str, int], *, source: str = "a", size: float = 100.0, phase: int = 0
) -> Kept:
    part = Partition(
        name=f"part-{source}-{ordinal:05d}",
        source=source,
        file="x.parquet",
        address="/x.parquet",
        first_row=ordinal * 10_000,
        num_rows=10_000,
        stamp="1",
    )
    found = {Component(phase, domain): number for domain, number in rows.items()}
    return Kept(part, found, disk_bytes=size, memory_bytes=3 * size)


def file_of(shard: Shard) -> str:
    (file,) = PARQUET.files(shard)
    return file


def test_a_plain_domain_keeps_its_name_as_slug():
    assert slugs(["web", "Python_3.11", "gsm8k-train"]) == {
        "web": "web",
        "Python_3.11": "Python_3.11",
        "gsm8k-train": "gsm8k-train",
    }


@given(st.lists(st.text(max_size=90), max_size=8, unique=True))
def test_slugs_are_safe_short_and_different_on_any_file_system(domains: list[str]):
    found = slugs(domains)
    assert set(found) == set(domains)
    assert len({slug.casefold() for slug in found.values()}) == len(domains)
    for slug in found.values():
        assert slug.isascii()
        assert all(char.isalnum() or char in "._-" for char in slug)
        assert slug[0] not in ".-_"
        assert 0 < len(slug) <= 80


@given(
    st.lists(st.sampled_from(["a/b", "a b", "a-b", "A-B", "Ä", "a", "", "default"]), unique=True)
)
def test_a_slug_with_a_hash_depends_on_the_domain_alone(domains: list[str]):
    everything = slugs(["a/b", "a b", "a-b", "A-B", "Ä", "a", "", "default"])
    for domain, slug in slugs(domains).items():
        if slug != domain and everything[domain] != slug:
            # The only difference others may make is whether there is a hash at all.
            assert everything[domain].rpartition("-")[0] == slug


def test_reserved_names_get_a_hash():
    found = slugs(["default", "phase-1", "phase-2-web", "train"])
    assert all(slug != domain and slug.startswith(domain) for domain, slug in found.items())


@given(st.integers(1, 10_000), st.integers(1, 50))
def test_an_even_split_loses_nothing(total: int, parts: int):
    counts = split_evenly(total, parts)
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1
    assert min(counts) > 0


def test_one_domain_in_order_gives_shards_of_the_target_size():
    entries = [kept(i, {"web": 1000}) for i in range(100)]  # 10 MB in all
    groups = lay_out(entries, size_bytes=1e6, names={"web": "web"})
    shards = [shard for group in groups for shard in group.shards]
    assert [file_of(shard) for shard in shards] == [
        f"data/web/train-{i:05d}-of-00010.parquet" for i in range(10)
    ]
    assert {shard.num_rows for shard in shards} == {10_000}


def test_mixed_domains_still_fill_a_shard_with_the_largest():
    entries = [kept(i, {"large": 600, "small": 400}) for i in range(100)]  # 6 and 4 MB
    groups = lay_out(entries, size_bytes=1e6, names={"large": "large", "small": "small"})
    sizes = [100 * shard.num_rows for group in groups for shard in group.shards]
    assert max(sizes) <= 1.2e6
    assert sum(size >= 0.8e6 for size in sizes) >= 5


def test_ten_mixed_domains_fill_their_shards_once_there_is_enough_of_them():
    names = {f"d{i}": f"d{i}" for i in range(10)}
    few = [kept(i, dict.fromkeys(names, 100)) for i in range(100)]  # 10 shards
    many = [kept(i, dict.fromkeys(names, 100)) for i in range(2000)]  # 200 shards
    for entries, least_groups, least_size in ((few, 5, 0.15e6), (many, 16, 0.9e6)):
        groups = lay_out(entries, size_bytes=1e6, names=names)
        assert len(groups) >= least_groups
        for group in groups:
            assert all(least_size <= 100 * shard.num_rows <= 1.5e6 for shard in group.shards)


def test_a_domain_that_fills_a_stretch_alone_is_split_into_near_equal_shards():
    entries = [kept(i, {f"d{i // 25}": 1000}) for i in range(100)]  # sorted by domain, 2.5 MB each
    groups = lay_out(entries, size_bytes=1e6, names={f"d{i}": f"d{i}" for i in range(4)})
    sizes = [100 * shard.num_rows for group in groups for shard in group.shards]
    assert sum(sizes) == 10_000_000
    assert all(0.5e6 <= size <= 1.5e6 for size in sizes)


def test_a_partition_is_read_by_one_group_and_groups_keep_to_one_source():
    entries = [kept(i, {"x": 700, "y": 30}, source="a") for i in range(40)]
    entries += [kept(i, {"z": 900}, source="b", size=300) for i in range(40)]
    groups = lay_out(entries, size_bytes=5e5, names={"x": "x", "y": "y", "z": "z"})
    read = [part.name for group in groups for part in group.partitions]
    assert read == [entry.partition.name for entry in entries]
    assert all(len({part.source for part in group.partitions}) == 1 for group in groups)
    for domain in "xyz":
        wanted = sum(entry.rows.get(Component(0, domain), 0) for entry in entries)
        given_rows = sum(
            shard.num_rows
            for group in groups
            for shard in group.shards
            if shard.component.domain == domain
        )
        assert given_rows == wanted


def test_a_full_shard_has_at_least_four_row_groups():
    groups = lay_out(
        [kept(i, {"web": 1000}) for i in range(10)], size_bytes=1e6, names={"web": "web"}
    )
    (shard,) = groups[0].shards
    assert len(shard.row_groups) >= 4


def test_row_groups_shrink_so_that_many_domains_fit_into_memory():
    names = {f"d{i}": f"d{i}" for i in range(150)}
    entries = [kept(i, dict.fromkeys(names, 100), size=5e4) for i in range(10)]
    groups = lay_out(entries, size_bytes=128e6, names=names)
    for group in groups:
        held = sum(max(shard.row_groups) * 1.5e5 for shard in group.shards)
        assert held < 160 * 2**20


def test_more_domains_than_files_may_be_open_are_written_in_several_rounds():
    names = {f"d{i:04d}": f"d{i:04d}" for i in range(450)}
    entries = [kept(i, dict.fromkeys(names, 3), size=1e5) for i in range(4)]
    groups = lay_out(entries, size_bytes=1e9, names=names)
    assert [len(group.shards) for group in groups] == [200, 200, 50]
    assert len({group.name for group in groups}) == 3
    files = [file_of(shard) for group in groups for shard in group.shards]
    assert len(set(files)) == 450


@pytest.mark.parametrize("phase", [1, 2])
def test_each_phase_has_a_folder_of_its_own(phase: int):
    (group,) = lay_out([kept(0, {"web": 5}, phase=phase)], size_bytes=1e6, names={"web": "web"})
    assert file_of(group.shards[0]) == f"data/phase-{phase}/web/train-00000-of-00001.parquet"


def test_numbers_run_on_from_group_to_group():
    entries = [kept(i, {"x": 1000, "y": 10}) for i in range(50)]
    groups = lay_out(entries, size_bytes=1e6, names={"x": "x", "y": "y"})
    for domain in "xy":
        files = [file_of(s) for g in groups for s in g.shards if s.component.domain == domain]
        assert len(files) > 1
        assert all(a < b for a, b in pairwise(files))
        assert files[-1].endswith(f"train-{len(files) - 1:05d}-of-{len(files):05d}.parquet")


def test_ten_thousand_small_domains_are_written_in_one_round():
    names = {f"d{i:05d}": f"d{i:05d}" for i in range(10_000)}
    (group,) = lay_out([kept(0, dict.fromkeys(names, 3))], size_bytes=1e9, names=names)
    assert len(group.shards) == 10_000


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(1, 40)), min_size=1, max_size=9),
    st.integers(1, 50),
)
def test_every_domain_with_as_many_rows_gets_the_files_asked_for(
    rows: list[dict[str, int]], least: int
):
    entries = [kept(i, each, size=1e5) for i, each in enumerate(rows) if each]
    names = {name: name for name in "abc"}
    groups = lay_out(entries, size_bytes=1e6, names=names, min_files=least)
    for name in names:
        total = sum(each.get(name, 0) for each in rows)
        files = [s for group in groups for s in group.shards if s.component.domain == name]
        assert len(files) >= min(least, total)
        assert sum(shard.num_rows for shard in files) == total
        assert all(shard.num_rows for shard in files)


def test_row_groups_are_no_larger_than_asked():
    part = Part(rows=10_000, disk=1e6, memory=4e6)
    (one,) = cut_shards(part, size_bytes=128e6, row_group_bytes=1e6)
    assert one == (2500,) * 4
    assert cut_shards(part, size_bytes=128e6, row_group_bytes=16e6) == [(10_000,)]
    entries = [kept(i, {"web": 1000}) for i in range(10)]  # 3 MB in memory
    (group,) = lay_out(entries, size_bytes=1e9, names={"web": "web"}, row_group_bytes=3e5)
    assert [len(shard.row_groups) for shard in group.shards] == [10]
