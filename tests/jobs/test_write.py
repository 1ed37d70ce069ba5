"""The write stage: what trainers load, what a rerun does, and what happens when writing fails."""

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from data.planned_run import Decide, Row, Tables, planned_run, replan

from curate.errors import CurateError, InputError, RunFolderError
from jobs.cluster import Cluster, open_pool
from jobs.run import Progress, ignore
from jobs.settings import Settings
from jobs.verify import verify_shards
from jobs.write import measure_write, plan_write, write_run

TWO_SOURCES: Tables = {
    "news": {
        "2024.parquet": pa.table(
            {"text": [f"news {i} {i**9}" for i in range(400)], "stars": range(400)}
        ),
        "2025.parquet": pa.table(
            {"text": [f"later {i} {i**9}" for i in range(150)], "stars": range(150)}
        ),
    },
    "forum": {
        "posts.parquet": pa.table(
            {
                "text": [f"post {i} {i**9}" for i in range(250)],
                "tags": [[f"t{i}"] for i in range(250)],
            }
        )
    },
}


def decide(source: str, file: str, row: int) -> Row | None:
    """Three domains, copies 0 to 2, weights that differ."""
    if row % 11 == 10:
        return None
    domain = "forum" if source == "forum" else f"news/{'world' if row % 4 else 'sport'}"
    return Row(domain, copies=row % 3, weight=0.5 + row % 2, tokens=5 + row % 7)


def wanted_rows(tables: Tables, decide: Decide) -> Counter[tuple[Any, ...]]:
    """(source, file, row, domain, weight) -> copies, straight from the decision."""
    wanted = Counter[tuple[Any, ...]]()
    for source, files in tables.items():
        for file, table in files.items():
            for row in range(table.num_rows):
                decided = decide(source, file, row)
                if decided is not None and decided.copies:
                    assert isinstance(decided.copies, int)
                    wanted[source, file, row, decided.domain, decided.weight] += decided.copies
    return wanted


def counted(rows: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    names = ("source", "file", "row", "domain", "weight")
    return Counter(tuple(row[f"curate_{name}"] for name in names) for row in rows)


def run_write(settings: Settings, **options: Any) -> dict[str, Any]:
    with open_pool(settings.cluster) as pool:
        return write_run(settings, pool=pool, **options)


def shards_of(settings: Settings) -> Path:
    return Path(settings.run) / "shards"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def times(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def load(settings: Settings, *config: str, cache: Path, **options: Any) -> Any:
    return datasets.load_dataset(
        str(shards_of(settings)), *config, split="train", cache_dir=str(cache), **options
    )


# -- what is loaded -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("written")
    settings = planned_run(
        root,
        TWO_SOURCES,
        decide,
        weights=[{"forum": 0.5, "news/sport": 0.2, "news/world": 0.3}],
        shards={"size_mb": 0.004},
    )
    return settings, run_write(settings), root / "cache"


def test_datasets_loads_everything_as_planned(written: tuple[Settings, dict[str, Any], Path]):
    settings, summary, cache = written
    loaded = load(settings, cache=cache)
    assert counted(loaded.to_list()) == wanted_rows(TWO_SOURCES, decide)
    assert len(loaded) == summary["rows"]
    texts = {(r["curate_file"], r["curate_row"]): r["text"] for r in loaded}
    for (file, row), text in texts.items():
        (source,) = (source for source, files in TWO_SOURCES.items() if file in files)
        assert text == TWO_SOURCES[source][file].column("text")[row].as_py()


@pytest.mark.parametrize("domain", ["forum", "news/sport", "news/world"])
def test_datasets_loads_one_domain(written: tuple[Settings, dict[str, Any], Path], domain: str):
    settings, summary, cache = written
    loaded = load(settings, summary["domains"][domain]["config"], cache=cache)
    everything = wanted_rows(TWO_SOURCES, decide)
    assert counted(loaded.to_list()) == {k: n for k, n in everything.items() if k[3] == domain}
    assert len(loaded) == summary["domains"][domain]["rows"]


def test_datasets_streams_and_splits_between_processes(
    written: tuple[Settings, dict[str, Any], Path],
):
    settings, summary, cache = written
    streamed = load(settings, cache=cache, streaming=True)
    assert counted(list(streamed)) == wanted_rows(TWO_SOURCES, decide)
    from datasets.distributed import split_dataset_by_node

    halves = [list(split_dataset_by_node(streamed, rank=r, world_size=2)) for r in range(2)]
    assert all(halves)
    assert counted(halves[0]) + counted(halves[1]) == wanted_rows(TWO_SOURCES, decide)
    assert summary["shards"] > 4


def test_polars_and_pyarrow_read_the_same_rows(written: tuple[Settings, dict[str, Any], Path]):
    settings, _, _ = written
    by_polars = pl.read_parquet(shards_of(settings) / "data" / "**" / "*.parquet").to_dicts()
    by_arrow = pyarrow.dataset.dataset(shards_of(settings) / "data").to_table().to_pylist()
    assert counted(by_polars) == wanted_rows(TWO_SOURCES, decide)
    assert counted(by_arrow) == wanted_rows(TWO_SOURCES, decide)


def test_the_three_lines_of_the_summary_load_the_shards(
    written: tuple[Settings, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
):
    _, summary, cache = written
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    assert len(summary["load"]) == 3
    names: dict[str, Any] = {}
    exec("\n".join(summary["load"]), names)
    assert len(names["everything"]) == summary["rows"]
    assert 0 < len(names["one_domain"]) < summary["rows"]


def test_the_snippets_of_the_card_run(
    written: tuple[Settings, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
):
    settings, summary, cache = written
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.chdir(settings.run)
    text = (shards_of(settings) / "README.md").read_text()
    names: dict[str, Any] = {}
    blocks = text.split("```python\n")[1:]
    assert len(blocks) == 3
    for block in blocks:
        exec(block.partition("```")[0], names)
    assert len(names["everything"]) == summary["rows"]
    assert len(list(names["part"])) > 0
    mixed = list(names["mixed"])
    assert len(mixed) == summary["rows"]


def test_row_probabilities_give_the_realised_shares_of_tokens(
    written: tuple[Settings, dict[str, Any], Path],
):
    settings, summary, _ = written
    mixture = json.loads((shards_of(settings) / "mixture.json").read_text())
    (phase,) = mixture["phases"]
    expected = {
        domain: entry["row_probability"] * entry["tokens"] / entry["rows"]
        for domain, entry in phase["domains"].items()
    }
    total = sum(expected.values())
    shares = {domain: value / total for domain, value in expected.items()}
    assert shares == pytest.approx({d: e["realised"] for d, e in phase["domains"].items()})
    asked = {domain: entry["asked"] for domain, entry in phase["domains"].items()}
    assert asked == {"forum": 0.5, "news/sport": 0.2, "news/world": 0.3}
    assert sum(e["row_probability"] for e in phase["domains"].values()) == pytest.approx(1)
    realised = {domain: entry["tokens"] for domain, entry in summary["domains"].items()}
    for domain, entry in phase["domains"].items():
        assert entry["realised"] == pytest.approx(realised[domain] / summary["tokens"])
    assert summary["tokens"] == sum(
        copies * (5 + key[2] % 7) for key, copies in wanted_rows(TWO_SOURCES, decide).items()
    )


def test_the_manifest_names_neither_time_nor_place(
    written: tuple[Settings, dict[str, Any], Path],
):
    settings, _, _ = written
    text = "".join(path.read_text() for path in shards_of(settings).glob("*.*"))
    assert str(settings.run) not in text
    assert "2026-" not in text
    for content in snapshot(shards_of(settings)).values():
        assert str(settings.run).encode() not in content


def test_verify_accepts_the_folder_wherever_it_lies(
    written: tuple[Settings, dict[str, Any], Path], tmp_path: Path
):
    settings, summary, _ = written
    moved = tmp_path / "elsewhere"
    for file, content in snapshot(shards_of(settings)).items():
        (moved / file).parent.mkdir(parents=True, exist_ok=True)
        (moved / file).write_bytes(content)
    checked = verify_shards(moved)
    assert {key: checked[key] for key in ("shards", "rows", "tokens", "bytes")} == {
        key: summary[key] for key in ("shards", "rows", "tokens", "bytes")
    }


# -- mixtures and names ---------------------------------------------------------------------------


def test_phases_are_written_in_order_and_loaded_in_order(tmp_path: Path):
    tables: Tables = {"a": {"x.parquet": pa.table({"n": range(200)})}}

    def phased(_source: str, _file: str, row: int) -> Row:
        return Row("rare" if row % 4 == 0 else "common", copies=(2, 1) if row % 4 == 0 else (0, 1))

    settings = planned_run(
        tmp_path,
        tables,
        phased,
        weights=[{"rare": 1.0, "common": 0.0}, {"rare": 0.25, "common": 0.75}],
    )
    summary = run_write(settings)
    files = sorted(json.loads((shards_of(settings) / "manifest.json").read_text())["shards"],
                   key=lambda shard: shard["file"])  # fmt: skip
    assert [(shard["phase"], shard["domain"], shard["rows"]) for shard in files] == [
        (1, "rare", 100),
        (2, "common", 150),
        (2, "rare", 50),
    ]
    cache = tmp_path / "cache"
    everything = load(settings, cache=cache)
    assert len(everything) == summary["rows"] == 300
    assert set(everything[:100]["curate_domain"]) == {"rare"}
    first = load(settings, "phase-1", cache=cache)
    assert everything[:100]["n"] == first["n"][:]
    assert set(load(settings, "phase-2", cache=cache)["curate_domain"]) == {"rare", "common"}
    assert len(load(settings, "phase-2-rare", cache=cache)) == 50
    assert len(load(settings, "rare", cache=cache)) == 150
    mixture = json.loads((shards_of(settings) / "mixture.json").read_text())
    assert [phase["config"] for phase in mixture["phases"]] == ["phase-1", "phase-2"]
    assert mixture["phases"][0]["domains"]["common"] == {
        "config": None,
        "folder": None,
        "asked": 0.0,
        "realised": 0.0,
        "examples": 0,
        "rows": 0,
        "tokens": 0,
        "bytes": 0,
        "row_probability": 0.0,
        "draw": {"rows": 0.0, "tokens": 0.0, "bytes": 0.0},
        "repeat": 0.0,
    }
    assert "phases are ordered" in (shards_of(settings) / "README.md").read_text()


WEIRD = ["", "a/b", "a b", "A/B", "日本語", "Ünïcode", "x" * 300, "default", "phase-1", "..",
         "null", "a|b`<img src=x>\n# title", "--"]  # fmt: skip


def test_domains_of_any_name_are_written_loaded_and_mapped(tmp_path: Path):
    tables: Tables = {"a": {"x.parquet": pa.table({"n": range(130)})}}
    settings = planned_run(tmp_path, tables, lambda _s, _f, row: Row(WEIRD[row % len(WEIRD)]))
    summary = run_write(settings)
    slugs = json.loads((shards_of(settings) / "manifest.json").read_text())["domains"]
    assert set(slugs) == set(WEIRD)
    assert {domain: entry["config"] for domain, entry in summary["domains"].items()} == slugs
    for domain in WEIRD:
        loaded = load(settings, slugs[domain], cache=tmp_path / "cache")
        assert set(loaded["curate_domain"]) == {domain}
    assert len(load(settings, cache=tmp_path / "cache")) == 130
    card = (shards_of(settings) / "README.md").read_text()
    assert "<img" not in card
    assert "\n# title" not in card
    verify_shards(shards_of(settings))


def test_sources_whose_columns_conflict_get_a_configuration_each(tmp_path: Path):
    tables: Tables = {
        "a": {"x.parquet": pa.table({"text": ["one", "two"], "id": [1, 2]})},
        "b": {"y.parquet": pa.table({"text": ["three"], "id": ["x1"]})},
    }

    def domains(source: str, _file: str, row: int) -> Row:
        return Row(f"{source}/{row}")

    settings = planned_run(tmp_path, tables, domains)
    summary = run_write(settings)
    cache = tmp_path / "cache"
    assert load(settings, "a", cache=cache)["id"][:] == [1, 2]
    assert load(settings, "b", cache=cache)["id"][:] == ["x1"]
    assert load(settings, "a-1", cache=cache)["id"][:] == [2]
    with pytest.raises(ValueError, match="Config name is missing"):
        load(settings, cache=cache)
    assert "no default configuration" in (shards_of(settings) / "README.md").read_text()
    assert summary["load"][1].startswith("#")


def test_without_tokens_shares_are_shares_of_rows(tmp_path: Path):
    tables: Tables = {"a": {"x.parquet": pa.table({"n": range(40)})}}
    settings = planned_run(
        tmp_path, tables, lambda _s, _f, row: Row("x" if row < 30 else "y"), has_tokens=False
    )
    summary = run_write(settings)
    assert summary["tokens"] is None
    mixture = json.loads((shards_of(settings) / "mixture.json").read_text())
    assert mixture["unit"] == "rows"
    shares = {d: e["row_probability"] for d, e in mixture["phases"][0]["domains"].items()}
    assert shares == {"x": 0.75, "y": 0.25}


def test_a_plan_that_keeps_nothing_is_an_error_with_a_way_out(tmp_path: Path):
    tables: Tables = {"a": {"x.parquet": pa.table({"n": range(10)})}}
    settings = planned_run(tmp_path, tables, lambda _s, _f, _r: Row("a", copies=0))
    with pytest.raises(CurateError, match="keeps no example") as caught:
        run_write(settings)
    assert "plan.keep" in caught.value.fix
    assert "keeps no example" in plan_write(settings).why[0]
    assert not shards_of(settings).exists()


def test_without_a_plan_the_command_to_run_is_named(tmp_path: Path):
    settings = planned_run(
        tmp_path, {"a": {"x.parquet": pa.table({"n": [1]})}}, lambda _s, _f, _r: Row("a")
    )
    next((Path(settings.run) / "plan").glob("*.parquet")).unlink()
    assert plan_write(settings).why == ("there is no complete plan yet",)
    with pytest.raises(InputError, match="no complete plan") as caught:
        run_write(settings)
    assert "curate plan" in caught.value.fix


# -- again ----------------------------------------------------------------------------------------


def test_a_second_run_writes_nothing(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide, shards={"size_mb": 0.004})
    state = plan_write(settings)
    assert (state.done, state.total) == (0, state.total)
    assert not shards_of(settings).exists()
    first = run_write(settings)
    before = times(Path(settings.run))
    assert plan_write(settings).done == state.total
    assert plan_write(settings).why == ()
    assert run_write(settings) == {**first, "done": 0, "skipped": state.total}
    assert times(Path(settings.run)) == before


@pytest.mark.slow
def test_the_cluster_makes_no_difference_to_any_byte(tmp_path: Path):
    settings = planned_run(tmp_path / "inline", TWO_SOURCES, decide, shards={"size_mb": 0.004})
    run_write(settings)
    other = planned_run(
        tmp_path / "dask",
        TWO_SOURCES,
        decide,
        shards={"size_mb": 0.004},
        cluster={"kind": "local", "workers": 2},
    )
    run_write(other)
    assert snapshot(shards_of(other)) == snapshot(shards_of(settings))


def test_a_changed_plan_redoes_its_groups_and_leaves_nothing_of_the_old(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide, shards={"size_mb": 0.004})
    run_write(settings)
    before = times(shards_of(settings) / "data" / "forum")

    def fewer(source: str, file: str, row: int) -> Row | None:
        if source == "news":
            return Row("news/world", copies=int(row % 5 == 0))
        return decide(source, file, row)

    replan(tmp_path, TWO_SOURCES, fewer)
    state = plan_write(settings)
    assert any("another plan" in reason for reason in state.why)
    assert any("older plan" in reason for reason in state.why)
    run_write(settings)
    assert times(shards_of(settings) / "data" / "forum") == before
    assert not (shards_of(settings) / "data" / "news-sport").exists()
    loaded = load(settings, cache=tmp_path / "cache")
    assert counted(loaded.to_list()) == wanted_rows(TWO_SOURCES, fewer)
    verify_shards(shards_of(settings))


def test_other_settings_rewrite_and_are_announced(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide)
    run_write(settings)
    changed = planned_run(tmp_path, TWO_SOURCES, decide, shards={"compression": "snappy"})
    assert plan_write(changed).done == 0
    run_write(changed)
    file = next((shards_of(settings) / "data").rglob("*.parquet"))
    codec = pq.read_metadata(file).row_group(0).column(0).compression
    assert codec == "SNAPPY"


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_shard_that_was_lost_is_written_again_and_no_other(tmp_path: Path, damage: str):
    settings = planned_run(tmp_path, TWO_SOURCES, decide, shards={"size_mb": 0.004})
    run_write(settings)
    whole = snapshot(shards_of(settings))
    victim = next((shards_of(settings) / "data" / "forum").glob("*.parquet"))
    before = times(shards_of(settings) / "data" / "news-world")
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-10])
    assert "missing or cut short" in plan_write(settings).why[0]
    run_write(settings)
    assert snapshot(shards_of(settings)) == whole
    assert times(shards_of(settings) / "data" / "news-world") == before


def test_the_estimate_of_the_size_is_near_the_truth(tmp_path: Path):
    text = [f"{i} {i**3} {i**9} {i**27}" for i in range(20_000)]
    tables: Tables = {"a": {"x.parquet": pa.table({"text": text})}}
    settings = planned_run(
        tmp_path,
        tables,
        lambda _s, _f, row: Row("a", copies=row % 2),
        partition_rows=5000,
        row_group_rows=2000,
        shards={"size_mb": 0.1},
    )
    guess = measure_write(settings)
    summary = run_write(settings)
    assert guess["size_bytes"] == pytest.approx(summary["bytes"], rel=0.2)
    sizes = [p.stat().st_size for p in (shards_of(settings) / "data").rglob("*.parquet")]
    assert all(0.05e6 < size < 0.2e6 for size in sizes)
    assert measure_write(settings)["size_bytes"] == 0
    (Path(settings.run) / "plan" / "summary.json").unlink()
    half = planned_run(
        tmp_path,
        tables,
        lambda _s, _f, _r: Row("a"),
        partition_rows=5000,
        row_group_rows=2000,
        plan={"keep": 0.5},
    )
    (Path(half.run) / "plan" / "summary.json").unlink()
    assert measure_write(half)["size_bytes"] == pytest.approx(summary["bytes"], rel=0.2)


# -- failure --------------------------------------------------------------------------------------


def test_a_shard_in_whose_way_something_lies_fails_and_the_others_are_written(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide)
    (shards_of(settings) / "data" / "forum" / "train-00000-of-00001.parquet" / "x").mkdir(
        parents=True
    )
    with pytest.raises(CurateError, match=r"forum/train-00000-of-00001\.parquet could not be") as e:
        run_write(settings)
    assert e.value.exit_code == 4  # the others are there
    news = sorted((shards_of(settings) / "data").glob("news-*/*.parquet"))
    assert len(news) == 2
    before = times(shards_of(settings) / "data" / "news-world")
    assert not (shards_of(settings) / "manifest.json").exists()
    with pytest.raises(CurateError, match="incomplete"):
        verify_shards(shards_of(settings))
    blocking = shards_of(settings) / "data" / "forum" / "train-00000-of-00001.parquet"
    (blocking / "x").rmdir()
    blocking.rmdir()
    seen: list[Progress] = []
    run_write(settings, listener=seen.append)
    assert len(seen) == 1
    assert times(shards_of(settings) / "data" / "news-world") == before
    verify_shards(shards_of(settings))


@contextmanager
def largest_file(size: int) -> Generator[None]:
    """Files cannot grow beyond `size` bytes: every write behind fails with an error."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_grow_names_itself_and_leaves_no_half(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide)
    with largest_file(5000), pytest.raises(CurateError, match=r"shard .*parquet could not be"):
        run_write(settings)
    for path in shards_of(settings).rglob("*"):
        if path.is_file():
            pq.read_table(path)
    run_write(settings)
    loaded = load(settings, cache=tmp_path / "cache")
    assert counted(loaded.to_list()) == wanted_rows(TWO_SOURCES, decide)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_stops_the_stage_and_a_rerun_with_space_finishes_it(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide, shards={"size_mb": 0.004})
    disk = shards_of(settings)
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        with pytest.raises(CurateError, match="No space left"):
            run_write(settings)
        kept = [path for path in disk.rglob("*") if path.is_file()]
        assert kept
        for path in kept:
            pq.read_table(path)
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        before = times(disk)
        run_write(settings)
        assert {path: times(disk)[path] for path in before} == before
        verify_shards(disk)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_foreign_files_are_named_and_left_alone(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide)
    folder = shards_of(settings)
    (folder / "data").mkdir(parents=True)
    (folder / "thesis.tex").write_text("all my work")
    (folder / "data" / "mine.parquet").write_text("mine")
    with pytest.raises(RunFolderError, match=r"data/mine\.parquet, thesis\.tex") as caught:
        run_write(settings)
    assert caught.value.exit_code == 5
    assert (folder / "thesis.tex").read_text() == "all my work"
    assert len(snapshot(folder)) == 2


def test_what_comes_with_pushing_the_folder_is_not_foreign(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide)
    folder = shards_of(settings)
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("x")
    (folder / ".gitattributes").write_text("x")
    run_write(settings)
    verify_shards(folder)
    assert (folder / ".git" / "config").read_text() == "x"


def test_an_input_that_changed_since_the_index_fails_by_name(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide)
    path = tmp_path / "data" / "forum" / "posts.parquet"
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match=r"posts\.parquet has changed"):
        run_write(settings)


KILLED_AT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import pyarrow.parquet as pq
from curate.config import read_yaml
from jobs.cluster import open_pool
from jobs.settings import parse_settings
from jobs.write import write_run
calls = 0
def dying(original):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)
    return call
pq.ParquetWriter.write_table = dying(pq.ParquetWriter.write_table)
import curate.data.shard_writer as shards
shards.publish = dying(shards.publish)
settings = parse_settings(read_yaml(open({config!r}).read(), where="test"))
with open_pool(settings.cluster) as pool:
    write_run(settings, pool=pool)
"""


@pytest.mark.parametrize("call", [5, 9])
def test_a_killed_writer_leaves_no_half_file_and_a_rerun_gives_the_same_bytes(
    tmp_path: Path, call: int
):
    whole = planned_run(tmp_path / "whole", TWO_SOURCES, decide, shards={"size_mb": 0.01})
    run_write(whole)
    settings = planned_run(tmp_path / "killed", TWO_SOURCES, decide, shards={"size_mb": 0.01})
    from curate.config import plain, to_yaml

    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(plain(settings)))
    script = KILLED_AT.format(tests=str(Path(__file__).parents[1]), call=call, config=str(config))
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    folder = shards_of(settings)
    assert not (folder / "manifest.json").exists()
    for path in folder.rglob("*.parquet"):
        pq.read_table(path)
    run_write(settings)
    assert snapshot(folder) == snapshot(shards_of(whole))


def test_a_manifest_does_not_outlive_the_shards_it_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = planned_run(tmp_path, TWO_SOURCES, decide)
    run_write(settings)
    replan(tmp_path, TWO_SOURCES, lambda source, _f, row: Row(source, copies=int(row < 50)))
    stop: Callable[..., Any] = lambda *_args, **_options: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    monkeypatch.setattr("jobs.write.run_tasks", stop)
    with pytest.raises(KeyboardInterrupt):
        run_write(settings)
    with pytest.raises(CurateError, match="incomplete"):
        verify_shards(shards_of(settings))


def test_writing_loads_neither_torch_nor_dask(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide)
    from curate.config import plain, to_yaml

    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(plain(settings)))
    script = KILLED_AT.format(tests="", call=-1, config=str(config)) + (
        "heavy = {'torch', 'transformers', 'datasets', 'dask', 'distributed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_progress_is_told_per_group(tmp_path: Path):
    settings = planned_run(tmp_path, TWO_SOURCES, decide, shards={"size_mb": 0.004})
    seen: list[Progress] = []
    run_write(settings, listener=seen.append)
    assert [event.done for event in seen] == list(range(1, plan_write(settings).total + 1))
    assert ignore(seen[0]) is None
    assert isinstance(settings.cluster, Cluster)
