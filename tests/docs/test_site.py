"""The site is built without a warning, and its pages ask nothing of other machines."""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Generator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
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


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and keeps no log."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def served(site: Path) -> Generator[str]:
    """The address at which this machine shows the site."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser_the_search_finds_and_nothing_else_is_asked(served: str):
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    messages: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        page = browser.new_context(color_scheme="dark").new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(served + "index.html")
        assert page.get_attribute("body", "data-md-color-scheme") == "slate"
        page.keyboard.press("f")  # opens the search
        page.fill("input[name=query]", "wrong labels")
        page.wait_for_selector(".md-search-result__link:visible", timeout=30_000)
        found = page.locator(".md-search-result__link").first.get_attribute("href") or ""
        browser.close()
    assert "label" in found
    assert all(url.startswith((served, "data:", "blob:")) for url in requests), requests
    assert not messages


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
