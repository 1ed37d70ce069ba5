"""DGA in your own training: a stream that leans to the domains which help with the target.

Every T_r steps, between two steps of the optimiser, the gradient of the trainer's model on fresh
examples of each domain is held against that on examples of the target, and the stream goes on with
what `mixers.dga` makes of it, from the first position that no worker has read. `.grad`, the random
state and the trainer's own examples are left as they are.

Source, departures: `mixers.dga`. The lag is that of the loader's reading ahead, and is logged.
Cost: see `mixers.dga`; every rank takes its share of the examples measured.
Shapes: K domains, N distributions over them (N = K where none are given), B examples of a piece.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curate.errors import ConfigError, InputError
from mixers.basis import make_basis
from mixers.dga import DGA
from mixers.dga_schedule import Mix, first_mix, next_mix
from mixers.live_gradients import LiveGradients
from mixers.share_limits import epoch_caps
from mixers.stream import Examples, MixtureStream
from mixers.trainer_state import note, noted
from mixers.trainer_stream import MixtureCallback

_STATE = "curate.live_alignment"
"""Under this name the weights lie in a checkpoint's trainer_state.json."""


def align_mixture(
    trainer: Trainer,
    target: Examples,
    settings: DGA | None = None,
    *,
    delay_steps: int | None = None,
    log: Callable[[dict[str, float]], object] | None = None,
) -> "LiveAlignment":
    """Let a trainer's stream follow the target; call it before `train()`.

    Training begins with the probabilities of the stream, or with `start` of the settings. Resume
    with `ignore_data_skip=True`.

    Args:
        trainer: whose `train_dataset` is a `MixtureStream`; its collator makes the batches.
        target: examples such as the domains hold; keep some of them back to report on.
        settings: how often, how far; `mixers.dga` says what is there.
        delay_steps: see `MixtureCallback`.
        log: where values go, such as `trainer.log`; by default only into `state.log_history`.

    Returns:
        What knows the weights; `mixture()` is their mean.

    Raises:
        ConfigError: the trainer has no stream, or gradients that are spread over devices.
        InputError: the target is empty.
    """
    stream, settings = _checked(trainer, target), settings or DGA()
    follows = settings.start is None and settings.basis is None
    if follows:
        settings = replace(settings, start=stream.probabilities(stream.start), start_uniform=0.0)
    aligner = LiveAlignment(trainer, stream, target, settings, log=log)
    if not follows:
        stream.set_probabilities(aligner.mixture(), from_position=stream.start)
    aligner.mixing = MixtureCallback(stream, live=aligner, delay_steps=delay_steps, log=log)
    trainer.add_callback(aligner)
    trainer.add_callback(aligner.mixing)
    return aligner


class LiveAlignment(TrainerCallback):
    """Measures, and says the probabilities; `align_mixture` makes one and ties it to a trainer."""

    mixing: MixtureCallback

    def __init__(
        self,
        trainer: Trainer,
        stream: MixtureStream,
        target: Examples,
        settings: DGA,
        *,
        log: Callable[[dict[str, float]], object] | None,
    ) -> None:
        self._stream, self._settings, self._log = stream, settings, log
        self._basis = make_basis(tuple(stream.domains), settings.basis)
        self._gradients = LiveGradients(trainer, stream, target, settings, self._basis)
        self._reset()

    @property
    def weights(self) -> dict[str, float]:
        """Name of a domain, or of a distribution of the basis -> its last weight."""
        return dict(zip(self._basis.names, self._mix.log_weights.exp().tolist(), strict=True))

    def mixture(self) -> dict[str, float]:
        """Domain -> mean of its probabilities over the measurements: what to train another model
        with, where the schedule cannot be followed."""
        return dict(zip(self._stream.domains, self._mix.mean.tolist(), strict=True))

    def schedule(self) -> list[tuple[int, dict[str, float]]]:
        """Step and probabilities from then on: what `MixtureCallback` takes, made a dict."""
        return [
            (int(step), dict(zip(self._stream.domains, row.tolist(), strict=True)))
            for step, row in zip(self._mix.steps, self._mix.schedule, strict=True)
        ]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        loader: DataLoader[Any] = kwargs["train_dataloader"]
        # The trainer's own may be wrapped there, to leave out what the model does not take.
        self._gradients.collate = cast(Any, loader.collate_fn)
        self._reset()
        if not state.global_step:
            return
        saved = noted(state, _STATE)
        if saved is None:
            raise InputError(
                f"the checkpoint of step {state.global_step} holds no weights of a live mixture",
                fix="resume with the callbacks that it was saved with, or start anew",
            )
        if saved["names"] != list(self._basis.names):
            raise InputError(
                f"the checkpoint's weights are of {', '.join(saved['names'])}",
                fix="resume with the same domains and basis",
            )
        kinds = {"steps": torch.int64}
        self._mix = Mix(
            **{
                name: torch.tensor(saved[name], dtype=kinds.get(name, torch.float64))
                for name in Mix._fields
            }
        )
        if not len(self._mix.steps):
            self._mix = self._mix._replace(schedule=self._empty)
        self._gradients.drawn = saved["drawn"]
        self._note = saved

    def __call__(self, state: TrainerState) -> dict[str, float] | None:
        """The probabilities from a later step on, where this one was measured; see `Live`."""
        found = None
        begins = state.global_step + self.mixing.delay
        if begins < state.max_steps and self._settings.is_due(state.global_step, state.max_steps):
            self._measure(state, begins)
            found = dict(zip(self._stream.domains, self._mix.shares.tolist(), strict=True))
            self._note = self._kept()
        note(state, _STATE, self._note)
        return found

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The trainer's own entry of a training step; what is logged here comes by as well.
        if "loss" not in (logs or {}) or self._alignment is None:
            return
        found = zip(self._basis.names, self._alignment.tolist(), strict=True)
        values = {f"alignment/{name}": value for name, value in found if value == value}
        values["alignment/lag_steps"] = float(self.mixing.delay)
        if self._log is not None:
            self._log(values)
        else:
            state.log_history.append({**values, "step": state.global_step})

    def _reset(self) -> None:
        self._mix = first_mix(self._settings, self._basis)
        self._empty = self._mix.schedule
        self._alignment: Tensor | None = None
        self._gradients.drawn = {}
        self._note = self._kept()

    def _kept(self) -> dict[str, Any]:
        """What the next measurement depends on, as JSON values."""
        mix = {name: tensor.tolist() for name, tensor in self._mix._asdict().items()}
        return {"names": list(self._basis.names), "drawn": self._gradients.drawn, **mix}

    def _measure(self, state: TrainerState, begins: int) -> None:
        """Move the weights; they hold from the step that begins there."""
        settings, basis = self._settings, self._basis
        if not len(self._mix.steps):
            settings.tell_cost(len(basis.names), self.mixing.global_batch)
        found = self._gradients.alignment(state.global_step)
        caps = self._caps(state, begins)
        self._mix = next_mix(settings, basis, self._mix, found, begins=begins, caps=caps)
        self._alignment = found

    def _caps(self, state: TrainerState, begins: int) -> Tensor | None:
        """(K,) most that each domain can have from that step on."""
        stream, mixing = self._stream, self.mixing
        left = (state.max_steps - begins) * mixing.global_batch
        if self._settings.max_epochs is None or left <= 0:
            return None
        sizes = torch.from_numpy(stream.sizes).double()
        position = mixing.position(state.global_step)
        epochs = torch.tensor(list(stream.epochs(position).values()), dtype=torch.float64)
        # What will be drawn before then is not counted yet.
        coming = mixing.delay * mixing.global_batch
        now = torch.tensor(list(stream.probabilities(position).values()), dtype=torch.float64)
        read = epochs * sizes + coming * now
        return epoch_caps(sizes, read, left=left, max_epochs=self._settings.max_epochs)


def _checked(trainer: Trainer, target: Examples) -> MixtureStream:
    stream = trainer.train_dataset
    if not isinstance(stream, MixtureStream):
        raise ConfigError(
            "the trainer trains on no MixtureStream, so that nothing can be mixed",
            fix="pass a MixtureStream as train_dataset",
        )
    callbacks = cast(Any, trainer.callback_handler).callbacks
    if any(isinstance(each, MixtureCallback) for each in callbacks):
        raise ConfigError(
            "the trainer has a MixtureCallback already, and both would set the mixture",
            fix="leave the callback out: align_mixture adds its own",
        )
    for name, holds in {
        "FSDP": getattr(trainer, "is_fsdp_enabled", False),
        "DeepSpeed": getattr(trainer, "is_deepspeed_enabled", False),
        "several GPUs in one process": trainer.args.n_gpu > 1,
    }.items():
        if holds:
            raise ConfigError(
                f"gradients cannot be compared under {name}",
                fix="start one process for each GPU with torchrun, each with the whole model",
            )
    if len(target) == 0:
        raise InputError("the target has no examples", fix="give a few hundred")
    return stream
