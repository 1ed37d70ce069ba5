"""Loss reweighting in the proxy's training, and the mixture that its weights amount to.

    w_i: weight of example i from its own loss (`mixers.loss_weights`), or
    w_t: weight of token t from its own probability (`mixers.token_weights`)
    mixture_d  ~  share_d * mean over the steps of (mean w in d / mean w of the step)

The method weighs examples as training goes and knows no domains. Where domains differ in loss its
weights are domain weights all the same, and this mixer says which: it trains the proxy with them,
and reports the shares times each domain's mean weight.

Sources: those of `mixers.loss_weights` and `mixers.token_weights`.
Departures: the mixture is ours. It is what the weights came to, averaged; sampling by it is not the
method, which lives in training: see `mixers.online`.
Cost: a few numbers for each example or token; a forward pass more where a step has several pieces
and its weights depend on all of them.
Shapes: K domains, M examples of a step, n counted tokens of a piece.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError
from mixers.loss_weights import LossReweighting, Strategy
from mixers.proxy_settings import Proxy
from mixers.ranks import all_rows, over_ranks
from mixers.rules import Seen, Step, Tokens, first_look, loss_sums, second_look, token_counts
from mixers.token_weights import focal_weights, talr_temperature, talr_weights, tldr_weights

TokenKind = Literal["tldr", "focal", "talr"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsByLoss:
    """The mixture that weights from losses amount to."""

    __pydantic_config__: ClassVar = STRICT

    proxy: Proxy = field(default_factory=Proxy)
    """How the proxy is trained. Fewer than 32 sequences in a step have no range worth the name."""
    seeds: tuple[int, ...] = (0,)
    """Of the proxy, beside its own: one run each, and the mixture is their mean."""
    shares: Literal["natural", "uniform"] | dict[str, float] = "natural"
    """Of the tokens that the proxy is trained on, before any weight."""
    strategy: Strategy = "linupper"
    """`linupper` leaves the easy half behind, `quadratic` both ends, `extremes` the middle."""
    temperature: float = 1.0
    """The paper's r: two weights differ by at most exp(1/r), 2.7 times at 1, 12 times at 0.4."""
    delta: float = 1.0
    """Scale of the normalised losses."""
    uniform_share: float = 0.05
    """Share of the run at its start with `warm_temperature`."""
    warm_temperature: float | None = None
    """Temperature of that start; by default infinite, which is the plain mean."""
    within_domain: bool = False
    """Range and weights by domain: each keeps its share, and the mixture is `shares`."""
    robust: bool = False
    """The 2nd and 98th percentile of the last steps in place of the step's own range."""
    window_steps: int = 50
    """How many steps the robust form remembers."""
    token: TokenKind | None = None
    """Weights for tokens in place of examples: `tldr` and `focal` leave easy tokens behind, `talr`
    hard ones. It goes with none of the options of examples."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds are {list(self.seeds)}", fix="list different seeds: [0, 1, 2]"
            )
        examples = self.examples  # checks them
        if self.token is not None and examples != LossReweighting():
            raise ConfigError(
                f"token is {self.token}, and options of example weights are set beside it",
                fix="remove mix.token, or keep only proxy, seeds and shares beside it",
            )

    @property
    def examples(self) -> LossReweighting:
        """The options of example weights.

        Raises:
            ConfigError: one is out of range.
        """
        warm = self.warm_temperature
        return LossReweighting(
            strategy=self.strategy,
            temperature=self.temperature,
            delta=self.delta,
            uniform_share=self.uniform_share,
            warm_temperature=math.inf if warm is None else warm,
            within_domain=self.within_domain,
            robust=self.robust,
            window_steps=self.window_steps,
        )


class TokenRule:
    """Tokens weigh by their own probability, at shares that stay as they are.

        loss = sum over all tokens of the batch of w_t l_t / number of those tokens

    Args:
        shares: (K,) of the sequences, summing to 1.
        kind: which weight.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "factor": "mean weight of the domain's tokens by that of all; above 1, the domain gains",
        "effective_share": "effective sample size by number of tokens, the same for all domains",
        "largest": "largest weight by the mean one, the same for all domains",
    }
    by_domain: ClassVar[bool] = False

    def __init__(self, shares: Tensor, kind: TokenKind) -> None:
        self._shares, self._kind = shares.double(), kind
        self._sums = torch.zeros_like(self._shares)
        self._done = 0

    def shares(self) -> Tensor:
        return self._shares

    def step(self, step: Step) -> Seen:
        counts = token_counts(step)
        num = step.num_domains
        temperature, looks = None, None
        if self._kind == "talr":  # its median is that of the whole step
            looks = first_look(step)
            means = torch.cat([_means(look) for look in looks])
            temperature = talr_temperature(all_rows(means[:, None], None).flatten())
        passes = (
            (step.tokens(piece) for piece in step.pieces)
            if looks is None
            else second_look(step, looks)
        )
        sums = torch.zeros_like(counts)
        weight_sums, squares = torch.zeros_like(counts), torch.zeros(1, dtype=torch.float64)
        most = torch.zeros(1, dtype=torch.float64)
        for tokens in passes:
            weights = self._weights(tokens.losses.detach(), temperature)  # (n,)
            step.backward((weights * tokens.losses).sum() / counts.sum().to(tokens.losses))
            sums += loss_sums(tokens, num)
            own = weights.double().cpu()
            weight_sums.index_add_(0, tokens.domains.cpu(), own)
            squares += own.square().sum()
            most = torch.maximum(most, own.max()) if len(own) else most
        weight_sums, squares = step.total(weight_sums), step.total(squares)
        most = float(over_ranks(most, dist.ReduceOp.MAX, None))
        total = counts.sum()
        mean = weight_sums.sum() / total
        factors = weight_sums / counts / mean  # NaN where a domain is absent
        self._sums += self._shares * torch.where(factors.isnan(), 1.0, factors)
        self._done += 1
        share = float(weight_sums.sum().square() / (squares * total))
        values = {
            "factor": factors,
            "effective_share": torch.full_like(counts, share),
            "largest": torch.full_like(counts, most / float(mean)),
        }
        return Seen(self._shares * factors.nan_to_num(1.0), step.total(sums), counts, values)

    def mixture(self) -> Tensor:
        found = self._sums if self._done else self._shares
        return found / found.sum()

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self._done), "sums": self._sums}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self._done, self._sums = int(saved["done"]), saved["sums"]

    def _weights(self, losses: Tensor, temperature: Tensor | None) -> Tensor:
        if self._kind == "tldr":
            return tldr_weights(losses)
        if self._kind == "focal":
            return focal_weights(losses)
        assert temperature is not None
        return talr_weights(losses, temperature.to(losses))


def _means(tokens: Tokens) -> Tensor:
    """(B,) float64 mean loss of each sequence that has a counted token."""
    _, places, counts = tokens.owner.unique(return_inverse=True, return_counts=True)
    losses = tokens.losses.detach().double()
    return losses.new_zeros(len(counts)).index_add_(0, places, losses) / counts
