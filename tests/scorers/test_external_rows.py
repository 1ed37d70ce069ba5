"""Folders of Bergson as external scores: met by position, counted, refused where unfit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.errors import ConfigError, CurateError, InputError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.resolving import resolved
from jobs.score import score_run
from jobs.settings import Settings, parse_settings
from scorers.external import External, tables

POOL = Pool(InlineExecutor(), 1)
FILES = {("web", "a.jsonl"): 4, ("web", "b.jsonl"): 3, ("wiki", "a.jsonl"): 2}


def examples(*rows: int, source: str = "web", file: str = "b.jsonl") -> pl.DataFrame:
    return pl.DataFrame(
        {"source": [source] * len(rows), "file": [file] * len(rows), "row": list(rows), "id": None},
        schema_overrides={"row": pl.Int64, "id": pl.String, "source": pl.String},
    )


def write_gradients(folder: Path, values: Any) -> Path:
    """An index as Bergson 2.5.1 writes it."""
    folder.mkdir(parents=True)
    array = np.asarray(values, dtype=np.float32)
    array.tofile(folder / "gradients.bin")
    info = {"attribute_tokens": False, "num_items": len(array), "num_grads": len(array),
            "grad_sizes": {"a": array.shape[1]}, "base_dtype": "float32"}  # fmt: skip
    (folder / "info.json").write_text(json.dumps(info))
    return folder


def write_scores(folder: Path, values: Any) -> Path:
    """Scores of one query as Bergson 2.5.1 writes them: 4 bytes, a flag, 3 bytes of nothing."""
    folder.mkdir(parents=True)
    form: Any = {"names": ["score_0", "written_0"], "formats": ["float32", "bool"],
                 "offsets": [0, 4], "itemsize": 8}  # fmt: skip
    records = np.zeros(len(values), np.dtype(form))
    records["score_0"], records["written_0"] = values, True
    records.tofile(folder / "scores.bin")
    info = {"attribute_tokens": False, "num_items": len(values), "num_rows": len(values),
            "num_scores": 1, "dtype": form}  # fmt: skip
    (folder / "info.json").write_text(json.dumps(info))
    return folder


def test_rows_follow_the_files_of_their_source(tmp_path: Path):
    """Those that an index has set aside are counted all the same."""
    every = External(path=str(write_scores(tmp_path / "s", np.arange(9.0))))
    found = every.join(examples(0, 2), single_source=True, files=FILES)
    assert found.columns == [*KEY, "score"]
    assert found["score"].to_list() == [4, 6]
    assert found.schema["score"] == pl.Float32
    wiki = examples(1, source="wiki", file="a.jsonl")
    assert every.join(wiki, single_source=True, files=FILES)["score"].to_list() == [8]
    own = External(path=str(write_scores(tmp_path / "own", [10.0, 11.0])), source="wiki")
    assert own.join(wiki, single_source=False, files=FILES)["score"].to_list() == [11]
    other = own.join(examples(0, 2), single_source=False, files=FILES)
    assert other["score"].to_list() == [None, None]
    assert own.join(examples(), single_source=False, files=FILES).height == 0


@pytest.mark.parametrize("count", [8, 10])
def test_another_number_of_rows_is_refused(tmp_path: Path, count: int):
    table = External(path=str(write_scores(tmp_path / "s", np.arange(float(count)))))
    with pytest.raises(InputError, match=rf"has {count} rows, the files of the run have 9"):
        table.join(examples(0), single_source=True, files=FILES)
    named = replace(table, source="wiki")
    with pytest.raises(InputError, match=rf"has {count} rows, the files of wiki have 2"):
        named.join(examples(0), single_source=True, files=FILES)


def test_chosen_rows_must_be_rows_of_the_files(tmp_path: Path):
    folder = write_scores(tmp_path / "s", [1.0, 2.0])
    np.save(folder / "candidates.npy", np.array([6, 0]))
    table = External(path=str(folder))
    found = table.join(examples(0, 1, 2), single_source=True, files=FILES)
    assert found["score"].to_list() == [None, None, 1]
    np.save(folder / "candidates.npy", np.array([9, 0]))
    with pytest.raises(InputError, match="has 10 rows"):
        table.join(examples(0), single_source=True, files=FILES)


def test_an_index_can_be_asked_with_another(tmp_path: Path):
    pool = write_gradients(tmp_path / "g", [[1, 2], [0, 0], [3, -1]])
    ask = write_gradients(tmp_path / "q", [[1, 0], [1, 2]])
    files = {("web", "b.jsonl"): 3}
    plain = External(path=str(pool))
    assert plain.measurements() == ("squared_norm",)
    found = plain.join(examples(0, 1, 2), single_source=True, files=files)
    assert found["squared_norm"].to_list() == [5, None, 10]
    asked = External(path=str(pool), queries=str(ask))
    assert asked.measurements() == ("score",)
    found = asked.join(examples(0, 1, 2), single_source=True, files=files)
    assert found["score"].to_list() == [3, None, 2]
    assert asked.digest() != plain.digest()


def test_options_that_do_not_fit_are_refused(tmp_path: Path):
    table = External(path=str(write_scores(tmp_path / "s", [1.0])))
    with pytest.raises(ConfigError, match="the run has several sources"):
        table.key(single_source=False)
    with pytest.raises(ConfigError, match="column prob does not exist"):
        replace(table, columns=("prob",)).measurements()
    (tmp_path / "t.csv").write_text("id,q\nx,1\n")
    with pytest.raises(ConfigError, match="queries and source are for folders of Bergson"):
        External(path=str(tmp_path / "t.csv"), source="web").key(single_source=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a folder and none of Bergson's"):
        External(path=str(tmp_path / "empty")).key(single_source=True)
    assert tables({"b": {"path": "x", "queries": "q"}})["b"].queries == "q"


# ---- in a run


def run_of(root: Path, external: Any) -> Settings:
    for name, count in (("a", 7), ("b", 4)):
        (root / "data").mkdir(exist_ok=True)
        texts = [f"{name} {row}" if row != 2 else "" for row in range(count)]  # one is set aside
        pl.DataFrame({"text": texts}).write_parquet(root / "data" / f"{name}.parquet")
    settings = parse_settings(
        {
            "run": str(root / "run"),
            "sources": {"web": {"path": str(root / "data"), "text": "text"}},
            "score": {"scorers": [{"external": external}]},
            "index": {"held_out": 0.0, "partition_rows": 3, "max_bad_rows": 0.5},
        }
    )
    index_run(settings, pool=POOL)
    return settings


def scored(root: Path, name: str) -> pl.DataFrame:
    run = RunFolder(root / "run")
    return pl.concat(pl.read_parquet(run.scores(part, name).path) for part in run.partitions())


def test_a_run_reads_scores_of_all_its_files_partition_by_partition(tmp_path: Path):
    values = np.arange(11.0)
    folder = write_scores(tmp_path / "bergson", values)
    settings = run_of(tmp_path, {"bergson": str(folder)})
    score_run(settings, pool=POOL)
    found = scored(tmp_path, "bergson")
    starts = {"a.parquet": 0, "b.parquet": 7}
    assert found.height < 11  # the empty ones
    wanted = [starts[file] + row for file, row in found.select("file", "row").iter_rows()]
    assert found["score"].to_list() == wanted


def test_a_changed_folder_is_noticed_and_a_damaged_one_stops_before_anything(tmp_path: Path):
    folder = write_scores(tmp_path / "bergson", np.arange(11.0))
    settings = run_of(tmp_path, {"bergson": {"path": str(folder)}})
    assert score_run(settings, pool=POOL)
    before = scored(tmp_path, "bergson")
    records = bytearray((folder / "scores.bin").read_bytes())
    records[0:4] = np.float32(99).tobytes()
    (folder / "scores.bin").write_bytes(records)
    score_run(settings, pool=POOL)
    after = scored(tmp_path, "bergson")
    assert after["score"].max() == 99
    assert after["score"][1:].equals(before["score"][1:])
    (folder / "scores.bin").write_bytes(records[:-8])
    with pytest.raises(CurateError, match="truncated"):
        score_run(settings, pool=POOL)


def test_another_number_of_rows_fails_the_run_by_name(tmp_path: Path):
    folder = write_scores(tmp_path / "bergson", np.arange(10.0))
    settings = run_of(tmp_path, {"bergson": str(folder)})
    with pytest.raises(CurateError, match=r"has 10 rows, the files of the run have 11"):
        score_run(settings, pool=POOL)


def test_paths_of_both_folders_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_gradients(tmp_path / "g", np.ones((11, 2)))
    settings = run_of(tmp_path, {"b": {"path": "g", "queries": "g"}})
    named = resolved(settings).score.named["external"]["b"]
    assert named == {"path": str(tmp_path / "g"), "queries": str(tmp_path / "g")}
