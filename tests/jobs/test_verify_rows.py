"""Verification looks at the rows: what somebody changed is found though digests and counts were
made to fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.planned_run import Row, Tables, planned_run

import curate.data.shard_writer as shard_writer
import jobs.write
from curate.cli.tools import print_verification
from curate.config import plain, to_yaml
from curate.data.files import digest_file, read_json, write_json
from curate.data.layout import RunFolder
from curate.data.shard_checks import Names, check_contents
from curate.data.shard_folder import DamageError
from curate.data.tables import write_table
from curate.errors import CurateError
from jobs.settings import Settings
from jobs.verify import verify_shards
from jobs.write import write_run
from tests.jobs.scored_run import POOL

TABLES: Tables = {
    "news": {
        "a.parquet": pa.table({"text": [f"news {i} {i**9}" for i in range(120)]}),
        "b.parquet": pa.table({"text": [f"more {i} {i**9}" for i in range(60)]}),
    },
    "chat": {"c.parquet": pa.table({"text": [f"chat {i} {i**9}" for i in range(90)]})},
}


def decide(source: str, file: str, row: int) -> Row:
    """Two domains; copies 0 to 3, in one of them at most one."""
    if row % 2:
        return Row("once", copies=int(row % 3 > 0), weight=0.5 + row % 4)
    return Row("often", copies=row % 4 if row % 3 else 1 + row % 8 // 4, weight=1.25)


def made(root: Path, **settings: Any) -> Settings:
    found = planned_run(root, TABLES, decide, **settings)
    write_run(found, pool=POOL)
    (Path(found.run) / "config.yaml").write_text(to_yaml(plain(found)))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with shards, to be copied."""
    root = tmp_path_factory.mktemp("whole")
    return Path(made(root, shards={"size_mb": 0.001}).run)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def forge(shards: Path, file: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the rows of a shard, and make the manifest fit."""
    path = shards / file
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    manifest = read_json(shards / "manifest.json")
    for shard in manifest["shards"]:
        if shard["file"] == file:
            manifest["rows"] += table.num_rows - shard["rows"]
            manifest["bytes"] += path.stat().st_size - shard["bytes"]
            shard |= {"rows": table.num_rows, "bytes": path.stat().st_size,
                      "digest": digest_file(path)}  # fmt: skip
    write_json(shards / "manifest.json", manifest)


def problems_of(folder: Path) -> list[str]:
    try:
        verify_shards(folder)
    except DamageError as error:
        return error.problems
    return []


def with_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Any:
    def changed(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        field = table.schema.field(at)
        values = pa.array(change(table[name].to_pylist()), field.type)
        return table.set_column(at, field, values)

    return changed


def first_changed(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value, *values[1:]]


def doubled(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 1), table])


def lost(table: pa.Table) -> pa.Table:
    return table.slice(1)


def swapped(table: pa.Table) -> pa.Table:
    return table.take(pa.array([1, 0, *range(2, table.num_rows)]))


ATTACKS: dict[str, tuple[Callable[[pa.Table], pa.Table], str, str]] = {
    # What is done; what is found by the folder alone; what with the run at hand.
    "a doubled row": (doubled, "more often than any", "with another number of copies"),
    "a lost row": (lost, "as the manifest says", "keeps, but which are not there"),
    "two rows in another order": (swapped, "is late", "is late"),
    "a missing row number": (
        with_column("curate_row", first_changed(None)),
        "curate_row is missing in 1 row",
        "curate_row is missing in 1 row",
    ),
    "a negative row number": (
        with_column("curate_row", first_changed(-5)), "curate_row is -5", "does not keep",
    ),
    "another domain": (
        with_column("curate_domain", first_changed("often")),
        "1 row of another domain, such as 'often'",
        "that the plan does not keep",
    ),
    "an infinite weight": (
        with_column("curate_weight", first_changed(float("inf"))),
        "curate_weight is inf",
        "with another weight than the plan says",
    ),
    "a weight that is a little larger": (
        with_column("curate_weight", lambda v: [float(np.nextafter(np.float32(v[0]), 9)), *v[1:]]),
        "",  # the manifest has no weights
        "1 example with another weight than the plan says, such as chat/c.parquet:1",
    ),
    "a row of an example that is not kept": (
        with_column("curate_row", lambda v: [*v[:-1], v[-1] + 2]),
        "",  # as many examples as before
        "1 example that the plan does not keep, such as",
    ),
    "no row numbers": (
        lambda table: table.drop_columns("curate_row"),
        "has no column curate_row",
        "has no column curate_row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_rows_that_somebody_changed_are_found(run: Path, attack: str):
    change, alone, with_run = ATTACKS[attack]
    file = sorted((run / "shards/data/once").iterdir())[0].relative_to(run / "shards").as_posix()
    forge(run / "shards", file, change)
    problems = problems_of(run / "shards")
    assert any(alone in problem for problem in problems) if alone else problems == []
    problems = problems_of(run)
    assert any(with_run in problem for problem in problems), problems
    assert verify_shards(run / "shards", quick=True)["rows"] > 0


def test_a_row_doubled_among_rows_with_copies_is_found_by_their_number(run: Path):
    file = sorted((run / "shards/data/often").iterdir())[0].relative_to(run / "shards").as_posix()
    forge(run / "shards", file, doubled)
    found = problems_of(run / "shards")
    assert any("domain 'often'" in problem and "as the manifest says" in problem
               for problem in found)  # fmt: skip


def test_a_shard_that_was_taken_out_of_the_manifest_too_is_missed(run: Path):
    shards = run / "shards"
    manifest = read_json(shards / "manifest.json")
    gone = manifest["shards"].pop()
    for key in ("rows", "tokens", "bytes"):
        manifest[key] -= gone[key]
    (shards / gone["file"]).unlink()
    write_json(shards / "manifest.json", manifest)
    assert any("as the manifest says" in problem for problem in problems_of(shards))
    assert any("which are not there" in problem for problem in problems_of(run))


@pytest.mark.parametrize("key", ["rows", "tokens", "bytes"])
def test_a_wrong_count_in_the_manifest_is_found(run: Path, key: str):
    manifest = read_json(run / "shards/manifest.json")
    write_json(run / "shards/manifest.json", {**manifest, key: manifest[key] + 1})
    assert problems_of(run / "shards") == [
        f"manifest.json: the shards sum to {manifest[key]} {key}, not {manifest[key] + 1}"
    ]


@pytest.mark.parametrize("weights", ["column", "copies", "domains"])
def test_whole_shards_agree_with_their_plan_in_every_way_of_weights(tmp_path: Path, weights: str):
    settings = made(tmp_path, shards={"size_mb": 0.001, "weights": weights}, seed=3)
    found = verify_shards(Path(settings.run))
    assert found["rows"] == read_json(Path(settings.run) / "shards/manifest.json")["rows"]
    file = next((Path(settings.run) / "shards/data/once").iterdir())
    name = file.relative_to(Path(settings.run) / "shards").as_posix()
    forge(Path(settings.run) / "shards", name, with_column("curate_weight", first_changed(7.0)))
    told = " ".join(problems_of(Path(settings.run)))
    assert "another weight than the plan says" in told or "written as copies" in told


def test_shards_of_an_older_plan_are_told_from_the_plan(run: Path):
    """As after `curate plan` without `curate write`."""
    part = RunFolder(run).partitions()[0]
    output = RunFolder(run).planned(part)
    plan = pl.read_parquet(output.path).with_columns(keep=pl.lit(value=False))
    output.write(lambda path: write_table(plan, path), "another plan")
    assert problems_of(run / "shards") == []
    (problem,) = problems_of(run)
    assert problem.startswith("rows: ")
    assert "that the plan does not keep" in problem


def test_shards_are_incomplete_whenever_the_writer_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before every rename, and before every document."""
    settings = planned_run(tmp_path, TABLES, decide, shards={"size_mb": 0.001})
    folder = Path(settings.run) / "shards"
    publish, write_text = shard_writer.publish, jobs.write.write_text
    left = 0

    def at_a_step(function: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*arguments: Any) -> Any:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return function(*arguments)

        return stepping

    monkeypatch.setattr(shard_writer, "publish", at_a_step(publish))
    monkeypatch.setattr(jobs.write, "write_text", at_a_step(write_text))
    kills = 0
    while True:
        left = kills % 3  # the next steps are done, then the power goes
        kills += 1
        try:
            write_run(settings, pool=POOL)
            break
        except KeyboardInterrupt:
            with pytest.raises(CurateError, match=r"incomplete|there is no folder"):
                verify_shards(folder)
        assert kills < 60
        if kills > 20:
            monkeypatch.undo()
    assert kills > 10
    assert verify_shards(Path(settings.run))["rows"] > 0


def stream(folder: Path, domains: list[str], order: str) -> dict[str, Any]:
    """One shard with rows of these domains, and its manifest."""
    table = pa.table(
        {
            "curate_source": ["s"] * len(domains),
            "curate_file": ["f"] * len(domains),
            "curate_row": pa.array(np.arange(len(domains))[::-1]),
            "curate_weight": pa.array([1.0] * len(domains), pa.float32()),
            "curate_domain": domains,
        }
    )
    pq.write_table(table, folder / "train.parquet")
    shard = {"file": "train.parquet", "format": "parquet", "domain": "", "phase": 1}
    copies = [{"phase": 1, "domain": d, "examples": [domains.count(d)]} for d in set(domains)]
    return {"formats": ["parquet"], "order": order, "shards": [shard], "copies": copies}


def test_a_stream_follows_the_mixture_in_every_prefix(tmp_path: Path):
    even = ["a", "b", "a", "c", "a", "b"] * 20
    for order in ("domain-interleaved", "scheduled", "shuffled"):
        assert check_contents(tmp_path, stream(tmp_path, even, order)) == []
    for order in ("domain-interleaved", "scheduled"):
        (problem,) = check_contents(tmp_path, stream(tmp_path, sorted(even), order))
        assert "off its share in the first" in problem
        assert "of phase 1" in problem
    assert check_contents(tmp_path, stream(tmp_path, sorted(even), "shuffled")) == []
    found = check_contents(tmp_path, stream(tmp_path, ["a"] * 5, "input"))
    assert "is late" in found[0]


@pytest.mark.parametrize("order", ["input", "domain-interleaved"])
def test_rows_of_many_domains_are_looked_at_together(
    tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
):
    """The work is that of the rows, not that of the rows times the domains."""
    numbered, rows = Names.numbered, list[int]()

    def counting(self: Names, frame: pl.DataFrame) -> pl.DataFrame:
        rows.append(frame.height)
        return numbered(self, frame)

    monkeypatch.setattr(Names, "numbered", counting)
    tables: Tables = {"s": {"x.parquet": pa.table({"text": [f"{i} {i**9}" for i in range(400)]})}}
    settings = planned_run(
        tmp_path,
        tables,
        lambda _s, _f, row: Row(f"d{row % 200}", copies=1 + row % 2),
        shards={"order": order},
    )
    write_run(settings, pool=POOL)
    (Path(settings.run) / "config.yaml").write_text(to_yaml(plain(settings)))
    assert verify_shards(Path(settings.run))["rows"] == 600
    assert rows == [600, 400]  # of the shards, of the plan
    rows.clear()
    assert verify_shards(Path(settings.run) / "shards")["rows_checked"] == "parquet"
    assert rows == [600]


# -- several formats ------------------------------------------------------------------------------


def test_rows_that_were_not_looked_into_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path
):
    settings = made(tmp_path / "lines", shards={"format": "jsonl"})
    folder = Path(settings.run) / "shards"
    print_verification(folder, quick=False, as_json=False)
    assert "its rows were not looked into, which needs parquet or arrow" in capsys.readouterr().out
    print_verification(Path(settings.run), quick=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["rows_checked"] is None
    print_verification(run, quick=False, as_json=False)
    assert "looked into" not in capsys.readouterr().out
    print_verification(run, quick=True, as_json=False)
    assert "its rows were not looked into, as --quick asks" in capsys.readouterr().out


@pytest.mark.parametrize("formats", [["parquet", "jsonl"], ["parquet", "jsonl", "arrow"]])
def test_the_format_that_differs_is_named_where_it_can_be(tmp_path: Path, formats: list[str]):
    shards = Path(made(tmp_path, shards={"format": formats}).run) / "shards"
    manifest = read_json(shards / "manifest.json")
    mine = [s for s in manifest["shards"] if s["domain"] == "once"]
    file, other = (
        next(s["file"] for s in mine if s["format"] == form) for form in ("parquet", "jsonl")
    )
    forge(shards, file, doubled)
    (problem,) = problems_of(shards)
    rows = pq.read_metadata(shards / file).num_rows
    if len(formats) == 3:
        assert problem == f"{file}: {rows} rows, not {rows - 1} as in most formats"
    else:
        assert problem == (
            f"manifest.json: formats have different numbers of rows, {rows} in {file}, {rows - 1}"
            f" in {other}; which of them is right is not known"
        )
