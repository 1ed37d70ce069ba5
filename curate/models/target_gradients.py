"""Training on the target: its weights and its gradient just before the update, step by step.

Every evaluated step leaves one file with the weights that are trained, the buffers, and the
gradient of the minibatch's mean loss, taken in eval mode; the update then uses the same minibatch
in train mode. A run that was killed goes on from its last state and writes the same bytes.

Shapes: N target examples, B examples of a minibatch.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from curate.errors import ConfigError, DivergedError
from curate.models.checkpoints import load_state, save_state
from curate.models.epochs import Lengths, Schedule, epoch_windows, plan_epochs
from curate.models.gradient_similarity import position_losses
from curate.models.optimiser import Optimiser, own_random_state
from curate.models.recorded_steps import write_step
from curate.models.tasks import Batch, Encoded, Task
from curate.models.training_log import batch_losses

log = logging.getLogger(__name__)

EVALUATED_STEPS = 100
"""About how many steps are evaluated where the settings leave it open."""

_TELL_SECONDS = 20.0
_SPARE_BYTES = 256 << 20
"""Left free on the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What is written, and where."""

    folder: Path
    fingerprint: str
    """Of everything the run depends on; a state with another one is not resumed."""
    every: int
    """Steps from one evaluated step to the next; the first step is always evaluated."""
    measures: Callable[[str], bool]
    """Which parameters' gradients are kept, by name."""
    runs: int = 1
    """Trainings of this size that are still to come, this one included: for the disk."""
    resume_every_seconds: float = 30.0

    @property
    def state(self) -> Path:
        return self.folder / "resume" / "state.safetensors"


def target_lengths(encoded: Encoded, *, batch_size: int, batch_tokens: int) -> tuple[Lengths, int]:
    """(N,) what each example counts for in a minibatch, and the minibatch's budget.

    An example counts for its tokens, and for its share of `batch_size` examples at least, so that
    a minibatch is within both bounds.
    """
    share = math.ceil(batch_tokens / batch_size)
    counts = np.where(encoded.num_scored > 0, np.maximum(encoded.lengths, share), 0)
    return counts.astype(np.int32), share * batch_size


def target_schedule(lengths: Lengths, *, seed: int, budget: int, epochs: float) -> Schedule:
    """The steps of a training on the target."""
    return plan_epochs(
        [lengths], seed=seed, batch_tokens=budget, epochs=epochs, save_every_epochs=epochs
    )


def evaluated_steps(total_steps: int, every: int | str) -> tuple[int, list[int]]:
    """The distance of evaluated steps, and their numbers, from 1."""
    gap = math.ceil(total_steps / EVALUATED_STEPS) if isinstance(every, str) else every
    return max(gap, 1), list(range(1, total_steps + 1, max(gap, 1)))


def batch_gradient(
    model: nn.Module, task: Task, batch: Batch, names: Sequence[str]
) -> tuple[dict[str, Tensor], float]:
    """Gradient of a minibatch's mean loss in eval mode, and the loss, nats.

    Args:
        model: left in eval mode.
        task: of the batch.
        batch: on the model's device.
        names: of the parameters; one that has no part in the loss gets zeros.
    """
    model.eval()
    known = dict(model.named_parameters())
    chosen = [known[name] for name in names]
    with torch.enable_grad():
        loss = position_losses(model, task, batch)[0].mean()
    grads = cast(tuple[Tensor | None, ...], torch.autograd.grad(loss, chosen, allow_unused=True))
    found = {
        name: torch.zeros_like(parameter) if grad is None else grad
        for name, parameter, grad in zip(names, chosen, grads, strict=True)
    }
    return found, float(loss.detach())


def squared_norm(gradient: Mapping[str, Tensor]) -> float:
    """Over all parameters, summed in float64."""
    return float(sum(value.double().square().sum() for value in gradient.values()))


def record(
    optimiser: Optimiser,
    task: Task,
    encoded: Encoded,
    *,
    lengths: Lengths,
    budget: int,
    schedule: Schedule,
    recording: Recording,
) -> list[dict[str, Any]]:
    """Train on the target to the end, from the saved state where there is one.

    Args:
        optimiser: a fresh model in training.
        task: of the model.
        encoded: all target examples.
        lengths: from `target_lengths`.
        budget: likewise.
        schedule: from `target_schedule`.
        recording: what is written.

    Returns:
        For each evaluated step `step`, `lr`, `loss` before the update, `square`: the squared norm
        of the target's gradient.

    Raises:
        ConfigError: no parameter is to be measured, or the disk is too small.
        DivergedError: loss or gradient is no longer finite.
        OutputError: the disk refuses a write.
    """
    with own_random_state(optimiser.device):
        loop = _Loop(optimiser, task, encoded, schedule, recording)
        loop.resume()
        loop.check_disk()
        loop.run(_batches(optimiser.seed, lengths, budget, schedule))
    return loop.points


def _batches(
    seed: int, lengths: Lengths, budget: int, schedule: Schedule
) -> Iterator[npt.NDArray[np.int64]]:
    """(B,) examples of each step, from the first."""
    for epoch, steps in enumerate(schedule.epoch_steps):
        windows = epoch_windows([lengths], seed=seed, epoch=epoch, batch_tokens=budget)
        batches = [indices for window in windows for indices in window.batches]
        yield from batches[:steps]


class _Loop:
    """One training on the target in progress."""

    def __init__(
        self,
        optimiser: Optimiser,
        task: Task,
        encoded: Encoded,
        schedule: Schedule,
        recording: Recording,
    ) -> None:
        self.optimiser, self.task, self.encoded = optimiser, task, encoded
        self.schedule, self.recording = schedule, recording
        self.points: list[dict[str, Any]] = []
        named = [(n, p) for n, p in optimiser.model.named_parameters() if p.requires_grad]
        self.trained = dict(named)
        self.names = [name for name, _ in named if recording.measures(name)]
        if not self.names:
            some = ", ".join([name for name, _ in named][:3])
            raise ConfigError(
                "no parameter of the model is to be measured",
                fix=f"correct score.scorers.dvgs.parameters; there are {some}, ...",
            )

    def resume(self) -> None:
        saved = load_state(self.recording.state)
        if saved is None or saved[1].get("fingerprint") != self.recording.fingerprint:
            return
        tensors, facts = saved
        self.optimiser.load(tensors, facts["optimiser"])
        self.points = facts["points"]
        log.info("target: resuming after step %d", self.optimiser.step_number)

    def check_disk(self) -> None:
        """Refuse to begin what the disk cannot hold."""
        total = self.schedule.total_steps
        steps = len(range(1, total + 1, self.recording.every))
        each = 4 * sum(p.numel() for p in self.trained.values())
        each += 4 * sum(self.trained[name].numel() for name in self.names)
        whole = steps * each * self.recording.runs
        due = whole - len(self.points) * each
        free = shutil.disk_usage(self.recording.folder).free - _SPARE_BYTES
        log.info("target: %d evaluated steps take %.1f MB", steps, steps * each / 1e6)
        if due > free:
            possible = max(free, 0) / max(whole, 1)
            every = math.ceil(self.recording.every / possible) if possible else 0
            fix = (
                f"set score.scorers.dvgs.every to {every} or more, or fewer epochs"
                if 0 < every <= total
                else "free some space, choose another --out, or measure a smaller model"
            )
            raise ConfigError(
                f"weights and gradients of {steps} evaluated steps with {self.recording.runs}"
                f" seeds take {whole / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB are free",
                fix=fix,
            )

    def run(self, batches: Iterator[npt.NDArray[np.int64]]) -> None:
        kept = told = time.monotonic()
        total = self.schedule.total_steps
        for number, indices in enumerate(batches, start=1):
            if number <= self.optimiser.step_number:
                continue
            self._step(number, self._batch(indices), len(indices))
            now = time.monotonic()
            if now - told >= _TELL_SECONDS or number == total:
                told = now
                log.info("target: step %d of %d, loss %.4f", number, total, self.points[-1]["loss"])
            if now - kept >= self.recording.resume_every_seconds and number < total:
                self._keep()
                kept = time.monotonic()

    def _batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        batch = self.task.collate(self.encoded, indices)
        device = self.optimiser.device
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()}

    def _step(self, number: int, batch: Batch, size: int) -> None:
        model = self.optimiser.model
        gradient: dict[str, Tensor] = {}
        loss = 0.0
        is_evaluated = (number - 1) % self.recording.every == 0
        if is_evaluated:
            gradient, loss = batch_gradient(model, self.task, batch, self.names)
            write_step(self.recording.folder, number, model, gradient)
        result = self.optimiser.step(
            lambda model: batch_losses(self.task.logits_and_targets(model, batch), size)
        )
        mean = float(result.losses.mean.detach())
        square = squared_norm(gradient)
        if not all(map(math.isfinite, (loss, mean, square))):
            raise DivergedError(
                f"the loss on the target at step {number} is {mean}, its gradient's square"
                f" {square}",
                fix="lower score.scorers.dvgs.lr",
            )
        if is_evaluated:
            point = {"step": number, "lr": result.lr, "loss": loss, "square": square}
            self.points.append(point)

    def _keep(self) -> None:
        """Write the state to resume from."""
        facts = {
            "fingerprint": self.recording.fingerprint,
            "optimiser": self.optimiser.facts(),
            "points": self.points,
        }
        save_state(self.recording.state, self.optimiser.state(), facts)
