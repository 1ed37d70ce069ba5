"""The curriculum of `curate write`: the score that its settings name, and what its tasks need."""

from collections.abc import Mapping, Sequence
from typing import Any

from curate.data.layout import RunFolder
from curate.data.shard_curriculum import Ordering
from curate.data.shard_settings import Curriculum
from curate.data.shard_survey import Survey
from curate.errors import ConfigError
from curate.plan.expression import TOKENS, Column, parse_expression
from jobs.plan_tables import score_columns, score_digests


def curriculum_column(curriculum: Curriculum, scorers: Mapping[str, Sequence[str]]) -> str:
    """The full name of the score: `scorer.column`, or a column of the index.

    Args:
        curriculum: the settings.
        scorers: scorer -> its columns.

    Raises:
        ConfigError: there is no such column, or the score is an expression.
        InputError: nothing was scored yet.
    """
    root = parse_expression(curriculum.score, scorers, where="shards.curriculum.score").root
    if not isinstance(root, Column):
        raise ConfigError(
            f"shards.curriculum.score {curriculum.score!r} is an expression; a curriculum goes by"
            " one column",
            fix="name a score column, such as el2n; its order is all that counts, so functions of"
            " one column change nothing",
        )
    return root.name


def find_ordering(
    run: RunFolder, curriculum: Curriculum, *, seed: int, tokenizer: str | None
) -> Ordering:
    """How the examples of a run are put in order.

    Args:
        run: with scores.
        curriculum: the settings.
        seed: of the run.
        tokenizer: digest of the one that counted for the plan.

    Raises:
        ConfigError: as `curriculum_column`, or tokens were not counted.
        InputError: some partition has not been scored.
    """
    column = curriculum_column(curriculum, score_columns(run))
    if column == TOKENS and tokenizer is None:
        raise ConfigError(
            "shards.curriculum.score is num_tokens, but the plan counted none",
            fix="set plan.tokenizer, or name another column",
        )
    ordering = Ordering(column, tokenizer, curriculum.steps, curriculum.first, seed)
    for part in run.partitions():
        score_digests(run, part, ordering.scorers)
    return ordering


def phasing_of(
    found: Survey, domains: Sequence[str] | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a task's payload and fingerprint have of the curriculum, and whose scores it reads.

    Args:
        found: the survey.
        domains: that the task writes; None: any.
    """
    if found.phasing is None:
        return {}, ()
    phasing = found.phasing if domains is None else found.phasing.of(domains)
    return {"phasing": phasing.pack()}, phasing.ordering.scorers
