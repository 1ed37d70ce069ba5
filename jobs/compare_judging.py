"""From finished training runs to what `comparison.json` holds: verdicts, facts, cost, notes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import polars as pl

from curate.data.counts import EXAMPLES
from curate.data.files import read_json
from curate.errors import ConfigError, InputError
from jobs.compare_arms import PLAN, RANDOM, specs
from jobs.compare_outside import read_results
from jobs.compare_results import (
    SCHEMA_VERSION,
    Trained,
    last_points,
    parts_of,
    question_of,
    results_table,
    table_of,
    verdict_json,
    verdicts_of,
)
from jobs.compare_tasks import Work, commands_alone
from jobs.settings import Settings
from jobs.train_notes import comparison_notes

_MANY_PASSES = 1.05
"""An arm that goes through its data this much more often than the plan does is mentioned."""


def judge_work(work: Work, outside: Sequence[str]) -> tuple[dict[str, Any], pl.DataFrame]:
    """What `comparison.json` holds, and the table.

    Args:
        work: with all training runs finished.
        outside: arms of which only numbers are known, from commands or `compare.results`.
    """
    compare = work.settings.compare
    trained, results = _trained(work)
    given = [] if compare.results is None else read_results(Path(compare.results))
    table = pl.concat([table_of(trained), results_table(given)])
    specs = [] if work.making is None else work.making.specs
    # The points of a curve get no verdict.
    arms = [*(spec.name for spec in specs if spec.share is None), *outside]
    facts = _arm_facts(work, results)
    same = {arm: entry["same_as"] for arm, entry in facts.items() if entry["same_as"]}
    judged = judge_table(table, arms, work.luck, metric=compare.metric, better=compare.better,
                         on=compare.on, same=same)  # fmt: skip
    value = {
        **judged,
        "seeds": list(compare.seeds),
        "arms": facts,
        "budget": work.budget,
        "unit": _unit(work),
        "scale": _scale(work, results),
        "cost": _cost(work, results),
        "notes": [*work.notes, *_notes(work, facts, table)],
    }
    return value, table


def judge_table(
    table: pl.DataFrame,
    arms: Sequence[str],
    luck: Mapping[str, float],
    *,
    metric: str | None,
    better: Literal["higher", "lower"] | None,
    on: str | None,
    same: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Question, verdicts, and every number by part and arm.

    Args:
        table: of `jobs.compare_results.table_of`.
        arms: those that get a verdict, random among them.
        luck: arm -> how far the sets of its seeds share their luck.
        metric: asked for, or the rule's.
        better: asked for, or the rule's.
        on: asked for, or the rule's.
        same: arm -> an earlier one that trains on the same data.

    Raises:
        InputError: random is not among the arms.
        ConfigError: the metric or its direction is not known.
    """
    if RANDOM not in arms:
        raise InputError(
            "there is no arm called random to compare with",
            fix="add it to compare.arms, or its numbers to the CSV file",
        )
    question = question_of(table, metric=metric, better=better, on=on)
    verdicts = verdicts_of(table, arms, question, luck, same or {})
    return {
        "schema_version": SCHEMA_VERSION,
        "question": {**asdict(question), "told": question.told},
        "verdicts": [verdict_json(v, luck.get(v.arm, 1.0)) for v in verdicts],
        "parts": parts_of(last_points(table), luck, arms),
    }


def outside_arms(settings: Settings) -> list[str]:
    """Arms of which only numbers are known here, in their order."""
    names = list(dict.fromkeys(arm.name for arm, _ in commands_alone(settings)))
    if settings.compare.results is not None:
        rows = read_results(Path(settings.compare.results))
        names += list(dict.fromkeys(row.arm for row in rows))
    made = {spec.name for spec in specs(settings.compare)} if settings.compare.arms else set[str]()
    for name in names:
        if names.count(name) > 1 or name in made:
            raise ConfigError(
                f"arm {name} is trained here and stands in {settings.compare.results} too",
                fix="rename it in the file, or leave it out of compare.arms",
            )
    return names


def _trained(work: Work) -> tuple[list[Trained], dict[str, dict[str, Any]]]:
    """Every arm and seed with its result; and the results by training run."""
    results = {task.payload["key"]: read_json(task.output.path) for task in work.tasks}
    found = [Trained(arm, seed, results[key]) for (arm, seed), key in work.keys.items()]
    return found, results


def _arm_facts(work: Work, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What each arm trained on."""
    if work.making is None:
        return {}
    seeds = work.settings.compare.seeds
    found: dict[str, Any] = {}
    first: dict[tuple[str, ...], str] = {}
    for spec in work.making.specs:
        keys = tuple(work.keys[spec.name, seed] for seed in seeds)
        facts = work.facts[spec.set_of(seeds[0])]
        runs = [results[key] for key in keys]
        found[spec.name] = {
            "what": spec.what,
            "rows": facts.rows,
            "tokens": facts.tokens,
            "redrawn": spec.redrawn,
            "shared_luck": work.luck[spec.name],
            "same_as": first.get(keys),
            "epochs": _mean([run["epochs"] for run in runs]),
            "steps": _mean([run["steps"] for run in runs]),
            "trained_tokens": _mean([run["tokens"] for run in runs]),
        }
        first.setdefault(keys, spec.name)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _scale(work: Work, results: Mapping[str, dict[str, Any]]) -> str:
    """What the verdict is about, and nothing beyond it."""
    parameters = {run["parameters"] for run in results.values() if run["parameters"]}
    if not parameters:
        return "as trained elsewhere"
    model = work.settings.model
    name = model.name or str((model.config or {}).get("model_type"))
    return (
        f"{Path(name).name}, {max(parameters):,} parameters, {work.budget['steps']:,} steps and"
        f" {work.budget['tokens']:,} {_unit(work)} a run"
    )


def _unit(work: Work) -> str:
    is_table = work.making is not None and work.making.lengths == EXAMPLES
    return "examples" if is_table else "tokens"


def _cost(work: Work, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Of all training runs; those that several arms share count once."""
    marks = [task.output.mark() or {} for task in work.tasks]
    return {
        "runs": len(results),
        "steps": sum(run["steps"] or 0 for run in results.values()),
        "tokens": sum(run["tokens"] or 0 for run in results.values()),
        "seconds": round(sum(mark.get("seconds", 0.0) for mark in marks), 1),
    }


def _notes(work: Work, facts: Mapping[str, Any], table: pl.DataFrame) -> list[str]:
    """What a reader must not miss, one sentence each."""
    notes: list[str] = []
    for arm, seed, note in (
        table.filter(pl.col("note").is_not_null()).select("arm", "seed", "note").iter_rows()
    ):
        notes.append(f"{arm}, seed {seed}: {note}")
    if len(work.settings.compare.seeds) < 3:
        notes.append("fewer than three seeds: there is no verdict, only numbers")
    if work.making is None:
        return notes
    judged = {spec.name for spec in work.making.specs if spec.share is None}
    notes += comparison_notes({arm: facts[arm]["steps"] for arm in facts if arm in judged})
    if len(work.making.plan.phases) > 1:
        notes.append("the plan has phases; the arms are trained on their sum, not in their order")
    plan = facts.get(PLAN)
    for arm, entry in facts.items():
        if plan is None or arm == PLAN:
            continue
        spec = next(s for s in work.making.specs if s.name == arm)
        if spec.share is None and entry["tokens"] < 0.99 * plan["tokens"]:
            notes.append(
                f"{arm} has {entry['tokens']:,} {_unit(work)} where the plan has"
                f" {plan['tokens']:,}" + _passes(entry, plan)
            )
    tokens = work.budget.get("tokens", 0)
    for arm, entry in facts.items():
        got = entry["trained_tokens"]
        if got is not None and tokens and abs(got / tokens - 1) > 0.02:
            notes.append(f"{arm} was trained on {got:,.0f} {_unit(work)}; the budget is {tokens:,}")
    return notes


def _passes(entry: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    epochs, own = entry["epochs"], plan["epochs"]
    if not epochs or not own or epochs <= _MANY_PASSES * own:
        return ""
    return f": it is gone through {epochs:.1f} times, the plan {own:.1f} times"
