"""Pages of runs that the commands have made, in a headless browser: pictures, hostile texts."""

import io
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser
from report.opened_page import CHROMIUM, DESK, Opened, Opener, chromium

from curate.cli import main
from curate.config import to_yaml

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

SCRIPT = "</script></noscript><script>window.pwned = 1</script>"
PICTURE = '"><img src="http://a.example/x.png" onerror="window.pwned = 2">'
TEXTS = [SCRIPT, PICTURE, "{{ 7 * 7 }} ${window.pwned = 3} `", "exe[.]\u202egnp \u2028\u0000 end"]
DOMAINS = ["@accent", "constructor", "__proto__", "<b>bold</b>", PICTURE]
CLASSES = ["toString", "<script>window.pwned = 4</script>"]


@pytest.fixture(scope="module")
def browser() -> Generator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_report(browser: Browser) -> Generator[Any]:
    openers: list[Opener] = []

    def opened(run: Path) -> Opened:
        openers.append(Opener(browser, run / "report.html"))
        return openers[-1](DESK)

    yield opened
    for opener in openers:
        opener.close()


def reported(root: Path, **values: Any) -> Path:
    """A run by the commands themselves, and its page in the run folder."""
    config = root / "settings.yaml"
    config.write_text(to_yaml({"run": str(root / "run"), **values}), encoding="utf-8")
    assert main(["run", str(config), "--quiet"]) == 0
    assert main(["report", str(root / "run"), "--samples", "4"]) == 0
    return root / "run"


def drawn_picture(number: int) -> bytes:
    """A disc or a square on its own ground: small ones as PNG, every third one large, as JPEG."""
    edge = 150 if number % 3 == 0 else 20
    image = Image.new("RGB", (edge, edge), (5 * number, 80, 120))
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if number % 2 else draw.rectangle
    shape((edge // 4, edge // 4, 3 * edge // 4, 3 * edge // 4), fill=(250, 250 - 5 * number, 40))
    file = io.BytesIO()
    image.save(file, "JPEG" if number % 3 == 0 else "PNG")
    return file.getvalue()


def look_at_all(opened: Opened, run: Path) -> None:
    """Open every tab, wait for every chart that is in it, and see that nothing was said."""
    page = opened.page
    for name in opened.tabs():
        opened.tab(name)
        for at in range(page.locator(f"#{name} figure:visible").count()):
            figure = page.locator(f"#{name} figure:visible").nth(at)
            figure.scroll_into_view_if_needed()
            figure.locator(".chart svg").first.wait_for()
    assert opened.messages == []
    assert opened.requests == [(run / "report.html").as_uri()]
    assert page.evaluate("window.pwned") is None


def test_pictures_of_a_run_over_images_are_shown(tmp_path: Path, open_report: Any) -> None:
    files = [drawn_picture(number) for number in range(40)]
    frame = pl.DataFrame({"image": files, "label": [number % 2 for number in range(40)]})
    frame.write_parquet(tmp_path / "shapes.parquet")
    source = {"path": str(tmp_path / "shapes.parquet"), "image": "image", "label": "label",
              "classes": ["square", "disc"]}  # fmt: skip
    run = reported(
        tmp_path, sources={"shapes": source}, score={"scorers": ["random", "duplicates"]},
        plan={"score": "random", "keep": 0.5, "within": "label"},
    )  # fmt: skip
    opened = open_report(run)
    opened.tab("examples")
    while opened.page.locator("#more").is_visible():
        opened.page.click("#more")
    cards = opened.page.locator(".card:visible")
    shown = opened.page.locator(".card:visible img.picture")
    assert cards.count() == shown.count() > 10
    for key, image in zip(cards.locator(".key").all_inner_texts(), shown.all(), strict=True):
        number = int(key.rpartition(":")[2])
        opened.page.wait_for_function("image => image.complete", arg=image.element_handle())
        edge = 96 if number % 3 == 0 else 20  # large ones are reduced
        assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [edge, edge]
        with Image.open(io.BytesIO(image.screenshot())) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        middle = pixels[len(pixels) // 2, pixels.shape[1] // 2]
        assert np.abs(middle - (250, 250 - 5 * number, 40)).max() < 12  # this row's own colour
    labels = opened.page.locator("#shifts figure .role-axis-label text")
    opened.tab("shifts")
    opened.drawn("shifts")
    assert {"disc", "square"} <= set(labels.all_text_contents())
    look_at_all(opened, run)


def test_hostile_texts_of_a_run_stay_text(tmp_path: Path, open_report: Any) -> None:
    rows = 60
    random = np.random.default_rng(0)
    texts = [f"{TEXTS[row % 4]} {row}" for row in range(rows)]
    frame = pl.DataFrame({"text": texts, "domain": [DOMAINS[row % 5] for row in range(rows)],
                          "label": [row % 2 for row in range(rows)]})  # fmt: skip
    (tmp_path / "data").mkdir()
    name = "<img src=x onerror=alert(1)>.parquet"
    frame.write_parquet(tmp_path / "data" / name)
    scores = pl.DataFrame({"file": name, "row": np.arange(rows), "q": random.normal(size=rows)})
    scores.write_parquet(tmp_path / "scores.parquet")
    source = {"path": str(tmp_path / "data"), "text": "text", "domain": "domain",
              "label": "label", "classes": CLASSES}  # fmt: skip
    run = reported(
        tmp_path, sources={"pool": source}, mix={"mixer": "natural"},
        score={"scorers": ["length", "duplicates",
                           {"external": {"elsewhere": str(tmp_path / "scores.parquet")}}]},
        plan={"score": "q", "keep": 0.5},
    )  # fmt: skip
    opened = open_report(run)
    look_at_all(opened, run)
    opened.tab("shifts")
    opened.drawn("shifts")
    labels = set(opened.page.locator("#shifts .role-axis-label text").all_text_contents())
    assert labels >= {"@accent", "constructor", "__proto__", "<b>bold</b>", "toString"}
    opened.tab("mixture")
    opened.drawn("mixture")
    labels = opened.page.locator("#mixture .role-axis-label text").all_text_contents()
    assert {"@accent", "constructor"} <= set(labels)
    opened.tab("examples")
    told = "\n".join(opened.texts())
    assert SCRIPT in told
    assert PICTURE in told
    assert "exe[.][U+202E]gnp [U+2028][U+0000] end" in told
    assert all(name in key for key in opened.page.locator(".card .key").all_text_contents())
    filters = opened.page.locator("[data-filter=domain] option").all_text_contents()
    assert sorted(filters) == sorted(["all", *DOMAINS])
    opened.page.select_option("[data-filter=domain]", label=PICTURE)
    heads = opened.page.locator(".card:visible header").all_inner_texts()
    assert heads
    assert all(PICTURE in head for head in heads)
    assert opened.page.locator(".card img").count() == 0
