"""A mixture that changes during the training of a `Trainer`: by a schedule, or as a mixer decides.

Steps become positions of the stream: position = step times global batch size. The loader is told to
deal out whole batches, and the stream's state goes into every checkpoint.

Resuming: with `ignore_data_skip=True` the stream goes on from its state at once, with another
number of ranks or workers too. Without it `Trainer` reads the stream again from its beginning,
which gives the same examples where the schedule is known from the start.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curate.errors import ConfigError, InputError
from curate.plan.mixture import DomainSize, Mixture
from mixers.phases import phase_probabilities
from mixers.stream import MixtureStream
from mixers.trainer_state import note, noted

log = logging.getLogger(__name__)

Live = Callable[[TrainerState], Mapping[str, float] | None]
"""The trainer's state after a step -> new probabilities, or None to go on as before."""

_STREAM = "curate.mixture_stream"
"""Under this name the stream's state lies in a checkpoint's trainer_state.json."""


class MixtureCallback(TrainerCallback):
    """Drives the stream that a trainer trains on.

    Args:
        stream: the trainer's `train_dataset`.
        schedule: a mixture with phases, such as that of `mixers.cooldown`, its shares of tokens
            spread over `max_steps`; or step -> probabilities of examples. None to keep what the
            stream has.
        sizes: with a mixture, what there is of each domain: turns shares of tokens into
            probabilities of examples. None where all examples are of one length.
        live: asked after every step, for the mixture from `delay_steps` later on; it must answer
            the same on all ranks.
        delay_steps: how many steps after a decision the first example is drawn by it; by default
            just more than the loader has read ahead.
        log: where values go, such as `trainer.log`; by default only into `state.log_history`.
    """

    def __init__(
        self,
        stream: MixtureStream,
        schedule: Mixture | Mapping[int, Mapping[str, float]] | None = None,
        *,
        sizes: Mapping[str, DomainSize] | None = None,
        live: Live | None = None,
        delay_steps: int | None = None,
        log: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        if schedule is not None and live is not None:
            raise ConfigError(
                "a schedule and a live mixer both set the mixture", fix="give one of the two"
            )
        self.stream, self.log = stream, log
        self._schedule, self._sizes, self._live = schedule, sizes, live
        self._asked_delay, self._delay = delay_steps, 1
        # Its beginning, even if somebody has looked at the first example already.
        self._initial = stream.state_dict(stream.start)
        self._batch = 1
        self._anchor = (0, int(self._initial["position"]))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        loader: DataLoader[Any] = kwargs["train_dataloader"]
        self._batch = _deal(self.stream, loader, args)
        _own_seeds(loader, self.stream.seed)
        self._delay = _delay(loader, args) if self._asked_delay is None else self._asked_delay
        saved = noted(state, _STREAM)
        if state.global_step and args.ignore_data_skip:
            if saved is None:
                raise InputError(
                    f"the checkpoint of step {state.global_step} holds no state of the stream",
                    fix="resume without ignore_data_skip, or start anew",
                )
            self.stream.load_state_dict(saved)
            self._anchor = (state.global_step, int(saved["position"]))
            return
        if state.global_step:
            self._check_replay(saved)
        self.stream.load_state_dict(self._initial)
        self._anchor = (0, int(self._initial["position"]))
        for step, probabilities in self._changes(state):
            self.stream.set_probabilities(probabilities, from_position=self.position(step))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._live is not None:
            found = self._live(state)
            if found is not None:
                start = self.position(state.global_step + self._delay)
                self.stream.set_probabilities(found, from_position=start)
        position = self.position(state.global_step)
        # Every step, so that no more than one has to be drawn again to know where the stream is.
        kept = {**self.stream.state_dict(position), "global_batch": self._batch}
        note(state, _STREAM, kept)

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
        position = self.position(state.global_step)
        last = max(position - 1, int(self._initial["position"]))
        values = {f"mixture/{name}": p for name, p in self.stream.probabilities(last).items()}
        epochs = self.stream.epochs(position)
        values |= {f"epochs/{name}": times for name, times in epochs.items()}
        if self.log is not None:
            self.log(values)
        else:
            state.log_history.append({**values, "step": state.global_step})

    def _changes(self, state: TrainerState) -> list[tuple[int, Mapping[str, float]]]:
        """Step and probabilities, in order."""
        if self._schedule is None:
            return []
        if isinstance(self._schedule, Mixture):
            phases = phase_probabilities(self._schedule, state.max_steps, sizes=self._sizes)
            return list(phases)
        return sorted(self._schedule.items(), key=lambda entry: entry[0])

    @property
    def delay(self) -> int:
        """Steps between a decision and the first that is drawn by it, once training has begun."""
        return self._delay

    @property
    def global_batch(self) -> int:
        """Examples of a step, over all ranks, once training has begun."""
        return self._batch

    def position(self, step: int) -> int:
        """The first position of a step's examples."""
        since, position = self._anchor
        return position + (step - since) * self._batch

    def _check_replay(self, saved: dict[str, Any] | None) -> None:
        """Whether reading again from the beginning gives the same examples."""
        reason = "the mixture was set live" if self._live is not None else None
        if saved is not None and saved["global_batch"] != self._batch:
            reason = (
                f"a step had {saved['global_batch']} examples when the checkpoint was saved, "
                f"and has {self._batch} now"
            )
        if reason is not None:
            raise ConfigError(
                f"the stream cannot be read again up to the checkpoint: {reason}",
                fix="set ignore_data_skip=True: the stream then goes on from its saved state",
            )


def _deal(stream: MixtureStream, loader: DataLoader[Any], args: TrainingArguments) -> int:
    """Deal out what the loader takes in one go; returns the examples of a step on all ranks."""
    dataset, batch = loader.dataset, loader.batch_size or 1
    is_split = bool(getattr(args.accelerator_config, "split_batches", False))
    together = 1 if is_split else args.world_size
    dealt = batch
    if isinstance(dataset, IterableDatasetShard):
        # Each rank reads the whole stream and keeps its part of what all take in one go.
        batch = dataset.batch_size
        dealt = batch * together
        dataset = dataset.dataset
    if dataset is not stream:
        raise ConfigError(
            "the trainer does not train on the stream of its MixtureCallback",
            fix="pass the same stream as train_dataset",
        )
    if stream.num_ranks > 1:
        raise ConfigError(
            f"the stream is dealt to {stream.num_ranks} ranks, and the trainer deals once more",
            fix="leave rank and num_ranks of the stream as they are",
        )
    stream.batch_size = dealt
    return batch * together * args.gradient_accumulation_steps


def _own_seeds(loader: DataLoader[Any], seed: int) -> None:
    """Draw the seeds of workers apart from the numbers that dropout draws.

    A loader draws one when it begins, also where training is resumed: the dropout after that would
    not be that of the run without a stop.
    """
    for each in (loader, getattr(loader, "base_dataloader", None)):
        if each is not None:
            each.generator = torch.Generator().manual_seed(seed)


def _delay(loader: DataLoader[Any], args: TrainingArguments) -> int:
    """Steps after which nothing is drawn yet, when a step ends."""
    if not loader.num_workers:
        return 1  # accelerate reads one batch ahead
    ahead = loader.num_workers * (loader.prefetch_factor or 2) + 1
    return 1 + math.ceil(ahead / args.gradient_accumulation_steps)
