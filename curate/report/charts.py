"""Vega-Lite specifications of the report's charts, as plain mappings.

Values come in aggregated (bins, quantiles, shares), never as rows of the data. Names from the data
stand in values only; the fields are named here, so that no name can be read as an expression.
Colours are the theme's: see `blocks.Spec`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from curate.report.blocks import Spec
from curate.report.charts_axes import (
    FIT,
    MAX_LABEL,
    PLAIN,
    SHORT,
    Rows,
    binned,
    colours,
    in_order,
    rule_at,
    tip,
)


def histogram(
    edges: Sequence[float],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str,
    log: bool = False,
    cuts: Sequence[float] = (),
    count: str = "examples",
) -> Spec:
    """Bars over the bins of a number, on top of each other where there are several series.

    Args:
        edges: (B + 1,) of the bins, ascending.
        series: at most three names with their (B,) counts; the first in the accent's colour.
        title: what the number is.
        log: a logarithmic axis; a symmetric one where an edge is not above zero.
        cuts: where lines stand.
        count: what is counted.
    """
    rows: list[dict[str, Any]] = []
    for at, (low, high) in enumerate(pairwise(edges)):
        base = 0.0
        for name, counts in series:
            if counts[at]:
                rows.append(
                    {
                        "name": name,
                        "low": low,
                        "high": high,
                        "count": counts[at],
                        "y0": base,
                        "y1": base + counts[at],
                    }
                )
            base += counts[at]
    tips = [tip("low", "from", ".4~g"), tip("high", "to", ".4~g"), tip("count", count, ",d")]
    encoding: dict[str, Any] = {
        **binned(edges, title, log),
        "y": {
            "field": "y1",
            "type": "quantitative",
            "title": count,
            "axis": {"tickCount": 4, "labelExpr": SHORT},
        },
        "y2": {"field": "y0"},
        "tooltip": tips,
    }
    if len(series) > 1:
        names = [name for name, _ in series]
        encoding["color"] = colours(names, ["@accent", "@faint", "@quiet"])
        encoding["tooltip"] = [tip("name", "what"), *tips]
    bars = {"mark": {"type": "rect", "stroke": "@paper", "strokeWidth": 0.4}, "encoding": encoding}
    return {
        "data": {"values": rows},
        "height": 170,
        "width": "container",
        "autosize": FIT,
        "layer": [bars, *(rule_at(cut, "cut") for cut in cuts)],
    }


def overlay(
    edges: Sequence[float],
    before: Sequence[float],
    after: Sequence[float],
    *,
    title: str,
    names: tuple[str, str] = ("before", "after"),
    log: bool = False,
) -> Spec:
    """Two distributions over the same bins, as shares: filled what was, outlined what is kept.

    Args:
        edges: (B + 1,) of the bins, ascending.
        before: (B,) shares.
        after: (B,) shares.
        title: what the number is.
        names: of the two.
        log: a logarithmic axis.
    """
    layers: list[dict[str, Any]] = []
    for name, values in zip(names, (before, after), strict=True):
        rows = [
            {"name": name, "low": low, "high": high, "share": share, "zero": 0}
            for (low, high), share in zip(pairwise(edges), values, strict=True)
        ]
        second = name == names[1]
        mark: dict[str, Any] = {"type": "rect"}
        mark |= {"fillOpacity": 0.25, "strokeWidth": 1.3, "stroke": "@accent"} if second else {}
        layers.append(
            {
                "data": {"values": rows},
                "mark": mark,
                "encoding": {
                    **binned(edges, title, log),
                    "y": {
                        "field": "share",
                        "type": "quantitative",
                        "title": "share",
                        "axis": {"tickCount": 4, "format": ".0%"},
                    },
                    "y2": {"field": "zero"},
                    "color": colours(list(names), ["@faint", "@accent"]),
                    "tooltip": [
                        tip("name", "what"),
                        tip("low", "from", ",.4~g"),
                        tip("high", "to", ",.4~g"),
                        tip("share", "share", ".2%"),
                    ],
                },
            }
        )
    return {"height": 170, "width": "container", "autosize": FIT, "layer": layers}


def heatmap(cells: Rows, names: Sequence[str], *, title: str) -> Spec:
    """A square of rank correlations, -1 to 1, each with its number.

    Args:
        cells: mappings with `a`, `b` and `value`.
        names: the order of both axes.
        title: what the number is.
    """
    wide, high, font = (64, 34, 11) if len(names) <= 7 else (40, 30, 10)
    if len(names) > 14:
        wide, high, font = (28, 24, 8)
    known = {cell["a"] for cell in cells} | {cell["b"] for cell in cells}
    order = in_order([name for name in names if name in known])
    axis = {"title": None, "labelLimit": MAX_LABEL, "domain": False, "ticks": False, "grid": False}
    place = {
        "x": {
            "field": "b",
            "type": "nominal",
            **order,
            "axis": {**axis, "labelAngle": -40, "orient": "bottom"},
        },
        "y": {"field": "a", "type": "nominal", **order, "axis": axis},
    }
    tips = [tip("a", "score"), tip("b", "and"), tip("value", title, "+.3f")]
    return {
        "data": {"values": list(cells)},
        "width": {"step": wide},
        "height": {"step": high},
        "layer": [
            {
                "mark": {"type": "rect", "stroke": "@paper", "strokeWidth": 1},
                "encoding": {
                    **place,
                    "color": {
                        "field": "value",
                        "type": "quantitative",
                        "legend": None,
                        "scale": {
                            "domain": [-1, 0, 1],
                            "range": ["@against", "@level", "@accent"],
                            "interpolate": "rgb",
                        },
                    },
                    "tooltip": tips,
                },
            },
            {
                "mark": {"type": "text", "fontSize": font},
                "encoding": {
                    **place,
                    "text": {"field": "value", "type": "quantitative", "format": ".2f"},
                    "color": {
                        "condition": {"test": "abs(datum.value) > 0.6", "value": "@paper"},
                        "value": "@ink",
                    },
                },
            },
        ],
    }


def lines(points: Rows, *, x: str, y: str, names: Sequence[str], percent: bool = False) -> Spec:
    """A line per name over steps.

    Args:
        points: mappings with `x`, `y` and `name`.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        names: the order of the lines.
        percent: the numbers are shares.
    """
    labels = {"format": ".0%"} if percent else PLAIN
    place: dict[str, Any] = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "title": x,
            "axis": {"grid": False, "labelExpr": SHORT, "tickCount": 6},
        },
        "color": {
            "field": "name",
            "type": "nominal",
            "title": None,
            **in_order(names),
            "legend": {"orient": "bottom", "columns": 3, "symbolLimit": 24, "labelLimit": 110},
        },
    }
    axis = {
        "field": "y",
        "type": "quantitative",
        "title": y,
        "scale": {"zero": percent},
        "axis": {**labels, "tickCount": 5},
    }
    tips = [tip("name", "what"), tip("x", x, ",~g"), tip("y", y, ".2%" if percent else ".4~g")]
    dense = len(points) > 30 * max(1, len(names))
    point = {"size": 12 if dense else 28, "filled": True, "opacity": 0 if dense else 1}
    layers = [
        {
            "mark": {"type": "line", "strokeWidth": 1.8, "point": point},
            "encoding": {**place, "y": axis, "tooltip": tips},
        }
    ]
    return {
        "data": {"values": list(points)},
        "width": "container",
        "autosize": FIT,
        "height": 240,
        "layer": layers,
    }
