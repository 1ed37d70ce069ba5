"""What the proxy's loop costs beside a bare PyTorch loop, and what its rules add to a plain step.

    python -m pytest tests/benchmarks/test_proxy_loop.py -s -o addopts=--import-mode=importlib

A Llama of 5 layers of width 256 (5.4 M parameters); 64 sequences of 128 bytes of six domains in a
step (CURATE_BENCH_SEQUENCES); one thread. All ways train a model of their own on the same batches
and take turns, step by step, in another order each round; a time is user CPU seconds. The bare loop
has its batches ready as tensors, AdamW with the same groups, clipping and the mean loss of the
model's logits, and nothing else. DoReMi reads cached losses of a file.
"""

import ctypes
import os
import random
import statistics
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradient_ways import seconds
from proxy_case import make_task
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from curate.data.partitions import Output
from curate.models.epochs import random_seed
from curate.models.optimiser import Optimiser, learning_rate
from curate.models.sequence_files import write_sequences
from curate.models.sequence_losses import Computed, SequenceLosses, write_losses
from curate.models.sequences import PARTS, Sequences
from curate.models.tasks.protocol import Encoded
from mixers.doremi import DoReMi, DoReMiRule
from mixers.loss_weights import LossReweighting
from mixers.plain import PlainRule, ReweightedRule
from mixers.proxy import Files, run_proxy
from mixers.proxy_draws import stratified_counts
from mixers.proxy_settings import Proxy
from mixers.proxy_step import Data, Feed
from mixers.rules import Rule

ROUNDS = int(os.environ.get("CURATE_BENCH_ROUNDS", "8"))
SEQUENCES = int(os.environ.get("CURATE_BENCH_SEQUENCES", "64"))
LENGTH, NUM_DOMAINS, VOCABULARY = 128, 6, 260
LIBC = ctypes.CDLL("libc.so.6")
BARE, PLAIN = "bare PyTorch", "loop, plain"
SETTINGS = Proxy(steps=ROUNDS + 2, sequences=SEQUENCES, held_out=0)
UNIFORM = torch.full((NUM_DOMAINS,), 1 / NUM_DOMAINS, dtype=torch.float64)


def random_data(folder: Path) -> Data:
    """Random bytes, 256 sequences a domain, with losses of a reference."""
    num = 256 * NUM_DOMAINS
    generator = np.random.default_rng(0)
    encoded = Encoded(
        lengths=np.full(num, LENGTH),
        num_scored=np.full(num, LENGTH - 1),
        truncated=np.zeros(num, dtype=np.bool_),
        arrays={
            "tokens": generator.integers(1, 256, num * LENGTH).astype(np.int32),
            "starts": np.arange(num + 1) * LENGTH,
            "counted": np.tile(np.arange(LENGTH) > 0, num),
        },
        problems={},
    )
    write_sequences(
        folder / "pool.safetensors",
        encoded,
        domain=np.repeat(np.arange(NUM_DOMAINS, dtype=np.int32), 256),
        part=np.full(num, PARTS.index("proxy"), dtype=np.uint8),
        names=[f"domain-{number}" for number in range(NUM_DOMAINS)],
    )
    size = LENGTH - 1
    places = np.stack([np.arange(num), np.arange(num) * size, np.full(num, size)])
    losses = generator.uniform(4, 7, num * size).astype(np.float16)
    output = Output(folder / "losses.npy")
    write_losses(output, Computed(places, losses), "f")
    pool = Sequences.open([folder / "pool.safetensors"], parts=("proxy",))
    return Data(pool, None, reference=SequenceLosses([output.path]))


def make_model(layers: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=LENGTH,
            pad_token_id=0,
            bos_token_id=None,
        )
    )


class Turns:
    """A function that calls back after each step, one step at a time, in a thread of its own."""

    def __init__(self, work: Callable[[Callable[..., None]], object]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)

        def run() -> None:
            torch.set_num_threads(1)
            self._go.acquire()
            work(self._turn)
            self._done.release()

        threading.Thread(target=run, daemon=True).start()

    def _turn(self, *_: Any) -> None:
        self._done.release()
        self._go.acquire()

    def step(self) -> None:
        self._go.release()
        self._done.acquire()
        LIBC.malloc_trim(0)  # else each way keeps the memory of its activations


def bare_loop(data: Data, layers: int, width: int, turn: Callable[..., None]) -> None:
    """The steps of the loop without the loop."""
    feed = Feed(make_task(), data, seed=0, device=torch.device("cpu"), piece_tokens=None)
    batches: list[torch.Tensor] = []
    for number in range(1, SETTINGS.steps + 1):
        seed = random_seed(0, "proxy", "counts", number)
        counts = stratified_counts(UNIFORM.numpy(), SEQUENCES, seed)
        (piece,) = feed.batch(counts, number, by_domain=False)
        batches.append(piece.batch["input_ids"])
    model = make_model(layers, width).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups)
    for number, ids in enumerate(batches, 1):
        lr = learning_rate(number, total_steps=SETTINGS.steps, settings=SETTINGS.train)
        for group in adamw.param_groups:
            group["lr"] = lr
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        turn()


RULES: dict[str, Callable[[], Rule]] = {
    PLAIN: lambda: PlainRule(UNIFORM[None], torch.ones(1), total_steps=SETTINGS.steps),
    "loss reweighting": lambda: ReweightedRule(UNIFORM, LossReweighting()),
    "loss reweighting, robust": lambda: ReweightedRule(UNIFORM, LossReweighting(robust=True)),
    "DoReMi, cached reference": lambda: DoReMiRule(DoReMi(), NUM_DOMAINS),
}


def proxy_loop(
    folder: Path, data: Data, name: str, layers: int, width: int, turn: Callable[..., None]
) -> None:
    if "DoReMi" not in name:
        data = data._replace(reference=None)
    optimiser = Optimiser(
        make_model(layers, width),
        SETTINGS.train,
        seed=0,
        total_steps=SETTINGS.steps,
        device=torch.device("cpu"),
    )
    files = Files(folder=folder / name, fingerprint="f")
    run_proxy(optimiser, make_task(), data, RULES[name](), SETTINGS, files, told=turn)


def measured(folder: Path, layers: int, width: int) -> dict[str, list[float]]:
    """Way -> user CPU seconds of each round; two steps of each come before."""
    LIBC.mallopt(-8, 1)  # one arena for all threads: they take turns
    data = random_data(folder)
    ways = {BARE: Turns(lambda turn: bare_loop(data, layers, width, turn))}
    for name in RULES:
        ways[name] = Turns(partial(proxy_loop, folder, data, name, layers, width))
    for way in [*ways.values()] * 2:
        way.step()
    found: dict[str, list[float]] = {name: [] for name in ways}
    draw = random.Random(0)
    for _ in range(ROUNDS):
        for name in draw.sample(list(ways), len(ways)):
            found[name].append(seconds(ways[name].step))
    return found


@pytest.mark.timeout(3600)
def test_the_loop_and_its_rules_cost_little(tmp_path: Path):
    torch.set_num_threads(1)
    found = measured(tmp_path, 5, 256)
    medians = {name: statistics.median(times) for name, times in found.items()}
    print(f"\n{SEQUENCES} x {LENGTH} bytes, 5 layers of 256, {ROUNDS} rounds")
    ratios: dict[str, float] = {}
    for name, times in found.items():
        base = found[BARE if name in (BARE, PLAIN) else PLAIN]
        ratios[name] = statistics.median(a / b for a, b in zip(times, base, strict=True))
        print(f"| {name} | {medians[name]:.3f} s | {ratios[name]:.3f} |")
    assert ratios[PLAIN] <= 1.03
    assert ratios["loss reweighting"] <= 1.02
    assert ratios["DoReMi, cached reference"] <= 1.05


@pytest.mark.timeout(600)
def test_what_a_step_costs_beside_its_passes(tmp_path: Path):
    """With a model so small that what is not the model shows."""
    torch.set_num_threads(1)
    found = measured(tmp_path, 1, 16)
    plain = statistics.median(found[PLAIN])
    print(f"\n1 layer of 16, {ROUNDS} rounds; CPU ms of a step, and above a plain one")
    for name, times in found.items():
        middle = statistics.median(times)
        print(f"| {name} | {1e3 * middle:.1f} ms | {1e3 * (middle - plain):+.1f} ms |")
