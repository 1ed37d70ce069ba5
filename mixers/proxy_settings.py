"""How a proxy is trained: the small model that shows a mixer how domains are learned."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError
from curate.models.settings import Train


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """One training run: its model, its batches, its steps."""

    __pydantic_config__: ClassVar = STRICT

    steps: int = 1000
    """Optimiser steps."""
    sequences: int = 64
    """Sequences of a step, over all ranks."""
    length: int | None = None
    """Tokens of a sequence; by default `task.max_tokens`."""
    packed: bool = True
    """Language models only: documents one behind the other in sequences of just `length` tokens,
    no document seeing another; else one sequence for each example."""
    model: dict[str, Any] | None = None
    """A smaller model from scratch: `model_type` and the fields of its transformers configuration;
    by default what `model` says."""
    piece_tokens: int | None = None
    """Most tokens that go through the model together; by default the whole step. Rules that weigh
    by loss then need a forward pass more."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 switches it off."""
    seed: int = 0
    """Of weights and draws, beside the run's own."""
    ranks: int = 1
    """Processes that share a step, one on each worker of the cluster."""
    held_out: int = 64
    """Held-out sequences of each domain on which the loss is reported."""
    evaluate_every: int | None = None
    """Steps between two looks at the held-out losses; by default only the last step has one."""
    resume_every_seconds: float = 30.0
    """How often the state to resume from is written."""
    keep_model: bool = False
    """Keep the trained model beside the result."""

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "lr", "ranks"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, not above 0",
                    fix=f"set mix.proxy.{name} to a positive number",
                )
        if self.length is not None and self.length < 2:
            raise ConfigError(
                f"length is {self.length}: nothing would follow a token",
                fix="set mix.proxy.length to 2 or more, such as 512",
            )
        for name in ("piece_tokens", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}", fix=f"remove mix.proxy.{name}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(
                f"warmup is {self.warmup}, outside [0, 1]",
                fix="set mix.proxy.warmup to a share of the steps such as 0.06",
            )
        if self.held_out < 0 or self.weight_decay < 0 or self.clip_norm < 0:
            raise ConfigError(
                "held_out, weight_decay and clip_norm cannot be negative",
                fix="set them to 0 to switch them off",
            )

        if not self.resume_every_seconds >= 0:
            raise ConfigError(
                f"resume_every_seconds is {self.resume_every_seconds}, not 0 or more",
                fix="set mix.proxy.resume_every_seconds to 0 to write the state after every step,"
                " or to seconds such as 30",
            )

    @property
    def train(self) -> Train:
        """What the optimiser reads."""
        return Train(
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            schedule=self.schedule,
            clip_norm=self.clip_norm,
        )
