"""What the charts of the page have in common: axes, ticks, colours, tooltips."""

from collections.abc import Sequence
from typing import Any

from curate.report.blocks import Spec

Rows = Sequence[dict[str, Any]]

FIT = {"type": "fit-x", "contains": "padding"}
"""As wide as the page, as high as it has to be."""
SHORT = "format(datum.value, '~s')"
"""Ticks one by one: 0, 500, 1k."""
PLAIN = {"labelExpr": "format(datum.value, '~g')"}
"""Of an axis: 10, 20, 30. With `format` the step would set the digits: 1e+1, 2e+1, 3e+1."""
ROUND = (
    "indexof([1, 2, 5], round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))) < 0"
    f" ? '' : {SHORT}"
)
"""Of a logarithmic axis only 1, 2, 5, 10, 20 ... have room."""
ROW = 22
"""Height of a row of a chart by names, pixels."""
MAX_LABEL = 150
"""Width of the longest name at an axis, pixels."""
_LABEL_CHARS = 24
"""About as many fit."""
SHORTENED = (
    f"length(datum.label) > {_LABEL_CHARS} ? slice(datum.label, 0, {_LABEL_CHARS // 2 - 1}) +"
    f" '\u2026' + slice(datum.label, -{_LABEL_CHARS // 2}) : datum.label"
)
"""Long names lose their middle: those of a family differ at their ends."""


def names_axis(rows: Rows) -> dict[str, Any]:
    """The vertical axis of a chart by names, in the order of the rows."""
    return {
        "field": "name",
        "type": "nominal",
        "title": None,
        **in_order([str(row["name"]) for row in rows]),
        "axis": {
            "labelExpr": SHORTENED,
            "labelLimit": MAX_LABEL + 20,
            "domain": False,
            "ticks": False,
            "grid": False,
        },
    }


def in_order(names: Sequence[str]) -> dict[str, Any]:
    """Names stand in this order.

    Given as `sort` they would come to stand in an expression, and Vega's parser takes a text such
    as `constructor` for something else.
    """
    return {"sort": None, "scale": {"domain": list(dict.fromkeys(names))}}


def by_name(rows: Rows, layers: list[dict[str, Any]]) -> Spec:
    """A chart with a line of its own for each name."""
    return {
        "data": {"values": list(rows)},
        "width": "container",
        "autosize": FIT,
        "height": ROW * len({str(row["name"]) for row in rows}),
        "layer": layers,
    }


def rule_at(value: float, name: str) -> dict[str, Any]:
    """A dashed vertical line."""
    return {
        "data": {"values": [{"at": value, "name": name}]},
        "mark": {"type": "rule", "color": "@ink", "strokeDash": [4, 3], "strokeWidth": 1.2},
        "encoding": {
            "x": {"field": "at", "type": "quantitative"},
            "tooltip": [tip("at", name, ".4~g")],
        },
    }


def tip(field: str, title: str, form: str = "") -> dict[str, str]:
    """One line of a tooltip: as text, or as a number in a format of d3."""
    if not form:
        return {"field": field, "title": title, "type": "nominal"}
    return {"field": field, "title": title, "type": "quantitative", "format": form}


def binned(edges: Sequence[float], title: str, log: bool) -> dict[str, Any]:
    """The horizontal axis and both ends of each bin."""
    kind = ("log" if edges[0] > 0 else "symlog") if log else "linear"
    ticks = {"linear": PLAIN, "symlog": {"labelExpr": SHORT}}
    return {
        "x": {
            "field": "low",
            "type": "quantitative",
            "title": title,
            "scale": {"type": kind, "domain": [edges[0], edges[-1]], "nice": False},
            "axis": {
                "grid": False,
                "tickCount": 7,
                **ticks.get(kind, {"labelExpr": ROUND}),
            },
        },
        "x2": {"field": "high"},
    }


def colours(names: list[str], colours: list[str]) -> dict[str, Any]:
    """A colour for each of a few names, and a legend above the chart."""
    return {
        "field": "name",
        "type": "nominal",
        "title": None,
        "scale": {"domain": names, "range": colours[: len(names)]},
        "legend": {
            "orient": "top",
            "symbolType": "square",
            "symbolStrokeWidth": 0,
            "symbolOpacity": 1,
            "offset": 2,
        },
    }
