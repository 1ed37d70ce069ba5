"""What commands show on a terminal: colours, widths, escapes; and their JSON for scripts."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from curate.cli.app import app
from curate.cli.colour import painter, plain
from curate.cli.reporter import Pace, Reporter
from curate.cli.showing import preview
from curate.cli.text import cells, cut_end, table
from jobs.run import Progress

Curate = Callable[..., Any]
Config = Callable[..., Path]

CODES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def done(curate: Curate, config: Config, tmp_path: Path) -> Path:
    assert curate("run", config()).code == 0
    return tmp_path / "run"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Makes stdout a terminal of some width, or none again."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def open_it(width: int | None) -> None:
        monkeypatch.setattr("curate.cli.colour.is_terminal", lambda _=None: width is not None)
        monkeypatch.setenv("COLUMNS", str(width or 80))

    return open_it


def commands() -> dict[str, click.Command]:
    """All that `curate --help` lists."""
    found = typer.main.get_command(app)
    return dict(found.commands)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType]


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_takes_json(name: str):
    assert "--json" in {flag for option in commands()[name].params for flag in option.opts}


def test_the_commands_that_look_print_one_document_each(
    curate: Curate, done: Path, data: Path, tmp_path: Path
):
    given: dict[str, list[object]] = {
        "init": [data, "--out", tmp_path / "new.yaml"],
        "status": [done],
        "show": [done],
        "verify": [done / "shards"],
        "diff": [done, done],
        "methods": ["length"],
        "schema": [],
        "plan": [done, "--dry-run"],
        "index": [done, "-q"],
    }
    for name, arguments in given.items():
        result = curate(name, *arguments, "--json")
        assert result.code == 0, (name, result.err)
        document = json.loads(result.out)
        assert (document["schema_version"], document["command"]) == (1, name)
        assert "\x1b" not in result.out


def test_the_bare_schema_is_what_editors_read(curate: Curate):
    bare = json.loads(curate("schema").out)
    assert bare["type"] == "object"
    assert json.loads(curate("schema", "--json").out)["schema"] == bare


def test_colours_change_no_character_and_pipes_get_none(
    curate: Curate,
    done: Path,
    terminal: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
):
    for arguments in (["show", done], ["status", done], ["methods"], ["plan", done, "--dry-run"],
                      ["diff", done, done], ["verify", done / "shards"]):  # fmt: skip
        piped = curate(*arguments).out
        assert "\x1b" not in piped
        terminal(400)
        seen = curate(*arguments).out
        assert CODES.search(seen) or arguments[0] == "diff", arguments
        if arguments[0] in ("methods", "diff", "verify", "status"):  # others use the width
            assert CODES.sub("", seen) == piped
        with monkeypatch.context() as patch:
            patch.setenv("NO_COLOR", "1")
            assert "\x1b" not in curate(*arguments).out
        terminal(None)


def test_the_tables_of_show_fit_the_terminal(
    curate: Curate, done: Path, terminal: Callable[[int | None], None]
):
    whole = curate("show", done).out
    for width in (60, 80, 120):
        terminal(width)
        text = CODES.sub("", curate("show", done).out)
        tables = text.split("\n\n", 1)[1].split("load the shards")[0]
        assert max(map(len, tables.splitlines())) <= width
        for word in ("natural", "kept rows", "random", "at equal", "highest random"):
            assert word in text
        assert set(re.findall(r"\d+\.\d %", whole)) == set(re.findall(r"\d+\.\d %", text))


def test_a_dumb_terminal_has_no_colours(
    terminal: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
):
    terminal(80)
    assert painter()("a", "bold") != "a"
    monkeypatch.setenv("TERM", "dumb")
    assert painter() is plain


ROWS = [
    ["partition", "reason", "rows", "tokens", "rows/s"],
    ["part-0123456789-00001", "kept because it is the hardest", "1,000", "12,345", "99"],
    ["part-0123456789-00002", "dropped", "2", "3", "4"],
]


def test_a_table_that_fits_is_as_it_was():
    right = frozenset({2, 3, 4})
    assert table(ROWS, right=right, width=200) == table(ROWS, right=right)
    assert table(ROWS, right=right)[2] == (
        "part-0123456789-00002  dropped                             2       3       4"
    )


def test_a_narrow_table_loses_the_middle_of_texts_and_no_number():
    lines = table(ROWS, right=frozenset({2, 3, 4}), width=60)
    assert max(map(len, lines)) <= 60
    assert len(lines) == 3
    assert re.match(r"part-01\.\.\.9-00001 ", lines[1])
    for number in ("1,000", "12,345", "99"):
        assert number in lines[1]


def test_columns_that_find_no_room_go_below():
    lines = table(ROWS, right=frozenset({2, 3, 4}), width=30)
    assert max(map(len, lines)) <= 30
    blocks = "\n".join(lines).split("\n\n")
    assert len(blocks) > 1
    assert all(block.startswith("partition") for block in blocks)
    for number in ("1,000", "12,345", "99"):
        assert sum(number in block for block in blocks) == 1


def test_wide_characters_are_counted_as_they_are_shown():
    rows = [["domain", "rows"], ["日本語", "1"], ["news", "22"], ["café", "3"]]
    lines = table(rows, right=frozenset({1}))
    assert {cells(line) for line in lines} == {12}
    assert cut_end("日本語の新聞記事", 9) == "日本語..."
    assert cells(preview("日本語の新聞記事" * 40, width=80)) <= 80


def test_text_of_the_data_cannot_steer_the_terminal():
    nasty = "a\x1b[2J\nb\x07\u202ec\r"
    for shown in (preview(nasty), *table([["x"], [nasty]])[1:]):
        assert shown.isprintable()
    assert "\\x1b[2J" in table([["x"], [nasty]])[1]


def progress(done: int, seconds: float, **more: Any) -> Progress:
    values: dict[str, Any] = {"skipped": 10, "rows": 0, "num_tokens": 0, **more}
    return Progress("score", done, 110, f"part-{done}", seconds=seconds, **values)


def test_plain_lines_tell_rates_and_the_time_left(capsys: pytest.CaptureFixture[str]):
    reporter = Reporter(events=None, quiet=False, bars=None)
    reporter._last_line = -1e9  # pyright: ignore[reportPrivateUsage]
    reporter(progress(60, 100.0, rows=50_000, num_tokens=6_000_000, failed=1))
    assert capsys.readouterr().err == (
        "score: 60 of 110, 1 failed; 500 rows/s, 60,000 tokens/s, 1 min 38 s left\n"
    )
    reporter(progress(110, 200.0, rows=100_000, num_tokens=12_000_000))
    assert capsys.readouterr().err == (
        "score: 110 of 110; 500 rows/s, 60,000 tokens/s, in 3 min 20 s\n"
    )


def test_what_was_there_before_makes_no_stage_faster():
    pace = Pace()
    pace.add(progress(11, 10.0))
    assert pace.seconds_left() == pytest.approx(99 * 10, abs=1)
    assert pace.rates() == []


def test_the_pace_is_that_of_the_last_minutes_and_begins_anew_with_the_stage():
    pace = Pace()
    for i in range(300):  # an hour before the first, then one every two seconds
        pace.add(Progress("s", i + 1, 1_000, "p", seconds=3_600 + 2 * i, rows=10 * (i + 1)))
    assert pace.seconds_left() == pytest.approx(700 * 2, abs=1)
    assert pace.rates() == ["5 rows/s"]
    pace.add(Progress("s", 1, 3, "p", seconds=4.0))
    assert pace.seconds_left() == pytest.approx(8, abs=1)


def test_a_task_in_progress_counts_in_part():
    pace = Pace()
    pace.add(Progress("train", 0, 2, "seed-0", "step 5 of 20", 0.25, seconds=10.0))
    assert pace.seconds_left() == pytest.approx(1.75 * 40, abs=1)


def test_bars_show_the_pace_and_no_markup_of_names():
    from rich.console import Console

    from curate.cli.reporter import make_bars

    stream = io.StringIO()
    bars = make_bars(stream)
    bars.live.console = Console(file=stream, width=120, force_terminal=True, color_system=None)
    reporter = Reporter(events=None, quiet=False, bars=bars)
    with bars:
        reporter(
            Progress("score", 60, 110, "p", "[bold]step\n3", 0.5, skipped=10, rows=500,
                     seconds=10.0)
        )  # fmt: skip
    text = stream.getvalue()
    assert "50 rows/s" in text
    assert "left" in text
    assert "[bold]step\\n3" in text
    assert "60/110" in text


def test_log_lines_cannot_carry_control_characters(capsys: pytest.CaptureFixture[str]):
    import logging

    from curate.cli.reporter import start_logging

    start_logging(quiet=False, verbose=False)
    logging.getLogger("jobs.x").warning("partition %s", "a\x1b[31mb")
    assert capsys.readouterr().err == "warning: partition a\\x1b[31mb\n"
