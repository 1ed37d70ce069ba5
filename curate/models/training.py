"""The training loop: batches in their planned order, one step each, checkpoints, a state to resume.

Everything a step depends on is a function of settings, seed and step number, or stands in the
state file, so that a run that was killed anywhere goes on to the same bytes on one kind of device.

Shapes: N examples of a window, B of a batch.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from curate.errors import CurateError, DivergedError
from curate.models.checkpoints import Checkpoint, load_state, save_checkpoint, save_state
from curate.models.epochs import Schedule, Window, epoch_windows
from curate.models.optimiser import Optimiser, StepResult, own_random_state
from curate.models.tasks.protocol import Encoded, Task
from curate.models.training_data import Data, Files
from curate.models.training_log import Losses, Pending, Sums, batch_losses, write_curve

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_POINTS = 100
"""Points of the learning curve, about, besides one at each checkpoint."""
_TELL_SECONDS = 20.0
"""How often the log has a line, besides one at each checkpoint."""
_PENDING_STEPS = 50
"""Steps whose losses may wait on a GPU: fetching them makes the host wait for it."""


class Place(NamedTuple):
    """The next batch: where it stands and what is in it."""

    epoch: int
    parts: tuple[int, ...]
    indices: npt.NDArray[np.int64]
    """(B,) positions in the examples of `parts`."""
    is_last: bool
    """Whether the window ends with it."""


def run_steps(
    optimiser: Optimiser,
    items: Iterable[Item],
    losses: Callable[[nn.Module, Item], Any],
) -> Iterator[tuple[Item, StepResult]]:
    """Train on whatever comes, step by step; the caller looks at each step before the next.

    Args:
        optimiser: the model in training.
        items: one per step: batches, or batches with their weights.
        losses: maps model and item to a value whose `mean` is minimised.

    Raises:
        CurateError: the GPU has not enough memory for a batch.
    """
    for item in items:
        try:
            result = optimiser.step(lambda model, item=item: losses(model, item))
        except torch.cuda.OutOfMemoryError as error:
            raise CurateError(
                f"step {optimiser.step_number + 1}: the GPU has not enough memory for a batch",
                fix="lower checkpoints.train.batch_tokens",
            ) from error
        yield item, result


def train(
    optimiser: Optimiser, task: Task, data: Data, schedule: Schedule, files: Files
) -> list[dict[str, Any]]:
    """Train to the end, from the saved state where there is one.

    Args:
        optimiser: a fresh model in training.
        task: of the model.
        data: what it trains on.
        schedule: when it stops and saves; from the same lengths, seed and settings.
        files: where it writes.

    Returns:
        The points of the learning curve.

    Raises:
        DivergedError: the loss is no longer finite; names seed and step.
        OutputError: the disk refuses a write.
    """
    with own_random_state(optimiser.device):
        loop = _Loop(optimiser, task, data, schedule, files)
        loop.resume()
        loop.run()
    return loop.sums.points


@dataclass(slots=True)
class _Loop:
    """One training run in progress."""

    optimiser: Optimiser
    task: Task
    data: Data
    schedule: Schedule
    files: Files
    sums: Sums = field(default_factory=Sums)
    values: npt.NDArray[np.float32] = field(
        default_factory=lambda: np.zeros((3, 0), dtype=np.float32)
    )
    """(3, N) the records of the window in progress."""
    pending: list[Pending] = field(default_factory=list[Pending])
    encoded: tuple[tuple[int, ...], Encoded] | None = None
    """The window in memory and its examples."""
    state_time: float = field(default_factory=time.monotonic)
    told_time: float = field(default_factory=time.monotonic)

    def resume(self) -> None:
        """Go on from the saved state, where there is one of this very run."""
        saved = load_state(self.files.state)
        if saved is None or saved[1].get("fingerprint") != self.files.fingerprint:
            return
        tensors, facts = saved
        self.values = tensors.pop("log").numpy()
        self.optimiser.load(tensors, facts["optimiser"])
        self.sums = Sums(**facts["sums"])
        log.info("seed %d: resuming after step %d", self.files.seed, self.optimiser.step_number)

    def run(self) -> None:
        settings = self.optimiser.settings
        every = math.ceil(self.schedule.total_steps / _POINTS)
        for place, result in run_steps(self.optimiser, self._places(), self._losses):
            self.sums.tokens += self._tokens(place)
            self.pending.append(Pending(result.step, place.indices, result.losses))
            is_save = result.step in self.schedule.save_steps
            is_final = result.step == self.schedule.total_steps
            is_point = is_save or result.step % every == 0
            is_due = time.monotonic() - self.state_time >= settings.resume_every_seconds
            on_cpu = self.optimiser.device.type == "cpu"
            many = on_cpu or len(self.pending) >= _PENDING_STEPS
            if many or is_point or is_due or is_final or place.is_last:
                self._settle()
            if place.is_last or is_final:
                self._write_log(place)
            if is_point:
                self._note(result, evaluate=is_save)
            if is_save:
                self._save(result)
            if is_due and not is_final:
                self._keep()
        write_curve(self.files.curve, self.sums)

    def _places(self) -> Iterator[Place]:
        """The batches that are still to come."""
        first_epoch, done = self.schedule.place(self.optimiser.step_number)
        for epoch in range(first_epoch, len(self.schedule.epoch_steps)):
            number = 0
            for window in self._windows(epoch):
                end = number + len(window.batches)
                if end <= done:
                    number = end
                    continue
                if number >= done:  # else the state holds what this window has shown so far
                    size = sum(len(self.data.lengths[part]) for part in window.parts)
                    self.values = np.full((3, size), np.nan, dtype=np.float32)
                for indices in window.batches:
                    number += 1
                    if number > done:
                        yield Place(epoch, window.parts, indices, number == end)
                    if number == self.schedule.epoch_steps[epoch]:
                        break
                if number == self.schedule.epoch_steps[epoch]:
                    break
            done = 0

    def _windows(self, epoch: int) -> Iterator[Window]:
        return epoch_windows(
            self.data.lengths,
            seed=self.optimiser.seed,
            epoch=epoch,
            batch_tokens=self.optimiser.settings.batch_tokens,
        )

    def _examples(self, parts: tuple[int, ...]) -> Encoded:
        if self.encoded is None or self.encoded[0] != parts:
            self.encoded = None  # let go of the last window before the next one is read
            self.encoded = (parts, self.data.encoded(parts))
        return self.encoded[1]

    def _losses(self, model: nn.Module, place: Place) -> Losses:
        batch = self.task.collate(self._examples(place.parts), place.indices)
        device = self.optimiser.device
        moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        weights = None
        if self.data.weights is not None:
            chosen = self.data.weights(place.parts)[place.indices]
            weights = torch.from_numpy(chosen).to(device)
        flat = self.task.logits_and_targets(model, moved)
        return batch_losses(flat, len(place.indices), weights)

    def _tokens(self, place: Place) -> int:
        return int(self._examples(place.parts).lengths[place.indices].sum())

    def _settle(self) -> None:
        """Fetch the numbers of the last steps, check them, file them."""
        for step, indices, losses in self.pending:
            mean = float(losses.mean.detach())
            if not math.isfinite(mean):
                raise _diverged(self.files.seed, f"the loss at step {step} is {mean}")
            self.sums.add(mean, losses.num_counted)
            self.values[:, indices] = losses.examples.cpu().numpy()
        self.pending.clear()

    def _write_log(self, place: Place) -> None:
        """Write the records of the window that is behind; at the end also the empty ones."""
        sizes = [len(self.data.lengths[part]) for part in place.parts]
        ends = np.cumsum(sizes)
        for part, values in zip(place.parts, np.split(self.values, ends[:-1], axis=1), strict=True):
            self.data.write_log(place.epoch, part, values)
        epoch_start = sum(self.schedule.epoch_steps[: place.epoch])
        epoch_end = epoch_start + self.schedule.epoch_steps[place.epoch]
        if self.optimiser.step_number == epoch_end:
            reached = set[int]()
            number = 0
            for window in self._windows(place.epoch):
                if number < self.schedule.epoch_steps[place.epoch] and window.batches:
                    reached.update(window.parts)
                number += len(window.batches)
            for part in sorted(set(range(len(self.data.lengths))) - reached):
                self.data.write_log(place.epoch, part, None)

    def _note(self, result: StepResult, *, evaluate: bool) -> None:
        """A point on the learning curve."""
        held_out = self._held_out_loss() if evaluate else None
        epoch = self.schedule.progress(result.step)
        self.sums.point(step=result.step, epoch=epoch, lr=result.lr, held_out_loss=held_out)
        now = time.monotonic()
        is_told = evaluate or now - self.told_time >= _TELL_SECONDS
        self.told_time = now if is_told else self.told_time
        log.log(
            logging.INFO if is_told else logging.DEBUG,
            "seed %d: step %d of %d, loss %.4f%s",
            self.files.seed,
            result.step,
            self.schedule.total_steps,
            self.sums.points[-1]["loss"],
            "" if held_out is None else f", held out {held_out:.4f}",
        )

    @torch.no_grad()
    def _held_out_loss(self) -> float | None:
        """Mean over the counted positions of the held-out examples, nats."""
        encoded = self.data.held_out
        if encoded is None:
            return None
        model, device = self.optimiser.model, self.optimiser.device
        model.eval()
        total, counted = torch.zeros((), dtype=torch.float64, device=device), 0
        lengths = np.where(encoded.num_scored > 0, encoded.lengths, 0).astype(np.int32)
        budget = self.optimiser.settings.batch_tokens
        for window in epoch_windows([lengths], seed=0, epoch=0, batch_tokens=budget):
            for indices in window.batches:
                batch = self.task.collate(encoded, indices)
                moved: dict[str, Tensor] = {k: v.to(device) for k, v in batch.items()}
                with self.optimiser.precision():
                    flat = self.task.logits_and_targets(model, moved)
                    losses = batch_losses(flat, len(indices))
                total += losses.mean.double() * losses.num_counted
                counted += losses.num_counted
        return float(total) / counted if counted else None

    def _save(self, result: StepResult) -> Checkpoint:
        # The loss speaks of the weights before the step; these are the ones after it.
        if not all(bool(p.isfinite().all()) for p in self.optimiser.model.parameters()):
            raise _diverged(self.files.seed, f"step {result.step} left weights that are not finite")
        write_curve(self.files.curve, self.sums)
        moments = self.optimiser.moments() if self.optimiser.settings.save_moments else None
        return save_checkpoint(
            self.files.root,
            seed=self.files.seed,
            step=result.step,
            epoch=self.schedule.progress(result.step),
            lr=result.lr,
            write_model=self.files.write_model,
            moments=moments,
        )

    def _keep(self) -> None:
        """Write the state to resume from."""
        facts = {
            "fingerprint": self.files.fingerprint,
            "optimiser": self.optimiser.facts(),
            "sums": self.sums.facts(),
        }
        tensors = {**self.optimiser.state(), "log": torch.from_numpy(self.values)}
        save_state(self.files.state, tensors, facts)
        self.state_time = time.monotonic()


def _diverged(seed: int, what: str) -> DivergedError:
    return DivergedError(
        f"seed {seed}: {what}",
        fix="lower checkpoints.train.lr, or raise checkpoints.train.warmup;"
        " checkpoints saved so far are kept until then",
    )
