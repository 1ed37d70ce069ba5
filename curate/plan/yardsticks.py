"""What every plan is shown beside, at equal tokens: random, longest first, natural proportions."""

from dataclasses import replace

from curate.plan.mixture import Mixture, Phase
from curate.plan.plan import Arm
from curate.plan.rules import Thresholds
from curate.plan.settings import Keep, Plan

YARDSTICKS = {
    "random": "rows drawn at random from everything",
    "longest": "the rows with the most tokens",
    "natural": "the same rules, but every domain at its share of the pool",
}
"""Name -> what it keeps."""


def yardstick_arms(plan: Thresholds) -> dict[str, Arm]:
    """What to make beside a plan, at its number of tokens, copies counted; nothing beside none."""
    if plan.kept_tokens == 0:
        return {}
    budget = Keep(tokens=float(plan.kept_tokens))
    plain = Plan(keep=budget, within="all", max_repeats=plan.settings.max_repeats, force=True)
    pool = sum(tokens for _, tokens in plan.domains.values())
    natural = {domain: tokens / pool for domain, (_, tokens) in plan.domains.items()}
    return {
        "random": Arm(plain, repeat=True),
        "longest": Arm(replace(plain, score="num_tokens"), repeat=True),
        "natural": Arm(
            replace(plan.settings, keep=budget, weights=None, force=True),
            Mixture("natural", (Phase(1.0, natural),), {}),
            # The plan's own draws and ranks: only the proportions differ.
            label=plan.label,
            scoring=plan.scoring,
        ),
    }
