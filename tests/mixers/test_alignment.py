"""Products of gradients: two ways, against stacked gradients, on one rank and on two."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from alignment_case import (
    NUM_DOMAINS,
    ModelStep,
    in_two_ranks,
    language_model,
    losses_of,
    piece,
    share,
)
from torch import Tensor, nn

from curate.errors import ConfigError
from mixers.alignment import Alignments, Part, alignments, target_gradient
from mixers.rules import Piece, Tokens

BATCH = [piece(0, 4, seed=1), piece(1, 2, seed=2), piece(3, 6, seed=3)]
"""The third domain is absent."""
TARGET = [piece(0, 4, seed=4), piece(0, 2, seed=5)]


def flat_gradient(model: nn.Module, pieces: Sequence[Piece]) -> Tensor:
    """Of the mean loss of all tokens."""
    losses = torch.cat([losses_of(model, p.batch["ids"], p.counts) for p in pieces])
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(losses.mean(), list(model.parameters()))]
    )


def measured(step: ModelStep, **options: Any) -> Alignments:
    across = options.get("across", True)
    return alignments(step, step.pieces, target_gradient(step, TARGET, across=across), **options)


def test_products_and_lengths_are_those_of_stacked_gradients():
    model = language_model()
    target = flat_gradient(model, TARGET)
    stacked = torch.stack([flat_gradient(model, [each]) for each in BATCH])
    found = measured(ModelStep(model, BATCH))
    here = torch.tensor([0, 1, 3])
    torch.testing.assert_close(found.products[here], stacked @ target, rtol=1e-6, atol=0)
    assert found.norms is not None
    torch.testing.assert_close(found.norms[here], stacked.norm(dim=1), rtol=1e-6, atol=0)
    assert found.products[2].isnan()
    assert found.norms[2].isnan()
    assert found.counts.tolist() == [float(BATCH[0].counts.sum()), float(BATCH[1].counts.sum()),
                                     0.0, float(BATCH[2].counts.sum())]  # fmt: skip
    mean = found.loss_sums[0] / found.counts[0]
    wanted = losses_of(model, BATCH[0].batch["ids"], BATCH[0].counts).mean()
    torch.testing.assert_close(mean, wanted.detach())


def test_the_target_gradient_is_that_of_the_mean_of_all_its_tokens():
    model = language_model()
    step = ModelStep(model, BATCH)
    for parameter in step.parameters:
        parameter.grad = torch.ones_like(parameter)
    found = target_gradient(step, TARGET)
    wanted = flat_gradient(model, TARGET)
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.tensors]), wanted)
    assert found.norm == pytest.approx(float(wanted.norm()))
    assert found.num_tokens == sum(int(each.counts.sum()) for each in TARGET)
    for parameter in step.parameters:
        assert parameter.grad is not None
        assert bool((parameter.grad == 1).all())


def test_all_domains_count_alike_in_the_sum_of_their_gradients():
    model = language_model()
    found = target_gradient(ModelStep(model, BATCH), BATCH, each_domain=True)
    wanted = sum(flat_gradient(model, [each]) for each in BATCH)
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.tensors]), wanted)


def test_adams_scale_is_taken_once_and_not_where_no_gradient_has_been():
    model = language_model()
    step = ModelStep(model, BATCH)
    plain = target_gradient(step, TARGET).tensors
    moments = [torch.full_like(tensor, 0.25) for tensor in plain]
    moments[0][3] = 0.0
    scaled = target_gradient(step, TARGET, moments=moments).tensors
    assert bool((scaled[0][3] == 0).all())
    torch.testing.assert_close(scaled[0][4], plain[0][4] / (0.5 + 1e-8))
    torch.testing.assert_close(scaled[1], plain[1] / (0.5 + 1e-8))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_mode_gives_the_same_products(attention: str):
    step = ModelStep(language_model(attn_implementation=attention), BATCH)
    dots = measured(step)
    forward = measured(step, how="forward")
    # This model's norms are computed in float32.
    torch.testing.assert_close(forward.products, dots.products, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(forward.loss_sums, dots.loss_sums)
    assert forward.norms is None


def test_a_model_that_forward_mode_cannot_pass_is_named():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0]

    step = ModelStep(language_model(), BATCH)
    head: Any = step.model.lm_head
    head.register_forward_hook(lambda _module, _given, made: Odd.apply(made))
    measured(step)
    with pytest.raises(ConfigError, match="forward mode cannot"):
        measured(step, how="forward")


def test_what_is_kept_sums_to_the_weighted_gradient():
    model = language_model()
    weights = {0: 0.2, 1: 0.5, 3: 0.3}
    kept = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)

    def keep(domain: int, part: Part) -> None:
        kept.add_(torch.cat([g.flatten() for g in part if g is not None]), alpha=weights[domain])

    measured(ModelStep(model, BATCH), keep=keep)
    wanted = sum(weights[d] * flat_gradient(model, [each])
                 for d, each in zip(weights, BATCH, strict=True))  # fmt: skip
    torch.testing.assert_close(kept, wanted)


def test_a_domain_in_two_pieces_is_one_domain():
    model = language_model()
    whole = measured(ModelStep(model, BATCH))
    halves = [
        Piece({"ids": each.batch["ids"][part]}, each.domains[part], each.counts[part])
        for each in BATCH
        for part in (slice(0, 1), slice(1, None))
    ]
    split = measured(ModelStep(model, halves))
    for one, two in zip(split, whole, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)


def test_a_gradient_of_zero_is_a_product_of_zero():
    class Silent(ModelStep):
        def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
            found = super().tokens(piece, model)
            return found._replace(losses=found.losses * 0) if int(piece.domains[0]) == 1 else found

    found = measured(Silent(language_model(), BATCH))
    assert found.norms is not None
    assert float(found.products[1]) == 0.0
    assert float(found.norms[1]) == 0.0
    assert bool(found.products[[0, 3]].isfinite().all())


ALONE = [*BATCH[:2], piece(3, 1, seed=3)]
"""One domain has a single sequence, so that the second rank has none of it."""


def _two(rank: int, folder: Path) -> None:
    step = ModelStep(language_model(), share(ALONE, rank, 2), num_ranks=2)
    target = share(TARGET, rank, 2)
    exact, short, own = (
        alignments(step, step.pieces, target_gradient(step, target, across=across),
                   norms=norms, across=across)
        for norms, across in ((True, True), (False, True), (True, False))
    )  # fmt: skip
    forward = alignments(step, step.pieces, target_gradient(step, target), how="forward")
    torch.save([tuple(each) for each in (exact, short, own, forward)], folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path: Path):
    first, second = in_two_ranks(_two, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    model = language_model()
    alone = measured(ModelStep(model, ALONE))
    exact, short, own, forward = first
    torch.testing.assert_close(exact, tuple(alone), equal_nan=True, rtol=1e-9, atol=1e-12)
    assert short[1] is None
    torch.testing.assert_close(short[0], alone.products, equal_nan=True)
    torch.testing.assert_close(forward[0], alone.products, equal_nan=True)
    # Each rank's own product, and their mean; of the domain with one sequence the first rank's.
    pairs: list[Tensor] = []
    for rank in (0, 1):
        target = flat_gradient(model, share(TARGET, rank, 2))
        row = torch.full((NUM_DOMAINS,), torch.nan, dtype=torch.float64)
        for each in share(ALONE, rank, 2):
            row[int(each.domains[0])] = flat_gradient(model, [each]) @ target
        pairs.append(row)
    torch.testing.assert_close(own[0], torch.stack(pairs).nanmean(0), equal_nan=True)
