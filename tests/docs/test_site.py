"""The site is built without a warning, and its pages ask nothing of other machines."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytest.importorskip("material", reason="mkdocs-material is not installed")


class Fetched(HTMLParser):
    """What a browser would fetch by itself to show a page, and the links it offers."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {given.get("id") or "", given.get("name") or ""}
        for name in ("src", "srcset", "data", "poster"):
            self.fetched += [given.get(name) or ""]
        if tag == "link":
            self.fetched.append(given.get("href") or "")
        if tag == "a":
            self.links.append(given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def read(path: Path) -> Fetched:
    parsed = Fetched()
    parsed.feed(path.read_text(encoding="utf-8"))
    return parsed


def test_every_page_of_the_docs_is_built(site: Path):
    for page in ROOT.glob("docs/**/*.md"):
        made = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert made.is_file()
        assert "<h1" in made.read_text(encoding="utf-8"), page
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_nothing_is_fetched_from_elsewhere(site: Path):
    for path in site.rglob("*.html"):
        for address in read(path).fetched:
            assert not re.match(r"(?:[a-z]+:)?//", address), f"{path.name}: {address}"
    for path in site.rglob("*.css"):
        for address in re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", path.read_text()):
            assert not re.match(r"(?:https?:)?//", address), f"{path.name}: {address}"


def test_every_link_within_the_site_leads_to_a_place(site: Path):
    pages = {path: read(path) for path in site.rglob("*.html")}
    for path, parsed in pages.items():
        if path.name == "404.html":
            continue
        for link in parsed.links:
            if re.match(r"[a-z]+:", link):
                continue
            name, _, place = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            if place and target.suffix == ".html":
                assert place in pages[target].ids, f"{path.name}: {link}"


def test_both_colours_and_a_search_are_there(site: Path):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'data-md-color-scheme="slate"' in text
    assert 'data-md-color-scheme="default"' in text
    assert 'data-md-component="search"' in text


def test_the_navigation_has_every_page_once():
    read_as = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    named = list(leaves(read_as["nav"]))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert sorted(named) == sorted(pages)


def leaves(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [name for each in inner for name in leaves(each)]
