"""The page without a browser: what stands in it, and what cannot."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any, Literal

import pytest
from report import page_document

from curate.report import charts, charts_by_name
from curate.report.blocks import Block, Choice, Figure, Table
from curate.report.document import SECTIONS, Document, Mark
from curate.report.escaping import script_json, shown, visible
from curate.report.page import render, sections
from curate.report.parts_examples import pieces
from curate.report.parts_scores import column_figure
from curate.report.parts_summary import summary_section
from curate.report.wording import duration, moment, number, sentence, share, signed, whole


class Reader(HTMLParser):
    """What a browser would see: elements with their attributes, and text outside of scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.styles: list[str] = []
        self.text = ""
        self._raw = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append((given, ""))
        if tag == "style":
            self.styles.append("")

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw == "script":
            given, before = self.scripts[-1]
            self.scripts[-1] = (given, before + data)
        elif self._raw == "style":
            self.styles[-1] += data
        else:
            self.text += data


@cache
def page() -> str:
    return render(page_document.document())


@cache
def read() -> Reader:
    reader = Reader()
    reader.feed(page())
    reader.close()
    return reader


def policy() -> dict[str, list[str]]:
    metas = [a for tag, a in read().elements if tag == "meta"]
    (content,) = [a["content"] for a in metas if a.get("http-equiv") == "Content-Security-Policy"]
    return {words[0]: words[1:] for words in (part.split() for part in content.split(";"))}


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def figures(document: Document) -> list[Figure]:
    found: list[Figure] = []

    def walk(block: Block) -> None:
        if isinstance(block, Figure):
            found.append(block)
        if isinstance(block, Choice):
            for _, inner in block.options:
                for one in inner:
                    walk(one)

    for section in sections(document):
        for block in section.blocks:
            walk(block)
    return found


def test_the_policy_allows_nothing_but_the_pages_own_scripts_and_style() -> None:
    rules = policy()
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    assert set(rules) == {
        "default-src", "script-src", "style-src", "img-src", "base-uri", "form-action",
    }  # fmt: skip
    run = [text for given, text in read().scripts if given.get("type") != "application/json"]
    assert len(run) == 3
    assert rules["script-src"] == [digest(text) for text in run]
    assert rules["style-src"] == [digest(text) for text in read().styles]


def test_no_address_outside_the_file_is_named() -> None:
    for tag, given in read().elements:
        for name, value in given.items():
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"@import|url\(", read().styles[0])


def test_texts_of_the_data_become_no_elements_and_no_handlers() -> None:
    tags = {tag for tag, _ in read().elements}
    assert len(read().scripts) == 4
    assert tags & {"iframe", "object", "embed", "base", "form", "link"} == {"link"}
    for tag, given in read().elements:
        assert not [name for name in given if name.startswith("on")], (tag, given)
        assert "style" not in given
        if tag == "img":
            assert given["src"].startswith("data:image/png;base64,")


def test_hostile_texts_can_be_read_as_they_are() -> None:
    assert page_document.SCRIPT in read().text
    assert page_document.IMAGE in read().text
    assert "{{ 7 * 7 }} ${window.pwned = 2} `" in read().text
    assert "user[U+202E]gnp.exe[U+2066] [U+2028] line [U+0000] end" in read().text


def test_no_character_in_the_page_turns_the_direction_or_ends_a_line_unseen() -> None:
    own = page().rpartition("<script>")[0]  # Vega's script comes last
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00\ufeff]", own)


def test_a_picture_that_is_none_is_left_out() -> None:
    document = page_document.document(examples=4)
    assert document.samples is not None
    bad = [
        "javascript:alert(1)",
        "https://a.example/x.png",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AA" onerror="x',
    ]
    examples = [replace(document.samples.examples[0], picture=picture) for picture in bad]
    samples = replace(document.samples, examples=examples, picks=[])
    reader = Reader()
    reader.feed(render(replace(document, samples=samples, leakage=None)))
    assert "img" not in {tag for tag, _ in reader.elements}


def test_the_charts_data_are_json_that_cannot_leave_its_element() -> None:
    ((_, text),) = [s for s in read().scripts if s[0].get("type") == "application/json"]
    assert not set("<>&\u2028\u2029") & set(text)
    specs = json.loads(text)
    drawn = [int(a["data-chart"]) for tag, a in read().elements if tag == "figure"]
    assert drawn == list(range(len(specs)))
    names = {row["name"] for spec in specs for row in spec.get("data", {}).get("values", [])
             if "name" in row}  # fmt: skip
    assert page_document.IMAGE in names


def test_every_chart_stands_as_a_table_too() -> None:
    for figure in figures(page_document.document()):
        assert figure.table.rows, figure.title
        width = len(figure.table.columns)
        assert all(len(row) == width for row in figure.table.rows), figure.title


def test_every_specification_compiles() -> None:
    import vl_convert

    seen: set[str] = set()
    for figure in figures(page_document.document()):
        shape = json.dumps(figure.spec["layer"], default=str)[:60] + figure.title.partition(" ")[2]
        if shape not in seen:
            seen.add(shape)
            vega: dict[str, Any] = vl_convert.vegalite_to_vega(dict(figure.spec))
            assert vega["marks"], figure.title


def test_fields_of_charts_are_never_names_from_the_data() -> None:
    text = json.dumps([_without_data(figure.spec) for figure in figures(page_document.document())])
    fields = set(re.findall(r'"field": "([^"]*)"', text))
    assert fields <= {
        "low", "high", "count", "y0", "y1", "name", "share", "zero", "at", "q05", "q25", "q50",
        "q75", "q95", "a", "b", "value", "x", "y", "before", "after", "estimate", "word", "seed",
    }  # fmt: skip


def test_names_from_the_data_stand_in_no_expression_of_a_chart() -> None:
    import vl_convert

    name = "constructor"  # which Vega's parser takes for a function, and draws nothing
    row = {"name": name, "before": 0.1, "after": 0.2, "estimate": 0.1, "low": 0.0, "high": 0.2,
           "word": "helps", "seed": 0, "value": 0.5, "count": 3, "at": 0.3, "x": 1,
           "y": 2}  # fmt: skip
    row |= {f"q{share}": float(share) for share in ("05", "25", "50", "75", "95")}
    other = {**row, "name": "other"}
    rows = [row, other]
    for spec in (
        charts_by_name.before_after(rows, title="t"),
        charts_by_name.boxes(rows, title="t", own_cuts=rows),
        charts_by_name.forest(rows, title="t"),
        charts_by_name.strip(rows, title="t"),
        charts.heatmap([{"a": name, "b": "other", "value": 0.5}], [name, "other"], title="t"),
        charts.lines(rows, x="x", y="y", names=[name, "other"]),
    ):
        vega: dict[str, Any] = vl_convert.vegalite_to_vega({**spec, "width": 300})
        computed = json.dumps([_expressions(part) for part in (vega["marks"], vega["data"])])
        assert name not in computed
        (scale,) = [
            s for s in vega["scales"] if s["name"] in ("y", "color") and "other" in s["domain"]
        ]
        assert set(scale["domain"]) <= {name, "other"}


def test_a_run_that_has_done_nothing_says_so_everywhere() -> None:
    reader = Reader()
    reader.feed(render(page_document.empty()))
    for name in SECTIONS:
        assert f"Nothing of {name} yet." in reader.text
    assert not [1 for tag, _ in reader.elements if tag == "figure"]


def test_the_same_document_gives_the_same_page() -> None:
    assert render(page_document.document()) == page()


def test_what_the_summary_says_is_in_the_page() -> None:
    document = page_document.document()
    for line in [*document.summary, *document.notes, document.run, document.made]:
        assert line in read().text


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("\u202eabc", "[U+202E]abc"),
        ("\ud800", "\ufffd"),
        ("\x07\u200b\U000e0041", "[U+0007][U+200B][U+E0041]"),
        ("naïve 中文 עברית 👩‍🚀", "naïve 中文 עברית 👩‍🚀"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text: str, seen: str) -> None:
    assert visible(text) == seen
    assert shown(text) == seen
    visible(text).encode()


def test_json_in_a_script_comes_back_as_it_was() -> None:
    value = {"a<b": ["</script>", "\u2028", "& <!--", 1.5, None, True], "n": {"x": (1, 2)}}
    text = script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a<b": ["</script>", "[U+2028]", "& <!--", 1.5, None, True],
                                "n": {"x": [1, 2]}}  # fmt: skip
    assert json.loads(script_json([float("nan"), float("-inf")])) == [None, None]


def test_a_text_is_cut_at_its_marks_and_nothing_is_lost() -> None:
    text = "0123456789"
    marks = [
        Mark(start=6, end=99, kind="other"),
        Mark(start=2, end=4, kind="leakage"),
        Mark(start=3, end=5, kind="leakage"),
        Mark(start=40, end=50, kind="other"),
    ]
    parts = pieces(text, marks)
    assert "".join(part for part, _ in parts) == text
    assert [part for part, why in parts if why] == ["23", "4", "6789"]
    assert pieces("", []) == []


def test_bars_of_a_histogram_stand_on_each_other() -> None:
    spec = charts.histogram([0, 1, 2], [("kept", [3, 0]), ("left out", [4, 5])], title="x")
    rows = {(r["name"], r["low"]): (r["y0"], r["y1"]) for r in spec["data"]["values"]}
    assert rows == {("kept", 0): (0, 3), ("left out", 0): (3, 7), ("left out", 1): (0, 5)}


def test_numbers_are_written_for_readers() -> None:
    assert [number(v) for v in (0.0, 1.0, 0.123456, 12345.6, -0.5, 1.5e-7, 2.5e8, None)] == [
        "0", "1", "0.1235", "12,346", "\u22120.5", "1.5e-7", "2.5e8", "\u2013",
    ]  # fmt: skip
    assert [signed(v) for v in (0.5, -0.25, 0.0)] == ["+0.5", "\u22120.25", "0"]
    assert [share(v) for v in (0.0, 1.0, 0.1234, 0.0012, 0.00001, None)] == [
        "0 %", "100 %", "12.3 %", "0.12 %", "< 0.01 %", "\u2013",
    ]  # fmt: skip
    assert [duration(v) for v in (3.21, 42.0, 250.0, 7500.0, None)] == [
        "3.2 s", "42 s", "4 min 10 s", "2 h 5 min", "\u2013",
    ]  # fmt: skip
    assert (whole(1234567), whole(None)) == ("1,234,567", "\u2013")


def test_sentences_and_times_are_whole() -> None:
    assert [sentence(text) for text in ("nobody looked", "Done.", "")] == [
        "Nobody looked.", "Done.", "",
    ]  # fmt: skip
    assert moment("2026-11-22T19:13:37.5+00:00") == "2026-11-22 19:13 UTC"
    assert [moment(text) for text in ("yesterday", None)] == ["yesterday", ""]


def test_program_text_keeps_its_columns_and_prose_does_not() -> None:
    document = page_document.document(examples=2)
    assert document.samples is not None
    code = "def f(x):\n    if x:\n        return 1\n    return 2"
    samples = replace(
        document.samples,
        examples=[
            replace(document.samples.examples[1], text=t, marks=[]) for t in (code, "So." * 9)
        ],
        picks=[],
    )
    reader = Reader()
    reader.feed(render(replace(document, samples=samples, leakage=None)))
    bodies = [a["class"] for _, a in reader.elements if a.get("class", "").startswith("body")]
    assert bodies == ["body code", "body"]


def _expressions(node: Any) -> Any:
    """What a compiled chart computes: all but its values, and texts that are no name of a field."""
    if isinstance(node, dict):
        return [
            value if key in ("expr", "test", "signal", "update") and isinstance(value, str)
            else _expressions(value)
            for key, value in node.items() if key != "values"
        ]  # fmt: skip
    return [_expressions(item) for item in node] if isinstance(node, list) else None


def _without_data(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_data(v) for k, v in node.items() if k != "data"}
    return [_without_data(item) for item in node] if isinstance(node, list | tuple) else node


def test_the_rest_of_the_names_is_in_the_table_and_not_in_the_chart() -> None:
    named = {it.title: it for it in figures(page_document.document()) if "by label" in it.title}
    figure = named["Shares of tokens by label"]
    drawn = {value["name"] for value in figure.spec["data"]["values"]}
    listed = {row[0].text for row in figure.table.rows}
    assert len(drawn) == 30
    assert len(listed) == len(page_document.LABELS) + 41
    assert listed - drawn >= {"47 others", "a_label_with_a_very_long_name_39"}
    total = len(page_document.LABELS) + 40 + 47
    assert figure.note.endswith(f"The 30 largest of {total} labels.")


def test_the_summary_says_how_many_of_the_names_it_draws() -> None:
    whole = page_document.document()
    shifts = whole.shifts
    assert shifts is not None
    by_label = replace(whole, shifts=replace(shifts, domains=[]))
    (figure,) = [
        block
        for block in summary_section(by_label).blocks
        if isinstance(block, Figure) and "by label" in block.title
    ]
    assert len(figure.spec["data"]["values"]) == len(figure.table.rows) == 12
    assert "The 12 largest of" in figure.note


def test_long_names_at_an_axis_keep_both_ends() -> None:
    import vl_convert

    names = [f"top_up_failed_because_of_{why}_payment" for why in ("bank", "card")]
    rows = [{"name": name, "before": 0.1, "after": 0.2} for name in [*names, "short"]]
    spec = {**charts_by_name.before_after(rows, title="share"), "width": 400}
    svg = vl_convert.vegalite_to_svg(spec)
    seen = set(re.findall(r">([^<>]*)</text>", svg))
    assert "short" in seen
    assert {"top_up_fail\u2026bank_payment", "top_up_fail\u2026card_payment"} <= seen


@pytest.mark.parametrize("unit", ["tokens", "characters", "examples"])
def test_other_choices_are_counted_in_the_run_s_unit(unit: str) -> None:
    whole = page_document.document()
    shifts = whole.shifts
    assert shifts is not None
    counted = shifts.yardsticks
    if unit == "examples":
        counted = [replace(one, tokens=None) for one in counted]
    changed = replace(whole, shifts=replace(shifts, unit=unit, yardsticks=counted))
    (table,) = [
        block
        for section in sections(changed)
        for block in section.blocks
        if isinstance(block, Table) and block.caption == "Choices at an equal budget"
    ]
    titles = [column.title for column in table.columns]
    assert (unit in titles) == (unit != "examples")
    assert "tokens" not in titles or unit == "tokens"
    assert all(len(row) == len(titles) for row in table.rows)


def test_a_cut_in_the_tail_that_is_not_drawn_is_told_and_not_drawn() -> None:
    scores = page_document.document().scores
    assert scores is not None
    (planned,) = [column for column in scores.columns if column.is_planned]
    drawn = planned.edges[1]
    figure = column_figure(replace(planned, cuts=[drawn, 50 * planned.edges[-1]]))
    rules = [layer["data"]["values"][0]["at"] for layer in figure.spec["layer"][1:]]
    assert rules == [drawn]
    assert f" and {number(50 * planned.edges[-1])}." in figure.note


def test_round_numbers_at_an_axis_are_written_out() -> None:
    import vl_convert

    rows = [{"name": name, "count": 1, "x": at, "y": at, "value": at, "seed": 0,
             **{f"q{share}": at for share in ("05", "25", "50", "75", "95")}}
            for name, at in (("a", 5.0), ("b", 45.0))]  # fmt: skip
    for spec in (
        charts.histogram([float(edge) for edge in range(0, 50, 5)], [("n", [1] * 9)], title="t"),
        charts_by_name.boxes(rows, title="t"),
        charts_by_name.strip(rows, title="t"),
        charts.lines(rows, x="x", y="y", names=["a", "b"]),
    ):
        seen = re.findall(r">([^<>]*)</text>", vl_convert.vegalite_to_svg({**spec, "width": 500}))
        assert {"10", "20", "40"} <= set(seen)
        assert not [text for text in seen if "e+" in text]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_weights_are_drawn_on_the_scale_of_their_bins(scale: Literal["linear", "log"]) -> None:
    whole = page_document.document()
    assert whole.weights is not None
    weights = replace(whole.weights, scale=scale)
    if scale == "log":
        edges = [10.0**at for at in range(-len(weights.edges), 0)]
        weights = replace(weights, edges=edges)
    (figure,) = [it for it in figures(replace(whole, weights=weights)) if "Weights" in it.title]
    assert figure.spec["layer"][0]["encoding"]["x"]["scale"]["type"] == scale


def test_a_keyboard_reaches_texts_that_scroll() -> None:
    document = page_document.document(examples=2)
    assert document.samples is not None
    one = document.samples.examples[1]
    texts = ["word " * 130, "line\n" * 20, "short"]
    examples = [replace(one, text=text, marks=[]) for text in texts]
    samples = replace(document.samples, examples=examples, picks=[])
    reader = Reader()
    reader.feed(render(replace(document, samples=samples, leakage=None)))
    bodies = [a for _, a in reader.elements if a.get("class", "").startswith("body")]
    assert [a.get("tabindex") for a in bodies] == ["0", "0", None]
