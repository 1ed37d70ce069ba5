"""The proxy's training loop, one for all mixers that need one.

A step: the rule says the shares, the loop draws the batch, the rule leaves a gradient, the loop
sums it over the ranks and goes down. Everything a step depends on is a function of settings, seed
and step, or stands in the state file, so that a run that was killed goes on to the same bytes on a
CPU. Under `torch.distributed` each rank takes every n-th sequence of the same batch; rules add up
over ranks what they divide by, so that any number of ranks goes the same way, to rounding.

Source: none; the rules name theirs.
Cost: beside the passes of the rule, a few sums for each step.
Shapes: K domains, B sequences of a step.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from curate.data.files import replace, write_json
from curate.data.tables import write_table
from curate.errors import ConfigError, CurateError, DivergedError
from curate.models.checkpoints import load_state, save_state
from curate.models.epochs import random_seed
from curate.models.optimiser import Optimiser, own_random_state
from curate.models.tasks.protocol import Task
from mixers.orders import Order
from mixers.proxy_draws import stratified_counts
from mixers.proxy_settings import Proxy
from mixers.proxy_step import Data, Feed, LoopStep, counted, sum_gradients
from mixers.ranks import num_ranks, over_ranks, own_rank
from mixers.rules import Rule, Seen, loss_sums
from mixers.trajectory import Trajectory

log = logging.getLogger(__name__)

_SHOW_SECONDS = 1.0
_KEEP_FACTOR = 30
"""A large model's state takes seconds to write: at most a thirtieth of the time goes into it."""
_CHECK_STEPS = 100
"""How often ranks make sure that their weights are the same."""
_EVALUATION_TOKENS = 16_384

_HELD_OUT = {
    "step": pl.Int64,
    "domain": pl.String,
    "loss": pl.Float64,
    "num_tokens": pl.Int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where a run writes."""

    folder: Path
    fingerprint: str
    """Of everything the run depends on; a state with another one is not resumed."""

    @property
    def state(self) -> Path:
        return self.folder / "resume" / "state.safetensors"

    @property
    def trajectory(self) -> Path:
        return self.folder / "trajectory.parquet"

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out.parquet"

    @property
    def progress(self) -> Path:
        """How far it is, for those who watch; nothing depends on it."""
        return self.folder / "progress.json"


class ProxyResult(NamedTuple):
    """What a run ends with; the same on every rank."""

    mixture: dict[str, float]
    """Domain -> what the rule found, summing to 1."""
    held_out: dict[str, float]
    """Domain -> loss of the last step's model on its held-out sequences, nats per token; without
    the domains that have none."""
    epochs: dict[str, float]
    """Domain -> how often training went through it."""
    num_tokens: dict[str, int]
    """Domain -> counted tokens that were trained on."""


def run_proxy(
    optimiser: Optimiser,
    task: Task,
    data: Data,
    rule: Rule,
    settings: Proxy,
    files: Files,
    *,
    told: Callable[[int, Tensor], object] | None = None,
) -> ProxyResult:
    """Train a proxy to the end, from the saved state where there is one.

    Args:
        optimiser: a fresh model in training; its number of steps is that of the run.
        task: of the model.
        data: what it is trained on.
        rule: a fresh one.
        settings: of the run.
        files: where it writes; ranks share the folder, and the first one writes.
        told: called with step and weights (K,) after every step.

    Raises:
        ConfigError: there are more ranks than sequences in a step, or float16 for a rule that
            reads gradients.
        DivergedError: a loss is not finite; the trajectory up to there is written.
        CurateError: the GPU has not enough memory for a piece.
        OutputError: the disk refuses a write.
    """
    if settings.sequences < num_ranks():
        raise ConfigError(
            f"{settings.sequences} sequences in a step are too few for {num_ranks()} ranks",
            fix="raise mix.proxy.sequences, or lower mix.proxy.ranks",
        )
    if optimiser.dtype == "float16" and rule.by_domain:
        raise ConfigError(
            "model.dtype is float16, in which the gradients of single domains are scaled",
            fix="set model.dtype to bfloat16 or float32",
        )
    with own_random_state(optimiser.device):
        loop = _Loop(optimiser, task, data, rule, settings, files)
        loop.resume()
        try:
            loop.run(told)
        except DivergedError:
            loop.flush()
            raise
        return loop.result()


@dataclass(slots=True)
class _Loop:
    optimiser: Optimiser
    task: Task
    data: Data
    rule: Rule
    settings: Proxy
    files: Files
    feed: Feed = field(init=False)
    trajectory: Trajectory = field(init=False)
    held_out: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    num_tokens: Tensor = field(init=False)
    """(K,) float64 counted tokens so far."""
    kept_time: float = field(init=False)
    keep_seconds: float = 0.0
    """What the last state took to write."""
    shown_time: float = 0.0
    is_first: bool = field(init=False)
    """Whether this rank writes."""

    def __post_init__(self) -> None:
        domains = self.data.sequences.domains
        self.feed = Feed(
            self.task,
            self.data,
            seed=self.optimiser.seed,
            device=self.optimiser.device,
            piece_tokens=self.settings.piece_tokens,
        )
        total = self.optimiser.total_steps
        self.trajectory = Trajectory(domains, tuple(self.rule.columns), total)
        self.num_tokens = torch.zeros(len(domains), dtype=torch.float64)
        self.kept_time = time.monotonic()
        self.is_first = own_rank() == 0
        start = getattr(self.rule, "start", None)
        if start is not None:
            start(self.optimiser)

    def resume(self) -> None:
        """Go on from the saved state, where there is one of this very run."""
        saved = load_state(self.files.state)
        if saved is None or saved[1].get("fingerprint") != self.files.fingerprint:
            return
        tensors, facts = saved
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = tensor
        self.optimiser.load(groups["model"], facts["optimiser"])
        self.rule.load(groups.get("rule", {}))
        self.trajectory.load(groups["trajectory"])
        self.feed.load(groups.get("drawn", {}))
        self.num_tokens = groups["loop"]["num_tokens"]
        self.held_out = facts["held_out"]
        log.info("proxy: resuming after step %d", self.optimiser.step_number)

    def run(self, told: Callable[[int, Tensor], object] | None) -> None:
        total = self.optimiser.total_steps
        every = self.settings.evaluate_every or total
        while self.optimiser.step_number < total:
            seen = self._step()
            step = self.optimiser.step_number
            self._check(seen, step)
            self.trajectory.add(step, seen)
            self.num_tokens += seen.counts
            if step % every == 0 or step == total:
                self._evaluate(step)
            if told is not None:
                told(step, seen.weights)
            self._show(seen, step)
            if time.monotonic() - self.kept_time >= self._keep_every():
                self._keep()
        self.flush()

    def flush(self) -> None:
        """Write what was seen so far."""
        if self.is_first:
            self.trajectory.write(self.files.trajectory, self.optimiser.step_number)
            table = pl.DataFrame(self.held_out, schema=_HELD_OUT)
            replace(self.files.held_out, lambda target: write_table(table, target))

    def result(self) -> ProxyResult:
        domains = self.data.sequences.domains
        last = self.optimiser.step_number
        rows = {row["domain"]: row["loss"] for row in self.held_out if row["step"] == last}
        return ProxyResult(
            mixture=dict(zip(domains, self.rule.mixture().tolist(), strict=True)),
            held_out=rows,
            epochs=dict(zip(domains, self.feed.epochs.tolist(), strict=True)),
            num_tokens=dict(zip(domains, map(int, self.num_tokens.tolist()), strict=True)),
        )

    def _step(self) -> Seen:
        number = self.optimiser.step_number + 1
        shares = self.rule.shares().numpy()
        seed = random_seed(self.optimiser.seed, "proxy", "counts", number)
        counts = stratified_counts(shares, self.settings.sequences, seed)
        pieces = self.feed.batch(counts, number, by_domain=self.rule.by_domain)
        lr = self.optimiser.begin()
        step = LoopStep(
            self.optimiser, self.task, self.feed, pieces=pieces, lr=lr, num_domains=len(counts)
        )
        try:
            seen = self.rule.step(step)
            sum_gradients(self.optimiser.trained)
            self.optimiser.finish()
        except DivergedError:
            self._name_domain(step)
            raise
        except torch.cuda.OutOfMemoryError as error:
            raise CurateError(
                f"step {number}: the GPU has not enough memory for a piece of the batch",
                fix="set mix.proxy.piece_tokens to a lower number of tokens",
            ) from error
        return seen

    @torch.no_grad()
    def _name_domain(self, step: LoopStep) -> None:
        """A rule has found a number that is none: say where, if losses are it."""
        sums = torch.zeros(step.num_domains, dtype=torch.float64)
        for piece in step.pieces:
            sums += loss_sums(step.tokens(piece), step.num_domains)
        self._check_losses(sums, step.number)

    def _check_losses(self, sums: Tensor, step: int) -> None:
        wrong = ~sums.isfinite()
        if bool(wrong.any()):
            name = self.data.sequences.domains[int(wrong.int().argmax())]
            raise DivergedError(
                f"the loss of domain {name} at step {step} is {float(sums[wrong][0])}",
                fix="lower mix.proxy.lr, or raise mix.proxy.warmup;"
                f" the trajectory up to there is in {self.files.trajectory}",
            )

    def _check(self, seen: Seen, step: int) -> None:
        self._check_losses(seen.loss_sums, step)
        if num_ranks() > 1 and step % _CHECK_STEPS == 0:
            both = torch.stack([seen.weights, -seen.weights])
            most = over_ranks(both, dist.ReduceOp.MAX, None)
            assert torch.equal(most[0], -most[1]), "ranks have different weights"

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """Mean loss of each domain's held-out sequences, the same ones each time."""
        sequences = self.data.held_out
        if sequences is None or not self.settings.held_out:
            return
        model, device = self.optimiser.model, self.optimiser.device
        model.eval()
        sums = torch.zeros(2, len(sequences.domains), dtype=torch.float64)
        for domain, size in enumerate(sequences.sizes.tolist()):
            if not size:
                continue
            key = random_seed(self.optimiser.seed, "held out", sequences.domains[domain])
            places = Order(size, key).at(np.arange(min(size, self.settings.held_out)))
            places = places[own_rank() :: num_ranks()]
            if not len(places):
                continue
            taken = sequences.take(np.full(len(places), domain), places)
            most = self.settings.piece_tokens or _EVALUATION_TOKENS
            most = max(1, most // int(taken.encoded.lengths.max()))
            for first in range(0, len(places), most):
                chosen = np.arange(first, min(first + most, len(places)))
                batch = self.task.collate(taken.encoded, chosen)
                moved = {key: value.to(device) for key, value in batch.items()}
                with self.optimiser.precision():
                    flat = self.task.logits_and_targets(model, moved)
                loss = functional.cross_entropy(flat.logits.float(), flat.targets, reduction="none")
                sums[0, domain] += loss.double().sum().cpu()
                sums[1, domain] += counted(batch, len(chosen)).sum()
        sums = over_ranks(sums, dist.ReduceOp.SUM, None)
        for domain, (loss, count) in enumerate(sums.T.tolist()):
            if count:
                row = {"domain": sequences.domains[domain], "loss": loss / count}
                self.held_out.append({"step": step, **row, "num_tokens": int(count)})

    def _show(self, seen: Seen, step: int) -> None:
        """Say how far it is, now and then."""
        now = time.monotonic()
        if not self.is_first or now - self.shown_time < _SHOW_SECONDS:
            return
        self.shown_time = now
        domains = self.data.sequences.domains
        weights = dict(zip(domains, seen.weights.tolist(), strict=True))
        heaviest = sorted(weights, key=lambda name: -weights[name])[:6]
        told = ", ".join(f"{name} {weights[name]:.3f}" for name in heaviest)
        total = self.optimiser.total_steps
        facts = {"step": step, "total": total, "weights": told}
        write_json(self.files.progress, facts, flush=False)

    def _keep_every(self) -> float:
        """Seconds between two states: more than asked for where writing one takes long."""
        asked = self.settings.resume_every_seconds
        return max(asked, _KEEP_FACTOR * self.keep_seconds) if asked else 0.0

    def _keep(self) -> None:
        """Write the state to resume from, and what was seen so far."""
        self.kept_time = started = time.monotonic()
        if not self.is_first:
            return
        groups = {
            "model": self.optimiser.state(),
            "rule": self.rule.state(),
            "trajectory": self.trajectory.state(),
            "drawn": self.feed.state(),
            "loop": {"num_tokens": self.num_tokens},
        }
        tensors = {
            f"{group}/{name}": tensor
            for group, own in groups.items()
            for name, tensor in own.items()
        }
        facts = {
            "fingerprint": self.files.fingerprint,
            "optimiser": self.optimiser.facts(),
            "held_out": self.held_out,
        }
        save_state(self.files.state, tensors, facts)
        self.flush()
        self.kept_time = time.monotonic()
        self.keep_seconds = self.kept_time - started
