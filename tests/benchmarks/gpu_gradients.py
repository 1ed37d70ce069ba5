"""Gradient quantities on a GPU, beside a plain training step of the same model and batch.

    python tests/benchmarks/gpu_gradients.py --shape 1b           # bfloat16, T = 2,048, packed rows
    python tests/benchmarks/gpu_gradients.py --shape 8b-lora      # gradients of adapters only
    python tests/benchmarks/gpu_gradients.py --shape tiny --device cpu   # is the script in order?

The plain step is forward and backward of the same loss with SDPA, and once more compiled; no
optimiser. Each way runs in turn, `--steps` times after two that are not counted. For each it prints
the median step, tokens per second, the highest memory, and the ratio to the faster plain step.
Weights are random. Before it times anything it compares packed norms with those of single rows.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from curate.models.adapters import add_lora
from curate.models.gradients import Engine, Sides, Wanted
from curate.models.gradients.sketch import Sketch
from curate.models.settings import LoRA

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632,
           "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
    "8b-lora": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "tiny-lora": {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
                  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
INDEX_WIDTH = 16


def language_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if shape.endswith("lora"):
        add_lora(model, LoRA(rank=16), seed=0, kind="causal-lm", kept=())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # none of its sides zero, as after some training
                    parameter.normal_(std=0.02)
    return model.eval()


def packed_batch(shape: str, rows: int, length: int, device: str) -> tuple[dict[str, Tensor], int]:
    """Rows that are full of examples of different lengths, and how many examples there are."""
    draw = torch.Generator().manual_seed(0)
    segments = torch.zeros(rows, length, dtype=torch.long)
    positions = torch.zeros(rows, length, dtype=torch.long)
    count = 0
    for row in range(rows):
        start = 0
        while start < length:
            share = float(torch.rand((), generator=draw)) * 0.5 + 0.1
            stop = min(length, start + max(4, int(share * length)))
            segments[row, start:stop] = count
            positions[row, start:stop] = torch.arange(stop - start)
            start, count = stop, count + 1
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (rows, length), generator=draw)
    batch = {"input_ids": ids, "position_ids": positions, "segments": segments}
    return {key: value.to(device) for key, value in batch.items()}, count


def packed_losses(count: int) -> Callable[[nn.Module, Any], Tensor]:
    """(N,) summed losses of the examples of packed rows; no token predicts another example's."""

    def losses(model: Any, batch: Any) -> Tensor:
        ids, owner = batch["input_ids"], batch["segments"]
        # Positions that begin anew keep the attention within an example.
        logits = model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits
        logits = logits[:, :-1].flatten(0, 1).float()
        each = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        inside = (owner[:, 1:] == owner[:, :-1]).flatten()
        found = torch.zeros(count, dtype=each.dtype, device=each.device)
        return found.index_add(0, owner[:, :-1].flatten(), each * inside)

    return losses


def largest_difference(engine: Engine, batch: dict[str, Tensor], count: int) -> float:
    """Of the norms of packed examples to those of the same examples in rows of their own."""
    losses = packed_losses(count)
    given: dict[str, Any] = {"num_examples": count, "segments": batch["segments"]}
    packed = engine.measure(losses, batch, **given).total().sqrt()
    alone: list[Tensor] = []
    for number in range(min(count, 4)):
        inside = batch["segments"] == number
        one = {key: value[inside][None] for key, value in batch.items()}
        one["segments"] = torch.zeros_like(one["segments"])
        found = Engine(engine.model).measure(packed_losses(1), one, num_examples=1)
        alone.append(found.total().sqrt())
    single = torch.cat(alone)
    return float(((packed[: len(single)] - single).abs() / single).max())


class Ways:
    """Each method does the work of one batch once."""

    def __init__(self, model: Any, batch: dict[str, Tensor], count: int) -> None:
        self.model = model
        self.batch = batch
        self.count = count
        self.losses = packed_losses(count)
        self.engine = Engine(model)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2}
        inner = {n: p for n, p in named.items() if "layers." in n}
        draw = torch.Generator().manual_seed(1)
        self.sides = {
            name: Sides(*(torch.randn(n, INDEX_WIDTH, generator=draw).to(p) / 4 for n in p.shape))
            for name, p in inner.items()
        }
        self.indexer = Engine(model, only=self.sides.__contains__)
        self.sketch = Sketch()
        self.compiled: Any = None

    def plain(self) -> None:
        self.losses(self.model, self.batch).sum().backward()
        self.model.zero_grad(set_to_none=True)

    def plain_compiled(self) -> None:
        if self.compiled is None:
            self.compiled = torch.compile(self.model)
        self.losses(self.compiled, self.batch).sum().backward()
        self.model.zero_grad(set_to_none=True)

    def measured(self, engine: Engine, wanted: Wanted) -> Any:
        given: dict[str, Any] = {"num_examples": self.count, "segments": self.batch["segments"]}
        return engine.measure(self.losses, self.batch, wanted=wanted, **given)

    def norm(self) -> Tensor:
        return self.measured(self.engine, Wanted()).total().sqrt()

    def sketched_norm(self) -> Tensor:
        return self.measured(self.engine, Wanted(sketch=self.sketch)).total().sqrt()

    def index(self) -> None:
        self.measured(self.indexer, Wanted(squares=False, projections=self.sides))

    def one_pass(self) -> None:
        self.measured(self.engine, Wanted(projections=self.sides, sketch=self.sketch))


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds, and the highest memory in GB (0 on a CPU)."""
    is_gpu = device.startswith("cuda")
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    if is_gpu:
        torch.cuda.synchronize()
    spent = time.perf_counter() - started
    return spent, torch.cuda.max_memory_allocated() / 1e9 if is_gpu else 0.0


def compared(ways: Ways, steps: int, device: str, *, compile_too: bool) -> list[dict[str, Any]]:
    """One line for each way."""
    table: dict[str, Callable[[], object]] = {
        "plain step": ways.plain,
        "plain step, compiled": ways.plain_compiled,
        "exact norm": ways.norm,
        "sketched norm": ways.sketched_norm,
        "projected gradients, 256 numbers a layer": ways.index,
        "sketched norm and projected gradients": ways.one_pass,
    }
    if not compile_too:
        del table["plain step, compiled"]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in table}
    for number in range(steps + 2):
        for name, work in table.items():
            spent = timed(work, device)
            if number >= 2:
                found[name].append(spent)
    middle = {name: statistics.median(t for t, _ in each) for name, each in found.items()}
    base = min(seconds for name, seconds in middle.items() if name.startswith("plain"))
    tokens = ways.batch["input_ids"].numel()
    return [
        {
            "what": name,
            "seconds": middle[name],
            "tokens_per_second": tokens / middle[name],
            "memory_gb": max(memory for _, memory in each),
            "ratio": middle[name] / base,
        }
        for name, each in found.items()
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args(arguments)
    is_tiny = given.shape.startswith("tiny")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --shape tiny --device cpu only shows that the script runs")
    dtype = torch.float32 if is_tiny else torch.bfloat16
    length = min(given.length, 64) if is_tiny else given.length
    model = language_model(given.shape, given.device, dtype)
    batch, count = packed_batch(given.shape, given.rows, length, given.device)
    ways = Ways(model, batch, count)
    difference = largest_difference(ways.engine, batch, count)
    exact, sketched = ways.norm(), ways.sketched_norm()
    error = float(((sketched - exact).abs() / exact).max())
    lines = compared(ways, given.steps, given.device, compile_too=not given.no_compile)
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{given.shape}: {total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M measured, {dtype},"
    )
    print(f"{given.rows} rows of {length}, {count} examples, torch {torch.__version__}, {name}")
    print(f"packed norms differ from single ones by at most {difference:.1e};", end=" ")
    print(f"sketched ones from exact ones by at most {error:.1e}\n")
    print("| what | seconds | tokens/s | GB | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    for line in lines:
        print("| {what} | {seconds:.4f} | {tokens_per_second:.0f} | {memory_gb:.1f} |"
              " {ratio:.2f} |".format(**line))  # fmt: skip
    if given.json is not None:
        facts = {"shape": given.shape, "device": name, "packed_difference": difference,
                 "sketch_error": error, "lines": lines}  # fmt: skip
        given.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
