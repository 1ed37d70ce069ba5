"""Settings of tasks, models, checkpoints and passes; free of torch: every stage reads them."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TextClassification:
    """One label per text."""

    __pydantic_config__: ClassVar = STRICT
    implementation: ClassVar[str] = "curate.models.tasks.classification:TextTask"

    kind: Literal["text-classification"] = "text-classification"
    num_classes: int
    """Number of classes; labels lie in [0, num_classes)."""
    max_tokens: int = 512
    """Longer texts are cut here; the scores say how many tokens counted."""

    def __post_init__(self) -> None:
        _check_classes(self.num_classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TabularClassification:
    """One label per row of numbers."""

    __pydantic_config__: ClassVar = STRICT
    implementation: ClassVar[str] = "curate.models.tasks.classification:TabularTask"

    kind: Literal["tabular-classification"] = "tabular-classification"
    num_classes: int
    """Number of classes; labels lie in [0, num_classes)."""
    scale: float = 1.0
    """Features are multiplied by this before the model sees them."""

    def __post_init__(self) -> None:
        _check_classes(self.num_classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Examples longer than `max_tokens` are read in windows of that size, none of them cut."""

    __pydantic_config__: ClassVar = STRICT

    overlap: int = 128
    """Tokens that a window repeats from the one before: read as context, not counted again."""
    max_windows: int | None = None
    """Most windows of an example; what is behind them is cut, and the scored share says so."""

    def __post_init__(self) -> None:
        if self.overlap < 1:
            raise ConfigError(
                f"overlap is {self.overlap}: a window's first token would have nothing before it",
                fix="set task.window.overlap to 1 or more, such as a quarter of task.max_tokens",
            )
        if self.max_windows is not None and self.max_windows < 1:
            raise ConfigError(
                f"max_windows is {self.max_windows}", fix="remove task.window.max_windows"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageClassification:
    """One label per image."""

    __pydantic_config__: ClassVar = STRICT
    implementation: ClassVar[str] = "curate.models.tasks.images:ImageTask"

    kind: Literal["image-classification"] = "image-classification"
    num_classes: int
    """Number of classes; labels lie in [0, num_classes)."""
    size: int | None = None
    """The largest centred square of each image is scaled to this height and width; none: images
    stay as they are, and all have one size."""
    channels: Literal[1, 3] = 3
    """1 makes all images grey, 3 gives grey ones three equal channels."""
    mean: float | tuple[float, ...] = 0.5
    """Subtracted from pixels in [0, 1]; one number, or one for each channel."""
    std: float | tuple[float, ...] = 0.5
    """What is left is divided by this."""

    def __post_init__(self) -> None:
        _check_classes(self.num_classes)
        if self.size is not None and self.size < 1:
            raise ConfigError(f"size is {self.size}", fix="set task.size to pixels such as 224")
        for name in ("mean", "std"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != self.channels:
                raise ConfigError(
                    f"{name} has {len(given)} numbers, but channels is {self.channels}",
                    fix=f"set task.{name} to one number, or to one for each channel",
                )
        if min(self.std if isinstance(self.std, tuple) else (self.std,)) <= 0:
            raise ConfigError("std is not above 0", fix="set task.std to 0.5; 1 changes nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalLM:
    """Next-token prediction: plain text, prompt and response, or chat messages."""

    __pydantic_config__: ClassVar = STRICT
    implementation: ClassVar[str] = "curate.models.tasks.causal_lm:CausalLMTask"

    kind: Literal["causal-lm"] = "causal-lm"
    max_tokens: int = 1024
    """Longer examples are cut here, or read in windows; the scores say how many tokens counted."""
    turns: Literal["all", "last"] = "all"
    """Which assistant turns of a chat count in the loss."""
    window: Window | None = None
    """How longer examples are read in windows; without it they are cut."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window.overlap >= self.max_tokens:
            raise ConfigError(
                f"overlap is {self.window.overlap}, but a window has {self.max_tokens} tokens",
                fix="set task.window.overlap below task.max_tokens",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Which of two answers is better, by the loss of direct preference optimisation."""

    __pydantic_config__: ClassVar = STRICT
    implementation: ClassVar[str] = "curate.models.tasks.preference:PreferenceTask"

    kind: Literal["preference"] = "preference"
    beta: float = 0.1
    """How far the model may leave the reference: the margin is this times the gain in log odds."""
    max_tokens: int = 1024
    """Longer answers, with their prompt, are cut here; the scores say how many tokens counted."""
    reference: str | None = None
    """Folder or hub id of the model that both answers are compared with; by default model.name."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}", fix="set task.beta to 0.1")


def _check_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}", fix="set task.num_classes to 2 or more")


TASKS = {
    "text-classification": "curate.models.settings:TextClassification",
    "tabular-classification": "curate.models.settings:TabularClassification",
    "image-classification": "curate.models.settings:ImageClassification",
    "causal-lm": "curate.models.settings:CausalLM",
    "preference": "curate.models.settings:Preference",
}
"""Kind -> settings class; its `implementation` is imported when a model is built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Train a tokenizer on the run's own text."""

    __pydantic_config__: ClassVar = STRICT

    train: Literal["bpe"]
    """Byte-level byte-pair encoding."""
    vocab_size: int = 8192
    """Entries of the vocabulary, special tokens included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """A fresh low-rank adapter; the model itself is frozen. Needs the extra `lora`."""

    __pydantic_config__: ClassVar = STRICT

    rank: int = 8
    """Of the update of each matrix."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Layers that get one, by the end of their names: [q_proj, v_proj]; none: all linear layers
    but the head."""
    dropout: float = 0.0
    """Before the adapter, while it is trained; never while measuring."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(
                f"model.lora has rank {self.rank} and alpha {self.alpha:g}",
                fix="set both to positive numbers such as 8 and 16",
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"model.lora.dropout is {self.dropout}, outside [0, 1)",
                fix="set it to a share such as 0.05",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Which model measures: one that exists, or one made from scratch."""

    __pydantic_config__: ClassVar = STRICT

    name: str | None = None
    """Folder saved by transformers, or a hub id."""
    revision: str | None = None
    """Commit of a hub model; the resolved settings hold the one that was used."""
    config: dict[str, Any] | None = None
    """From scratch: `model_type` and the fields of its transformers configuration, or
    `model_type: mlp` with `hidden: [64]` for tables, `model_type: cnn` with `widths: [16, 32]`
    for images."""
    tokenizer: Tokenizer | str | None = None
    """From scratch: a tokenizer to train here, or the name of one that exists."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights while measuring; losses and sums are float32 or better."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    adapter: str | None = None
    """Folder of a saved adapter (peft, safetensors) on top of `name`; only it is measured and
    trained, the model is frozen."""
    lora: LoRA | None = None
    """A fresh adapter on top of `name`, to be trained or measured; likewise."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Load the frozen model in 4 (NF4) or 8 bits: needs a GPU, bitsandbytes, and an adapter where
    gradients are measured."""
    device_map: (
        Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None
    ) = None
    """Spread one model over the devices of a machine, as accelerate does; or module -> device
    (0, 1, cpu, disk). In place of `device`."""

    def __post_init__(self) -> None:
        if self.name is not None and self.config is not None:
            raise ConfigError(
                "model has a name and a config; it is one or the other",
                fix="remove model.config to load the model, or model.name to start from scratch",
            )
        for field in ("adapter", "lora", "quantize", "device_map"):
            if self.config is not None and getattr(self, field) is not None:
                raise ConfigError(
                    f"model.{field} needs a model that exists, but model.config makes a new one",
                    fix=f"remove model.{field}, or set model.name in place of model.config",
                )
        if self.adapter is not None and self.lora is not None:
            raise ConfigError(
                "model has an adapter and lora; it is one or the other",
                fix="remove model.lora to go on with the adapter, or model.adapter to start anew",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """How the scoring models are trained."""

    __pydantic_config__: ClassVar = STRICT

    epochs: float = 1.0
    """Passes over the training examples."""
    max_steps: int | None = None
    """Stop after this many optimiser steps, where that comes first."""
    seeds: tuple[int, ...] = (0,)
    """One independent run each: scores are averaged over them and their spread is shown."""
    lr: float = 5e-5
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Learning rate after the warm-up."""
    batch_tokens: int = 8192
    """Tokens in a batch (examples, for tables), padding included."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    save_every_epochs: float = 1.0
    """A checkpoint for scoring each time this much of an epoch has passed, and at the end."""
    save_moments: bool = False
    """Keep AdamW's moments beside each checkpoint, by parameter name."""
    resume_every_seconds: float = 30.0
    """How often the state to resume from is written."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds are {list(self.seeds)}", fix="list different seeds: [0, 1, 2]"
            )
        for name in ("epochs", "lr", "batch_tokens", "save_every_epochs"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, not above 0",
                    fix=f"set checkpoints.train.{name} to a positive number",
                )
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(
                f"max_steps is {self.max_steps}", fix="remove checkpoints.train.max_steps"
            )
        if not 0 <= self.warmup <= 1:
            raise ConfigError(
                f"warmup is {self.warmup}, outside [0, 1]",
                fix="set checkpoints.train.warmup to a share of the steps such as 0.06",
            )
        if self.weight_decay < 0 or self.clip_norm < 0:
            raise ConfigError(
                "weight_decay and clip_norm cannot be negative",
                fix="set them to 0 to switch them off",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Which checkpoints measure: trained here or the user's own; with neither, the model itself."""

    __pydantic_config__: ClassVar = STRICT

    train: Train | None = None
    """Train the scoring models in this run."""
    paths: tuple[str, ...] = ()
    """Folders saved by transformers."""

    def __post_init__(self) -> None:
        if self.train is not None and self.paths:
            raise ConfigError(
                "checkpoints has both train and paths",
                fix="keep one of checkpoints.train and paths",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What is measured, with which checkpoints, in which batches."""

    __pydantic_config__: ClassVar = STRICT

    scorers: tuple[str | dict[str, dict[str, Any]], ...] = ()
    """Names, or a name with its options: `{external: {quality: quality.parquet}}`."""
    checkpoints: Literal["all", "last"] | tuple[str, ...] = "all"
    """all, last (of every seed), or names such as `seed-0/step-000200`."""
    batch_tokens: int | Literal["auto"] = "auto"
    """Tokens in a batch (examples, for tables), padding included; auto is 16,384 on a CPU and
    65,536 on a GPU. Halved, and recorded, where memory does not suffice."""
    compile: bool = False
    """Compile the model with torch for passes without gradients: up to a minute for each model and
    process, and a C++ compiler. On a CPU it saves a few per cent at best."""

    def __post_init__(self) -> None:
        named = [name for entry in self.scorers for name, _ in _pairs(entry)]
        for name in named:
            if named.count(name) > 1:
                raise ConfigError(f"scorer {name} stands twice", fix="remove one of them")

    @property
    def named(self) -> dict[str, dict[str, Any]]:
        """Scorer name -> its options."""
        return {name: options for entry in self.scorers for name, options in _pairs(entry)}


def _pairs(entry: str | dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """A scorer as the YAML gives it: a bare name, or names with options."""
    return [(entry, {})] if isinstance(entry, str) else [(k, v or {}) for k, v in entry.items()]
