"""The fenced blocks of README and docs, and what is done with each of them.

* `yaml` is read as settings: complete ones, or sections over small ones. With a title it is also
  written to that file.
* `python` is executed: the blocks of a page one after the other, in one folder. With a title it is
  written to that file, for a `console` block to run.
* `console` has lines after `$`: `curate` runs in this process, and `python FILE` too. What the page
  shows below them is compared, numbers masked.
* `sh`, or no language and `curate` at the start: the same, and no output is shown.
* `json` is parsed.
* no language, or `text`, is output of another machine or time: nothing.

An HTML comment straight before a block changes that:

* `<!-- not run: WHY -->`;
* `<!-- dry run: WHY -->`: commands get `--dry-run`, those that have no such option are only parsed;
* `<!-- output not compared: WHY -->`;
* `<!-- run by tests/FILE -->`. The Python of the pages in `ELSEWHERE` has a test of its own, too.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"\n]+)\")?[^\n]*\n"
    r"(?P<text>(?:(?! *```)[^\n]*\n)*?)"
    r"^(?P=indent)```$",
    flags=re.MULTILINE,
)
_NUMBER = re.compile(r"[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
_VERDICTS = re.compile(r"not distinguishable from random|no verdict|\bhelps\b|\bhurts\b")
ELSEWHERE = {
    "README.md": "tests/mixers/test_online_docs.py",
    "docs/online.md": "tests/mixers/test_online_docs.py",
}
"""Page -> what runs its Python."""
NOTES = ("not run: ", "dry run: ", "output not compared: ", "run by tests/")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    """Path from the root of the repository."""
    line: int
    language: str
    title: str | None
    """The file that the reader is told to save it as."""
    text: str
    note: str
    """What the comment before it says."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def way(self) -> str:
        """What is done with it."""
        if self.note.startswith(("not run: ", "run by tests/")):
            return self.note.split(":")[0].split("/")[0]
        if self.language in ("yaml", "json", "console", "sh"):
            return {"yaml": "settings", "json": "parsed"}.get(self.language, "commands")
        if self.language == "python":
            return "file" if self.title else "executed"
        if self.language in ("", "text"):
            return "commands" if self.text.startswith(("curate ", "$ ")) else "output"
        return "unknown"


@dataclass(frozen=True)
class Command:
    """A line of a `console` or `sh` block, and what the page says that it prints."""

    words: list[str]
    expected: list[str]


def pages() -> list[str]:
    """README and every page of the docs."""
    found = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    return [
        Block(
            page=page,
            line=text.count("\n", 0, match.start("language")) + 1,
            language=match["language"],
            title=match["title"],
            text=match["text"],
            note=match["note"] or _elsewhere(page, match["language"]),
        )
        for match in _FENCE.finditer(text)
    ]


def _elsewhere(page: str, language: str) -> str:
    return f"run by {ELSEWHERE[page]}" if language == "python" and page in ELSEWHERE else ""


def fences(page: str) -> int:
    """Lines that open or close a block, counted without the pattern above."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return sum(line.lstrip().startswith("```") for line in lines)


def commands(block: Block) -> list[Command]:
    """The lines of a block that a reader would type."""
    shows = any(line.startswith("$ ") for line in block.text.splitlines())
    found: list[Command] = []
    for line in block.text.splitlines():
        if line.startswith("$ ") or (not shows and line.strip()):
            typed = line.removeprefix("$ ")
            if words := shlex.split(typed, comments=True):
                found.append(Command(words, []))
        elif shows and found:
            found[-1].expected.append(line)
    return found


def typed_lines(page: str) -> list[tuple[int, list[str]]]:
    """`curate` commands in indented text, which are code without a fence: line and words."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [
        (number, shlex.split(line, comments=True))
        for number, line in enumerate(lines, 1)
        if line.startswith("    curate ")
    ]


def masked(line: str) -> str:
    """A line of output without what another Python, machine or width of the terminal may change."""
    line = re.sub(r"'[^' ]*/(?=[^'/ ]+/[^'/ ]+')", "'", line)  # folders above the run
    line = _VERDICTS.sub("VERDICT", _NUMBER.sub("#", line))
    return re.sub(r"[\s,.#%]*#[\s,.#%]*", " # ", " ".join(line.split())).strip()


def unlike(expected: list[str], printed: str) -> str | None:
    """The first line of the page that was not printed where it stands; `...` stands for any."""
    found = [masked(line) for line in printed.splitlines() if line.strip()]
    place, free = 0, False
    for line in (line for line in expected if line.strip()):
        if line.strip() == "...":
            free = True
            continue
        wanted = masked(line)
        places = range(place, len(found)) if free else range(place, min(place + 1, len(found)))
        place = next((at for at in places if found[at] == wanted), -1) + 1
        if place == 0:
            return line
        free = False
    return None if free or place == len(found) else f"{found[place]} (not on the page)"
