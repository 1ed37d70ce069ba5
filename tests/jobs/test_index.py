"""`curate index` as a whole: what is redone, what is set aside, what a user is told."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from sklearn.datasets import load_digits

from curate.data.files import digest_file
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest
from curate.data.reading import payload_schema, read_fields, read_rows
from curate.data.tables import scan
from curate.errors import CurateError, InputError, TooManyBadError
from jobs.cluster import Cluster, open_pool
from jobs.index import index_run, plan_index
from jobs.run import Progress
from jobs.settings import Settings, parse_settings


def settings_for(
    tmp_path: Path,
    index: dict[str, Any] | None = None,
    /,
    task: dict[str, Any] | None = None,
    seed: Any = 0,
    **sources: dict[str, Any],
) -> Settings:
    run = str(tmp_path / "run")
    values = {"run": run, "seed": seed, "sources": sources, "index": index or {}}
    return parse_settings({**values, "task": task or {}})


def run_index(settings: Settings) -> dict[str, Any]:
    with open_pool(Cluster()) as pool:
        return index_run(settings, pool=pool)


def write_parquet(path: Path, first: int, rows: int, *, group: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"text number {i}" for i in range(first, first + rows)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=group)
    return path


def write_jsonl(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def digests(run: Path, *folders: str) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): digest_file(path)
        for folder in folders or ("examples", "quarantine")
        for path in sorted((run / folder).glob("part-*.parquet"))
    }


def quarantine(run: Path) -> list[tuple[Any, ...]]:
    tables = [pl.read_parquet(path) for path in (run / "quarantine").glob("part-*.parquet")]
    return sorted(pl.concat(tables).iter_rows(), key=str) if tables else []


# -- all formats together -------------------------------------------------------------------------


def test_every_format_becomes_examples_with_stable_keys(tmp_path: Path) -> None:
    data = tmp_path / "data"
    texts = [f"example {i}" for i in range(6)]
    write_jsonl(data / "a.jsonl", *({"text": text, "meta": {"n": [1]}} for text in texts))
    (data / "a.csv.gz").write_bytes(
        gzip.compress("\n".join(["text,n", *(f"{t},1" for t in texts)]).encode())
    )
    table = pa.table({"text": texts, "image": [{"bytes": b"x", "path": None}] * 6})
    pq.write_table(table, data / "a.parquet")
    with pa.ipc.new_file(str(data / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    (data / "a.txt").write_text("\n\n".join(texts))
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    sources: dict[str, dict[str, Any]] = {
        kind: {"path": f"{data}/a.{suffix}"}
        for kind, suffix in (("jsonl", "jsonl"), ("csv", "csv.gz"), ("parquet", "parquet"),
                             ("arrow", "arrow"), ("text", "txt"))
    }  # fmt: skip
    sources["text"]["passage_chars"] = 10
    sources["saved"] = {"path": str(tmp_path / "saved")}
    summary = run_index(settings_for(tmp_path, **sources))
    assert summary["domains"] == dict.fromkeys(sorted(sources), 6)
    assert (summary["rows"], summary["bad"], summary["done"]) == (36, {}, 6)
    run = RunFolder(tmp_path / "run")
    examples = scan(run, "examples").collect()
    hashes = examples.group_by("source").agg(pl.col("content"))["content"].to_list()
    assert all(sorted(one) == sorted(hashes[0]) for one in hashes)
    keys = examples.filter(source="csv").select("file", "row").rows()
    assert keys == [("a.csv.gz", i) for i in range(6)]
    rows = {part.source: read_rows(run, part, None) for part in run.partitions()}
    assert rows["jsonl"].to_pylist()[0] == {"text": "example 0", "meta": {"n": [1]}}
    assert rows["arrow"].equals(table)
    assert all("curate_problem" not in table.column_names for table in rows.values())
    assert "curate_problem" not in payload_schema(run, run.partitions()).names
    files = load_manifest(run)["stages"]["index"]["files"]
    assert "examples/data/jsonl/a.jsonl.parquet" in files


def test_the_longest_file_name_that_a_file_system_takes_is_indexed(tmp_path: Path) -> None:
    """244 bytes, as a Japanese title has: no room is left for the suffixes of tables and marks."""
    names = ["\u65e5" * 79 + f"{i}.jsonl" for i in "12"]
    for name in names:
        write_jsonl(tmp_path / "data" / name, {"text": name[-7:]})
    settings = settings_for(tmp_path, {"held_out": 0}, a={"path": str(tmp_path / "data")})
    run_index(settings)
    examples = scan(RunFolder(tmp_path / "run"), "examples").collect()
    assert sorted(examples["file"]) == names
    assert plan_index(settings).done == plan_index(settings).total


def test_the_standard_library_can_be_indexed(tmp_path: Path) -> None:
    source = {"path": "pkg://json", "format": "text", "include": "**/*.py", "passage_chars": 500}
    settings = settings_for(tmp_path, lib=source)
    summary = run_index(settings)
    assert summary["rows"] > 20
    run = RunFolder(tmp_path / "run")
    part = next(part for part in run.partitions() if part.file == "decoder.py")
    first = read_rows(run, part, ["text", "line"]).to_pylist()[0]
    assert first["line"] == 1
    assert first["text"].startswith('"""Implementation of JSONDecoder')


def test_the_digits_of_scikit_learn_are_a_table_of_features(tmp_path: Path) -> None:
    source = {"path": "pkg://sklearn/datasets/data/digits.csv.gz", "features": "column_*",
              "label": "column_64"}  # fmt: skip
    task = {"kind": "tabular-classification", "num_classes": 10}
    settings = settings_for(tmp_path, task=task, digits=source)
    summary = run_index(settings)
    assert (summary["rows"], summary["bad"]) == (1797, {})
    run = RunFolder(tmp_path / "run")
    (part,) = run.partitions()
    fields = read_fields(run, part, settings.sources["digits"])
    assert fields["features"].dtype == pl.Array(pl.Float32, 64)
    pixels, digits = load_digits(return_X_y=True)
    np.testing.assert_array_equal(fields["features"].to_numpy(), pixels)
    np.testing.assert_array_equal(fields["label"].to_numpy(), digits)


# -- what is redone ---------------------------------------------------------------------------


def test_new_changed_touched_and_removed_files_redo_their_own_partitions(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for at in range(3):
        write_parquet(data / f"{at}.parquet", 100 * at, 30, group=10)
    settings = settings_for(tmp_path, {"partition_rows": 10}, s={"path": str(data)})

    def counts() -> tuple[int, int]:
        summary = run_index(settings)
        return summary["done"], summary["skipped"]

    assert plan_index(settings).why == ("9 partitions are new",)
    assert counts() == (9, 0)
    before = digests(run)
    assert counts() == (0, 9)
    assert plan_index(settings).done == plan_index(settings).total == 9
    write_parquet(data / "0a.parquet", 1000, 20, group=10)  # sorts between the others
    assert counts() == (2, 9)
    assert before.items() <= digests(run).items()
    os.utime(data / "1.parquet", ns=(1, 1))
    before = digests(run)
    assert plan_index(settings).why == ("3 partitions have changed data or settings",)
    assert counts() == (3, 8)
    assert digests(run) == before  # what stands on these tables need not be redone
    write_parquet(data / "1.parquet", 5000, 10, group=10)
    for table in ("scores/el2n", "plan", "quantities/c", "lengths/t", "quarantine"):
        for part in RunFolder(run).partitions():
            (run / table).mkdir(parents=True, exist_ok=True)
            (run / table / f"{part.name}.parquet").write_text("")
    (run / "quarantine").rename(run / "gone")
    assert counts() == (1, 8)
    assert len(digests(run, "scores/el2n")) == len(digests(run, "plan")) == 9
    (data / "2.parquet").unlink()
    assert plan_index(settings).why == ("1 file is gone",)
    assert counts() == (0, 6)
    assert len(digests(run, "quantities/c")) == len(digests(run, "lengths/t")) == 6
    assert scan(RunFolder(run), "examples").collect()["file"].unique().sort().to_list() == [
        "0.parquet", "0a.parquet", "1.parquet"
    ]  # fmt: skip


def test_a_touched_file_that_is_converted_again_moves_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": f"t{i}"} for i in range(5)))
    write_jsonl(tmp_path / "b.jsonl", {"text": "b"})
    settings = settings_for(tmp_path, s={"path": f"{tmp_path}/*.jsonl"})
    run_index(settings)
    os.utime(path, ns=(1, 1))
    assert plan_index(settings).why == ("1 file has to be converted to Parquet first",)
    summary = run_index(settings)
    assert (summary["done"], summary["skipped"]) == (0, 2)
    path.unlink()
    assert run_index(settings)["rows"] == 1
    assert not (tmp_path / "run" / "examples" / "data" / "s" / "a.jsonl.parquet").exists()


def test_settings_redo_what_depends_on_them_and_nothing_else(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", 0, 20)
    table = pa.table({"text": ["a", "b"], "label": [0, 1], "topic": ["x", "y"]})
    pq.write_table(table, tmp_path / "b.parquet")
    a, b = {"path": f"{tmp_path}/a.parquet"}, {"path": f"{tmp_path}/b.parquet"}

    def done(index: dict[str, Any], seed: int = 0, **source: str) -> int:
        settings = settings_for(tmp_path, index, seed=seed, a=a, b={**b, **source})
        return run_index(settings)["done"]

    assert done({}) == 2
    assert done({}, domain="topic") == 1
    assert done({"max_bad_rows": 0.5, "max_bad_files": 3}, domain="topic") == 0
    assert done({}, seed=1, domain="topic") == 2
    assert done({"held_out": 0.5}, seed=1, domain="topic") == 2


def test_the_tables_are_the_same_from_any_folder_and_in_any_run(tmp_path: Path) -> None:
    for place in ("one", "two/deeper"):
        write_parquet(tmp_path / place / "data" / "x" / "a.parquet", 0, 50, group=10)
        settings = settings_for(tmp_path / place, {"partition_rows": 20},
                                s={"path": f"{tmp_path / place}/data"})  # fmt: skip
        run_index(settings)
    assert digests(tmp_path / "one" / "run") == digests(tmp_path / "two" / "deeper" / "run")


def test_keys_and_contents_do_not_depend_on_the_partitions(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", 0, 50, group=7)
    frames: list[pl.DataFrame] = []
    for rows in (5, 13, 1000):
        run_index(
            settings_for(tmp_path, {"partition_rows": rows}, s={"path": f"{tmp_path}/a.parquet"})
        )
        frames.append(scan(RunFolder(tmp_path / "run"), "examples").collect())
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])


def test_a_stop_in_the_middle_is_resumed_and_gives_the_same_bytes(tmp_path: Path) -> None:
    for at in range(4):
        write_parquet(tmp_path / "data" / f"{at}.parquet", 100 * at, 10)
    settings = settings_for(tmp_path / "stopped", s={"path": f"{tmp_path}/data"})

    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with open_pool(Cluster()) as pool, pytest.raises(KeyboardInterrupt):
        index_run(settings, pool=pool, listener=stop)
    summary = run_index(settings)
    assert (summary["done"], summary["skipped"]) == (2, 2)
    run_index(settings_for(tmp_path / "whole", s={"path": f"{tmp_path}/data"}))
    assert digests(tmp_path / "stopped" / "run") == digests(tmp_path / "whole" / "run")


def test_old_examples_never_meet_a_new_list_of_partitions(tmp_path: Path) -> None:
    """Killed after the list is written, before the changed file is indexed again."""
    path = write_parquet(tmp_path / "a.parquet", 0, 10)
    settings = settings_for(tmp_path, s={"path": str(path)})
    run_index(settings)
    write_parquet(path, 0, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.index.read_used", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_index(settings)
    run = RunFolder(tmp_path / "run")
    (part,) = run.partitions()
    assert part.num_rows == 20
    assert run.examples(part).mark() is None


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# -- what is set aside ------------------------------------------------------------------------


def test_one_corrupt_file_costs_itself_and_its_repair_only_its_own_work(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for at in range(4):
        write_parquet(data / f"{at}.parquet", 100 * at, 10)
    good = (data / "2.parquet").read_bytes()
    (data / "2.parquet").write_bytes(good[:-30])
    settings = settings_for(tmp_path, s={"path": str(data)})
    with pytest.raises(
        TooManyBadError, match=r"1 of 4 files cannot be read; s/2\.parquet: "
    ) as got:
        run_index(settings)
    assert got.value.exit_code == 4
    assert scan(RunFolder(tmp_path / "run"), "examples").collect().height == 30
    ((source, file, row, reason, _),) = quarantine(tmp_path / "run")
    assert (source, file, row, reason) == ("s", "2.parquet", None, "unreadable_file")
    tolerant = settings_for(tmp_path, {"max_bad_files": 1}, s={"path": str(data)})
    summary = run_index(tolerant)
    assert (summary["done"], summary["skipped"]) == (0, 3)
    assert summary["bad"] == {"unreadable_file": 1}
    (data / "2.parquet").write_bytes(good)
    summary = run_index(settings)
    assert (summary["done"], summary["skipped"], summary["bad"]) == (1, 3, {})
    assert quarantine(tmp_path / "run") == []


def test_damage_inside_a_row_group_costs_its_partition(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", 0, 30, group=10)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\xff" * chunk.total_compressed_size)
    settings = settings_for(tmp_path, {"partition_rows": 10}, s={"path": str(path)})
    with pytest.raises(TooManyBadError, match=r"s/a\.parquet: rows 10 to 19: "):
        run_index(settings)
    examples = scan(RunFolder(tmp_path / "run"), "examples").collect()
    assert examples["row"].to_list() == [*range(10), *range(20, 30)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.arrow"])
def test_a_damaged_input_that_is_converted_is_set_aside_too(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "data" / "good" / name.removesuffix(".gz"), {"text": "good"})
    if name.endswith(".gz"):
        whole = gzip.compress(b'{"text": "a"}\n' * 1000)
        (tmp_path / "data" / name).write_bytes(whole[:-20])
    else:
        (tmp_path / "data" / name).write_bytes(b"ARROW1\0\0rubbish")
        (tmp_path / "data" / "good" / name).unlink()
        table = pa.table({"text": ["good"]})
        with pa.ipc.new_file(str(tmp_path / "data" / "good" / name), table.schema) as writer:
            writer.write_table(table)
    source = {"path": f"{tmp_path}/data"}
    with pytest.raises(TooManyBadError, match=f"1 of 2 files cannot be read; s/{name}"):
        run_index(settings_for(tmp_path, s=source))
    summary = run_index(settings_for(tmp_path, {"max_bad_files": 1}, s=source))
    assert (summary["rows"], summary["skipped"]) == (1, 1)


@pytest.mark.parametrize("where", [slice(-8, -4), slice(4, 400)], ids=["footer", "rows"])
def test_a_damaged_copy_is_named_and_not_the_users_file(tmp_path: Path, where: slice) -> None:
    """The mark knows the size only."""
    write_jsonl(tmp_path / "a.jsonl", *({"text": f"row {n}"} for n in range(500)))
    settings = settings_for(tmp_path, s={"path": f"{tmp_path}/a.jsonl"})
    run_index(settings)
    before = digests(tmp_path / "run", "examples")
    # A moved folder, since this process holds the old one's files open.
    (tmp_path / "run").rename(tmp_path / "moved")
    settings = replace(settings, run=str(tmp_path / "moved"))
    copy = tmp_path / "moved" / "examples" / "data" / "s" / "a.jsonl.parquet"
    whole = bytearray(copy.read_bytes())
    whole[where] = b"\xff" * len(whole[where])
    copy.write_bytes(whole)
    for mark in (tmp_path / "moved" / "examples" / ".done").glob("part-*"):
        mark.unlink()
    with pytest.raises(CurateError, match=r"a\.jsonl\.parquet, the converted copy.*\n.*remove it"):
        run_index(settings)
    copy.unlink()
    run_index(settings)
    assert digests(tmp_path / "moved", "examples") == before


def test_bad_rows_of_all_kinds_keep_their_number_and_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"text": "fine", "label": 0},
        '{"text": "broken',
        {"text": None, "label": 0},
        {"text": "  ", "label": 0},
        {"text": "high", "label": 2},
        {"text": 7, "label": 1},
        {"text": "fine too", "label": 1},
    )
    task = {"kind": "text-classification", "num_classes": 2}
    source = {"path": str(path), "text": "text", "label": "label"}
    with pytest.raises(TooManyBadError) as got:
        run_index(settings_for(tmp_path, task=task, s=source))
    assert got.value.exit_code == 4
    assert "5 of 7 rows were set aside" in got.value.what
    assert "the first is row 1 of s/a.jsonl: unparsable" in got.value.what
    assert "index.max_bad_rows" in got.value.fix
    summary = run_index(settings_for(tmp_path, {"max_bad_rows": 0.8}, task=task, s=source))
    assert summary["bad"] == {"empty": 1, "label_out_of_range": 1, "missing_text": 1,
                              "unparsable": 1, "wrong_type": 1}  # fmt: skip
    examples = scan(RunFolder(tmp_path / "run"), "examples").collect()
    assert examples["row"].to_list() == [0, 6]
    assert sorted(row for _, _, row, _, _ in quarantine(tmp_path / "run")) == [1, 2, 3, 4, 5]
    write_jsonl(path, {"text": "fine", "label": 0})
    run_index(settings_for(tmp_path, task=task, s=source))
    assert quarantine(tmp_path / "run") == []


def test_a_quarantine_that_was_taken_away_is_made_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": ""})
    settings = settings_for(tmp_path, {"max_bad_rows": 1}, s={"path": str(path)})
    run_index(settings)
    for table in (tmp_path / "run" / "quarantine").glob("*.parquet"):
        table.unlink()
    assert run_index(settings)["done"] == 1
    assert len(quarantine(tmp_path / "run")) == 1


def test_an_unreachable_file_is_an_error_and_not_a_quarantined_one(tmp_path: Path) -> None:
    """A lack of rights may pass; it must not be marked as done with the file left out."""
    for at in range(3):
        write_jsonl(tmp_path / "data" / f"{at}.jsonl", {"text": f"t{at}"})
    settings = settings_for(tmp_path, s={"path": f"{tmp_path}/data"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("curate.data.formats.jsonl.open_stream", denied)
        with pytest.raises(InputError, match=r"3 of 3 tasks failed; s/0\.jsonl: .*Permission"):
            run_index(settings)
    assert run_index(settings)["rows"] == 3


def denied(address: str) -> None:
    from curate.data.storage import store_errors

    with store_errors(address):
        raise PermissionError(13, "Permission denied")


# -- messages ---------------------------------------------------------------------------------


def test_an_empty_data_set_is_an_input_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="there are no examples in s: 1 file, 0 rows") as got:
        run_index(settings_for(tmp_path, s={"path": f"{tmp_path}/a.parquet"}))
    assert got.value.exit_code == 3
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="there are no examples in t"):
        run_index(settings_for(tmp_path, t={"path": f"{tmp_path}/b.jsonl"}))


def test_data_whose_rows_were_all_set_aside_is_not_taken_for_missing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": ""}, "no JSON", {"text": " "}, {"text": ""})
    with pytest.raises(InputError) as got:
        run_index(settings_for(tmp_path, {"max_bad_rows": 1}, s={"path": str(path)}))
    assert got.value.what == (
        "all 4 rows of s were set aside, most often as empty (3); the first is"
        " row 0 of s/a.jsonl: empty, text is empty"
    )
    assert f"curate show {tmp_path / 'run'} --quarantine" in got.value.fix
    assert str(tmp_path / "run" / "quarantine") in got.value.fix
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no Parquet PAR1")
    broken = {"path": str(tmp_path / "b.parquet"), "text": "text"}
    with pytest.raises(InputError, match=r"the only file of t cannot be read: t/b\.parquet: "):
        run_index(settings_for(tmp_path, {"max_bad_files": 1}, t=broken))


def test_a_missing_column_stops_before_any_work(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", 0, 10)
    source = {"path": f"{tmp_path}/a.parquet", "text": "txt"}
    with pytest.raises(InputError, match=r"s/a\.parquet .*no column 'txt'.*\n.*mean text\?"):
        run_index(settings_for(tmp_path, s=source))
    assert not (tmp_path / "run" / "examples" / "partitions.json").exists()


def test_a_classification_task_without_labels_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", 0, 10)
    task = {"kind": "text-classification", "num_classes": 2}
    with pytest.raises(InputError, match=r"no label column.*\n.*sources\.s\.label"):
        run_index(settings_for(tmp_path, task=task, s={"path": f"{tmp_path}/a.parquet"}))


def test_files_that_would_be_read_by_different_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"2\.parquet .*text would be 'body'.*'text'"):
        run_index(settings_for(tmp_path, s={"path": f"{tmp_path}/*.parquet"}))


def test_feature_vectors_of_two_lengths_are_refused_with_their_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [[1.0, 2.0]]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"x": [[1.0]]}), tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"2 in 1\.parquet, 1 in 2\.parquet"):
        run_index(settings_for(tmp_path, s={"path": f"{tmp_path}/*.parquet", "features": "x"}))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    state = plan_index(settings_for(tmp_path, s={"path": f"{tmp_path}/a.jsonl"}))
    assert (state.total, state.done) == (1, 0)
    assert not (tmp_path / "run").exists()


# -- real data --------------------------------------------------------------------------------


def test_real_instructions_are_indexed_in_place(tmp_path: Path) -> None:
    folder = os.environ.get("CURATE_DATA")
    if not folder:
        pytest.skip("CURATE_DATA is not set: it names the folder with the real data sets")
    source = {"path": f"{folder}/instruct_mix/*.parquet", "prompt": "instruction",
              "response": "output", "domain": "source"}  # fmt: skip
    summary = run_index(settings_for(tmp_path, {"max_bad_rows": 0.05}, i=source))
    total = summary["rows"] + sum(summary["bad"].values())
    assert total == 24_223 + 2_529
    assert summary["num_domains"] == 7
    examples = scan(RunFolder(tmp_path / "run"), "examples").collect()
    assert 0.04 < (examples["split"] == "held_out").sum() / examples.height < 0.06


@pytest.mark.parametrize(
    ("columns", "source"),
    [
        ({"text": "a", "curate_weight": 2.0}, {"text": "text"}),
        ({"curate_row": "a"}, {"text": "curate_row"}),
        (
            {"curate_source": "s", "curate_file": "f", "curate_row": 1, "curate_weight": 1.0,
             "curate_domain": "d", "text": "a"},
            {"text": "text", "id": "curate_row"},
        ),
    ],
)  # fmt: skip
def test_a_column_that_the_shards_would_lose_is_refused(
    tmp_path: Path, columns: dict[str, Any], source: dict[str, Any]
):
    pl.DataFrame([columns] * 4).write_parquet(tmp_path / "data.parquet")
    settings = settings_for(tmp_path, a={"path": str(tmp_path / "data.parquet"), **source})
    for look in (run_index, plan_index):
        with pytest.raises(InputError, match=r"has a column curate_.*\n  fix: rename the column"):
            look(settings)


def test_the_shards_of_an_earlier_run_are_data_like_any_other(tmp_path: Path):
    row = {"text": "a", "curate_source": "s", "curate_file": "f", "curate_row": 1,
           "curate_weight": 1.0, "curate_domain": "d"}  # fmt: skip
    pl.DataFrame([row] * 4).write_parquet(tmp_path / "data.parquet")
    source = {"path": str(tmp_path / "data.parquet"), "text": "text", "domain": "curate_domain"}
    assert run_index(settings_for(tmp_path, a=source))["domains"] == {"d": 4}


def test_a_file_that_is_not_utf8_is_to_be_saved_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,n\ncafé,1\nplain,2\n".encode("latin-1"))
    settings = settings_for(tmp_path, s={"path": str(path)})
    with pytest.raises(TooManyBadError, match=r"invalid_utf8(.|\n)*, save the file as UTF-8, or"):
        run_index(settings)
    path.write_bytes("text,n\ncafé,1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"invalid_utf8(.|\n)*then save the file as UTF-8, or"):
        run_index(settings_for(tmp_path, {"max_bad_rows": 1}, s={"path": str(path)}))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_forecast_looks_at_the_columns(tmp_path: Path, name: str) -> None:
    frame = pl.DataFrame({"text": ["a", "b"], "label": [0, 1]})
    write = {"a.csv": frame.write_csv, "a.jsonl": frame.write_ndjson}
    write.get(name, frame.write_parquet)(tmp_path / name)
    source = {"path": str(tmp_path / name), "text": "text"}
    assert "columns" not in " ".join(plan_index(settings_for(tmp_path, s=source)).why)
    with pytest.raises(InputError, match=r"has no column 'lable'; it has text, label\n.*label"):
        plan_index(settings_for(tmp_path, s={**source, "label": "lable"}))
    assert not (tmp_path / "run").exists()


def test_a_forecast_of_large_files_looks_at_the_head_of_a_csv(tmp_path: Path) -> None:
    frame = pl.DataFrame({"text": ["a" * 1000] * 1500, "n": range(1500)})
    frame.write_csv(tmp_path / "a.csv")
    frame.write_ndjson(tmp_path / "a.jsonl")
    source = {"path": str(tmp_path / "a.csv"), "text": "text"}
    with pytest.raises(InputError, match=r"has no column 'label'; it has text, n"):
        plan_index(settings_for(tmp_path, s={**source, "label": "label"}))
    lines = {**source, "path": str(tmp_path / "a.jsonl"), "label": "label"}
    why = plan_index(settings_for(tmp_path, s=lines)).why
    assert why[-1] == "columns of s are looked at when the index is made"
    (tmp_path / "b.csv").write_text("text;n\na;1\n")
    with pytest.raises(InputError, match=r"set sources\.s\.separator"):
        plan_index(settings_for(tmp_path, s={"path": str(tmp_path / "b.csv"), "text": "text"}))
