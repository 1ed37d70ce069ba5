"""Weights three ways: as a column, as copies, as the probability of a domain.

What the plan gives an example is its copies times its weight, e. The three ways give it the same
in expectation:

    column    copies written, weight in the loss:             copies * weight = e
    copies    N copies written, weight 1:                     E[N] = e
    domains   written once, the domain drawn sum(e) times an
              epoch from n examples, weight n e / sum(e):     sum(e) / n * n e / sum(e) = e

Copies are drawn by systematic resampling within a component: one uniform number u, and the example
that spans [s, s + e) of the running sum gets floor(s + e + u) - floor(s + u). Unbiased for every
example, never a whole copy away from e, and the sum is that of e, rounded up or down (Carpenter,
Clifford and Fearnhead, "Improved particle filter for nonlinear problems", IEE Proceedings 1999).
Running sums are whole numbers of 2^-28, so that neither the cut into partitions nor the number of
workers changes a copy.

Shapes: N examples of a partition.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from curate.data.choice import Choice, IntArray
from curate.data.shard_layout import Component

Way = Literal["column", "copies", "domains"]

BITS = 28
ONE = 1 << BITS
"""A weight of 1; running sums within a partition stay below 2^35 such."""


class Sum(NamedTuple):
    """Of the examples that a component takes."""

    weight: int
    """Copies times weight, in units of 1 / ONE."""
    examples: int
    """With at least one copy."""

    @property
    def rows(self) -> float:
        """Rows of weight 1 that these stand for."""
        return self.weight / ONE


Terms = Mapping[Component, Any]
"""What the examples of one partition need to know of all others: for `copies` where the running
sum stands, for `domains` the component's `Sum`."""


def sums(choice: Choice) -> dict[Component, Sum]:
    """Of each component with an example in the partition."""
    found: dict[Component, Sum] = {}
    for phase, copies in choice.copies.items():
        number = np.bincount(choice.domains[copies > 0], minlength=len(choice.names))
        total = np.zeros(len(choice.names), np.int64)
        np.add.at(total, choice.domains, _worth(choice, phase))
        for place in np.flatnonzero(number).tolist():
            component = Component(phase, choice.names[place])
            found[component] = Sum(int(total[place]), int(number[place]))
    return found


@dataclass(slots=True)
class Tally:
    """Goes over the partitions in canonical order, and finds each one's terms."""

    way: Way
    seed: int
    totals: dict[Component, Sum] = field(default_factory=dict[Component, Sum])
    """Of what was taken in so far."""
    _terms: list[dict[Component, Any]] = field(default_factory=list[dict[Component, Any]])

    def take(self, choice: Choice) -> Choice:
        """The next partition; returns it with the copies that are written, weights not yet."""
        if self.way == "column":
            return choice
        found = sums(choice)
        terms: dict[Component, Any] = {}
        for component, mine in found.items():
            before = self.totals.get(component, Sum(0, 0))
            start = uniform(self.seed, component) if self.way == "copies" else 0
            terms[component] = (start + before.weight) % ONE
            together = (before.weight + mine.weight, before.examples + mine.examples)
            self.totals[component] = Sum(*together)
        self._terms.append(terms)
        if self.way == "copies":
            return weigh(choice, self.way, terms)
        once = {phase: np.minimum(copies, 1) for phase, copies in choice.copies.items()}
        return replace(choice, copies=once)

    def terms(self, number: int) -> dict[Component, Any]:
        """Of the partition that was taken in as the `number`-th; all must have been."""
        if self.way == "column":  # not all need have been
            return {}
        if self.way == "domains":
            return {component: self.totals[component] for component in self._terms[number]}
        return self._terms[number]


def uniform(seed: int, component: Component) -> int:
    """The number in [0, ONE) at which the draw of a component begins."""
    name = f"shards.weights\0{seed}\0{component.phase}\0{component.domain}"
    return xxhash.xxh3_64_intdigest(name.encode()) % ONE


def weigh(choice: Choice, way: Way, terms: Terms) -> Choice:
    """A partition of the plan as it is written.

    Args:
        choice: of the plan.
        way: how weights reach the trainer.
        terms: of `Tally.terms`; other components are left out of what is written.
    """
    if way == "column":
        return choice
    copies: dict[int, IntArray] = {}
    weights: dict[int, Any] = {}
    for phase, asked in choice.copies.items():
        if way == "copies":
            starts = [int(terms.get(Component(phase, name), 0)) for name in choice.names]
            copies[phase] = _systematic(choice, phase, np.array(starts, np.int64))
            weights[phase] = np.ones(len(choice.rows), np.float32)
            continue
        found = [terms.get(Component(phase, name)) for name in choice.names]
        scale = [s[1] / s[0] if s is not None and s[0] else 0.0 for s in found]
        copies[phase] = np.minimum(asked, 1)
        worth = _worth(choice, phase) * np.array(scale)[choice.domains]
        weights[phase] = worth.astype(np.float32)
    return replace(choice, copies=copies, phase_weights=weights)


def pack(terms: Terms) -> list[list[Any]]:
    """As JSON values."""
    return [[phase, domain, value] for (phase, domain), value in _items(terms)]


def unpack(values: list[list[Any]]) -> dict[Component, Any]:
    """What `pack` packed."""
    return {Component(phase, domain): value for phase, domain, value in values}


def _items(terms: Terms) -> list[tuple[tuple[int, str], Any]]:
    found = sorted(terms.items())
    return [((component.phase, component.domain), value) for component, value in found]


def _worth(choice: Choice, phase: int) -> IntArray:
    """(N,) copies times weight, in units of 1 / ONE."""
    exact = choice.weights.astype(np.float64) * choice.copies[phase]
    return np.rint(exact * ONE).astype(np.int64)


def _systematic(choice: Choice, phase: int, starts: IntArray) -> IntArray:
    """(N,) copies, from (number of domains,) where the running sum of each domain stands."""
    order = np.argsort(choice.domains, kind="stable")
    worth, domains = _worth(choice, phase)[order], choice.domains[order]
    ends = np.cumsum(worth)
    first = np.flatnonzero(np.diff(domains, prepend=-1))  # where the next domain begins
    shift = np.zeros(len(starts), np.int64)
    shift[domains[first]] = starts[domains[first]] - (ends[first] - worth[first])
    upto = ends + shift[domains]
    copies = np.empty(len(order), np.int64)
    copies[order] = (upto >> BITS) - ((upto - worth) >> BITS)
    return copies
