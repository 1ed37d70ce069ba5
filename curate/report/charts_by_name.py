"""Vega-Lite specifications of charts with a line per name; see `charts`."""

from collections.abc import Sequence
from typing import Any

from curate.report.blocks import Spec
from curate.report.charts_axes import PLAIN, Rows, by_name, names_axis, rule_at, tip

_SIGNED = "datum.value == 0 ? '0' : format(datum.value, '+~g')"


def boxes(groups: Rows, *, title: str, cuts: Sequence[float] = (), own_cuts: Rows = ()) -> Spec:
    """One line per group: 5 to 95 % thin, the middle half thick, a tick at the median.

    Args:
        groups: mappings with `name`, `count`, `q05`, `q25`, `q50`, `q75` and `q95`.
        title: what the number is.
        cuts: where lines stand.
        own_cuts: mappings with `name` and `at`: a tick in a group's line.
    """
    y = names_axis(groups)
    x: dict[str, Any] = {
        "type": "quantitative",
        "scale": {"zero": False},
        "title": title,
        "axis": {"tickCount": 7, **PLAIN},
    }
    tips = [
        tip("name", "group"),
        tip("count", "examples", ",d"),
        tip("q05", "5 %", ".4~g"),
        tip("q25", "25 %", ".4~g"),
        tip("q50", "median", ".4~g"),
        tip("q75", "75 %", ".4~g"),
        tip("q95", "95 %", ".4~g"),
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
    layers.extend(rule_at(cut, "cut") for cut in cuts)
    if own_cuts:
        layers.append(
            {
                "data": {"values": list(own_cuts)},
                "mark": {"type": "tick", "color": "@against", "thickness": 2, "size": 19},
                "encoding": {
                    "y": y,
                    "x": {"field": "at", **x},
                    "tooltip": [tip("name", "group"), tip("at", "cut", ".4~g")],
                },
            }
        )
    return by_name(groups, layers)


def before_after(rows: Rows, *, title: str) -> Spec:
    """Two dots per name joined by a line: what came in (hollow) and what is kept (filled).

    Args:
        rows: mappings with `name`, `before` and `after`, both shares.
        title: what the shares are of.
    """
    y = names_axis(rows)
    x: dict[str, Any] = {
        "type": "quantitative",
        "title": title,
        "axis": {"format": "~%", "tickCount": 6},
    }
    tips = [tip("name", "group"), tip("before", "before", ".2%"), tip("after", "after", ".2%")]
    return by_name(
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
    y = names_axis(rows)
    x: dict[str, Any] = {
        "type": "quantitative",
        "title": title,
        "scale": {"zero": True},
        "axis": {"labelExpr": _SIGNED, "tickCount": 6},
    }
    decided = {"test": "datum.word == 'helps' || datum.word == 'hurts'", "value": "@accent"}
    colour = {"condition": decided, "value": "@quiet"}
    tips = [
        tip("name", "arm"),
        tip("estimate", "difference", "+.4~g"),
        tip("low", "from", "+.4~g"),
        tip("high", "to", "+.4~g"),
        tip("word", "verdict"),
    ]
    return by_name(
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
    y = names_axis(points)
    x: dict[str, Any] = {
        "type": "quantitative",
        "title": title,
        "scale": {"zero": False},
        "axis": {"tickCount": 6, **PLAIN},
    }
    tips = [tip("name", "arm"), tip("seed", "seed", "d"), tip("value", title, ".4~g")]
    return by_name(
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
