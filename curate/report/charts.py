"""Vega-Lite specifications of the report's charts, as plain mappings.

Values come in aggregated (bins, quantiles, shares), never as rows of the data. Names from the data
stand in values only; the fields are named here, so that no name can be read as an expression.
Colours are the theme's: see `blocks.Spec`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from curate.report.blocks import Spec

Rows = Sequence[dict[str, Any]]

_FIT = {"type": "fit-x", "contains": "padding"}
_SHORT = "format(datum.value, '~s')"
"""Ticks one by one: 0, 500, 1k."""
_ROUND = (
    "indexof([1, 2, 5], round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))) < 0"
    f" ? '' : {_SHORT}"
)
"""Of a logarithmic axis only 1, 2, 5, 10, 20 ... have room."""
_ROW = 22
"""Height of a row of a chart by names, pixels."""
_MAX_LABEL = 150
"""Width of the longest name at an axis, pixels."""


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
    tips = [_tip("low", "from", ".4~g"), _tip("high", "to", ".4~g"), _tip("count", count, ",d")]
    encoding: dict[str, Any] = {
        **_binned(edges, title, log),
        "y": {
            "field": "y1",
            "type": "quantitative",
            "title": count,
            "axis": {"tickCount": 4, "labelExpr": _SHORT},
        },
        "y2": {"field": "y0"},
        "tooltip": tips,
    }
    if len(series) > 1:
        names = [name for name, _ in series]
        encoding["color"] = _colours(names, ["@accent", "@faint", "@quiet"])
        encoding["tooltip"] = [_tip("name", "what"), *tips]
    bars = {"mark": {"type": "rect", "stroke": "@paper", "strokeWidth": 0.4}, "encoding": encoding}
    return {
        "data": {"values": rows},
        "height": 170,
        "width": "container",
        "autosize": _FIT,
        "layer": [bars, *(_rule_at(cut, "cut") for cut in cuts)],
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
                    **_binned(edges, title, log),
                    "y": {
                        "field": "share",
                        "type": "quantitative",
                        "title": "share",
                        "axis": {"tickCount": 4, "format": ".0%"},
                    },
                    "y2": {"field": "zero"},
                    "color": _colours(list(names), ["@faint", "@accent"]),
                    "tooltip": [
                        _tip("name", "what"),
                        _tip("low", "from", ",.4~g"),
                        _tip("high", "to", ",.4~g"),
                        _tip("share", "share", ".2%"),
                    ],
                },
            }
        )
    return {"height": 170, "width": "container", "autosize": _FIT, "layer": layers}


def boxes(groups: Rows, *, title: str, cuts: Sequence[float] = ()) -> Spec:
    """One line per group: 5 to 95 % thin, the middle half thick, a tick at the median.

    Args:
        groups: mappings with `name`, `count`, `q05`, `q25`, `q50`, `q75` and `q95`.
        title: what the number is.
        cuts: where lines stand.
    """
    y = _names(groups)
    x: dict[str, Any] = {
        "type": "quantitative",
        "scale": {"zero": False},
        "title": title,
        "axis": {"tickCount": 7, "format": "~g"},
    }
    tips = [
        _tip("name", "group"),
        _tip("count", "examples", ",d"),
        _tip("q05", "5 %", ".4~g"),
        _tip("q25", "25 %", ".4~g"),
        _tip("q50", "median", ".4~g"),
        _tip("q75", "75 %", ".4~g"),
        _tip("q95", "95 %", ".4~g"),
    ]
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "rule", "color": "@quiet", "strokeWidth": 1.5},
            "encoding": {"y": y, "x": {"field": "q05", **x}, "x2": {"field": "q95"}},
        },
        {
            "mark": {"type": "bar", "height": 9, "opacity": 0.55},
            "encoding": {
                "y": y,
                "x": {"field": "q25", **x},
                "x2": {"field": "q75"},
                "tooltip": tips,
            },
        },
        {
            "mark": {"type": "tick", "color": "@ink", "thickness": 2, "size": 13},
            "encoding": {"y": y, "x": {"field": "q50", **x}, "tooltip": tips},
        },
    ]
    layers.extend(_rule_at(cut, "cut") for cut in cuts)
    return _by_name(groups, layers)


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
    axis = {"title": None, "labelLimit": _MAX_LABEL, "domain": False, "ticks": False, "grid": False}
    place = {
        "x": {
            "field": "b",
            "type": "nominal",
            "sort": list(names),
            "axis": {**axis, "labelAngle": -40, "orient": "bottom"},
        },
        "y": {"field": "a", "type": "nominal", "sort": list(names), "axis": axis},
    }
    tips = [_tip("a", "score"), _tip("b", "and"), _tip("value", title, "+.3f")]
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
                        "scale": {"domain": [-1, 0, 1], "range": ["@against", "@level", "@accent"]},
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
    form = ".0%" if percent else "~g"
    place: dict[str, Any] = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "title": x,
            "axis": {"grid": False, "labelExpr": _SHORT, "tickCount": 6},
        },
        "color": {
            "field": "name",
            "type": "nominal",
            "title": None,
            "sort": list(names),
            "scale": {"domain": list(names)},
            "legend": {"orient": "bottom", "columns": 3, "symbolLimit": 24, "labelLimit": 110},
        },
    }
    axis = {
        "field": "y",
        "type": "quantitative",
        "title": y,
        "scale": {"zero": percent},
        "axis": {"format": form, "tickCount": 5},
    }
    tips = [_tip("name", "what"), _tip("x", x, ",~g"), _tip("y", y, ".2%" if percent else ".4~g")]
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
        "autosize": _FIT,
        "height": 240,
        "layer": layers,
    }


def before_after(rows: Rows, *, title: str) -> Spec:
    """Two dots per name joined by a line: what came in (hollow) and what is kept (filled).

    Args:
        rows: mappings with `name`, `before` and `after`, both shares.
        title: what the shares are of.
    """
    tip = ".2%"
    y = _names(rows)
    x: dict[str, Any] = {
        "type": "quantitative",
        "title": title,
        "axis": {"format": "~%", "tickCount": 6},
    }
    tips = [_tip("name", "group"), _tip("before", "before", tip), _tip("after", "after", tip)]
    return _by_name(
        rows,
        [
            {
                "mark": {"type": "rule", "color": "@quiet", "strokeWidth": 2, "opacity": 0.6},
                "encoding": {"y": y, "x": {"field": "before", **x}, "x2": {"field": "after"}},
            },
            {
                "mark": {"type": "point", "size": 55, "color": "@quiet", "fill": "@paper"},
                "encoding": {"y": y, "x": {"field": "before", **x}, "tooltip": tips},
            },
            {
                "mark": {"type": "point", "size": 60, "filled": True, "opacity": 1},
                "encoding": {"y": y, "x": {"field": "after", **x}, "tooltip": tips},
            },
        ],
    )


def forest(rows: Rows, *, title: str) -> Spec:
    """One line per arm: the interval, the estimate in it, and the line of no difference.

    Args:
        rows: mappings with `name`, `estimate`, `low`, `high` and `word`, the verdict.
        title: what the difference is of.
    """
    y = _names(rows)
    x: dict[str, Any] = {
        "type": "quantitative",
        "title": title,
        "scale": {"zero": True},
        "axis": {"format": "+~g", "tickCount": 6},
    }
    decided = {"test": "datum.word == 'helps' || datum.word == 'hurts'", "value": "@accent"}
    colour = {"condition": decided, "value": "@quiet"}
    tips = [
        _tip("name", "arm"),
        _tip("estimate", "difference", "+.4~g"),
        _tip("low", "from", "+.4~g"),
        _tip("high", "to", "+.4~g"),
        _tip("word", "verdict"),
    ]
    return _by_name(
        rows,
        [
            {
                "data": {"values": [{"zero": 0}]},
                "mark": {"type": "rule", "color": "@ink", "opacity": 0.5},
                "encoding": {"x": {"field": "zero", "type": "quantitative"}},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {
                    "y": y,
                    "x": {"field": "low", **x},
                    "x2": {"field": "high"},
                    "color": colour,
                    "tooltip": tips,
                },
            },
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 70,
                    "shape": "diamond",
                    "opacity": 1,
                },
                "encoding": {
                    "y": y,
                    "x": {"field": "estimate", **x},
                    "color": colour,
                    "tooltip": tips,
                },
            },
        ],
    )


def strip(points: Rows, *, title: str) -> Spec:
    """Every training run a dot, the mean of each arm a tick.

    Args:
        points: mappings with `name`, `seed` and `value`.
        title: what the number is.
    """
    y = _names(points)
    x: dict[str, Any] = {
        "type": "quantitative",
        "title": title,
        "scale": {"zero": False},
        "axis": {"tickCount": 6, "format": "~g"},
    }
    tips = [_tip("name", "arm"), _tip("seed", "seed", "d"), _tip("value", title, ".4~g")]
    return _by_name(
        points,
        [
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 38,
                    "color": "@quiet",
                    "opacity": 0.8,
                },
                "encoding": {"y": y, "x": {"field": "value", **x}, "tooltip": tips},
            },
            {
                "mark": {"type": "tick", "thickness": 2.5, "size": 16},
                "encoding": {"y": y, "x": {"field": "value", "aggregate": "mean", **x}},
            },
        ],
    )


def _names(rows: Rows) -> dict[str, Any]:
    return {
        "field": "name",
        "type": "nominal",
        "title": None,
        "sort": list(dict.fromkeys(str(row["name"]) for row in rows)),
        "axis": {"labelLimit": _MAX_LABEL, "domain": False, "ticks": False, "grid": False},
    }


def _by_name(rows: Rows, layers: list[dict[str, Any]]) -> Spec:
    return {
        "data": {"values": list(rows)},
        "width": "container",
        "autosize": _FIT,
        "height": _ROW * len({str(row["name"]) for row in rows}),
        "layer": layers,
    }


def _rule_at(value: float, name: str) -> dict[str, Any]:
    return {
        "data": {"values": [{"at": value, "name": name}]},
        "mark": {"type": "rule", "color": "@ink", "strokeDash": [4, 3], "strokeWidth": 1.2},
        "encoding": {
            "x": {"field": "at", "type": "quantitative"},
            "tooltip": [_tip("at", name, ".4~g")],
        },
    }


def _tip(field: str, title: str, form: str = "") -> dict[str, str]:
    if not form:
        return {"field": field, "title": title, "type": "nominal"}
    return {"field": field, "title": title, "type": "quantitative", "format": form}


def _binned(edges: Sequence[float], title: str, log: bool) -> dict[str, Any]:
    kind = ("log" if edges[0] > 0 else "symlog") if log else "linear"
    ticks = {"linear": {"format": "~g"}, "symlog": {"labelExpr": _SHORT}}
    return {
        "x": {
            "field": "low",
            "type": "quantitative",
            "title": title,
            "scale": {"type": kind, "domain": [edges[0], edges[-1]], "nice": False},
            "axis": {
                "grid": False,
                "tickCount": 7,
                **ticks.get(kind, {"labelExpr": _ROUND}),
            },
        },
        "x2": {"field": "high"},
    }


def _colours(names: list[str], colours: list[str]) -> dict[str, Any]:
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
