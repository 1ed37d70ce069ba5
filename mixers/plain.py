"""Plain training at given shares: the loop with the ordinary loss, and what it reports.

    loss = sum over all tokens of the batch of l / number of those tokens

What a mixture is put to the test with, and what every run of a swarm of proxies does. On demand
the loss weighs examples by their own losses: sum over all examples of w_i L_i, as
`mixers.loss_weights` says, with the weight that each domain gets in the trajectory.

Source: none; that of the weights stands there.
Departures: none.
Cost: none beside the training; with weights a few numbers for each example.
Shapes: K domains, P phases, M examples of this rank in a step, n tokens of a piece.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mixers.loss_weights import LossReweighting, example_weights, summary
from mixers.loss_window import Window, empty_window, remember, window_bounds
from mixers.rules import Seen, Step, Tokens, first_look, loss_sums, second_look, token_counts


class PlainRule:
    """Shares that are known beforehand.

    Args:
        shares: (P, K) of the sequences, each row summing to 1.
        ends: (P,) share of the steps after which each phase is over; the last is 1.
    """

    columns: ClassVar[Mapping[str, str]] = {}
    by_domain: ClassVar[bool] = False

    def __init__(self, shares: Tensor, ends: Tensor, *, total_steps: int) -> None:
        self._shares = shares.double()
        self._ends = (ends.double() * total_steps).round()
        self._done = 0

    def shares(self) -> Tensor:
        phase = int((self._ends <= self._done).sum())
        return self._shares[min(phase, len(self._shares) - 1)]

    def step(self, step: Step) -> Seen:
        counts = token_counts(step)
        sums = torch.zeros_like(counts)
        for piece in step.pieces:
            tokens = step.tokens(piece)
            step.backward(tokens.losses.sum() / counts.sum().to(tokens.losses))
            sums += loss_sums(tokens, step.num_domains)
        weights = self.shares()
        self._done += 1
        return Seen(weights, step.total(sums), counts)

    def mixture(self) -> Tensor:
        parts = self._ends.diff(prepend=torch.zeros(1, dtype=torch.float64)) / self._ends[-1]
        return parts @ self._shares

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self._done)}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self._done = int(saved["done"])


class ReweightedRule:
    """Examples weigh by their own losses, at shares that stay as they are.

    Args:
        shares: (K,) of the sequences, summing to 1.
        settings: of the weights.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "factor": "mean weight of the domain's examples; above 1, the domain gains",
        "effective_share": "effective sample size by number of examples, the same for all domains",
        "largest": "largest weight by the mean one; the paper's theory assumes at most 2",
    }
    by_domain: ClassVar[bool] = False

    def __init__(self, shares: Tensor, settings: LossReweighting) -> None:
        self._shares, self._settings = shares.double(), settings
        self._done = 0
        self._window: Window = empty_window()
        self._sums = torch.zeros_like(self._shares)

    def shares(self) -> Tensor:
        return self._shares

    def step(self, step: Step) -> Seen:
        num_domains = step.num_domains
        counts = token_counts(step)
        looks = first_look(step)
        parts = [_means(look, piece.counts) for look, piece in zip(looks, step.pieces, strict=True)]
        means = torch.cat([part.detach() for part in parts]).cpu()  # (M,)
        domains = torch.cat([piece.domains[piece.counts > 0] for piece in step.pieces]).cpu()
        weights = self._weigh(means, domains, step)
        sums = torch.zeros_like(counts)
        split = weights.split([len(part) for part in parts])
        for look, piece, own in zip(second_look(step, looks), step.pieces, split, strict=True):
            step.backward((own.to(look.losses) * _means(look, piece.counts)).sum())
            sums += loss_sums(look, num_domains)
        told = summary(means, weights, domains=domains, num_domains=num_domains)
        factors = told.domain_weights
        self._sums += self._shares * torch.where(factors.isnan(), 1.0, factors)
        self._done += 1
        share = told.effective_size / told.num_examples
        values = {
            "factor": factors,
            "effective_share": torch.full_like(factors, share),
            "largest": torch.full_like(factors, told.largest),
        }
        return Seen(self._shares * factors.nan_to_num(1.0), step.total(sums), counts, values)

    def _weigh(self, means: Tensor, domains: Tensor, step: Step) -> Tensor:
        """(M,) weights of examples; over all ranks they sum to 1."""
        settings, num_domains = self._settings, step.num_domains
        within = domains if settings.within_domain else None
        groups = num_domains if settings.within_domain else 1
        bounds = None
        if settings.robust:
            self._window = remember(
                self._window,
                means,
                step=step.number,
                num_steps=settings.window_steps,
                domains=within,
            )
            bounds = window_bounds(self._window, num_domains=groups)
        return example_weights(
            means,
            strategy=settings.strategy,
            temperature=settings.temperature_at(self._done, step.total_steps),
            delta=settings.delta,
            domains=within,
            num_domains=groups,
            bounds=bounds,
        )

    def mixture(self) -> Tensor:
        """The shares times the mean weight of each domain: the mixture that the weights were."""
        found = self._sums if self._done else self._shares
        return found / found.sum()

    def state(self) -> dict[str, Tensor]:
        window = {f"window.{name}": value for name, value in self._window._asdict().items()}
        return {"done": torch.tensor(self._done), "sums": self._sums, **window}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self._done, self._sums = int(saved["done"]), saved["sums"]
        self._window = Window(*(saved[f"window.{name}"] for name in Window._fields))


def _means(tokens: Tokens, counts: Tensor) -> Tensor:
    """(m,) mean loss of each example of a piece that has a counted token."""
    sums = tokens.losses.new_zeros(len(counts)).index_add(0, tokens.owner, tokens.losses)
    return (sums / counts.clamp(min=1))[counts > 0]
