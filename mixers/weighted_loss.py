"""The loss of a trainer, with weights for examples or tokens: what `compute_loss_func` takes.

    tokens    sum_i u_i sum_t nll_it / number of target tokens of the step       u_i has mean 1
    examples  sum_i u_i L_i / M = sum_i w_i L_i        L_i: mean over the tokens of an example

With all weights 1 the first is the loss of `Trainer`, with gradient accumulation and several ranks
too. The second is the formula of loss-based reweighting as published. Where all examples have the
same number of tokens, as packed windows do, they are one.

Shapes: B examples of a micro-batch, M of the step over all micro-batches and ranks, T positions,
C classes or vocabulary, K domains.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curate.errors import ConfigError, InputError
from mixers.loss_weights import LossReweighting, Summary, example_weights, summary
from mixers.loss_window import Window, empty_window, remember, window_bounds
from mixers.ranks import all_rows, num_ranks, over_ranks
from mixers.token_weights import TokenWeights, talr_temperature, token_weights

Measure = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""Output of the model and labels -> losses (B, T), nats, and bool (B, T) of what is counted."""

Weights = str | LossReweighting | TokenWeights
"""A column that holds weights, or how losses become weights."""


class Progress(NamedTuple):
    """How far training is."""

    step: int
    """Steps done, from 0."""
    total_steps: int


class _Example(NamedTuple):
    """The examples of one micro-batch, in numbers."""

    losses: Tensor
    """(B,) mean loss over the counted tokens."""
    counts: Tensor
    """(B,) counted tokens."""
    domains: Tensor
    """(B,) indices in [0, K)."""


def class_losses(output: Any, labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position, as transformers computes it, before any sum.

    Args:
        output: has `logits` (B, T, C), or (B, C) with one label for each example.
        labels: (B, T) or (B,) class indices; -100 is not counted.
        shift: whether position t predicts label t + 1, as in causal language models.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ConfigError(
            "the model's output has no logits, so that losses of examples cannot be told apart",
            fix="switch off use_liger_kernel, or pass losses= to apply_weights",
        )
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ConfigError(
            f"labels {tuple(labels.shape)} of {labels.dtype} are no classes for logits "
            f"{tuple(logits.shape)}",
            fix="pass a function of output and labels as losses= to apply_weights",
        )
    if shift:
        labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    flat = nn.functional.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten().to(logits.device),
        ignore_index=-100,
        reduction="none",
    )
    rows = len(labels)
    return flat.view(rows, -1), (labels != -100).view(rows, -1).to(logits.device)


class WeightedLoss:
    """A weighted loss; `apply_weights` makes one and gives it to a trainer.

    Args:
        weights: a column, or how losses become weights.
        measure: losses of a micro-batch.
        average: over tokens, as `Trainer` does, or over examples.
        num_domains: K; 1 where domains are not told apart.
        progress: how far training is.
        is_training: whether the model is in training; elsewhere all weigh 1.
        columns: what was carried past the model in its last call.
        domain_column: the carried column of domain indices; None where there is none.
        local_items: whether the trainer counts each rank's items by themselves.
        device: where ranks exchange numbers.
        group: the ranks that share a step.
    """

    def __init__(
        self,
        weights: Weights,
        measure: Measure,
        *,
        average: Literal["tokens", "examples"] = "tokens",
        num_domains: int = 1,
        progress: Callable[[], Progress],
        is_training: Callable[[], bool],
        columns: Callable[[], dict[str, Tensor]],
        domain_column: str | None = None,
        local_items: bool = False,
        device: torch.device | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._weights, self._measure, self._average = weights, measure, average
        self._num_domains, self._domain_column = num_domains, domain_column
        self._progress, self._is_training, self._columns = progress, is_training, columns
        self._local_items, self._device, self._group = local_items, device, group
        self.window: Window = empty_window()
        """What the robust form remembers."""
        self._planned: list[Tensor] | None = None
        self._temperature: Tensor | None = None
        self._num_examples: int | None = None
        self._seen: list[tuple[_Example, Tensor]] = []

    @property
    def needs_losses(self) -> bool:
        """Whether weights depend on the losses of the whole step."""
        is_talr = isinstance(self._weights, TokenWeights) and self._weights.kind == "talr"
        return is_talr or isinstance(self._weights, LossReweighting)

    def begin(
        self, sizes: Sequence[int], outputs: Iterable[tuple[Any, Tensor, Any]] | None = None
    ) -> None:
        """A step begins.

        Args:
            sizes: examples of each micro-batch of this rank.
            outputs: output, labels and carried columns of each micro-batch, from a first pass over
                all of them; None where each is to be weighed by itself.
        """
        self._seen.clear()
        self._planned = self._temperature = self._num_examples = None
        if self._average == "examples":
            total = torch.tensor([sum(sizes)], device=self._device)
            self._num_examples = int(over_ranks(total, dist.ReduceOp.SUM, self._group)[0])
        if outputs is None:
            return
        parts = [
            self._example(*self._measure(out, labels), carried) for out, labels, carried in outputs
        ]
        whole = _Example(*(torch.cat(each) for each in zip(*parts, strict=True)))
        if isinstance(self._weights, LossReweighting):
            factors = self._factors(whole, self._weights)
            self._planned = list(factors.split([len(part.losses) for part in parts]))
        else:
            self._temperature = self._median(whole)

    def __call__(
        self, output: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a micro-batch.

        Args:
            output: of the model.
            labels: as the batch had them.
            num_items_in_batch: target tokens of the whole step, as `Trainer` counts them.
        """
        if labels is None:
            raise InputError("the batch has no labels", fix="let the collator make labels")
        losses, counted = self._measure(output, labels)
        items = counted.sum() if num_items_in_batch is None else num_items_in_batch
        if not self._is_training():
            return losses.sum() / items
        carried = self._columns()
        example = self._example(losses, counted, carried)
        if isinstance(self._weights, TokenWeights):
            of_tokens = token_weights(
                losses, counted, self._weights, temperature=self._talr(example)
            )
            losses = losses * of_tokens
            factors = torch.ones_like(example.losses)
        elif isinstance(self._weights, LossReweighting):
            planned = self._planned
            factors = self._factors(example, self._weights) if planned is None else planned.pop(0)
        else:
            factors = self._from_column(self._weights, carried).to(losses)
        self._seen.append((example, factors))
        sums = losses.sum(dim=1)
        if self._average == "tokens":
            return (factors * sums).sum() / items
        divisor = self._num_examples or len(labels)
        if self._local_items:  # the trainer then does not multiply by the number of ranks
            divisor = divisor / num_ranks(self._group)
        return (factors * sums / example.counts.clamp(min=1)).sum() / divisor

    def summary(self) -> Summary | None:
        """What the weights of the last step did, over all ranks; None before the first."""
        if not self._seen:
            return None
        factors = torch.cat([factors for _, factors in self._seen])
        losses = torch.cat([example.losses for example, _ in self._seen])
        domains = torch.cat([example.domains for example, _ in self._seen])
        total = over_ranks(factors.double().sum()[None], dist.ReduceOp.SUM, self._group)
        return summary(
            losses,
            factors.double() / total,
            domains=domains,
            num_domains=self._num_domains,
            group=self._group,
        )

    def _example(self, losses: Tensor, counted: Tensor, carried: dict[str, Tensor]) -> _Example:
        counts = counted.sum(dim=1)
        means = losses.detach().sum(dim=1) / counts.clamp(min=1)
        if self._domain_column is None:
            return _Example(means, counts, torch.zeros_like(counts))
        if self._domain_column not in carried:
            raise _missing(self._domain_column)
        return _Example(means, counts, carried[self._domain_column].to(counts.device))

    def _factors(self, example: _Example, settings: LossReweighting) -> Tensor:
        """M times the weight of each example; 0 where nothing is counted."""
        progress = self._progress()
        has_any = example.counts > 0
        losses, domains = example.losses[has_any], example.domains[has_any]
        within = domains if settings.within_domain else None
        num_domains = self._num_domains if settings.within_domain else 1
        bounds = None
        if settings.robust:
            self.window = remember(
                self.window,
                losses,
                step=progress.step,
                num_steps=settings.window_steps,
                domains=within,
                group=self._group,
            )
            bounds = window_bounds(self.window, num_domains=num_domains)
        weights = example_weights(
            losses,
            strategy=settings.strategy,
            temperature=settings.temperature_at(progress.step, progress.total_steps),
            delta=settings.delta,
            domains=within,
            num_domains=num_domains,
            bounds=bounds,
            group=self._group,
        )
        total = over_ranks(has_any.sum()[None], dist.ReduceOp.SUM, self._group)
        found = torch.zeros_like(example.losses)
        found[has_any] = (weights * total).to(found.dtype)
        return found

    def _talr(self, example: _Example) -> Tensor | None:
        if not self.needs_losses:
            return None
        return self._median(example) if self._temperature is None else self._temperature

    def _median(self, example: _Example) -> Tensor:
        losses = example.losses[example.counts > 0].double()
        return talr_temperature(all_rows(losses[:, None], self._group).flatten())

    def _from_column(self, column: str, carried: dict[str, Tensor]) -> Tensor:
        if column not in carried:
            raise _missing(column)
        return carried[column]


def _missing(column: str) -> InputError:
    return InputError(
        f"a training batch has no {column}",
        fix=f"give every example a {column}, and leave the trainer's data_collator as "
        "apply_weights set it",
    )
