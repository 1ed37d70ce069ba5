"""`curate compare`: does the plan help? The same model on each arm, several seeds, a verdict.

Three rounds of tasks: the sets of all arms, partition by partition; token counts, partition by
partition; then one training run for each different set and seed, with its evaluation. What is
finished is kept, whatever interrupts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import polars as pl

from curate.data.layout import RunFolder
from curate.data.manifest import record_stage
from curate.errors import ConfigError, InputError
from jobs.cluster import Pool
from jobs.compare_arms import RANDOM, Making, luck, set_facts, specs
from jobs.compare_judging import judge_table, judge_work, outside_arms
from jobs.compare_outside import read_results
from jobs.compare_plot import write_plot
from jobs.compare_results import Question, results_table, write_results
from jobs.compare_sets import make_sets, set_tasks, write_sets
from jobs.compare_settings import is_random
from jobs.compare_tasks import (
    Work,
    command_of,
    prepare_training,
    train_or_run,
    training_tasks,
    write_shards,
)
from jobs.lengths import tokenizer_for
from jobs.run import Listener, Outcome, StageState, ignore, raise_failures, require, run_tasks
from jobs.settings import Settings


def compare_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Train the arms that are not trained yet, and judge.

    Args:
        settings: of a run with a plan, unless all numbers come from `compare.results`.
        pool: where sets are written and models are trained.
        listener: told after each task.

    Returns:
        What `compare/comparison.json` holds, and how many runs were `done` now or `skipped`.

    Raises:
        InputError: there is no plan, or nothing to measure on.
        ConfigError: the metric is not known, or an arm of `redrawn`, or there is no model to train.
        MissingDependencyError: the plot cannot be made; everything else is written.
        CurateError: a training run failed; the others have finished. One that diverged is no
            failure, but a result.
    """
    run = RunFolder(Path(settings.run))
    work, outcome = Work(settings, run), Outcome()
    outside = outside_arms(settings)
    _check_redrawn(settings.compare.redrawn, outside)
    if settings.compare.arms:
        require(run.partitions(), stage="the index", command=f"curate index {run.root}")
        work.making = Making.of(settings, tokenizer_for(settings)[1])
        work.notes += work.making.notes
        written = run_tasks("arms", make_sets(work.making), write_sets, pool=pool)
        raise_failures("arms", written)
        work.facts, work.luck = set_facts(work.making), luck(work.making)
        outcome = _train(work, pool, listener)
    for arm in outside:
        is_drawn = arm in settings.compare.redrawn or is_random(arm)
        work.luck.setdefault(arm, 0.0 if is_drawn else 1.0)
    value, table = judge_work(work, outside)
    write_results(run.root / "compare", table, value)
    record_stage(
        run,
        "compare",
        outputs=[task.output for task in work.tasks],
        seconds=outcome.seconds,
        facts={"words": {each["arm"]: each["word"] for each in value["verdicts"]}},
    )
    _plot(settings, value, table)
    return {**value, "done": len(outcome.done), "skipped": len(outcome.skipped)}


def plan_compare(settings: Settings) -> StageState:
    """What `compare_run` would do; writes nothing."""
    compare = settings.compare
    if not compare.arms:
        return StageState("compare", 0, 0)
    run = RunFolder(Path(settings.run))
    total = len(specs(compare)) * len(compare.seeds)
    if not run.partitions():
        return StageState("compare", total, 0, ("the index has not been made yet",))
    try:
        making = Making.of(settings, tokenizer_for(settings)[1])
    except InputError as error:
        return StageState("compare", total, 0, (error.what,))
    if not all(task.is_done() for task in set_tasks(making)):
        return StageState("compare", total, 0, ("the sets of the arms are not made yet",))
    try:
        work = Work(settings, run, making, set_facts(making), luck(making))
        tasks = training_tasks(work)
    except (InputError, FileNotFoundError):
        return StageState("compare", total, 0, ("the arms are not ready to be trained yet",))
    done = sum(task.is_done() for task in tasks)
    why = (f"{len(tasks) - done} training runs are due",) if done < len(tasks) else ()
    return StageState("compare", len(tasks), done, why)


def judge_results(
    path: Path,
    *,
    metric: str | None = None,
    better: Literal["higher", "lower"] | None = None,
    redrawn: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Verdicts on the numbers of a CSV file; nothing is trained or written.

    Args:
        path: with the columns arm, seed, metric, value; one arm is called random, and was drawn
            anew with each seed.
        metric: which one is judged; needed where there are several.
        better: its good direction, where the name does not say it.
        redrawn: arms whose data were drawn anew with each seed too.

    Raises:
        InputError: the file cannot be read, or has no arm called random.
        ConfigError: the metric or its direction is not known, or an arm of `redrawn`.
    """
    table = results_table(read_results(path))
    arms = list(dict.fromkeys(table["arm"].to_list()))
    _check_redrawn(redrawn, arms)
    shared = {arm: 0.0 if arm in redrawn or is_random(arm) else 1.0 for arm in arms}
    value = judge_table(table, arms, shared, metric=metric, better=better, on=None)
    nothing = {"runs": 0, "steps": 0, "tokens": 0, "seconds": 0.0}
    return {**value, "arms": {}, "unit": "tokens", "scale": "as trained elsewhere",
            "cost": nothing, "notes": []}  # fmt: skip


def _check_redrawn(redrawn: Sequence[str], arms: Sequence[str]) -> None:
    """A name that fits nothing would leave the arm that was meant with the stricter test."""
    for arm in redrawn:
        if arm not in arms:
            raise ConfigError(
                f"redrawn: there is no arm {arm} among those of commands and files",
                fix=f"use one of {', '.join(arms)}" if arms else "leave it out",
            )


def _train(work: Work, pool: Pool, listener: Listener) -> Outcome:
    """Train and measure what is due."""
    assert work.making is not None
    commands = [command_of(work.settings, spec) for spec in work.making.specs]
    if None in commands:
        prepare_training(work, pool)
    for spec, command in zip(work.making.specs, commands, strict=True):
        if "{shards}" in (command or ""):
            write_shards(work, spec, pool)
    work.tasks = training_tasks(work)
    outcome = run_tasks("compare", work.tasks, train_or_run, pool=pool, listener=listener)
    raise_failures("compare", outcome)
    return outcome


def _plot(settings: Settings, value: dict[str, Any], table: pl.DataFrame) -> None:
    kind = settings.compare.plot
    if kind == "none":
        return
    question = Question(**{key: value["question"][key] for key in ("metric", "part", "better")})
    arms = [RANDOM, *(each["arm"] for each in value["verdicts"])]
    path = Path(settings.run) / "compare" / f"plot.{kind}"
    write_plot(path, table.filter(pl.col("arm").is_in(arms)), arms, question, value["scale"])
