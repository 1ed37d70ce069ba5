"""The write stage in other orders than the input's: what is written, again, and after a kill."""

import errno
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from data.planned_run import Row, Tables, planned_run
from tiny_models import byte_tokenizer

from curate.config import plain, to_yaml
from curate.errors import ConfigError, CurateError, OutputError
from jobs.cluster import open_pool
from jobs.run import Progress
from jobs.settings import Settings
from jobs.verify import verify_shards
from jobs.write import measure_write, plan_write, write_run

STREAMS = ("domain-interleaved", "scheduled")
WORDS = [f"{i} {i**9}" for i in range(700)]
TABLES: Tables = {
    "news": {"a.parquet": pa.table({"text": WORDS[:400]}), "b.parquet": pa.table({"text": WORDS})},
    "forum": {"c.parquet": pa.table({"text": WORDS[:250], "tags": [[w] for w in WORDS[:250]]})},
}


def decide(source: str, _file: str, row: int) -> Row | None:
    """Three domains, two phases, copies 0 to 2."""
    if row % 11 == 10:
        return None
    domain = "forum" if source == "forum" else f"news/{'world 🌍' if row % 4 else 'sport'}"
    return Row(domain, copies=(row % 3, int(row % 5 < 2)), weight=0.5 + row % 2, tokens=5 + row % 7)


def in_one_phase(source: str, file: str, row: int) -> Row | None:
    found = decide(source, file, row)
    return found and Row(found.domain, copies=row % 3, weight=found.weight, tokens=found.tokens)


def ordered_run(root: Path, order: str, *, phases: bool = True, **shards: Any) -> Settings:
    shards = {"order": order, "size_mb": 0.01, **shards}
    return planned_run(root, TABLES, decide if phases else in_one_phase, shards=shards)


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


def wanted(phase: int | None) -> Counter[tuple[str, int, str, float]]:
    """(file, row, domain, weight) -> copies, straight from the decision."""
    found = Counter[tuple[str, int, str, float]]()
    for source, files in TABLES.items():
        for file, table in files.items():
            for row in range(table.num_rows):
                each = (decide if phase else in_one_phase)(source, file, row)
                if each is not None:
                    copies = each.copies if isinstance(each.copies, int) else each.copies[phase - 1]  # type: ignore[operator]
                    if copies:
                        found[file, row, each.domain, each.weight] += copies
    return found


def keys(frame: pl.DataFrame) -> list[tuple[str, int, str, float]]:
    return frame.select("curate_file", "curate_row", "curate_domain", "curate_weight").rows()


def read(paths: Sequence[Path]) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in paths])


def worst_deviation(domains: Sequence[str]) -> float:
    """How far the first rows are from the mixture of all, over all prefixes and domains."""
    names = np.array(domains)
    seen = np.arange(1, len(names) + 1)
    return max(
        float(np.abs(np.cumsum(names == name) - seen * (names == name).mean()).max())
        for name in set(domains)
    )


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Many tasks in both passes, each of a few rows."""
    patch.setattr("curate.data.shard_line.BUCKET_BYTES", 20_000)
    patch.setattr("curate.data.shard_shuffle._HELD_BYTES", 20_000)
    patch.setattr("curate.data.shard_line._DEAL_BYTES", 40_000)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Shards that were written without a break."""
    settings = ordered_run(tmp_path_factory.mktemp("scheduled"), "scheduled")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        run_write(settings)
    return snapshot(shards_of(settings))


# -- what is written ------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("phases", [False, True])
def test_rows_of_each_domain_are_shuffled_over_its_files(tmp_path: Path, phases: bool):
    settings = ordered_run(tmp_path, "shuffled", phases=phases, min_files=5)
    summary = run_write(settings)
    for phase in (1, 2) if phases else (None,):
        folder = shards_of(settings) / "data" / (f"phase-{phase}" if phase else "")
        everything = wanted(phase)
        for domain in ("forum", "news/sport", "news/world 🌍"):
            files = sorted((folder / summary["domains"][domain]["config"]).iterdir())
            assert len(files) >= 5
            found = read(files)
            assert Counter(keys(found)) == {k: n for k, n in everything.items() if k[2] == domain}
            places = found["curate_row"].to_numpy().astype(float)
            assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 4 / len(places) ** 0.5
    verify_shards(shards_of(settings))
    assert not (Path(settings.run) / "shards.work").exists()


@pytest.mark.usefixtures("small")
def test_every_prefix_of_the_stream_follows_the_mixture(tmp_path: Path):
    settings = ordered_run(tmp_path, "domain-interleaved", phases=False)
    summary = run_write(settings)
    files = sorted((shards_of(settings) / "data").iterdir())
    assert len(files) == summary["shards"] > 3
    found = read(files)
    assert Counter(keys(found)) == wanted(None)
    assert worst_deviation(found["curate_domain"].to_list()) < 1.68
    # Domains in order would be off by hundreds of rows.
    assert worst_deviation(sorted(found["curate_domain"].to_list())) > 100
    loaded = datasets.load_dataset(
        str(shards_of(settings)), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["curate_domain"][:] == found["curate_domain"].to_list()
    assert {d: e["rows"] for d, e in summary["domains"].items()} == Counter(
        found["curate_domain"].to_list()
    )
    tokens = sum(copies * (5 + key[1] % 7) for key, copies in wanted(None).items())
    assert summary["tokens"] == sum(e["tokens"] for e in summary["domains"].values()) == tokens
    verify_shards(shards_of(settings))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("order", STREAMS)
def test_phases_come_one_after_the_other(tmp_path: Path, order: str):
    settings = ordered_run(tmp_path, order, min_files=3)
    run_write(settings)
    cache = str(tmp_path / "cache")
    both: list[tuple[str, int, str, float]] = []
    for phase in (1, 2):
        loaded: Any = datasets.load_dataset(
            str(shards_of(settings)), f"phase-{phase}", split="train", cache_dir=cache
        )
        found = pl.DataFrame(loaded.to_list())
        assert Counter(keys(found)) == wanted(phase)
        assert worst_deviation(found["curate_domain"].to_list()) < 1.68
        both += keys(found)
    everything: Any = datasets.load_dataset(
        str(shards_of(settings)), split="train", cache_dir=cache
    )
    assert keys(pl.DataFrame(everything.to_list())) == both
    files = [path.name for path in (shards_of(settings) / "data").iterdir() if path.is_file()]
    assert bool(files) == (order == "scheduled")
    if files:
        assert keys(read(sorted((shards_of(settings) / "data").iterdir()))) == both
    mixture = json.loads((shards_of(settings) / "mixture.json").read_text())
    for entry in mixture["phases"]:
        counts = Counter[str]()
        for key, copies in wanted(entry["phase"]).items():
            counts[key[2]] += copies
        assert {d: e["rows"] for d, e in entry["domains"].items()} == counts
    verify_shards(shards_of(settings))


def test_several_formats_hold_the_same_stream(tmp_path: Path):
    settings = ordered_run(tmp_path, "scheduled", format=["parquet", "jsonl", "mds"])
    run_write(settings)
    folder = shards_of(settings)
    names = sorted(path.name.split(".")[0] for path in (folder / "data").iterdir())
    assert sorted(path.name.split(".")[0] for path in (folder / "jsonl").iterdir()) == names
    index = json.loads((folder / "mds" / "index.json").read_text())
    rows = [pl.read_parquet(path).height for path in sorted((folder / "data").iterdir())]
    assert [shard["samples"] for shard in index["shards"]] == rows
    verify_shards(folder)


def test_tokens_stand_in_the_same_order(tmp_path: Path):
    byte_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    packing = {"length": 32, "tokenizer": str(tmp_path / "tokenizer")}
    settings = ordered_run(
        tmp_path, "scheduled", format=["parquet", "packed", "megatron"], packing=packing
    )
    run_write(settings)
    assert plan_write(settings).why == ()
    folder = shards_of(settings)
    for path in sorted((folder / "data").iterdir()):
        texts = pl.read_parquet(path)["text"].to_list()
        packed = pl.read_parquet(folder / "packed" / path.name)
        tokens = [token for row in packed["input_ids"].to_list() for token in row]
        assert sum(packed["num_documents"].to_list()) >= len(texts)
        assert len(tokens) >= sum(len(text) for text in texts)
    verify_shards(folder)
    byte_tokenizer(bos=False).save_pretrained(str(tmp_path / "tokenizer"))
    assert plan_write(settings).why != ()


def test_another_seed_gives_another_order_of_the_same_rows(tmp_path: Path):
    found: list[list[tuple[str, int, str, float]]] = []
    for seed, size in ((0, 0.01), (0, 1.0), (1, 1.0)):
        shards = {"order": "domain-interleaved", "size_mb": size}
        settings = planned_run(
            tmp_path / f"{seed}-{size}", TABLES, in_one_phase, shards=shards, seed=seed
        )
        run_write(settings)
        found.append(keys(read(sorted((shards_of(settings) / "data").iterdir()))))
    assert found[0] == found[1] != found[2]
    assert Counter(found[0]) == Counter(found[2])


@pytest.mark.parametrize("phases", [False, True])
def test_snippets_and_recipe_of_a_stream_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phases: bool
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    settings = ordered_run(tmp_path, "scheduled" if phases else "domain-interleaved", phases=phases)
    summary = run_write(settings)
    names: dict[str, Any] = {}
    exec("\n".join(summary["load"]), names)
    everything = names["everything"].to_list()
    assert len(everything) == summary["rows"]
    assert 0 < len(names["one_phase" if phases else "one_domain"]) < summary["rows"]
    text = (shards_of(settings) / "README.md").read_text()
    assert "Read the files in order" in text
    monkeypatch.chdir(settings.run)
    for block in text.split("```python\n")[1:]:
        exec(block.partition("```")[0], names)
    (recipe,) = (shards_of(settings) / "recipes").iterdir()
    found: dict[str, Any] = {"__file__": str(recipe)}
    exec(recipe.read_text(), found)
    assert list(found["rows"]()) == everything
    halves = [list(found["rows"](rank=rank, num_ranks=2)) for rank in (0, 1)]
    assert halves == [everything[0::2], everything[1::2]]
    if phases:
        parts = [list(found["rows"](phase)) for phase in (1, 2)]
        assert parts[0] + parts[1] == everything
        assert all(parts)


# -- what is refused ------------------------------------------------------------------------------


def test_a_schedule_needs_phases(tmp_path: Path):
    settings = ordered_run(tmp_path, "scheduled", phases=False)
    assert "no phases" in plan_write(settings).why[0]
    with pytest.raises(ConfigError, match="no phases") as caught:
        run_write(settings)
    assert "domain-interleaved" in caught.value.fix


@pytest.mark.parametrize("order", STREAMS)
def test_domains_cannot_be_drawn_from_a_stream(tmp_path: Path, order: str):
    with pytest.raises(CurateError, match="share their files"):
        ordered_run(tmp_path, order, weights="domains")


def test_columns_that_conflict_cannot_be_shuffled(tmp_path: Path):
    tables: Tables = {
        "a": {"x.parquet": pa.table({"id": [1, 2]})},
        "b": {"y.parquet": pa.table({"id": ["x1"]})},
    }
    settings = planned_run(
        tmp_path, tables, lambda source, _f, _r: Row(source), shards={"order": "shuffled"}
    )
    with pytest.raises(ConfigError, match="every order but input") as caught:
        run_write(settings)
    assert "column 'id'" in caught.value.what


def test_a_plan_that_keeps_nothing_has_no_order(tmp_path: Path):
    settings = planned_run(
        tmp_path, TABLES, lambda _s, _f, _r: Row("a", copies=0), shards={"order": "shuffled"}
    )
    with pytest.raises(CurateError, match="keeps no example"):
        run_write(settings)


# -- again ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_a_second_run_does_nothing_and_a_lost_shard_comes_back(tmp_path: Path):
    settings = ordered_run(tmp_path, "domain-interleaved")
    before = plan_write(settings)
    assert (before.done, len(before.why)) == (0, 2)
    assert not shards_of(settings).exists()
    assert measure_write(settings)["seconds"] > 0
    run_write(settings)
    whole = snapshot(Path(settings.run))
    assert plan_write(settings).why == ()
    assert plan_write(settings).done == before.total
    assert measure_write(settings)["seconds"] == 0
    assert run_write(settings)["done"] == 0
    assert snapshot(Path(settings.run)) == whole
    lost = next(iter((shards_of(settings) / "data" / "phase-2").glob("train-00001-of-*")))
    lost.unlink()
    assert plan_write(settings).why[0].startswith("1 group has shards that are missing")
    assert run_write(settings)["done"] == 1
    shards = {k.removeprefix("shards/"): v for k, v in whole.items() if k.startswith("shards/")}
    assert snapshot(shards_of(settings)) == shards


def test_changing_the_order_leaves_nothing_of_the_other(tmp_path: Path):
    interleaved = ordered_run(tmp_path, "domain-interleaved")
    run_write(interleaved)
    fresh = ordered_run(tmp_path / "fresh", "input")
    run_write(fresh)
    again = ordered_run(tmp_path, "input")
    assert plan_write(again).done == 0
    run_write(again)
    assert snapshot(shards_of(again)) == snapshot(shards_of(fresh))
    run_write(interleaved)
    assert {path.name for path in (shards_of(again) / "data").iterdir()} == {"phase-1", "phase-2"}
    assert not [p for p in (shards_of(again) / "data").rglob("*") if p.parent.name == "forum"]
    verify_shards(shards_of(again))


def test_changing_order_and_format_leaves_no_empty_folder(tmp_path: Path):
    run_write(ordered_run(tmp_path, "input", format=["arrow", "jsonl", "parquet"]))
    folder = shards_of(ordered_run(tmp_path, "domain-interleaved", format=["arrow", "jsonl"]))
    (folder / "notes").mkdir()
    run_write(ordered_run(tmp_path, "domain-interleaved", format=["arrow", "jsonl"]))
    run_write(ordered_run(tmp_path, "scheduled", format=["mds"]))
    empty = [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert empty == [folder / "notes"]


KILLED_AT = """
import os, signal, sys
import curate.data.shard_line as line, curate.data.shard_shuffle as shuffle
import curate.data.files as files, curate.data.shard_writer as writer
line.BUCKET_BYTES = shuffle._HELD_BYTES = 20_000
line._DEAL_BYTES = 40_000
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
{where} = dying({where})
settings = parse_settings(read_yaml(open({config!r}).read(), where="test"))
with open_pool(settings.cluster) as pool:
    write_run(settings, pool=pool)
"""


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("shuffle._Dealt._write", 30),  # in the midst of a file of the first pass
        ("files.publish", 4),  # before its name, or that of its mark
        ("shuffle._gather", 3),  # in the second pass
        ("writer.publish", 3),  # between the files of one task
    ],
)
def test_a_kill_in_either_pass_costs_no_byte(
    tmp_path: Path, scheduled: dict[str, bytes], where: str, call: int
):
    settings = ordered_run(tmp_path / "killed", "scheduled")
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(plain(settings)))
    script = KILLED_AT.format(where=where, call=call, config=str(config))
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    assert not (shards_of(settings) / "manifest.json").exists()
    for path in shards_of(settings).rglob("*.parquet"):
        pl.read_parquet(path)
    seen: list[Progress] = []
    run_write(settings, listener=seen.append)
    if where in ("shuffle._gather", "writer.publish"):
        assert {event.stage for event in seen} == {"write"}  # the first pass is not redone
    assert snapshot(shards_of(settings)) == scheduled
    assert not (Path(settings.run) / "shards.work").exists()


@pytest.mark.usefixtures("small")
def test_what_was_dealt_for_another_order_is_dealt_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduled: dict[str, bytes]
):
    settings = ordered_run(tmp_path / "other", "shuffled")
    with monkeypatch.context() as patch:
        patch.setattr("jobs.write.stretch_work", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_write(settings)
    work = Path(settings.run) / "shards.work"
    (work / "deal-009999.rows").write_bytes(b"of a larger plan")
    assert len(list(work.glob("*.rows"))) > 2
    changed = ordered_run(tmp_path / "other", "scheduled")
    run_write(changed)
    assert snapshot(shards_of(changed)) == scheduled
    assert not work.exists()


def test_a_full_disk_between_the_passes_is_named_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = ordered_run(tmp_path, "shuffled")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("curate.data.shard_shuffle._Dealt._write", full)
        with pytest.raises(OutputError, match=r"deal-000000\.rows could not be written: No space"):
            run_write(settings)
    assert [path.suffix for path in (Path(settings.run) / "shards.work").iterdir()] == [".json"]
    run_write(settings)
    verify_shards(shards_of(settings))


@pytest.mark.slow
def test_two_workers_write_the_same_bytes_as_none(tmp_path: Path):
    """Rows of a megabyte: several tasks in both passes without a patch that workers do not see."""
    texts = [f"{i} " + "x" * 1_000_000 for i in range(170)]
    tables: Tables = {"a": {"x.parquet": pa.table({"text": texts})}}
    found: list[dict[str, bytes]] = []
    for workers in (0, 2):
        settings = planned_run(
            tmp_path / str(workers),
            tables,
            lambda _s, _f, row: Row(f"d{row % 3}"),
            shards={"order": "domain-interleaved", "min_files": 6},
            cluster={"kind": "local", "workers": workers} if workers else {"kind": "inline"},
            partition_rows=30,
        )
        assert plan_write(settings).total >= 5
        run_write(settings)
        found.append(snapshot(shards_of(settings)))
    assert found[0] == found[1]


# -- ten thousand domains -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["input", "shuffled", "domain-interleaved"])
def test_many_domains(tmp_path: Path, order: str):
    # A file for each would cost a flush of the disk for each; see also test_shard_layout.
    num = 10_000 if order == "domain-interleaved" else 250
    tables: Tables = {"a": {"x.parquet": pa.table({"n": range(num * 3)})}}
    settings = planned_run(
        tmp_path,
        tables,
        lambda _s, _f, row: Row(f"topic/{row % num} 🎈"),
        partition_rows=num,
        shards={"order": order},
    )
    summary = run_write(settings)
    assert len(summary["domains"]) == num
    assert summary["shards"] == (1 if order == "domain-interleaved" else num)
    manifest = json.loads((shards_of(settings) / "manifest.json").read_text())
    assert len(set(manifest["domains"].values())) == num
    assert manifest["rows"] == 3 * num
    if order == "domain-interleaved":
        (path,) = (shards_of(settings) / "data").iterdir()
        found = read([path])
        assert sorted(found["n"].to_list()) == list(range(3 * num))
        # No topic comes a second time before nearly all came once.
        assert found["curate_domain"][: num - 10].n_unique() > 0.9 * num
