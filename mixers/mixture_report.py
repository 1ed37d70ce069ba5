"""What a mixture from proxy runs is worth: errors of the fits, what they foretell, warnings.

Shapes: n runs, m domains of the mixture, q losses.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from curate.config import nearest
from curate.errors import ConfigError, InputError, counted
from mixers.laws import Floats, Law, SmoothLaw
from mixers.mixture_fits import Fitted
from mixers.mixture_results import Runs

_NEAR = 1e-6
_DOUBTFUL = 0.8
"""Rank correlation below which the order of mixtures is hardly known."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A mixture, and all that led to it."""

    weights: dict[str, float]
    """Domain -> share of the tokens, summing to 1."""
    rules: dict[str, str]
    """Domain -> what decided its weight."""
    notes: tuple[str, ...]
    report: dict[str, Any]
    """Plain values for `fits.json`: fits and their errors, what is foretold, what was measured."""


def check_domains(known: Sequence[str], domains: Iterable[str]) -> None:
    """Refuse domains of which the runs say nothing.

    Raises:
        ConfigError: names the domain and the nearest one of the runs.
    """
    for name in domains:
        if name not in known:
            shown = ", ".join(known[:10])
            raise ConfigError(
                f"the runs say nothing of the domain {name!r}",
                fix=nearest(name, known)
                or f"name the results' columns as the domains; they are {shown}",
            )


def with_notes(error: InputError, notes: Sequence[str]) -> InputError:
    """The same error with what is known of the runs, such as why some are missing."""
    return InputError("; ".join([error.what, *notes]), fix=error.fix)


def all_used(max_epochs: float, total: float, budget: float) -> str:
    """A note where the limit of epochs leaves nothing to decide."""
    return (
        f"{max_epochs:g} epochs of everything are {total:,.0f} tokens, no more than the budget of "
        f"{budget:,.0f}: the runs decide nothing; stop there, or raise mix.max_epochs"
    )


def warnings(runs: Runs, found: Fitted, best: Floats, *, covered: bool) -> list[str]:
    """What a reader must know before this mixture is trusted.

    Args:
        runs: what was fitted.
        found: the fit.
        best: (m,) the mixture.
        covered: whether it was kept within shares that the runs had.
    """
    num, size = runs.mixtures.shape
    notes: list[str] = []
    if num < 3 * (size + 1):
        notes.append(f"{num} runs are few for {size} domains: {3 * (size + 1)} are a start")
    told = found.told[found.name].target
    if not told >= _DOUBTFUL:
        notes.append(
            f"the rank correlation on left-out runs is {told:.2f}: the order of mixtures is hardly "
            "known; make more or longer runs"
        )
    if found.name == "linear":
        notes.append("a linear law has its optimum at a limit, wherever the limits are")
    if not covered:
        notes.append("the limits lie outside of what the runs tried: the mixture is extrapolated")
    low, high = runs.mixtures.min(0), runs.mixtures.max(0)
    at_edge = ((best > high - _NEAR) & (high < 1)) | ((best < low + _NEAR) & (low > 0))
    if covered and at_edge.any():
        named = ", ".join(name for name, there in zip(runs.domains, at_edge, strict=True) if there)
        notes.append(f"at the edge of what the runs tried: {named}; try mixtures beyond it")
    if len(runs.targets) == 1 and runs.targets[0] in runs.domains:
        notes.append(
            f"the target is the loss of {runs.targets[0]} alone, which rewards that domain"
        )
    return notes


def report(
    runs: Runs, found: Fitted, shares: Floats, best: Floats, tokens: Floats
) -> dict[str, Any]:
    """What `fits.json` holds, in plain values.

    Args:
        runs: what was fitted.
        found: the fit.
        shares: (q,) weights of the losses.
        best: (m,) the mixture.
        tokens: (m,) what there is of each domain.
    """
    there = tokens > 0
    asked = np.stack([best, tokens / tokens.sum(), there / there.sum()])
    foretold = found.law.losses(asked) @ shares
    measured = runs.losses @ shares
    first = int(measured.argmin())
    return {
        "fit": found.name,
        "num_runs": len(runs.names),
        "target": dict(zip(runs.targets, shares.tolist(), strict=True)),
        "fits": {
            name: {
                "target": {"spearman": _number(told.target), "error": told.target_error},
                "losses": {
                    loss: {"spearman": _number(rank), "error": float(error)}
                    for loss, rank, error in zip(
                        runs.targets, told.by_loss.spearman, told.by_loss.error, strict=True
                    )
                },
            }
            for name, told in found.told.items()
        },
        "slopes": _slopes(runs, found.law, best),
        "foretold": dict(zip(("mixture", "natural", "uniform"), foretold.tolist(), strict=True)),
        "best_run": {"name": runs.names[first], "target": float(measured[first])},
    }


def _slopes(runs: Runs, law: Law, best: Floats) -> dict[str, dict[str, float]] | None:
    """Loss -> domain -> nats that a whole more of it would change the loss, at the mixture."""
    if not hasattr(law, "gradients"):
        return None
    slopes = cast(SmoothLaw, law).gradients(best)
    return {
        loss: dict(zip(runs.domains, row.tolist(), strict=True))
        for loss, row in zip(runs.targets, slopes, strict=True)
    }


def outlook(facts: Mapping[str, Any]) -> str:
    """What is to be expected of the mixture, in one sentence, from the report."""
    told, run = facts["foretold"], facts["best_run"]
    return (
        f"foretold target {told['mixture']:.4f}, natural {told['natural']:.4f}, uniform "
        f"{told['uniform']:.4f}; the best of {counted(facts['num_runs'], 'run')} measured "
        f"{run['target']:.4f}: train and compare with natural and uniform at full size"
    )


def held_back(facts: Mapping[str, Any], *, allowed: bool, penalty: float) -> list[str]:
    """A note where another mixture is foretold better than the one proposed, and why it is not it.

    Args:
        facts: the report.
        allowed: whether the uniform mixture lies within the limits.
        penalty: nats for each nat of divergence from the natural mixture.
    """
    told = facts["foretold"]
    if not told["uniform"] < told["mixture"] - _NEAR or not (penalty or not allowed):
        return []
    why = (
        "the penalty keeps the mixture near natural (mix.penalty: 0 would not)"
        if allowed
        else "it lies outside of the limits"
    )
    return [f"uniform is foretold lower, by {told['mixture'] - told['uniform']:.4f}: {why}"]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
