"""Thresholds as JSON, and the sorted values of their ranks as one array beside it.

Positions are 128-bit integers and stand as hexadecimal texts: JSON readers round large numbers.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from curate.config import parse, plain
from curate.plan.expression import INDEX_COLUMNS, parse_expression
from curate.plan.groups import Group, Grouping
from curate.plan.rules import Rule, Thresholds, Weighing, Window
from curate.plan.scoring import Moments, Ranks, Scoring
from curate.plan.settings import Plan

SCHEMA_VERSION = 1

Array = NDArray[np.float32]


def to_values(plans: Mapping[str, Thresholds]) -> tuple[dict[str, Any], Array]:
    """Values that JSON holds, and the array that belongs to them."""
    arrays: list[Array] = []
    values = {name: _plan_values(plan, arrays) for name, plan in plans.items()}
    ranks = np.concatenate([np.zeros(0, np.float32), *arrays])
    # The digest tells plans apart whose cuts are the same, but whose ranks are not.
    digest = xxhash.xxh3_128_hexdigest(ranks.tobytes())
    return {"schema_version": SCHEMA_VERSION, "ranks": digest, "plans": values}, ranks


def from_values(values: Mapping[str, Any], ranks: Array) -> dict[str, Thresholds]:
    """The plans that `to_values` took apart."""
    return {name: _plan(entry, ranks) for name, entry in values["plans"].items()}


def _plan_values(plan: Thresholds, arrays: list[Array]) -> dict[str, Any]:
    weighing = plan.weighing
    return {
        "settings": plain(plan.settings),
        "seed": plan.seed,
        "label": plan.label,
        "grouping": asdict(plan.grouping),
        "drop": None if plan.drop is None else _scoring_values(plan.drop, arrays),
        "scoring": None if plan.scoring is None else _scoring_values(plan.scoring, arrays),
        "moments": None if plan.moments is None else asdict(plan.moments),
        "rules": [_rule_values(rule) for rule in plan.rules],
        "weighing": None
        if weighing is None
        else {
            "scoring": _scoring_values(weighing.scoring, arrays),
            "mean": weighing.mean,
            "clipped_mean": weighing.clipped_mean,
        },
        "unit": plan.unit,
        "asked": plan.asked,
        "phases": list(plan.phases),
        "domains": plan.domains,
        "weights": plan.weights,
        "effective_size": plan.effective_size,
    }


def _plan(values: dict[str, Any], ranks: Array) -> Thresholds:
    weighing = values["weighing"]
    return Thresholds(
        settings=parse(Plan, values["settings"], where="plan"),
        seed=values["seed"],
        label=values["label"],
        grouping=Grouping(**values["grouping"]),
        drop=None if values.get("drop") is None else _scoring(values["drop"], ranks),
        scoring=None if values["scoring"] is None else _scoring(values["scoring"], ranks),
        moments=None if values["moments"] is None else _moments(values["moments"]),
        rules=tuple(_rule(entry) for entry in values["rules"]),
        weighing=None
        if weighing is None
        else Weighing(
            _scoring(weighing["scoring"], ranks), weighing["mean"], weighing["clipped_mean"]
        ),
        unit=values["unit"],
        asked=values["asked"],
        phases=tuple(values["phases"]),
        domains={domain: (sizes[0], sizes[1]) for domain, sizes in values["domains"].items()},
        weights=values["weights"],
        effective_size=values["effective_size"],
    )


def _rule_values(rule: Rule) -> dict[str, Any]:
    windows = [[window.full, f"{window.low:x}", f"{window.high:x}"] for window in rule.windows]
    return {
        **asdict(rule),
        "group": list(rule.group),
        "drop": f"{rule.drop:x}",
        "windows": windows,
    }


def _rule(values: dict[str, Any]) -> Rule:
    windows = tuple(
        Window(full, int(low, 16), int(high, 16)) for full, low, high in values["windows"]
    )
    decoded: dict[str, Any] = {
        **values,
        "group": Group(*values["group"]),
        "drop": int(values["drop"], 16),
        "windows": windows,
    }
    return Rule(**decoded)


def _scoring_values(scoring: Scoring, arrays: list[Array]) -> dict[str, Any]:
    tables: list[dict[str, Any]] = []
    for node in [node for level in scoring.expression.statistics for node in level]:
        table = scoring.tables[node]
        if isinstance(table, Moments):
            tables.append(asdict(table))
            continue
        start = sum(len(array) for array in arrays)
        arrays.append(table.values)
        tables.append({"start": start, "ends": list(table.ends)})
    scorers: dict[str, list[str]] = {}
    for name in scoring.expression.columns:
        if name not in INDEX_COLUMNS:
            scorer, _, column = name.partition(".")
            scorers.setdefault(scorer, []).append(column)
    return {
        "expression": scoring.expression.text,
        "scorers": scorers,
        "grouping": asdict(scoring.grouping),
        "groups": [list(group) for group in scoring.groups],
        "tables": tables,
    }


def _scoring(values: dict[str, Any], ranks: Array) -> Scoring:
    expression = parse_expression(values["expression"], values["scorers"])
    nodes = [node for level in expression.statistics for node in level]
    tables: list[Moments | Ranks] = []
    for entry in values["tables"]:
        if "mean" in entry:
            tables.append(_moments(entry))
            continue
        size = entry["ends"][-1] if entry["ends"] else 0
        start = entry["start"]
        tables.append(Ranks(ranks[start : start + size], tuple(entry["ends"])))
    return Scoring(
        expression,
        Grouping(**values["grouping"]),
        tuple(Group(*group) for group in values["groups"]),
        dict(zip(nodes, tables, strict=True)),
    )


def _moments(values: dict[str, Any]) -> Moments:
    return Moments(tuple(values["mean"]), tuple(values["deviation"]))
