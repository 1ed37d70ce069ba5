"""A run folder is opened only where it is ours and free; what changed is said."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from curate.config import plain, read_yaml
from curate.errors import InputError, OutputError, RunFolderError
from jobs.all_stages import affected
from jobs.opening import changes, load_settings, open_run
from jobs.settings import Settings, parse_settings


def settings(root: Path, **more: object) -> Settings:
    return parse_settings({"run": str(root), "sources": {"a": {"path": "data.parquet"}}, **more})


def test_the_resolved_settings_are_written_with_every_default(tmp_path: Path):
    with open_run(settings(tmp_path / "run", plan={"keep": 0.5})) as full:
        text = (tmp_path / "run" / "config.yaml").read_text()
    values = read_yaml(text, where="config.yaml")
    assert values["sources"]["a"]["path"] == str(Path("data.parquet").absolute())
    assert values["plan"]["draw"] == "top"
    assert parse_settings(values) == full


def test_a_rerun_from_the_resolved_settings_changes_nothing(tmp_path: Path):
    config = tmp_path / "run" / "config.yaml"
    with open_run(settings(tmp_path / "run")) as full:
        before = config.stat().st_mtime_ns
    with open_run(full) as again:
        assert again == full
    assert config.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "manifest.json"])
def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, name: str):
    (tmp_path / name).write_text("mine: 1\n")
    with (
        pytest.raises(RunFolderError, match=f"holds no run of curate .it has {name}"),
        open_run(settings(tmp_path)),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_no_run_folder(tmp_path: Path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunFolderError, match="is a file"), open_run(settings(tmp_path / "run")):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    tmp_path.chmod(0o500)
    with (
        pytest.raises(OutputError, match="run cannot be made: Permission denied"),
        open_run(settings(tmp_path / "run")),
    ):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    right = os.open

    def refuse(path: str | Path, *more: Any, **options: Any) -> int:
        if Path(path).name == ".lock":
            raise OSError(number, os.strerror(number))
        return right(path, *more, **options)

    monkeypatch.setattr("jobs.locking.os.open", refuse)
    said = f"written into the run folder {tmp_path / 'run'}: {os.strerror(number)}"
    with pytest.raises(OutputError, match=said), open_run(settings(tmp_path / "run")):
        pass


HOLDER = """
import sys, time
from jobs.opening import open_run
from jobs.settings import parse_settings
with open_run(parse_settings({"run": sys.argv[1], "sources": {"a": {"path": "d.parquet"}}})):
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_kill_frees_the_folder(tmp_path: Path):
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with (
            pytest.raises(RunFolderError, match=f"in use by another process .pid {holder.pid} on"),
            open_run(settings(run)),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with open_run(settings(run)):
        pass


def test_a_changed_setting_is_told_with_the_stages_that_follow(tmp_path: Path):
    old = plain(settings(tmp_path, plan={"keep": 0.5}))
    new = settings(tmp_path / "elsewhere", plan={"keep": 0.3}, cluster={"stall_minutes": 5})
    assert changes(old, new) == [
        "cluster.stall_minutes: 30.0 -> 5.0; nothing is redone",
        "plan.keep: 0.5 -> 0.3; plan and write are redone",
    ]
    assert changes(None, new) == []


def test_a_changed_setting_is_told_with_the_stages_of_the_command_too(tmp_path: Path):
    old = plain(settings(tmp_path))
    new = settings(tmp_path, attribution={"seed": 1})
    line = "attribution.seed: 0 -> 1;"
    assert changes(old, new) == [f"{line} nothing is redone"]
    told = changes(old, new, command="evaluate-attribution")
    assert told == [f"{line} evaluate-attribution is redone"]


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("shards.size_mb", ["write"]),
        ("plan.order", ["plan", "write", "compare"]),
        ("score.scorers", ["score", "plan", "write", "compare", "evaluate-attribution"]),
        ("attribution.seed", ["evaluate-attribution"]),
        ("sources.a.text",
         ["index", "tokenizer", "train", "embed", "domains", "score", "lengths", "mix", "plan",
          "write", "compare", "evaluate-attribution"]),
        ("mix", ["mix", "plan", "write", "compare"]),
        ("model.device", []),
        ("index.max_bad_rows", []),
    ],
)  # fmt: skip
def test_each_setting_concerns_its_stage_and_what_follows(key: str, stages: list[str]):
    assert affected([key]) == stages


def test_a_moved_run_is_read_where_it_lies(tmp_path: Path):
    with open_run(settings(tmp_path / "run")):
        pass
    (tmp_path / "run").rename(tmp_path / "moved")
    assert load_settings(tmp_path / "moved").run == str(tmp_path / "moved")
    with pytest.raises(InputError, match="there is no run folder"):
        load_settings(tmp_path / "run")
    with pytest.raises(RunFolderError, match="is no run folder of curate"):
        load_settings(tmp_path)
