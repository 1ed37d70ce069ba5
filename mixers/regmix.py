"""RegMix: the mixture that small runs on many mixtures say is best.

    L_i(p) = law fitted to the losses of runs on p_1 ... p_n, or as a file gives them
    p*     = argmin over what the runs cover, p_j <= max_epochs n_j / budget, of
             sum_i s_i L_i(p) + lambda KL(p, natural)

Source: Liu et al., "RegMix: Data Mixture as Regression for Language Model Pre-training", ICLR 2025,
arXiv:2407.01492; the log-linear law is that of Ye et al., "Data Mixing Laws", ICLR 2025,
arXiv:2403.16952; the penalty is Olmix'.

Departures: three laws are fitted, and the one that ranks left-out runs best is taken, where the
paper always has trees. Limits of repeats and a penalty hold while the optimum is sought. Laws with
a formula are minimised instead of asked about draws, and only within the shares that the runs had,
domain by domain: beyond, they are guesses. Draws for the trees have many strengths, as the runs.
Cost: the runs; fits and optimum take seconds.
Shapes: n runs, m domains of the mixture, q losses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt

from curate.config import STRICT
from curate.errors import ConfigError, InputError
from curate.plan.mixture import DomainSize
from mixers.law_optimum import Wanted, drawn_optimum, smooth_optimum, wanted
from mixers.laws import Floats, Law, SmoothLaw
from mixers.mixture_draws import scattered
from mixers.mixture_fits import Choice, fitted
from mixers.mixture_report import (
    Proposal,
    all_used,
    check_domains,
    held_back,
    outlook,
    report,
    warnings,
    with_notes,
)
from mixers.mixture_results import Runs, chosen_losses
from mixers.proxy_settings import Proxy

_DRAWS = 100_000
_NEAR = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RegMix:
    """From the losses of many small runs, each on a mixture of its own."""

    __pydantic_config__: ClassVar = STRICT

    results: tuple[str, ...] = ()
    """Files with mixtures and losses of runs made elsewhere: one, or mixtures and losses apart;
    by default the runs are made here."""
    runs: int | None = None
    """How many proxies, the natural and the uniform mixture among them; by default 32, or three for
    each domain and three more."""
    target: dict[str, float] = field(default_factory=dict[str, float])
    """Loss -> weight in what is made small; all alike where none is given."""
    fit: Choice = "auto"
    """How losses depend on the mixture; `auto` takes what ranks left-out runs best."""
    max_epochs: float = 4.0
    """Most passes over a domain."""
    penalty: float = 0.05
    """Nats for each nat by which the mixture diverges from the natural one; 0: the runs alone."""

    check: bool = True
    """Train one proxy more, on the mixture that was found, and say what came of it."""
    proxy: Proxy = field(default_factory=Proxy)
    """How a proxy is trained."""

    def __post_init__(self) -> None:
        if not self.max_epochs > 0:
            raise ConfigError(
                f"max_epochs is {self.max_epochs}, not above 0",
                fix="set mix.max_epochs to a number of passes such as 4",
            )
        if self.penalty < 0:
            raise ConfigError(
                f"penalty is {self.penalty}, below 0", fix="set mix.penalty to 0 or 0.05"
            )
        if any(weight < 0 for weight in self.target.values()):
            raise ConfigError("a weight of target is below 0", fix="set mix.target from 0 up")
        if len(self.results) > 2:
            raise ConfigError(
                f"results names {len(self.results)} files",
                fix="give one, or two: mixtures, then losses",
            )
        if self.runs is not None and self.runs < 5:
            raise ConfigError(
                f"runs is {self.runs}, too few for any fit",
                fix="set mix.runs to three for each domain and three more",
            )

    def num_runs(self, num_domains: int) -> int:
        """How many proxies for so many domains."""
        return max(32, 3 * (num_domains + 1)) if self.runs is None else self.runs


def proposal(
    settings: RegMix, runs: Runs, sizes: Mapping[str, DomainSize], budget_tokens: float
) -> Proposal:
    """The mixture for domains of these sizes, from runs.

    Args:
        settings: target, fit, limits.
        runs: of proxies.
        sizes: domain -> what there is of it; every one is a domain of the runs.
        budget_tokens: tokens that training will see, repeats counted.

    Raises:
        ConfigError: the runs say nothing of a domain, or the target names an unknown loss.
        InputError: too few runs; says which were set aside.
        MissingDependencyError: LightGBM is asked for and not installed.
    """
    check_domains(runs.domains, sizes)
    used, shares = chosen_losses(runs, settings.target)
    tokens = np.array([sizes[name].num_tokens if name in sizes else 0.0 for name in used.domains])
    try:
        found = fitted(used.mixtures, used.losses, shares, choice=settings.fit)
    except InputError as error:
        raise with_notes(error, used.notes) from error
    caps = np.minimum(settings.max_epochs * tokens / budget_tokens, 1)
    total = settings.max_epochs * tokens.sum()
    notes = [*used.notes, *found.notes]
    absent = [name for name in used.domains if name not in sizes]
    if absent:
        notes.append(f"domains of the runs that have no training tokens here: {', '.join(absent)}")
    want: Wanted | None = None
    if total <= budget_tokens:
        best, covered = tokens / tokens.sum(), True
        notes.append(all_used(settings.max_epochs, float(total), budget_tokens))
    else:
        want, covered = _limits(used, shares, tokens, caps, settings.penalty)
        best = _optimum(found.law, want, tokens)
    notes += warnings(used, found, best, covered=covered)
    facts = report(used, found, shares, best, tokens)
    notes.append(outlook(facts))
    if want is not None:
        notes += held_back(facts, allowed=_allows(want, tokens > 0), penalty=settings.penalty)
    weights = {name: float(best[used.domains.index(name)]) for name in sizes}
    rules = _rules(used, weights, found.name, caps)
    return Proposal(weights, rules, tuple(notes), facts)


def _limits(
    runs: Runs, shares: Floats, tokens: Floats, caps: Floats, penalty: float
) -> tuple[Wanted, bool]:
    """Limits of the optimum, and whether they keep it to shares that the runs had."""
    seen_low, seen_high = runs.mixtures.min(0), runs.mixtures.max(0)
    high = np.minimum(caps, seen_high)
    low = np.minimum(seen_low, high)
    covered = bool(high.sum() >= 1 and low.sum() <= 1)
    if not covered:
        low, high = np.zeros_like(caps), caps
    size, num_losses = len(tokens), runs.losses.shape[1]
    want = wanted(
        size, num_losses, shares=shares, low=low, caps=high, natural=tokens, penalty=penalty
    )
    return want, covered


def _allows(want: Wanted, there: npt.NDArray[np.bool_]) -> bool:
    """Whether the uniform mixture of the domains that are there (m,) lies within the limits."""
    uniform = there / there.sum()
    return bool(((want.low - _NEAR <= uniform) & (uniform <= want.high + _NEAR)).all())


def _optimum(law: Law, want: Wanted, tokens: Floats) -> Floats:
    """(m,) by derivatives where the law has them, else from draws."""
    if hasattr(law, "gradients"):
        return smooth_optimum(cast(SmoothLaw, law), want)
    there = tokens > 0
    draws = np.zeros((_DRAWS, len(tokens)))
    draws[:, there] = scattered(tokens[there], _DRAWS, np.random.default_rng(0))
    return drawn_optimum(law, want, draws)


def _rules(runs: Runs, weights: Mapping[str, float], fit: str, caps: Floats) -> dict[str, str]:
    """Domain -> what decided its weight."""
    high = dict(zip(runs.domains, caps.tolist(), strict=True))
    return {
        name: "the limit of epochs"
        if share >= high[name] - _NEAR and high[name] < 1
        else f"the optimum of the {fit.replace('_', '-')} law"
        for name, share in weights.items()
    }
