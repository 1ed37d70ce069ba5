"""What DMO's laws propose for domains of some sizes and a budget, and how far to trust it.

Shapes: n runs, m domains.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from curate.config import nearest
from curate.errors import ConfigError, InputError
from curate.plan.mixture import DomainSize
from mixers.dmo import DMO, STEEPEST, AtBudget, TransferLaw, fit
from mixers.law_optimum import smooth_optimum, wanted
from mixers.laws import Floats, HeldOut, held_out
from mixers.mixture_report import Proposal, all_used, check_domains, with_notes
from mixers.mixture_results import Amounts

_FAR = 10.0
"""Times the largest run's tokens from which a budget is called far."""
_NEAR = 1e-6


def proposal(
    settings: DMO, runs: Amounts, sizes: Mapping[str, DomainSize], budget_tokens: float
) -> Proposal:
    """The mixture for domains of these sizes, from runs.

    Args:
        settings: target and limits.
        runs: of proxies.
        sizes: domain -> what there is of it; every one is a domain of the runs.
        budget_tokens: N, tokens that training will see, repeats counted.

    Raises:
        ConfigError: the runs say nothing of a domain, or the target names an unknown one.
        InputError: too few runs.
    """
    check_domains(runs.domains, sizes)
    shares = _target_shares(settings, runs)
    tokens = np.array([sizes[name].num_tokens if name in sizes else 0.0 for name in runs.domains])
    try:
        law = fit(runs.tokens, runs.losses)
    except InputError as error:
        raise with_notes(error, runs.notes) from error
    told = held_out(fit, runs.tokens, runs.losses)
    at_budget = AtBudget(law, budget_tokens)
    caps = np.minimum(settings.max_epochs * tokens / budget_tokens, 1)
    total = settings.max_epochs * float(tokens.sum())
    notes = [*runs.notes]
    if total <= budget_tokens:
        best = tokens / tokens.sum()
        notes.append(all_used(settings.max_epochs, total, budget_tokens))
    else:
        size = len(tokens)
        want = wanted(
            size, size, shares=shares, caps=caps, natural=tokens, penalty=settings.penalty
        )
        best = smooth_optimum(at_budget, want)
    there = tokens > 0
    asked = np.stack([best, tokens / tokens.sum(), there / there.sum()])
    values: list[float] = (at_budget.losses(asked) @ shares).tolist()
    foretold = {"mixture": values[0], "natural": values[1], "uniform": values[2]}
    notes += _notes(runs, law, told, budget_tokens, foretold)
    weights = {name: float(best[runs.domains.index(name)]) for name in sizes}
    high = dict(zip(runs.domains, caps.tolist(), strict=True))
    rules = {
        name: "the limit of epochs"
        if share >= high[name] - _NEAR and high[name] < 1
        else "the optimum of the transfer law"
        for name, share in weights.items()
    }
    return Proposal(weights, rules, tuple(notes), _report(runs, law, told, shares, foretold))


def _target_shares(settings: DMO, runs: Amounts) -> Floats:
    """(m,) weights of the losses, summing to 1."""
    for name in settings.target:
        if name not in runs.domains:
            raise ConfigError(
                f"mix.target names {name!r}, which is no domain of the runs",
                fix=nearest(name, runs.domains) or f"use some of {', '.join(runs.domains[:10])}",
            )
    given = settings.target or dict.fromkeys(runs.domains, 1.0)
    shares = np.array([given.get(name, 0.0) for name in runs.domains])
    if not shares.sum() > 0:
        raise ConfigError("no weight of mix.target is above 0", fix="give a domain a weight")
    return shares / shares.sum()


def _notes(
    runs: Amounts, law: TransferLaw, told: HeldOut, budget: float, foretold: Mapping[str, float]
) -> list[str]:
    ranks = dict(zip(runs.domains, told.spearman.tolist(), strict=True))
    worst = min(ranks, key=lambda name: -1.0 if np.isnan(ranks[name]) else ranks[name])
    notes = [
        f"runs left out in turn are foretold within {told.error.mean():.3g} nats; the lowest rank "
        f"correlation is {ranks[worst]:.3f}, of {worst}"
    ]
    steep = [
        name
        for name, beta in zip(runs.domains, law.decays.tolist(), strict=True)
        if beta > 0.999 * STEEPEST
    ]
    if steep:
        notes.append(
            f"beta has reached its limit of {STEEPEST:g}, so the runs do not determine the law of "
            f"{', '.join(steep)}: do not trust it beyond their amounts"
        )
    largest = float(runs.tokens.sum(1).max())
    if budget > _FAR * largest:
        notes.append(
            f"the budget is {budget / largest:.3g} times the largest run: the laws are far "
            "extrapolated, and small errors of beta and E decide the mixture"
        )
    notes.append(
        f"foretold target {foretold['mixture']:.4f}, natural {foretold['natural']:.4f}, uniform "
        f"{foretold['uniform']:.4f}: train and compare with natural and uniform at full size"
    )
    return notes


def _report(
    runs: Amounts, law: TransferLaw, told: HeldOut, shares: Floats, foretold: Mapping[str, float]
) -> dict[str, Any]:
    """What `fits.json` holds, in plain values."""
    parts = {name: values.tolist() for name, values in asdict(law).items()}
    return {
        "num_runs": len(runs.names),
        "target": dict(zip(runs.domains, shares.tolist(), strict=True)),
        "laws": {
            domain: {name: values[at] for name, values in parts.items()}
            for at, domain in enumerate(runs.domains)
        },
        "held_out": {
            domain: {"spearman": None if np.isnan(rank) else rank, "error": error}
            for domain, rank, error in zip(
                runs.domains, told.spearman.tolist(), told.error.tolist(), strict=True
            )
        },
        "foretold": dict(foretold),
    }
