"""The page in a headless browser, opened from the file: it works, asks for nothing, stays quiet."""

import re
from collections.abc import Generator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser
from report import page_document
from report.opened_page import CHROMIUM, DESK, PHONE, Opener, chromium

from curate.report.page import render

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(page_document.document(examples=60)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Generator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser, file: Path) -> Generator[Opener]:
    opener = Opener(browser, file)
    yield opener
    opener.close()


def colours(picture: bytes) -> int:
    """How many colours a screenshot has."""
    with Image.open(BytesIO(picture)) as opened:
        return len(opened.convert("RGB").getcolors(1 << 24) or [])


def test_every_tab_opens_draws_and_asks_the_network_for_nothing(
    open_page: Opener, file: Path
) -> None:
    opened = open_page(DESK)
    assert opened.page.title() == "demo · curate report"
    names = opened.tabs()
    assert len(names) == 10
    with_charts = {"summary", "scores", "agreement", "selection", "shifts", "mixture", "comparison"}
    for name in names:
        opened.tab(name)
        assert opened.page.locator(".panel:visible").count() == 1
        assert opened.page.locator(f"#{name}").is_visible()
        if name in with_charts:
            assert opened.drawn(name) >= 1
        if name in ("summary", "scores", "examples"):
            assert colours(opened.page.screenshot()) > 50
    assert opened.requests == [file.as_uri()]
    assert opened.messages == []
    assert opened.page.evaluate("window.pwned") is None


def test_charts_wait_until_they_are_looked_at(open_page: Opener) -> None:
    opened = open_page(DESK)
    opened.drawn("summary")
    assert opened.page.locator("#scores figure[data-drawn]").count() == 0
    opened.tab("scores")
    assert opened.drawn("scores") >= 1


def test_tabs_can_be_used_by_keyboard_and_say_what_they_are(open_page: Opener) -> None:
    page = open_page(DESK).page
    page.focus("#tab-summary")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-scores"
    assert page.locator("#scores").is_visible()
    page.keyboard.press("End")
    assert page.locator("#run").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.locator("#summary").is_visible()
    selected = page.locator(".tabs a[aria-selected=true]")
    assert selected.count() == 1
    assert selected.get_attribute("role") == "tab"
    assert page.locator("#summary").get_attribute("aria-labelledby") == "tab-summary"
    assert page.locator(".tabs a[tabindex='0']").count() == 1
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, [role=img], [role=region]")]
        .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() && e.tagName ===
        "BUTTON" || e.closest("label"))).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []


def test_examples_can_be_filtered_and_searched(open_page: Opener) -> None:
    opened = open_page(DESK)
    page = opened.page
    opened.tab("examples")
    assert len(opened.texts()) == 25
    page.click("#more")
    assert len(opened.texts()) == 50
    page.select_option("[data-filter=domain]", label="books")
    tags = page.locator(".card:visible header").all_inner_texts()
    assert len(tags) == 10
    assert all(re.search(r"domain\s+books", tag) for tag in tags)
    page.select_option("[data-filter=reason]", label="kept")
    assert page.locator(".card:visible").count() == 5
    page.click("#clear")
    page.fill("[data-filter=search]", "ZANZIBAR")
    (text,) = opened.texts()
    assert page_document.SCRIPT in text
    assert page.locator("mark.hit:visible").all_inner_texts() == ["Zanzibar"]
    page.fill("[data-filter=search]", "no such words")
    assert page.inner_text("#card-count") == "No example fits."
    page.fill("[data-filter=search]", "")
    assert page.locator("mark.hit").count() == 0
    assert opened.messages == []


def test_a_list_of_examples_comes_in_its_order(open_page: Opener) -> None:
    opened = open_page(DESK)
    opened.tab("examples")
    samples = page_document.document(examples=60).samples
    assert samples is not None
    opened.page.select_option("[data-filter=list]", value="highest el2n")
    keys = opened.page.locator(".card:visible .key").all_inner_texts()
    expected = [samples.examples[i] for i in samples.picks[0].examples]
    assert keys == [f"{e.source} {e.file}:{e.row}" for e in expected]


def test_a_reason_leads_to_its_examples(open_page: Opener) -> None:
    opened = open_page(DESK)
    opened.tab("selection")
    opened.page.click("#selection td a >> text=duplicate")
    assert opened.page.locator("#examples").is_visible()
    heads = opened.page.locator(".card:visible header").all_inner_texts()
    assert len(heads) == 15
    assert all(head.startswith("duplicate") for head in heads)


def test_tables_sort_and_search_and_charts_show_their_numbers(open_page: Opener) -> None:
    opened = open_page(DESK)
    page = opened.page
    opened.tab("comparison")
    table = page.locator("#comparison table").last
    table.locator("thead button", has_text="mean").click()
    means = [float(t) for t in table.locator("tbody td:nth-child(5)").all_inner_texts()]
    assert means == sorted(means, reverse=True)
    table.locator("thead button", has_text="mean").click()
    means = [float(t) for t in table.locator("tbody td:nth-child(5)").all_inner_texts()]
    assert means == sorted(means)
    differences = table.locator("tbody td:nth-child(7)")
    for _ in range(2):
        table.locator("thead button", has_text="to random").click()
        told = differences.all_inner_texts()
        last = told.count("–")  # noqa: RUF001 - what was not measured is last in both orders
        assert last
        assert told[-last:] == ["–"] * last  # noqa: RUF001
    page.locator("#comparison .find input").last.fill("forums longest")
    assert table.locator("tbody tr:visible").count() == 1
    opened.tab("shifts")
    labels = page.locator("#shifts figure", has=page.locator("b", has_text="by label"))
    assert labels.locator(".find input").count() == 1  # its numbers are open from the start
    labels.locator(".find input").fill("name_39")
    assert labels.locator("tbody tr:visible").count() == 1
    labels.locator(".numbers > button").click()
    assert labels.locator(".find:visible, table:visible").count() == 0
    opened.tab("agreement")
    page.click("#agreement .numbers > button")
    assert page.locator("#agreement .numbers table").is_visible()
    assert "\u22120.44" in page.inner_text(
        "#agreement .numbers table"
    ) or "-0.44" in page.inner_text("#agreement .numbers table")


def test_another_score_can_be_chosen(open_page: Opener) -> None:
    opened = open_page(DESK)
    opened.tab("scores")
    opened.drawn("scores")
    assert opened.page.locator("#scores figcaption b:visible").first.inner_text().startswith("el2n")
    opened.page.select_option("#scores .choose select", label="length.length")
    opened.page.wait_for_selector("#scores .option:nth-of-type(3) figure[data-drawn]")
    shown = opened.page.locator("#scores figcaption b:visible").all_inner_texts()
    assert shown == ["length over all examples", "length by domain", "length by label"]


def test_light_and_dark_follow_the_system_and_the_switch(open_page: Opener) -> None:
    opened = open_page(DESK, dark=True)
    page = opened.page
    ground = "getComputedStyle(document.body).backgroundColor"
    opened.drawn("summary")
    assert page.evaluate(ground) == "rgb(20, 24, 26)"
    assert page.locator("figure[data-drawn=light]").count() == 0
    before = page.locator("#summary figure svg").first.inner_html()
    page.click("#theme")
    page.wait_for_selector("#summary figure[data-drawn=light] svg")
    assert page.evaluate(ground) == "rgb(252, 252, 250)"
    assert page.inner_text("#theme") == "Dark"
    page.wait_for_function("() => !document.querySelector('#summary figure[data-drawn=dark]')")
    assert page.locator("#summary figure svg").first.inner_html() != before
    page.reload()
    assert page.evaluate(ground) == "rgb(252, 252, 250)"
    assert opened.messages == []


def test_a_phone_scrolls_down_only(open_page: Opener) -> None:
    opened = open_page(PHONE)
    for link in opened.page.locator(".tabs a").all():
        link.click()
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    opened.tab("summary")
    opened.drawn("summary")
    assert colours(opened.page.screenshot()) > 50
    assert opened.messages == []


def test_names_from_the_data_stay_text_in_a_charts_label(open_page: Opener) -> None:
    opened = open_page(DESK)
    opened.tab("shifts")
    opened.drawn("shifts")
    chart = opened.page.locator("#shifts figure").first
    chart.locator(".mark-symbol path").last.hover()
    tip = opened.page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert page_document.IMAGE in tip.inner_text()
    assert tip.locator("img").count() == 0
    assert opened.page.evaluate("window.pwned") is None
    assert opened.messages == []


def test_without_scripts_everything_can_be_read(open_page: Opener) -> None:
    opened = open_page(DESK, scripts=False)
    assert opened.page.locator(".panel:visible").count() == 10
    assert (
        opened.page.locator("figure noscript table").count()
        == opened.page.locator("figure").count()
    )
    assert opened.page.locator(".card:visible").count() == 60


def test_on_paper_every_part_is_there(open_page: Opener) -> None:
    opened = open_page(DESK, dark=True)
    opened.page.emulate_media(media="print")
    assert opened.page.locator(".panel:visible").count() == 10
    assert not opened.page.locator(".tabs").is_visible()
    assert opened.page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 34, 36)"
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.page.locator("#agreement .numbers table").is_visible()
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not opened.page.locator("#agreement .numbers table").is_visible()
