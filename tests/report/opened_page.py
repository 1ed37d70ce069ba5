"""A page in a headless browser, with all that it asks for and complains of."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (found := shutil.which(name))
    ),
    None,
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
DESK = {"width": 1200, "height": 900}
PHONE = {"width": 390, "height": 844}


@dataclass
class Opened:
    """A page and all it asked for and complained of."""

    page: Page
    requests: list[str] = field(default_factory=list[str])
    messages: list[str] = field(default_factory=list[str])

    def tab(self, name: str) -> None:
        self.page.click(f"#tab-{name}")

    def tabs(self) -> list[str]:
        links = self.page.locator(".tabs a").all()
        return [(link.get_attribute("href") or "")[1:] for link in links]

    def drawn(self, panel: str) -> int:
        """Charts of a panel, after the first one that is in the window has been drawn."""
        self.page.wait_for_selector(f"#{panel} figure[data-drawn] svg")
        return self.page.locator(f"#{panel} figure[data-drawn] svg").count()

    def texts(self) -> list[str]:
        return self.page.locator(".card:visible .body").all_inner_texts()


class Opener:
    """Opens the page anew, with a profile of its own, and closes all at the end."""

    def __init__(self, browser: Browser, file: Path) -> None:
        self.browser, self.file = browser, file
        self.contexts: list[BrowserContext] = []

    def __call__(self, size: dict[str, int], *, dark: bool = False, scripts: bool = True) -> Opened:
        context = self.browser.new_context(
            viewport={"width": size["width"], "height": size["height"]},
            color_scheme="dark" if dark else "light",
            java_script_enabled=scripts,
        )
        context.set_default_timeout(20_000)
        self.contexts.append(context)
        page = context.new_page()
        opened = Opened(page=page)
        page.on("request", lambda request: opened.requests.append(request.url))
        page.on("console", lambda message: opened.messages.append(message.text))
        page.on("pageerror", lambda error: opened.messages.append(str(error)))
        page.goto(self.file.as_uri())
        return opened

    def close(self) -> None:
        for context in self.contexts:
            context.close()


@contextmanager
def chromium() -> Generator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
