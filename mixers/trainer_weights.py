"""Weights in a Trainer of transformers or TRL: one call after it is made.

`Trainer` drops a weight column without a word, or lets the model swallow it. Here the column goes
past the model into the loss; missing columns and settings under which weights would be lost are
errors before the first step.

With loss-based weights and gradient accumulation, minimum, maximum and sum run over all
micro-batches of the step: their losses come from a forward pass before the first backward, which
draws the same dropout as the passes that follow. It costs about a third of a step. With
`accumulation="each"` it is left out and every micro-batch is weighed by itself, which is another
method. Without accumulation there is no such pass.

Shapes: see `mixers.weighted_loss`.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curate.errors import ConfigError
from mixers.carried import Carried, CarryingCollator
from mixers.loss_weights import LossReweighting
from mixers.loss_window import Window
from mixers.trainer_state import note, noted
from mixers.weighted_loss import Measure, Progress, WeightedLoss, Weights, class_losses

log = logging.getLogger(__name__)

_SHIFTED = ("ForCausalLM", "ForConditionalGeneration")
_ALIGNED = (
    "ForMaskedLM",
    "ForTokenClassification",
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)
_WINDOW = "curate.loss_window"
"""Under this name the window lies in a checkpoint's trainer_state.json."""


def apply_weights(
    trainer: Trainer,
    weights: Weights = "curate_weight",
    *,
    domains: Sequence[str] = (),
    domain_column: str = "curate_domain",
    average: Literal["tokens", "examples"] = "tokens",
    accumulation: Literal["all", "each"] = "all",
    losses: Measure | None = None,
    group: dist.ProcessGroup | None = None,
) -> WeightedLoss:
    """Let a trainer weigh examples or tokens; call it before `train()`.

    Evaluation stays unweighted. Where every weight is 1, training is that of the trainer as it was,
    to rounding. Besides the trainer's own `loss`, which is the weighted one then, the log gets
    `weights/unweighted_loss`, `weights/effective_share`, `weights/largest` and, with `domains`,
    the mean weight of each.

    Args:
        trainer: of transformers, or a subclass such as TRL's SFTTrainer.
        weights: a column of weights, or how losses become weights.
        domains: names of all domains, for the log and for `within_domain`.
        domain_column: where examples name theirs.
        average: what is averaged: "tokens", as the trainer does, or "examples", the formula of the
            paper on loss-based weights. Alike where all examples have the same number of tokens.
        accumulation: which losses a weight is relative to: "all" of the step, or those of "each"
            micro-batch.
        losses: for models other than language models and classifiers: output and labels -> losses
            (B, T) and what is counted (B, T).
        group: the ranks that share a step, where these are not all.

    Returns:
        The loss; its `summary()` says what the weights of the last step did.

    Raises:
        ConfigError: the trainer would lose the weights: a column would be removed or is missing,
            examples are packed, the loss is computed elsewhere.
    """
    column = weights if isinstance(weights, str) else None
    _check(trainer, weights, column=column, domains=domains, domain_column=domain_column)
    model = cast(nn.Module, trainer.model)
    carried_domains = domain_column if domains else None
    names = [name for name in (column, carried_domains) if name]
    carried = Carried(model, names)
    if names:
        inner = cast(Callable[[list[Any]], Any], trainer.data_collator)
        trainer.data_collator = CarryingCollator(
            inner,
            keep=_taken(trainer),
            weight_column=column,
            domain_column=carried_domains,
            domains=domains,
        )
    loss = WeightedLoss(
        weights,
        losses or _measure(trainer),
        average=average,
        num_domains=max(len(domains), 1),
        progress=lambda: Progress(trainer.state.global_step, trainer.state.max_steps),
        is_training=lambda: model.training,
        columns=lambda: carried.columns,
        domain_column=carried_domains,
        local_items=not trainer.args.average_tokens_across_devices,
        device=trainer.args.device,
        group=group,
    )
    trainer.compute_loss_func = loss
    if getattr(trainer, "loss_is_scaled_for_ga", None) is not None:
        trainer.loss_is_scaled_for_ga = True
    _watch_steps(trainer, loss, carried, whole=accumulation == "all")
    keeps_window = isinstance(weights, LossReweighting) and weights.robust
    trainer.add_callback(_Log(trainer, loss, domains, keeps_window=keeps_window))
    return loss


def _watch_steps(trainer: Trainer, loss: WeightedLoss, carried: Carried, *, whole: bool) -> None:
    """Tell the loss where steps begin, after a first pass over their micro-batches if need be."""
    inner = trainer.get_batch_samples

    def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
        samples, num_items = inner(*args, **kwargs)
        sizes = [len(batch["labels"]) for batch in samples if "labels" in batch]
        # One micro-batch is weighed from the pass that trains.
        is_needed = loss.needs_losses and whole and len(samples) > 1
        loss.begin(sizes, _first_pass(trainer, samples, carried) if is_needed else None)
        return samples, num_items

    trainer.get_batch_samples = get_batch_samples


def _first_pass(
    trainer: Trainer, samples: Sequence[Mapping[str, Any]], carried: Carried
) -> Iterator[tuple[Any, Tensor, dict[str, Tensor]]]:
    """Output, labels and columns of each micro-batch, with the dropout that training will draw.

    One at a time: the outputs of a whole step would not fit.
    """
    model = cast(nn.Module, trainer.model_wrapped)
    model.train()
    device = trainer.args.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), trainer.compute_loss_context_manager():
        for batch in samples:
            moved = trainer._prepare_inputs(dict(batch))  # pyright: ignore[reportPrivateUsage]
            labels = cast(Tensor, moved.pop("labels"))
            with torch.no_grad():
                output = model(**moved)
            yield output, labels, carried.columns


def _check(
    trainer: Trainer,
    weights: Weights,
    *,
    column: str | None,
    domains: Sequence[str],
    domain_column: str,
) -> None:
    """Whether the weights would reach the loss."""
    args = trainer.args
    needed = [name for name in (column, domain_column if domains else None) if name]
    if needed and args.remove_unused_columns:
        raise ConfigError(
            f"the trainer removes {' and '.join(needed)} before the loss can see it",
            fix="set remove_unused_columns=False in its arguments; what the model does not take is "
            "then left out here",
        )
    present = getattr(trainer.train_dataset, "column_names", None)
    for name in needed:
        if isinstance(present, list) and name not in present:
            raise ConfigError(
                f"the training data have no column {name}, but {', '.join(map(str, present))}",
                fix="name the column that holds it, or add it",
            )
    if isinstance(weights, LossReweighting) and weights.within_domain and not domains:
        raise ConfigError("within_domain needs the domains", fix="pass their names as domains")
    for name in ("packing", "padding_free"):
        if getattr(args, name, False):
            raise ConfigError(
                f"{name} joins examples, so that the trainer cannot weigh them apart",
                fix=f"set {name}=False",
            )
    reasons = {
        "it has a compute_loss_func already": trainer.compute_loss_func is not None,
        "it has label smoothing": args.label_smoothing_factor != 0,
        "use_liger_kernel keeps the logits to itself": getattr(args, "use_liger_kernel", False),
        "it runs on several GPUs in one process": args.n_gpu > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"the trainer cannot weigh: {reason}",
                fix="switch that off; for several GPUs start one process for each with torchrun",
            )


def _unwrapped(trainer: Trainer) -> nn.Module:
    model = cast(nn.Module, trainer.model)
    base = getattr(model, "get_base_model", None)
    if callable(base) and hasattr(model, "peft_config"):
        return cast(nn.Module, base())
    return model


def shifts_labels(trainer: Trainer) -> bool:
    """Whether position t of the trainer's model predicts label t + 1.

    Raises:
        ConfigError: it is not known how the losses of its examples are computed.
    """
    model = _unwrapped(trainer)
    kind = getattr(model, "loss_type", None)
    config = getattr(model, "config", None)
    if kind not in (*_SHIFTED, *_ALIGNED):
        raise ConfigError(
            f"it is not known how {type(model).__name__} computes the losses of examples",
            fix="pass a function of output and labels as losses= to apply_weights",
        )
    if getattr(config, "output_router_logits", False):
        raise ConfigError(
            "the model adds a loss for its router, which a weighted loss would leave out",
            fix="set output_router_logits to False in the model's config",
        )
    return kind in _SHIFTED and not getattr(config, "is_encoder_decoder", False)


def _measure(trainer: Trainer) -> Measure:
    """How to read the losses of examples from the trainer's model."""
    shift = shifts_labels(trainer)
    return lambda output, labels: class_losses(output, labels, shift=shift)


def _taken(trainer: Trainer) -> list[str]:
    """Columns that the model or the trainer's own collator take."""
    # TRL's trainers list the columns of their collators there.
    fill = getattr(trainer, "_set_signature_columns_if_needed", None)
    if callable(fill):
        fill()
    listed = getattr(trainer, "_signature_columns", None)
    if listed is None:
        listed = [*inspect.signature(_unwrapped(trainer).forward).parameters, *trainer.label_names]
    return [*listed, "label", "label_ids"]


class _Log(TrainerCallback):
    """Tells what the weights do, and keeps the window of the robust form in the checkpoints."""

    def __init__(
        self, trainer: Trainer, loss: WeightedLoss, domains: Sequence[str], *, keeps_window: bool
    ) -> None:
        self._trainer, self._loss, self._domains = trainer, loss, tuple(domains)
        self._keeps_window = keeps_window

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        saved = noted(state, _WINDOW)
        if self._keeps_window and saved is not None:
            self._loss.window = Window(
                torch.tensor(saved["losses"], dtype=torch.float64),
                torch.tensor(saved["domains"], dtype=torch.int64),
                torch.tensor(saved["steps"], dtype=torch.int64),
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._keeps_window:
            window = self._loss.window._asdict()
            note(state, _WINDOW, {name: values.tolist() for name, values in window.items()})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The trainer's own entry of a training step; what is logged here comes by as well.
        if "loss" not in (logs or {}):
            return
        told = self._loss.summary()
        if told is None:
            return
        values = {
            "weights/unweighted_loss": told.mean_loss,
            "weights/effective_share": told.effective_size / told.num_examples,
            "weights/largest": told.largest,
        }
        for name, mean in zip(self._domains, told.domain_weights.tolist(), strict=False):
            if not math.isnan(mean):  # no number where it had no example in this step
                values[f"weights/domain/{name}"] = mean
        self._trainer.log(values)
