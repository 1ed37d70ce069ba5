"""One optimiser step, and the state it leaves: AdamW under `accelerate`, resumable to the bit.

Every draw of a step (dropout) is seeded by (seed, step), and the learning rate is a function of
the step, so that weights, moments and the number of the step are all there is to resume from.
"""

import math
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from curate.data.pulse import beat
from curate.errors import ConfigError
from curate.models.checkpoints import Moments
from curate.models.epochs import random_seed
from curate.models.settings import Train
from curate.models.sharded import is_placed

_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


class StepResult(NamedTuple):
    """What a step did."""

    step: int
    """Its number, from 1."""
    lr: float
    losses: Any
    """What the caller's loss function returned; its `mean` was minimised."""


def learning_rate(step: int, *, total_steps: int, settings: Train) -> float:
    """Learning rate of a step: it rises to the peak, then falls; no step has a rate of 0.

    Args:
        step: from 1.
        total_steps: of the whole run.
        settings: peak, share of the warm-up, form of the fall.
    """
    warmup = math.ceil(settings.warmup * total_steps)
    if step <= warmup:
        return settings.lr * step / warmup
    behind = (step - warmup) / (total_steps - warmup + 1)
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "linear":
        return settings.lr * (1 - behind)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * behind))


class Optimiser:
    """A model in training.

    Args:
        model: its parameters are float32 while they are trained.
        settings: learning rate, decay, clipping.
        seed: of the training run.
        total_steps: for the learning rate.
        device: where it trains.
        dtype: float32, or the half type of mixed precision.

    Raises:
        ConfigError: float16 was asked for on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Train,
        *,
        seed: int,
        total_steps: int,
        device: torch.device,
        dtype: str = "float32",
    ) -> None:
        if dtype == "float16" and device.type == "cpu":
            raise ConfigError(
                "model.dtype is float16, in which a CPU cannot train",
                fix="set model.dtype to bfloat16 or float32",
            )
        self.settings = settings
        self.seed = seed
        self.total_steps = total_steps
        self.dtype = dtype
        self.step_number = 0
        """Steps done."""
        self._accelerator = _accelerator(device, _PRECISION[dtype])
        # Moved before AdamW sees the parameters. It is not "prepared": that wraps `forward` only,
        # and a task may call a model's body and head apart.
        self.model = model if is_placed(model) else model.float().to(self._accelerator.device)
        self._adamw = torch.optim.AdamW(_groups(self.model, settings.weight_decay), lr=settings.lr)
        self._optimiser = self._accelerator.prepare_optimizer(self._adamw)

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    def precision(self) -> AbstractContextManager[None]:
        """Inside, the model computes in the half type of mixed precision, where one was chosen."""
        return self._accelerator.autocast()

    def step(self, losses: Callable[[nn.Module], Any]) -> StepResult:
        """One step down the gradient of a loss.

        Args:
            losses: maps the model to a value whose `mean` is minimised; called once, in training
                mode, with the random state of this step.
        """
        self.begin()
        with self.precision():
            found = losses(self.model)
        self.backward(found.mean)
        return self.finish(found)

    def begin(self) -> float:
        """Get ready for the next step, in training mode and with its random state; its rate.

        `step` in three parts, for those who find the gradient in several passes: between this and
        `finish` it is left in `.grad`.
        """
        number = self.step_number + 1
        lr = learning_rate(number, total_steps=self.total_steps, settings=self.settings)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self.model.train()
        seed_draws(random_seed(self.seed, "train", "step", number), self.device)
        return lr

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to `.grad`."""
        self._accelerator.backward(loss)

    def finish(self, losses: Any = None) -> StepResult:
        """Go down what `.grad` holds, and empty it."""
        lr = float(self._adamw.param_groups[0]["lr"])
        if self.settings.clip_norm > 0:
            self._accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.step_number += 1
        beat()
        return StepResult(self.step_number, lr, losses)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn, tied ones once."""
        return [parameter for _, parameter in _trained(self.model)]

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop AdamW's moments of some parameters, as if no step had used them."""
        for parameter in parameters:
            self._adamw.state.pop(parameter, None)

    def second_moments(self) -> list[Tensor] | None:
        """AdamW's mean squares of `trained`, corrected for their start at 0; None before step 1."""
        if not self.step_number:
            return None
        beta = float(self._adamw.param_groups[0]["betas"][1])
        found: list[Tensor] = []
        for parameter in self.trained:
            state = self._adamw.state.get(parameter)
            if state:
                found.append(state["exp_avg_sq"] / (1 - beta ** float(state["step"])))
            else:  # no batch has used it yet
                found.append(torch.zeros_like(parameter))
        return found

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step needs: trained weights, buffers, moments."""
        model = self.model
        found: dict[str, Tensor] = {f"buffer.{name}": b for name, b in model.named_buffers()}
        for name, parameter in _trained(model):
            found[f"weight.{name}"] = parameter
            for key, value in self._adamw.state.get(parameter, {}).items():
                found[f"adamw.{key}.{name}"] = value
        return found

    def facts(self) -> dict[str, Any]:
        """What is no tensor and the next step needs, as JSON values."""
        scaler = self._accelerator.scaler
        return {"step": self.step_number, "scaler": scaler.state_dict() if scaler else None}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go back to what `state` and `facts` gave."""
        model = self.model
        for name, buffer in model.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        for name, parameter in _trained(model):
            parameter.copy_(tensors[f"weight.{name}"])
            state: dict[str, Tensor] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                saved = tensors.get(f"adamw.{key}.{name}")
                if saved is not None:  # a parameter that no batch has used yet has no moments
                    # AdamW keeps its count on the CPU, wherever the weights are.
                    state[key] = saved.clone() if key == "step" else saved.to(parameter.device)
            if state:
                self._adamw.state[parameter] = state
        if facts["scaler"] and self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(facts["scaler"])
        self.step_number = facts["step"]

    def moments(self) -> Moments:
        """AdamW's moments by parameter name."""
        found = Moments({}, {})
        for name, parameter in _trained(self.model):
            state = self._adamw.state.get(parameter)
            if state:
                found.gradient[name] = state["exp_avg"]
                found.square[name] = state["exp_avg_sq"]
        return found


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed what models draw, such as dropout.

    `torch.manual_seed` notes for GPUs that have not been used yet from where it was called, which
    takes a millisecond.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def own_random_state(device: torch.device) -> Generator[None]:
    """Leaves the caller's random state as it was, whatever is drawn inside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that learn; tied ones once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and the scales of norms do not."""
    parameters = [parameter for _, parameter in _trained(model)]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _accelerator(device: torch.device, mixed_precision: str) -> Accelerator:
    """An accelerator for one device; the library keeps one state per process, so it is renewed."""
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    name = "ACCELERATE_TORCH_DEVICE"  # its own way to name a device that is not the first
    before = os.environ.get(name)
    os.environ[name] = str(device)
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
