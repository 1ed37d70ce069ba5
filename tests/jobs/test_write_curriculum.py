"""`shards.curriculum`: which rows each phase gets, and what becomes of the phases."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from data.planned_run import Row, Tables, planned_run

import curate
from curate.config import plain, to_yaml
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.shard_settings import Curriculum
from curate.data.tables import read_examples, write_table
from curate.errors import ConfigError, CurateError, InputError
from jobs.cluster import open_pool
from jobs.plan_check import check_plan
from jobs.settings import Settings
from jobs.verify import verify_shards
from jobs.write import plan_write, write_run

WORDS = [f"{i} {i**9}" for i in range(160)]
TABLES: Tables = {
    "news": {"a.parquet": pa.table({"text": WORDS[:90]}), "b.parquet": pa.table({"text": WORDS})},
    "forum": {"c.parquet": pa.table({"text": WORDS[:71]})},
}
TIED = {"first": "easiest", "steps": 3, "score": "el2n"}
Value = Callable[[str, str, int], float | str | None]


def decide(source: str, _file: str, row: int) -> Row | None:
    """Three domains, copies 0 to 2, and weights."""
    if row % 11 == 10:
        return None
    domain = "forum" if source == "forum" else f"news/{'world 🌍' if row % 4 else 'sport'}"
    return Row(domain, copies=(row + 1) % 3, weight=0.5 + row % 2, tokens=5 + row % 7)


def in_phases(source: str, file: str, row: int) -> Row | None:
    found = decide(source, file, row)
    return found and Row(found.domain, copies=(1, row % 2))


def measured(source: str, file: str, row: int) -> float | None:
    """Negative and positive numbers, each several times in a domain; every ninth is missing."""
    return None if row % 9 == 4 else ((row * 37 + len(file + source)) % 23 - 11) / 3


def write_scores(settings: Settings, value: Value, scorer: str = "el2n") -> None:
    run = RunFolder(Path(settings.run))
    for part in run.partitions():
        keys = read_examples(run, part, KEY)
        found = [value(part.source, part.file, row) for row in keys["row"]]
        table = keys.with_columns(pl.Series(scorer, found, strict=False))
        run.scores(part, scorer).write(
            lambda path, table=table: write_table(table, path), "by hand", rows=table.height
        )


def curriculum_run(
    root: Path, value: Value = measured, *, options: dict[str, Any] | None = None, **shards: Any
) -> Settings:
    """A planned run with the score `el2n`; `options` are those of `planned_run`."""
    asked = {"curriculum": TIED, "size_mb": 0.03, **shards}
    more: dict[str, Any] = {"partition_rows": 90, **(options or {})}
    settings = planned_run(root, TABLES, decide, shards=asked, **more)
    (Path(settings.run) / "config.yaml").write_text(to_yaml(plain(settings)))
    write_scores(settings, value)
    return settings


def run_write(settings: Settings) -> dict[str, Any]:
    with open_pool(settings.cluster) as pool:
        return write_run(settings, pool=pool)


def shards_of(settings: Settings) -> Path:
    return Path(settings.run) / "shards"


def written(settings: Settings, steps: int = 3) -> pl.DataFrame:
    """All rows that were written, with their phase, in the order of the files."""
    found: list[pl.DataFrame] = []
    for phase in range(1, steps + 1):
        for path in sorted((shards_of(settings) / "data" / f"phase-{phase}").rglob("*.parquet")):
            ours = pl.read_parquet(path).select(pl.selectors.starts_with("curate_"))
            found.append(ours.with_columns(phase=pl.lit(phase)))
    return pl.concat(found).rename(lambda name: name.removeprefix("curate_"))


def phase_of(settings: Settings, steps: int = 3) -> dict[tuple[str, str, int], int]:
    rows = written(settings, steps).select(*KEY, "phase").unique().rows()
    found = {(source, file, row): phase for source, file, row, phase in rows}
    assert len(found) == len(rows)  # no example stands in two phases
    return found


def kept(value: Value = measured) -> pl.DataFrame:
    """Straight from the decision: the kept examples, their copies and scores."""
    rows: list[tuple[Any, ...]] = []
    for source, files in TABLES.items():
        for file, table in files.items():
            for row in range(table.num_rows):
                each = decide(source, file, row)
                if each is not None and each.copies:
                    score = value(source, file, row)
                    rows.append((source, file, row, each.domain, each.copies, score))
    names = [*KEY, "domain", "copies", "score"]
    return pl.DataFrame(rows, schema=names, orient="row", infer_schema_length=None)


# -- which rows a phase gets ----------------------------------------------------------------------


@pytest.mark.parametrize(("first", "steps"), [("easiest", 3), ("hardest", 4), ("easiest", 2)])
def test_phases_are_those_of_a_sort(tmp_path: Path, first: str, steps: int):
    settings = curriculum_run(tmp_path, curriculum={**TIED, "first": first, "steps": steps})
    run_write(settings)
    phases = phase_of(settings, steps)
    everything = kept()
    counts = Counter(written(settings, steps).select(*KEY).rows())
    assert counts == {(s, f, r): n for s, f, r, _, n, _ in everything.rows()}
    everything = everything.with_columns(
        pl.Series("phase", [phases[key] for key in everything.select(*KEY).rows()])
    )
    for (domain,), rows in everything.group_by("domain"):
        rows = rows.sort("score", descending=first == "hardest", nulls_last=True)
        sizes = [rows.filter(phase=phase).height for phase in range(1, steps + 1)]
        assert max(sizes) - min(sizes) <= 1, domain
        start = 0
        for phase, size in enumerate(sizes, 1):
            mine = rows.filter(phase=phase)["score"].to_list()
            assert mine == rows["score"].slice(start, size).to_list()
            start += size
    verify_shards(Path(settings.run))
    assert plan_write(settings).why == ()


def test_ties_are_drawn_and_partitions_do_not_matter(tmp_path: Path):
    found: list[dict[tuple[str, str, int], int]] = []
    for nth, (rows, seed) in enumerate(((60, 0), (37, 0), (60, 1))):
        options = {"partition_rows": rows, "seed": seed}
        settings = curriculum_run(tmp_path / str(nth), lambda *_key: 0.25, options=options)
        run_write(settings)
        found.append(phase_of(settings))
    assert found[0] == found[1]
    assert found[0] != found[2]
    sizes = Counter((key[0], phase) for key, phase in found[0].items() if key[0] == "forum")
    assert max(sizes.values()) - min(sizes.values()) <= 1
    # Drawn: neither the first rows of the input nor the last ones stand together.
    places = np.array([key[2] for key in found[0] if key[1] == "b.parquet"])
    phases = np.array([phase for key, phase in found[0].items() if key[1] == "b.parquet"])
    assert abs(np.corrcoef(places, phases)[0, 1]) < 4 / len(places) ** 0.5


def test_rows_without_a_score_are_in_the_last_phase_even_if_they_are_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def rare(source: str, _file: str, row: int) -> float | None:
        return float(row) if source == "forum" or row % 5 == 0 else float("nan")

    settings = curriculum_run(tmp_path, rare)
    run_write(settings)
    everything = kept(rare)
    phases = phase_of(settings)
    missing = everything.filter(pl.col("score").is_nan())
    assert {phases[key] for key in missing.select(*KEY).rows()} == {3}
    assert f"{missing.height} of {everything.height} kept examples have no el2n" in caplog.text
    scored = everything.filter(pl.col("score").is_not_nan() & (pl.col("source") == "news"))
    for (domain,), rows in scored.group_by("domain"):
        sizes = Counter(phases[key] for key in rows.select(*KEY).rows())
        assert sizes[3] == 0, domain
        assert abs(sizes[1] - sizes[2]) <= 1
    verify_shards(Path(settings.run))


def test_domains_of_one_example_are_spread_over_the_phases(tmp_path: Path):
    tables = {"web": {"a.parquet": pa.table({"text": WORDS[:40]})}}
    shards = {"curriculum": {**TIED, "steps": 2}}
    settings = planned_run(tmp_path, tables, lambda *key: Row(f"domain {key[2]}"), shards=shards)
    write_scores(settings, measured)
    run_write(settings)
    assert all(8 < n < 32 for n in Counter(phase_of(settings, 2).values()).values())


def test_numbers_of_the_index_and_named_columns_are_scores_too(tmp_path: Path):
    asked = {"steps": 2, "first": "easiest"}
    settings = curriculum_run(tmp_path, curriculum={**asked, "score": "num_tokens"})
    write_scores(settings, lambda *key: 5 + key[2] % 7, scorer="length")
    run_write(settings)
    by_index = phase_of(settings, 2)
    longest = {n: max(5 + key[2] % 7 for key in by_index if by_index[key] == n) for n in (1, 2)}
    assert longest[1] < longest[2]
    named = curriculum_run(
        tmp_path / "named", curriculum={**asked, "score": "length.length"}, options={}
    )
    write_scores(named, lambda *key: 5 + key[2] % 7, scorer="length")
    run_write(named)
    assert phase_of(named, 2) == by_index


# -- as phases of a mixture -----------------------------------------------------------------------


def test_a_schedule_reads_the_phases_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("curate.data.shard_line.BUCKET_BYTES", 20_000)
    monkeypatch.setattr("curate.data.shard_line._DEAL_BYTES", 40_000)
    weights = {"forum": 0.2, "news/sport": 0.3, "news/world 🌍": 0.5}
    apart = curriculum_run(tmp_path / "apart")
    run_write(apart)
    phases = phase_of(apart)
    settings = curriculum_run(tmp_path, order="scheduled", options={"weights": [weights]})
    run_write(settings)
    folder = str(shards_of(settings))
    cache = str(tmp_path / "cache")
    loaded: Any = datasets.load_dataset(folder, split="train", cache_dir=cache)
    keys = list(zip(*(loaded[f"curate_{name}"][:] for name in KEY), strict=True))
    order = [phases[key] for key in keys]
    assert order == sorted(order)
    assert set(order) == {1, 2, 3}
    second: Any = datasets.load_dataset(folder, "phase-2", split="train", cache_dir=cache)
    assert len(second) == order.count(2)
    mixture = json.loads((shards_of(settings) / "mixture.json").read_text())
    for entry in mixture["phases"]:
        assert entry["asked"] == 1 / 3
        assert {d: e["asked"] for d, e in entry["domains"].items()} == weights
    assert "a curriculum: each domain's examples by `el2n`" in Path(folder, "README.md").read_text()
    verify_shards(Path(settings.run))
    verify_shards(Path(folder))
    different = curate.diff(shards_of(apart), folder)
    assert different.same
    assert [entry["key"] for entry in different.settings] == ["order"]


@pytest.mark.parametrize(
    ("order", "weights"),
    [
        ("input", "column"),
        ("input", "copies"),
        ("input", "domains"),
        ("shuffled", "domains"),
        ("domain-interleaved", "copies"),
        ("scheduled", "copies"),
    ],
)
def test_all_orders_and_weights_have_phases(tmp_path: Path, order: str, weights: str):
    formats = ["parquet", "jsonl"]
    settings = curriculum_run(tmp_path, order=order, weights=weights, format=formats)
    run_write(settings)
    verify_shards(Path(settings.run))  # rows, copies and weights of each phase
    manifest = json.loads((shards_of(settings) / "manifest.json").read_text())
    assert manifest["curriculum"] == TIED
    assert {shard["phase"] for shard in manifest["shards"]} == {1, 2, 3}


# -- again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["input", "scheduled"])
def test_a_changed_score_redoes_the_shards(tmp_path: Path, order: str):
    settings = curriculum_run(tmp_path, order=order)
    run_write(settings)
    assert run_write(settings)["done"] == 0
    write_scores(settings, lambda *key: -(measured(*key) or 0.0))
    assert plan_write(settings).why != ()
    with pytest.raises(CurateError, match="the plan"):
        verify_shards(Path(settings.run))
    assert run_write(settings)["done"] > 0
    verify_shards(Path(settings.run))
    fresh = curriculum_run(tmp_path / "fresh", order=order)
    write_scores(fresh, lambda *key: -(measured(*key) or 0.0))
    run_write(fresh)
    names = [path.relative_to(shards_of(fresh)) for path in shards_of(fresh).rglob("*.parquet")]
    assert names
    for name in names:
        assert (shards_of(fresh) / name).read_bytes() == (shards_of(settings) / name).read_bytes()


def test_scores_that_change_places_move_their_rows_though_no_quantile_moves(tmp_path: Path):
    def rising(_source: str, _file: str, row: int) -> float:
        return float(row)

    def swapped(source: str, file: str, row: int) -> float:
        return float({3: 63, 63: 3}.get(row, row)) if source == "forum" else float(row)

    settings = curriculum_run(tmp_path, rising)
    run_write(settings)
    before = phase_of(settings)
    write_scores(settings, swapped)
    run_write(settings)
    changed = {key[2]: (before[key], phase) for key, phase in phase_of(settings).items()
               if before[key] != phase}  # fmt: skip
    assert changed == {3: (1, 3), 63: (3, 1)}
    verify_shards(Path(settings.run))


def test_without_a_curriculum_the_phases_are_gone(tmp_path: Path):
    settings = curriculum_run(tmp_path)
    run_write(settings)
    plainly = planned_run(tmp_path, TABLES, decide, shards={"size_mb": 0.03}, partition_rows=90)
    run_write(plainly)
    (Path(plainly.run) / "config.yaml").write_text(to_yaml(plain(plainly)))
    assert not list((shards_of(settings) / "data").glob("phase-*"))
    assert "curriculum" not in json.loads((shards_of(settings) / "manifest.json").read_text())
    verify_shards(Path(settings.run))


def test_a_curriculum_is_written_without_torch(tmp_path: Path):
    settings = curriculum_run(tmp_path)
    script = (
        "import sys; from pathlib import Path; from curate.config import read_yaml_file\n"
        "from jobs.settings import parse_settings; from jobs.write import write_run\n"
        "from jobs.cluster import InlineExecutor, Pool\n"
        f"settings = parse_settings(read_yaml_file(Path({settings.run!r}, 'config.yaml')))\n"
        "write_run(settings, pool=Pool(InlineExecutor(), 1))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'dask', 'distributed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (shards_of(settings) / "data" / "phase-3").is_dir()


# -- what is refused ------------------------------------------------------------------------------


def test_a_score_that_is_no_column_is_refused(tmp_path: Path):
    made = curriculum_run(tmp_path)
    for score, message in (
        ("0.5*rank(el2n)", "is an expression"),
        ("el2m", "no score column el2m"),
        ("loss", "no score column loss"),
        ("el2n.loss", "no score column el2n.loss"),
    ):
        curriculum = Curriculum(score=score, steps=2, first="easiest")
        settings = replace(made, shards=replace(made.shards, curriculum=curriculum))
        for refuse in (run_write, check_plan):
            with pytest.raises(ConfigError, match=message) as caught:
                refuse(settings)
            assert "shards.curriculum.score" in caught.value.what
            assert "el2n" in caught.value.fix
        assert message in plan_write(settings).why[0]
    check_plan(made)


def test_a_mixture_with_phases_is_refused(tmp_path: Path):
    settings = planned_run(
        tmp_path, TABLES, in_phases, shards={"curriculum": TIED}, partition_rows=90
    )
    write_scores(settings, measured)
    with pytest.raises(ConfigError, match="the plan has 2 already") as caught:
        run_write(settings)
    assert "remove shards.curriculum" in caught.value.fix


def test_fewer_than_two_steps_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="steps is 1: a curriculum has at least two phases"):
        curriculum_run(tmp_path, curriculum={**TIED, "steps": 1})


def test_scores_that_say_nothing_are_refused(tmp_path: Path):
    settings = planned_run(tmp_path, TABLES, decide, shards={"curriculum": TIED}, partition_rows=90)
    with pytest.raises(InputError, match="nothing was scored yet"):
        run_write(settings)
    write_scores(settings, lambda *_key: None)
    with pytest.raises(ConfigError, match=r"none of the \d+ kept examples has a el2n\.el2n"):
        run_write(settings)
    write_scores(settings, lambda *_key: "high")
    with pytest.raises(ConfigError, match=r"el2n\.el2n, which holds no numbers"):
        run_write(settings)
    run = RunFolder(Path(settings.run))
    run.scores(run.partitions()[-1], "el2n").remove()
    with pytest.raises(InputError, match=r"el2n has no scores for news/b\.parquet from row 90"):
        run_write(settings)
