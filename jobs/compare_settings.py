"""Settings of `curate compare`."""

import re
import shlex
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError
from curate.models.settings import Train
from curate.plan.settings import Plan

ARMS = {
    "plan": "the plan of this run, as it stands",
    "random": "rows drawn at random from everything, anew with each seed",
    "natural": "the plan's rules, but every domain at its share of the pool",
    "unimax": "the plan's rules, but domains as equal as UniMax makes them",
    "shuffled": "the plan's shares of domains, rows drawn at random within them",
    "longest": "the rows with the most tokens",
    "everything": "all rows, once each",
}
"""Arms that need no more than their name."""

PLACEHOLDERS = ("shards", "seed", "tokens", "steps", "arm")
"""What a command may ask for, in braces."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSettings:
    """One more way to choose the data, or to train on it."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    """Letters, digits, `_ . @ -`."""
    run: str | None = None
    """Another run over the same data, whose plan is taken."""
    rules: Plan | None = None
    """Rules for a plan from this run's scores, as under `plan`."""
    mix: dict[str, Any] = field(default_factory=dict[str, Any])
    """Mixer for those rules, as under `mix`."""
    command: str | None = None
    """A program that trains and prints its metrics; what it trains on is its own affair, unless it
    asks for {shards}: then it gets those of `run`, `rules` or, without either, of the plan."""
    redraw: bool = False
    """Make the plan of `rules` anew with each seed: that judges the rules, not the one set."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in ARMS or is_random(self.name):
            raise ConfigError(
                f"{self.name!r} is no name for an arm of your own",
                fix="use letters, digits, _ . @ -, and none of " + ", ".join(ARMS),
            )
        if self.run is not None and self.rules is not None:
            raise ConfigError(f"arm {self.name} has a run and rules", fix="keep one of them")
        if self.run is None and self.rules is None and self.command is None:
            raise ConfigError(
                f"arm {self.name} does not say what it trains on", fix="set run, rules or command"
            )
        if (self.mix or self.redraw) and self.rules is None:
            raise ConfigError(
                f"arm {self.name}: mix and redraw belong to rules", fix="add rules, or remove them"
            )
        if self.command is not None:
            check_command(self.command)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Which arms are trained, how long, and what is measured."""

    __pydantic_config__: ClassVar = STRICT

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One training run of every arm for each; there is no verdict with fewer than three."""
    arms: tuple[str | ArmSettings, ...] = (
        "plan", "random", "natural", "unimax", "longest", "everything",
    )  # fmt: skip
    """plan, random, natural, unimax, shuffled, longest, everything, or arms of your own. Random is
    always among them."""
    random_draws: int = 2
    """Sets that random draws with each seed: luck is seen there, and the more of it is seen, the
    smaller the differences that can be told from it."""
    redraw: bool = False
    """Make the plan anew with each seed, where its rules draw: that judges the rules. Otherwise the
    plan is one set, and has to beat the luck of a draw."""
    tokens: float | None = None
    """Tokens that each arm trains on, repeats counted; by default what `train` makes of the plan.
    Of examples, for tables."""
    steps: int | None = None
    """The same, in optimiser steps."""
    train: Train | None = None
    """How each arm is trained; by default as `checkpoints.train`. Its `seeds` are not used."""
    metric: str | None = None
    """What the verdict stands on: accuracy, loss, bits_per_byte, or a metric of your command; by
    default accuracy for classification and loss (nats per token) for language models."""
    better: Literal["higher", "lower"] | None = None
    """Which direction is good, for a metric of your own."""
    on: Literal["held_out", "target", "worst_domain", "worst_class"] | None = None
    """Where it is measured; by default on the target, or without one on what was held out."""
    held_out_examples: int = 1000
    """Most held-out examples of each domain that are evaluated; as many of the target per domain
    of it."""
    points: int = 1
    """Evaluations during training, evenly spaced: above 1 for a curve over tokens."""
    shares: tuple[float, ...] = ()
    """Curve over the kept share: the plan and random once more at each of these token shares."""
    command: str | None = None
    """A program that trains every arm in place of curate's own training: words with {shards},
    {seed}, {tokens}, {steps}, {arm}. It is run without a shell, and the last line that it prints
    is a JSON object of metrics."""
    results: str | None = None
    """CSV with the columns arm, seed, metric, value: arms that were trained elsewhere."""
    redrawn: tuple[str, ...] = ()
    """Arms of `results` or of commands whose data were drawn anew with each seed."""
    plot: Literal["svg", "png", "none"] = "svg"
    """Format of the plot."""
    keep_models: bool = False
    """Keep the trained models; they are removed once they are evaluated."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {list(self.seeds)}", fix="list different seeds")
        if not self.arms and self.results is None:
            raise ConfigError("there are no arms", fix="name plan, at least, or set results")
        names = [arm if isinstance(arm, str) else arm.name for arm in self.arms]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"arm {name} stands twice", fix="remove one of them")
        for arm in self.arms:
            if isinstance(arm, str) and arm not in ARMS:
                raise ConfigError(
                    f"there is no arm {arm!r}",
                    fix=f"use {', '.join(ARMS)}, or {{name: {arm}, run: FOLDER}}",
                )
        if self.tokens is not None and self.steps is not None:
            raise ConfigError("tokens and steps are both set", fix="keep one of them")
        given = self.tokens if self.steps is None else self.steps
        if given is not None and given <= 0:
            raise ConfigError("tokens and steps must be above 0", fix="raise compare.tokens")
        if self.points < 1 or self.held_out_examples < 1 or self.random_draws < 1:
            raise ConfigError(
                "points, held_out_examples and random_draws start at 1", fix="raise them"
            )
        if not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"shares are {list(self.shares)}", fix="set shares in (0, 1]")
        if self.command is not None:
            check_command(self.command)


def is_random(arm: str) -> bool:
    """Whether an arm is the yardstick: `random`, or one more draw of it, `random-2`."""
    return re.fullmatch(r"random(-\d+)?", arm) is not None


def check_command(command: str) -> list[str]:
    """The words of a command, its placeholders still in place.

    Raises:
        ConfigError: it has no words, an open quote, or a placeholder that does not exist.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"command {command!r}: {error}", fix="close the quotes") from error
    if not words:
        raise ConfigError("command is empty", fix="name the program that trains")
    for word in words:
        for name in re.findall(r"\{(\w+)\}", word):
            if name not in PLACEHOLDERS:
                raise ConfigError(
                    f"command asks for {{{name}}}, which does not exist",
                    fix="use " + ", ".join(f"{{{known}}}" for known in PLACEHOLDERS),
                )
    return words


def filled(command: str, values: dict[str, str]) -> list[str]:
    """The words of a command with its placeholders filled in.

    The words are split first: whatever a value holds, it stays inside its word.
    """

    def value(match: re.Match[str]) -> str:
        return values[match.group(1)]

    pattern = re.compile(r"\{(" + "|".join(PLACEHOLDERS) + r")\}")
    return [pattern.sub(value, word) for word in check_command(command)]
