"""DGA inside the proxy's loop: measured every T_r steps, sampled by what was found.

Source, departures: `mixers.dga`. Over several ranks every gradient is summed over them, so that any
number of ranks finds the same, to rounding.
Cost: see `mixers.dga`; a batch is drawn before its step, so that weights are a step behind.
Shapes: K domains, N distributions over them (N = K where none are given).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from curate.models.epochs import random_seed
from mixers.alignment import alignments, target_gradient
from mixers.basis import make_basis
from mixers.dga import DGA
from mixers.dga_schedule import Mix, first_mix, next_mix
from mixers.proxy_draws import stratified_counts
from mixers.rules import Piece, Seen, Step, loss_sums, token_counts
from mixers.share_limits import epoch_caps


class DGARule:
    """Trains with the ordinary loss on batches drawn by the weights.

    Args:
        settings: of the method.
        domains: K names.
        sizes: (K,) sequences of each, for `max_epochs`.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "alignment": "cosine or product of the domain's gradient with the target's, where measured",
        "epochs": "how often training has gone through the domain",
    }
    by_domain: ClassVar[bool] = False

    def __init__(self, settings: DGA, domains: Sequence[str], sizes: Tensor) -> None:
        self._settings, self._sizes = settings, sizes.double()
        self._basis = make_basis(domains, settings.basis)
        self._mix = first_mix(settings, self._basis)
        self._read = torch.zeros(len(domains), dtype=torch.float64)

    @property
    def weights(self) -> dict[str, float]:
        """Name of a domain, or of a distribution of the basis -> its last weight."""
        return dict(zip(self._basis.names, self._mix.log_weights.exp().tolist(), strict=True))

    def shares(self) -> Tensor:
        return self._mix.shares

    def step(self, step: Step) -> Seen:
        shares = self._mix.shares
        drawn = torch.zeros_like(shares)
        for piece in step.pieces:
            drawn += piece.domains.cpu().bincount(minlength=len(shares))
        drawn = step.total(drawn)
        self._read = self._read + drawn
        found = torch.full_like(shares, torch.nan)
        if self._settings.is_due(step.number - 1, step.total_steps):
            found = self._measure(step, float(drawn.sum()))
        counts = token_counts(step)
        sums = torch.zeros_like(counts)
        for piece in step.pieces:
            tokens = step.tokens(piece)
            step.backward(tokens.losses.sum() / counts.sum().to(tokens.losses))
            sums += loss_sums(tokens, step.num_domains)
        values = {"alignment": found, "epochs": self._read / self._sizes}
        return Seen(shares, step.total(sums), counts, values)

    def mixture(self) -> Tensor:
        """Mean over the measurements, not the last of them: that one is noise where the target's
        loss is flat."""
        return self._mix.mean

    def state(self) -> dict[str, Tensor]:
        return {**self._mix._asdict(), "read": self._read}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self._mix = Mix(*(saved[name] for name in Mix._fields))
        self._read = saved["read"]

    def _measure(self, step: Step, batch: float) -> Tensor:
        """Move the weights; (K,) the alignment of each domain, NaN where weights are of a basis."""
        settings, basis = self._settings, self._basis
        if not len(self._mix.steps):
            settings.tell_cost(len(basis.names), batch)
        moments = step.second_moments() if settings.precondition == "adam" else None
        target = target_gradient(
            step, step.target("alignment", settings.target_sequences), moments=moments
        )
        measured = alignments(step, self._pieces(step), target)
        assert measured.norms is not None
        number = len(basis.names)
        found = settings.alignment(
            measured.products[:number],
            measured.norms[:number],
            target.norm,
            present=measured.counts[:number] > 0,
            names=basis.names,
        )
        left = (step.total_steps - step.number) * batch
        caps = None
        if settings.max_epochs is not None and left:
            limit = settings.max_epochs
            caps = epoch_caps(self._sizes, self._read, left=left, max_epochs=limit)
        self._mix = next_mix(settings, basis, self._mix, found, begins=step.number, caps=caps)
        return found if basis.is_plain else torch.full_like(self._read, torch.nan)

    def _pieces(self, step: Step) -> Sequence[Piece]:
        """What each domain, or each distribution, is measured on; their numbers for the domains."""
        each = self._settings.sequences
        if self._basis.is_plain:
            return step.more("alignment", each)
        found: list[Piece] = []
        for number, name in enumerate(self._basis.names):
            seed = random_seed(0, "basis", name, step.number)
            counts = stratified_counts(self._basis.rows[number].numpy(), each, seed)
            found += [
                piece._replace(domains=torch.full_like(piece.domains, number))
                for piece in step.more(f"alignment {name}", torch.from_numpy(counts))
            ]
        return found
