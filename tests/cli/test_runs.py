"""Whole commands on a small table: results, JSON, events, dry runs, status, show."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import curate as package

Curate = Callable[..., Any]
"""Runs a command: code, out, err."""
Config = Callable[..., Path]
"""Writes settings."""

STAGES = ["index", "score", "lengths", "plan", "write"]


@pytest.fixture
def done(curate: Curate, config: Config, tmp_path: Path) -> Path:
    """A finished run without a model."""
    assert curate("run", config(), "-q").code == 0
    return tmp_path / "run"


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its size and time of change."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def test_results_go_to_stdout_and_the_rest_to_stderr(
    curate: Curate, config: Config, tmp_path: Path
):
    result = curate("run", config())
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == [*STAGES, "run"]
    assert lines[-1].endswith(str(tmp_path / "run"))
    assert "in 1 domain, 1 file;" in lines[0]
    assert " in 1 shard, " in lines[-2]
    assert "index: 1 of 1" in result.err
    assert "\x1b" not in result.out + result.err


def test_json_is_one_document_with_a_summary_per_stage(
    curate: Curate, config: Config, tmp_path: Path
):
    result = curate("run", config(), "--json")
    document = json.loads(result.out)
    assert document["schema_version"] == 1
    assert document["command"] == "run"
    assert document["planned"] is False
    assert document["run"] == str(tmp_path / "run")
    assert list(document["stages"]) == STAGES
    assert document["stages"]["plan"]["kept"]["rows"] > 0


def test_a_dry_run_has_the_same_shape_and_touches_nothing(
    curate: Curate, config: Config, tmp_path: Path
):
    path = config()
    before = listing(tmp_path)
    result = curate("run", path, "--dry-run", "--json")
    assert listing(tmp_path) == before
    document = json.loads(result.out)
    assert (result.code, document["planned"]) == (0, True)
    assert list(document["stages"]) == STAGES
    assert document["stages"]["index"]["due"] == 1
    assert document["stages"]["write"]["after"] == ["plan"]


def test_a_dry_run_of_a_finished_run_touches_nothing_and_finds_nothing_due(
    curate: Curate, done: Path
):
    before = listing(done)
    document = json.loads(curate("run", done, "--dry-run", "--json").out)
    assert listing(done) == before
    assert {name: entry["due"] for name, entry in document["stages"].items()} == dict.fromkeys(
        STAGES, 0
    )
    assert all(entry["done"] == entry["total"] > 0 for entry in document["stages"].values())


def test_a_dry_run_says_what_a_changed_setting_redoes(curate: Curate, done: Path):
    before = listing(done)
    result = curate("run", done, "--dry-run", "--set", "plan.keep=0.25")
    assert listing(done) == before
    assert "changed: plan.keep: 0.5 -> 0.25; plan and write are redone" in result.out
    assert "plan: the settings of the plan" in result.out
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if line.strip()}
    assert rows["index"] == ["1", "1", "0"]
    assert rows["plan"] == ["1", "0", "1"]
    assert rows["write"][2:] == ["after", "plan"]


def test_a_dry_run_tells_the_origin_of_every_value(
    curate: Curate, config: Config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CURATE__SEED", "7")
    path = config()
    lines = curate("index", path, "--dry-run", "--set", "plan.keep=0.25", "--workers", "2").out
    rows = {line.split()[0]: line.split()[1:] for line in lines.splitlines() if line.strip()}
    assert rows["seed"] == ["7", "environment", "CURATE__SEED"]
    assert rows["plan.keep"] == ["0.25", "--set"]
    assert rows["cluster.workers"] == ["2", "option"]
    assert rows["plan.score"] == ["random", str(path)]
    assert "index.held_out" not in rows
    lines = curate("index", path, "--dry-run", "-v").out
    rows = {line.split()[0]: line.split()[1:] for line in lines.splitlines() if line.strip()}
    assert rows["index.held_out"] == ["0.05", "default"]


def test_measuring_says_which_stages_cannot_tell(curate: Curate, config: Config):
    out = curate("run", config(), "--dry-run", "--measure").out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "hours" in rows["stage"]
    assert "not measured" in rows["index"]
    assert "free on this disk" in out


def test_measuring_says_what_to_run_first(curate: Curate, config: Config):
    path = config()
    out = curate("run", path, "--dry-run", "--measure").out
    hint = "can be timed once index is done: run `curate index` on the same settings first"
    assert f"\nscore and write {hint}\n" in out
    assert hint not in curate("run", path, "--dry-run").out
    assert curate("index", path).code == 0
    assert "can be timed" not in curate("write", path, "--dry-run", "--measure").out
    assert curate("run", path).code == 0
    assert "can be timed" not in curate("run", path, "--dry-run", "--measure").out


def test_a_changed_setting_is_said_and_redoes_what_depends_on_it(curate: Curate, done: Path):
    def kept() -> int:
        return int(pl.read_parquet(done / "plan" / "part-*.parquet")["keep"].sum())

    before = kept()
    index = listing(done / "examples")
    result = curate("write", done, "--set", "plan.keep=0.25")
    assert "plan.keep: 0.5 -> 0.25; plan and write are redone" in result.err
    assert kept() == pytest.approx(before / 2, abs=1)
    assert listing(done / "examples").keys() == index.keys()
    shards = pl.read_parquet(done / "shards" / "data" / "**" / "*.parquet")
    assert shards.height == kept()


def test_a_second_run_does_nothing_again(curate: Curate, done: Path):
    before = listing(done)
    document = json.loads(curate("run", done, "--json", "-q").out)
    for stage in ("index", "score", "lengths", "plan"):
        assert document["stages"][stage]["done"] == 0
    changed = {name for name, entry in listing(done).items() if before.get(name) != entry}
    assert "manifest.json" not in changed
    assert not {name for name in changed if name.endswith((".parquet", ".yaml"))}


def test_a_stage_that_is_done_says_so_once(curate: Curate, config: Config):
    path = config(mix={"mixer": "unimax"})
    assert "done already" not in curate("run", path).err
    told = [line for line in curate("run", path).err.splitlines() if "already" in line]
    assert told == [f"{stage}: done already" for stage in
                     ("index", "score", "lengths", "plan", "write")]  # fmt: skip


def test_a_run_folder_that_moved_goes_on_where_it_is(curate: Curate, done: Path):
    moved = done.with_name("moved")
    done.rename(moved)
    document = json.loads(curate("run", moved, "--json", "-q").out)
    assert document["run"] == str(moved)
    assert document["stages"]["plan"]["done"] == 0
    assert not done.exists()


def test_events_are_json_lines(curate: Curate, config: Config, tmp_path: Path):
    path = tmp_path / "events.jsonl"
    curate("index", config(), "--events", path)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert events[0]["event"] == "start"
    assert events[0]["stages"] == ["index"]
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["stage"] == "index"
    assert progress[-1]["done"] == progress[-1]["total"] == 1


def test_events_on_stdout_end_with_the_result(curate: Curate, config: Config):
    lines = curate("index", config(), "--events", "-").out.splitlines()
    events = [json.loads(line) for line in lines]
    assert events[-1]["event"] == "result"
    assert events[-1]["stages"]["index"]["rows"] == 40


def test_a_stage_runs_what_it_needs_first(curate: Curate, config: Config):
    assert list(json.loads(curate("plan", config(), "--json").out)["stages"]) == STAGES[:-1]


def test_a_later_file_wins_and_out_wins_over_it(curate: Curate, config: Config, tmp_path: Path):
    more = tmp_path / "more.yaml"
    more.write_text(f"run: {tmp_path / 'second'}\nindex: {{held_out: 0}}\n")
    document = json.loads(curate("index", config(), "-c", more, "--json").out)
    assert document["run"] == str(tmp_path / "second")
    assert document["stages"]["index"]["held_out"] == 0
    document = json.loads(
        curate("index", config(), "-c", more, "--out", tmp_path / "third", "--json").out
    )
    assert document["run"] == str(tmp_path / "third")


def test_workers_run_on_dask_and_write_the_same_bytes(
    curate: Curate, config: Config, tmp_path: Path
):
    path = config()
    assert curate("run", path, "-q", "--out", tmp_path / "inline").code == 0
    assert curate("run", path, "-q", "--out", tmp_path / "dask", "--workers", 1).code == 0
    for folder in ("plan", "shards"):
        files = sorted(p for p in (tmp_path / "inline" / folder).glob("**/*") if p.is_file())
        assert files
        for file in files:
            other = tmp_path / "dask" / file.relative_to(tmp_path / "inline")
            assert file.read_bytes() == other.read_bytes()


def test_status_counts_done_and_remaining_and_exits_with_0(
    curate: Curate, config: Config, tmp_path: Path
):
    curate("index", config())
    result = curate("status", tmp_path / "run")
    assert result.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines()}
    assert rows["index"][:3] == ["1", "0", "0"]
    assert rows["write"][3:] == ["never"]


def test_status_tells_what_failed(curate: Curate, config: Config, data: Path, tmp_path: Path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    frame = pl.read_parquet(data)
    frame.write_parquet(folder / "good.parquet")
    (folder / "bad.parquet").write_bytes(b"PAR1 this is no Parquet file PAR1")
    result = curate("index", config(sources={"a": {"path": str(folder), "text": "text"}}))
    assert result.code == 4
    document = json.loads(curate("status", tmp_path / "run", "--json").out)
    (index,) = (stage for stage in document["stages"] if stage["stage"] == "index")
    assert index["done"] == 1
    assert index["failed"] == 1
    assert document["set_aside"] == {"unreadable_file": 1}
    shown = json.loads(curate("show", tmp_path / "run", "--quarantine", "--json").out)
    (row,) = shown["rows"]
    assert (row["file"], row["row"], row["reason"]) == ("bad.parquet", None, "unreadable_file")


def test_show_tells_what_was_kept_beside_random(curate: Curate, done: Path):
    result = curate("show", done, "--examples", "2")
    assert result.code == 0
    assert "in common with the plan" in result.out
    assert result.out.count("text number") == 4
    assert "from datasets import load_dataset" in result.out
    assert " characters (" in result.out  # there is no tokenizer
    assert "tokens" not in result.out
    document = json.loads(curate("show", done, "--json").out)
    assert document["unit"] == "characters"
    (domain,) = document["domains"]
    assert domain["domain"] == "a"
    assert domain["natural_share"] == domain["kept_share"] == 1.0
    scores = [example["score"] for example in document["highest"]]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > document["lowest"][-1]["score"]


def test_show_of_one_domain_counts_that_domain_alone(curate: Curate, config: Config, data: Path):
    kinds = ["a"] * 30 + ["b"] * 10
    texts = [f"text number {i}" for i in range(40)]
    pl.DataFrame({"text": texts, "kind": kinds}).write_parquet(data)
    path = config(sources={"a": {"path": str(data), "text": "text", "domain": "kind"}})
    assert curate("run", path, "-q").code == 0
    plan = pl.read_parquet(path.parent / "run" / "plan" / "*.parquet")
    kept = plan.filter(pl.col("keep"), pl.col("row") >= 30).height
    document = json.loads(curate("show", path.parent / "run", "--domain", "b", "--json").out)
    assert document["kept"]["rows"] == kept
    assert document["kept"]["row_share"] == kept / document["training"]["rows"]
    assert document["yardsticks"] == {}
    for domain in ("a", "b"):
        shown = json.loads(curate("show", path.parent / "run", "--domain", domain, "--json").out)
        assert len(shown["load"]) == 2
        assert f', "{domain}", split="train")' in shown["load"][1]


def test_show_leaves_out_yardsticks_that_say_nothing(
    curate: Curate, config: Config, data: Path, tmp_path: Path
):
    def yardsticks(**more: Any) -> set[str]:
        path = config(**more)
        assert curate("run", path, "-q").code == 0
        return set(json.loads(curate("show", tmp_path / "run", "--json").out)["yardsticks"])

    assert yardsticks() == {"plan", "random", "longest"}
    assert yardsticks(mix={"mixer": "unimax"}) == {"plan", "random", "longest", "natural"}
    pl.DataFrame({"x": [float(i) for i in range(40)], "label": [0, 1] * 20}).write_parquet(data)
    source = {"path": str(data), "features": "x", "label": "label"}
    task = {"kind": "tabular-classification", "num_classes": 2}
    assert yardsticks(sources={"a": source}, task=task) == {"plan", "random"}


def test_show_takes_any_expression(curate: Curate, done: Path):
    document = json.loads(
        curate("show", done, "--json", "--score", "-num_chars", "--examples", "1").out
    )
    shortest = min(len(f"text number {i} says {'yes' if i % 2 else 'no'}") for i in range(40))
    assert document["highest"][0]["score"] == -shortest


def test_show_works_before_there_is_a_plan(curate: Curate, config: Config, tmp_path: Path):
    curate("index", config())
    result = curate("show", tmp_path / "run")
    assert result.code == 0
    assert "there is no plan yet" in result.out


def test_control_characters_of_the_data_do_not_reach_the_terminal(
    curate: Curate, config: Config, data: Path
):
    texts = [f"\x1b]0;evil {i}\x07\x1b[31mred\r\n{'x' * i}" for i in range(40)]
    pl.DataFrame({"text": texts}).write_parquet(data)
    path = config()
    assert curate("run", path, "-q").code == 0
    out = curate("show", path.parent / "run").out
    assert "\\x1b]0;evil" in out
    assert not set(out) & {"\x1b", "\x07", "\r"}


def test_verify_says_that_the_shards_are_whole_or_which_is_not(curate: Curate, done: Path):
    result = curate("verify", done)
    assert (result.code, result.err) == (0, "")
    shard = next((done / "shards" / "data").glob("**/*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    broken = curate("verify", done / "shards")
    assert broken.code == 1
    assert shard.name in broken.err


def test_verify_tells_scripts_what_is_damaged(curate: Curate, done: Path):
    assert json.loads(curate("verify", done, "--json").out)["whole"] is True
    (table,) = (done / "scores" / "random").glob("*.parquet")
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    result = curate("verify", done, "--json")
    document = json.loads(result.out)
    assert (result.code, document["command"], document["whole"]) == (1, "verify", False)
    name = f"scores/random/{table.name}"
    assert document["problems"] == [f"{name}: changed: its digest is another"]
    assert name in result.err
    (done / "shards" / "manifest.json").unlink()
    document = json.loads(curate("verify", done / "shards", "--json").out)
    assert (document["whole"], document["problems"]) == (False, [])
    assert "no manifest.json" in document["what"]


def test_planning_loads_no_model_library(config: Config, curate: Curate, tmp_path: Path):
    """What plans and writes must run where torch would not fit."""
    path = config()
    assert curate("run", path, "-q").code == 0
    code = (
        "import sys\n"
        "from curate.cli import main\n"
        f"assert main(['index', {str(path)!r}, '-q']) == 0\n"
        "assert not {'torch', 'transformers', 'distributed'} & set(sys.modules), "
        "sorted({'torch', 'transformers', 'distributed'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_starter_runs_as_it_is(curate: Curate, data: Path, tmp_path: Path):
    target = tmp_path / "starter.yaml"
    result = curate("init", data, "--out", target)
    assert result.code == 0
    assert result.out.splitlines()[-1] == f"next: curate run {target} --dry-run"
    out = curate("run", target, "--dry-run", "--out", tmp_path / "run", "--json").out
    assert json.loads(out)["stages"]["train"]["due"] == 1


def test_bars_are_drawn_on_a_terminal_only(curate: Curate, config: Config):
    """A terminal of its own stands for stderr; without colour there are still bars."""
    path = config()
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "curate", "index", str(path)],
        stdout=subprocess.PIPE, stderr=follower, env=environment, text=True,
    )  # fmt: skip
    os.close(follower)
    seen = bytearray()
    with contextlib.suppress(OSError):  # how a terminal ends on Linux
        while chunk := os.read(leader, 4096):
            seen += chunk
    os.close(leader)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out.startswith("index ")
    text = seen.decode()
    assert "━" in text
    assert "1/1" in text
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", text), "NO_COLOR"


def test_a_mean_is_that_of_the_first_column_that_has_one():
    from curate.cli.summaries import summary_lines

    def line(**scorers: Any) -> str:
        score = {"rows": 4, "reused": 0, "scorers": scorers}
        return summary_lines({"stages": {"score": score}, "run": "r"})[0]

    none, some = {"mean": None}, {"mean": 2.5}
    told = line(length={"length": none, "num_chars": some}, el2n={"el2n": some, "other": some})
    assert told.split(maxsplit=1)[1] == "4 examples, means: length.num_chars 2.5, el2n 2.5"
    assert line(length={"length": none}).split(maxsplit=1)[1] == "4 examples"


def test_length_without_a_tokenizer_shows_the_mean_of_characters(curate: Curate, config: Config):
    result = curate("score", config(score={"scorers": ["length"]}))
    assert "means: length" in result.out
    assert "means: \n" not in result.out


def test_a_plan_without_a_tokenizer_is_told_in_characters(curate: Curate, config: Config):
    (line,) = (
        each for each in curate("plan", config()).out.splitlines() if each.startswith("plan ")
    )
    assert " characters (" in line
    assert "tokens" not in line


def test_verify_says_which_stages_of_a_run_are_not_finished(curate: Curate, config: Config):
    path = config()
    run = path.parent / "run"
    assert curate("index", path, "-q").code == 0
    result = curate("verify", run)
    assert result.code == 0
    assert f"{run} is whole" in result.out
    assert "note: not finished yet, or failed: score, lengths, plan, write " in result.out
    assert f"`curate run {run}` goes on" in result.out
    found = json.loads(curate("verify", run, "--json").out)
    assert (found["whole"], found["unfinished"]) == (True, STAGES[1:])
    assert curate("run", path, "-q").code == 0
    assert "not finished" not in curate("verify", run).out
    assert json.loads(curate("verify", run, "--json").out)["unfinished"] == []


@pytest.mark.parametrize("place", ["file/report.html", "file/sub/report.html"])
def test_a_page_that_cannot_be_written_is_one_clear_error(
    curate: Curate, done: Path, tmp_path: Path, place: str
):
    (tmp_path / "file").write_bytes(b"x")
    result = curate("report", done, "--out", tmp_path / place)
    assert result.code == 1
    assert f"{tmp_path / place} could not be written" in result.err
    assert "choose another place" in result.err
    assert "bug" not in result.err
    assert "space" not in result.err
