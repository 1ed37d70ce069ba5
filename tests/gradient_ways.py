"""Models, batches and ways of measuring per-example gradients, for the benchmarks.

Three language models with random weights, of the sizes of common small ones, and tokens of which
some are frequent, as in text. Each method of `Ways` measures one batch once.
"""

import ctypes
import gc
import resource
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from curate.models.gradients import Engine, LowRank, Sides, Wanted
from curate.models.gradients.sketch import Sketch
from curate.models.quantities import summarise
from curate.models.tasks import Flat

VOCABULARY = 8192
INDEX_WIDTH = 16
"""256 numbers for each layer of the index."""
RANK = 32
WIDTHS = {"llama-4m": 128, "llama-50m": 640, "neox-9m": 256, "gpt2-7m": 256}

_ROTARY: dict[str, Any] = {"max_position_embeddings": 1024, "tie_word_embeddings": False}
_LLAMA: dict[str, Any] = {"model_type": "llama", **_ROTARY}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-4m": {**_LLAMA, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3,
                 "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama-50m": {**_LLAMA, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8,
                  "num_attention_heads": 10, "num_key_value_heads": 10},
    "neox-9m": {**_ROTARY, "model_type": "gpt_neox", "hidden_size": 256, "num_hidden_layers": 6,
                "intermediate_size": 1024, "num_attention_heads": 4, "hidden_dropout": 0.0,
                "attention_dropout": 0.0},
    "gpt2-7m": {"model_type": "gpt2", "n_embd": 256, "n_layer": 6, "n_head": 4,
                "n_positions": 1024, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip


def language_model(name: str) -> Any:
    config = AutoConfig.for_model(vocab_size=VOCABULARY, **CONFIGS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Frequent and rare ones, so that they repeat within an example as in text."""
    share = 1 / torch.arange(10, VOCABULARY + 10)
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(share, rows * length, replacement=True, generator=draw)
    return drawn.view(rows, length)


def losses(model: nn.Module, batch: Any) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).sum(1)


class Ways:
    """Each method runs one way of measuring once; all see equal models and the same batch."""

    def __init__(self, name: str, rows: int, length: int) -> None:
        self.name = name
        self.model = language_model(name)
        self.batch = {"input_ids": tokens(rows, length)}
        self.rows = rows
        self.engine = Engine(self.model)
        draw = torch.Generator().manual_seed(1)
        body = {
            f"{name}.weight": module.weight.shape
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter)
            and module.weight.dim() == 2
            and not isinstance(module, nn.Embedding)
            and module is not self.model.get_output_embeddings()
        }
        self.sides = {
            name: Sides(*(torch.randn(width, INDEX_WIDTH, generator=draw) / 4 for width in shape))
            for name, shape in body.items()
        }
        self.indexer = Engine(self.model, only=self.sides.__contains__)
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self.dense = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        self.low_rank = {
            name: LowRank(*(torch.randn(width, RANK, generator=draw) for width in shape))
            if len(shape) == 2
            else self.dense[name]
            for name, shape in shapes.items()
        }
        self.sketch = Sketch()

    def plain(self) -> None:
        losses(self.model, self.batch).sum().backward()
        self.model.zero_grad(set_to_none=True)

    def forward(self) -> None:
        with torch.no_grad():
            losses(self.model, self.batch)

    def floor(self) -> None:
        """Forward, and gradients of activations only."""
        self.model.requires_grad_(False)
        table = self.model.get_input_embeddings()

        def begin(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output.detach().requires_grad_()

        handle = table.register_forward_hook(begin)
        losses(self.model, self.batch).sum().backward()
        handle.remove()
        self.model.requires_grad_(True)

    def norm(self) -> Tensor:
        return self.engine.measure(losses, self.batch, num_examples=self.rows).total().sqrt()

    def sketched_norm(self) -> Tensor:
        wanted = Wanted(sketch=self.sketch)
        found = self.engine.measure(losses, self.batch, num_examples=self.rows, wanted=wanted)
        return found.total().sqrt()

    def inner(self) -> Tensor:
        return self._inner(self.dense)

    def inner_low_rank(self) -> Tensor:
        return self._inner(self.low_rank)

    def _inner(self, direction: Mapping[str, Any]) -> Tensor:
        wanted = Wanted(squares=False, directions={"one": direction})
        found = self.engine.measure(losses, self.batch, num_examples=self.rows, wanted=wanted)
        return found.inner["one"]

    def index(self) -> None:
        wanted = Wanted(squares=False, projections=self.sides)
        self.indexer.measure(losses, self.batch, num_examples=self.rows, wanted=wanted)

    def one_pass(self, sketch: Sketch | None = None) -> None:
        """Norms, projections, and every score of the forward pass."""
        seen: list[Flat] = []

        def watched_losses(model: nn.Module, batch: Any) -> Tensor:
            ids = batch["input_ids"]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            owner = torch.arange(len(ids)).repeat_interleave(ids.shape[1] - 1)
            targets = ids[:, 1:].flatten()
            seen.append(Flat(logits.detach(), targets, owner))
            each = functional.cross_entropy(logits, targets, reduction="none")
            return each.view(len(ids), -1).sum(1)

        wanted = Wanted(projections=self.sides, sketch=sketch)
        self.engine.measure(watched_losses, self.batch, num_examples=self.rows, wanted=wanted)
        with torch.no_grad():
            summarise(seen[-1], self.rows)

    def one_pass_sketched(self) -> None:
        self.one_pass(self.sketch)

    def loop(self) -> Tensor:
        found: list[Tensor] = []
        for i in range(self.rows):
            one = {"input_ids": self.batch["input_ids"][i : i + 1]}
            total = losses(self.model, one).sum()
            grads = torch.autograd.grad(total, list(self.model.parameters()))
            found.append(torch.stack([value.square().sum() for value in grads]).sum())
        return torch.stack(found).sqrt()

    def by_vmap(self) -> Tensor:
        values = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss_of(values: dict[str, Tensor], ids: Tensor) -> Tensor:
            inputs = {"input_ids": ids[None], "use_cache": False}
            logits = functional_call(self.model, values, (), inputs).logits[0, :-1]
            return functional.cross_entropy(logits, ids[1:], reduction="sum")

        self.model.set_attn_implementation("eager")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = vmap(grad(loss_of), in_dims=(None, 0))(values, self.batch["input_ids"])
        finally:
            self.model.set_attn_implementation("sdpa")
        return torch.stack([v.flatten(1).square().sum(1) for v in found.values()]).sum(0).sqrt()

    def opacus(self, *, ghost: bool) -> Callable[[], Tensor]:
        """Norms by Opacus, of a model of its own; raises what Opacus raises."""
        # By name: it is no dependency, and is compared with where it happens to be installed.
        kinds: Any = import_module("opacus.grad_sample")
        model = language_model(self.name).train()
        more: dict[str, Any] = {"max_grad_norm": 1.0, "use_ghost_clipping": True} if ghost else {}
        kind = kinds.GradSampleModuleFastGradientClipping if ghost else kinds.GradSampleModule
        wrapped = kind(model, loss_reduction="sum", strict=False, **more)

        def work() -> Tensor:
            wrapped.zero_grad(set_to_none=True)
            losses(wrapped, self.batch).sum().backward()
            if ghost:
                return wrapped.get_norm_sample()
            each = [p.grad_sample.flatten(1).norm(dim=1) for p in wrapped.parameters()]
            for parameter in wrapped.parameters():
                parameter.grad_sample = None
            return torch.stack(each).norm(dim=0)

        return work


def interleaved(
    table: Mapping[str, Callable[[], object]], rounds: int, seldom: Sequence[str] = ()
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of each way in each round, and its peak in MB in the last one.

    Those that are `seldom` run in every third round.
    """
    times: dict[str, list[float]] = {name: [] for name in table}
    peaks: dict[str, float] = {}
    for number in range(rounds):
        for name, work in table.items():
            step = 3 if name in seldom else 1
            if number % step:
                continue

            def timed(name: str = name, work: Callable[[], object] = work) -> None:
                times[name].append(seconds(work))

            if number + step >= rounds:
                peaks[name] = peak_mb(timed)
            else:
                timed()
    return times, peaks


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, list[float]]:
    """Each round's ratio to the base of the same round."""
    found: dict[str, list[float]] = {}
    for name, each in times.items():
        step = 1 if len(each) == len(times[base]) else 3
        found[name] = [m / b for m, b in zip(each, times[base][::step], strict=True)]
    return found


def medians(found: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in found.items()}


def seconds(work: Callable[[], object]) -> float:
    """User CPU time; what the kernel spends on a busy machine's memory is left out."""
    gc.collect()
    started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime - started


def peak_mb(work: Callable[[], object]) -> float:
    """Resident memory at its highest during the work, above that before it; Linux only."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work has left would hide the peak
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    with open("/proc/self/status") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) / 1024
