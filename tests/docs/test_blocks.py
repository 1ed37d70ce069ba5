"""Every fenced block of README and docs is run, read as settings, or says why not: `blocks.py`."""

import contextlib
import gc
import io
import json
import re
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from docs.blocks import (
    NOTES,
    Block,
    Command,
    blocks_of,
    commands,
    fences,
    masked,
    pages,
    typed_lines,
    unlike,
)
from docs.prepared import INSTEAD, NAMES, make, place

from curate.cli import main
from curate.cli.app import app
from curate.config import read_yaml
from jobs.chosen import chosen_scorers
from jobs.settings import parse_settings
from tests.mosaic.environment import PYTHON, start

SLOW = {f"docs/tutorials/{name}.md" for name in ("label_noise", "mixture", "target")}
"""Pages that train for more than ten seconds."""
BLOCKS = {page: blocks_of(page) for page in pages()}
RUN = [
    page
    for page, blocks in BLOCKS.items()
    if any(block.way in ("executed", "file", "commands") for block in blocks)
]
SMALL: dict[str, Any] = {
    "run": "run",
    "sources": {"news": {"path": "data/*.parquet", "text": "text"}},
}
"""Settings that a block of a few sections goes over."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("prepared") / "made")


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Signals, paths and modules are afterwards as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    signals = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(sys, "path", sys.path[:])
    modules = set(sys.modules)
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    for name in ("trainer", "datasets_interleave", "per_character"):
        if name not in modules:
            sys.modules.pop(name, None)


def test_every_block_is_found_and_has_its_way():
    for page, blocks in BLOCKS.items():
        assert 2 * len(blocks) == fences(page), page
        for block in blocks:
            assert block.way != "unknown", f"{block.place}: {block.language}"
            assert not block.note or block.note.startswith(NOTES), f"{block.place}: {block.note}"
    everything = [block for blocks in BLOCKS.values() for block in blocks]
    ways = Counter(block.way for block in everything)
    print("\n" + ", ".join(f"{count} {way}" for way, count in ways.most_common()))
    for block in everything:
        if block.note:
            print(f"  {block.place}: {block.note}")
    assert ways["not run"] <= 12
    assert ways["executed"] + ways["file"] + ways["commands"] > 3 * ways["not run"]


def test_what_others_run_is_there():
    for page, blocks in BLOCKS.items():
        for block in blocks:
            if block.note.startswith("run by tests/"):
                file = block.note.removeprefix("run by ")
                assert Path(page).name in Path(file).read_text(encoding="utf-8"), block.place


SETTINGS = [block for blocks in BLOCKS.values() for block in blocks if block.way == "settings"]


@pytest.mark.parametrize("block", SETTINGS, ids=lambda block: block.place)
def test_settings_are_right(block: Block):
    for values in alternatives(block):
        whole = {"run", "sources"} <= set(values)
        settings = parse_settings(dict(values) if whole else {**SMALL, **values})
        if settings.score.scorers:
            chosen_scorers(settings.score.named)


def alternatives(block: Block) -> list[Mapping[str, Any]]:
    """The mapping of a block, or each of its sections where one stands there twice."""
    sections = re.split(r"^(?=[a-z])", block.text, flags=re.MULTILINE)
    heads = Counter(section.split(":")[0] for section in sections if re.match(r"[a-z]", section))
    texts = sections if max(heads.values()) > 1 else [block.text]
    read = [read_yaml(text, where=block.place) for text in texts]
    return [values for values in read if values]


def test_json_is_json():
    for block in (block for blocks in BLOCKS.values() for block in blocks):
        if block.way == "parsed":
            json.loads(block.text)


LINES = [(page, *line) for page in BLOCKS for line in typed_lines(page)]


@pytest.mark.parametrize(("page", "line", "words"), LINES, ids=[f"{p}:{n}" for p, n, _ in LINES])
def test_commands_in_indented_text_have_the_options_they_are_given(
    page: str, line: int, words: list[str]
):
    known(words)


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in RUN]
)
@pytest.mark.usefixtures("undisturbed")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of a reader of tar files
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_blocks_of_a_page_run(
    page: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    if not page.startswith("docs/tutorials/"):  # these bring all they need
        place(made, tmp_path, page)
    names: dict[str, Any] = {"__name__": page} | NAMES.get(page, dict)()
    for block in BLOCKS[page]:
        if block.title and block.way in ("file", "settings"):
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.way == "executed":
            execute(block, names)
        elif block.way == "commands":
            for command in commands(block):
                typed(command, block)
    gc.collect()  # what is left open is told here and not in the next test


def execute(block: Block, names: dict[str, Any]) -> None:
    """Python as it stands, in the names that the blocks before it have left."""
    text = block.text
    if "from streaming import" in text:
        mosaic(text)
        return
    for given, instead in INSTEAD.get(block.page, []):
        text = text.replace(given, instead)
    code = compile("\n" * (block.line - 1) + text, block.page, "exec")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)


def mosaic(text: str) -> None:
    """In the environment of Mosaic Streaming; where there is none the block is only compiled."""
    compile(text, "streaming", "exec")
    if not (PYTHON.parents[1] / ".installed").exists():
        return
    Path("streamed.py").write_text(text + "\nprint(len(data))\n")
    process = start(Path("streamed.py"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert int(out.splitlines()[-1]) > 0


def typed(command: Command, block: Block) -> None:
    """One line of a terminal, and what it prints held against the page."""
    words = command.words
    place = f"{block.place}: {' '.join(words)}"
    if words[0] == "PYTHONPATH=.":
        words = words[1:]
        sys.path.insert(0, str(Path.cwd()))
    if words[0] == "python" and len(words) == 2:
        printed = script(Path(words[1]))
    elif words[0] == "curate":
        arguments = words[1:]
        if block.note.startswith("dry run: "):
            known(words)
            if "--dry-run" not in options(words[1]):
                return
            arguments = [*arguments, "--dry-run"]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(arguments)
        assert code == 0, f"{place}\n{out.getvalue()}{err.getvalue()}"
        printed = out.getvalue()
    else:
        raise AssertionError(f"{place}: neither curate nor python FILE")
    if command.expected and not block.note:
        assert (line := unlike(command.expected, printed)) is None, f"{place}\n{line}\n\n{printed}"


def script(path: Path) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        runpy.run_path(str(path), run_name="__main__")
    return out.getvalue()


def options(name: str) -> set[str]:
    group: Any = typer.main.get_command(app)
    return {option for parameter in group.commands[name].params for option in parameter.opts}


def known(words: list[str]) -> None:
    """Fails where a command does not take these words; nothing runs."""
    group: Any = typer.main.get_command(app)
    name, *rest = words[1:]
    rest = [word for word in rest if word != "..."]
    group.commands[name].make_context(name, rest, resilient_parsing=False)


def test_masks_leave_words_and_hide_numbers():
    assert masked("plan   900 40 0.9592 +0.0514 helps") == masked("plan 1,316 4 1e-3 -3 no verdict")
    assert masked("kept 3 rows") != masked("left 3 rows")


def test_a_line_that_is_not_printed_is_found():
    assert unlike(["a 1", "...", "c 3"], "a 2\nb 2\nc 9\n") is None
    assert unlike(["a 1", "c 3"], "a 2\nb 2\nc 9\n") == "c 3"
    assert unlike(["a 1"], "a 2\nb 2\n") is not None
    assert unlike(["a 1", "..."], "a 2\nb 2\n") is None


def test_a_page_that_is_wrong_is_noticed(tmp_path: Path):
    text = "<!-- dry run: WHY -->\n```sh\ncurate plan RUN --keep 3\n```\n"
    (block,) = blocks_of("page.md", text)
    assert block.note == "dry run: WHY"
    with pytest.raises(Exception, match="--keep"):
        typed(commands(block)[0], block)
    (block,) = blocks_of("page.md", "```yaml\nplan: {keeps: 3}\n```\n")
    with pytest.raises(Exception, match="keeps"):
        test_settings_are_right(block)
    (block,) = blocks_of("page.md", "```python\nundefined\n```\n")
    with pytest.raises(NameError):
        execute(block, {})
