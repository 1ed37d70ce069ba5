"""Peak memory and time of scores and gradient norms where the vocabulary is large.

    pytest tests/benchmarks/test_large_head.py -s -o addopts=--import-mode=importlib

A small body (width 256, two layers) below a head of 131,072 tokens, one text of 2,048 tokens: the
logits are 1 GB in float32, the weights 0.3 GB. The plain way is the model's own logits and autograd
(`loss.backward()` for all parameters; for scores no gradient). Each way runs in a process of its
own and prints the kernel's highest resident memory above that before the pass; the check of the
engine against autograd, made once for a partition, has a line of its own. `CURATE_BENCH_TOKENS` and
`CURATE_BENCH_VOCABULARY` take other sizes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import byte_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from curate.models.gradient_pass import GradientPass
from curate.models.quantities import measure
from curate.models.settings import CausalLM
from curate.models.tasks import Encoded, build_task

TOKENS = int(os.environ.get("CURATE_BENCH_TOKENS", "2048"))
VOCABULARY = int(os.environ.get("CURATE_BENCH_VOCABULARY", str(1 << 17)))
WIDTH = 256
PEAK_GOAL = 0.35


def language_model(*, tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def a_text(length: int) -> Encoded:
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, length).astype(np.int32)
    return Encoded(
        lengths=np.array([length]),
        num_scored=np.array([length - 1]),
        truncated=np.array([False]),
        arrays={"tokens": tokens, "starts": np.array([0, length]),
                "counted": np.arange(length) > 0},
        problems={},
    )  # fmt: skip


def steady(model: Any, name: str) -> Callable[[], dict[str, float]]:
    """Ours, after the check of the engine on a short text."""
    task = build_task(CausalLM(max_tokens=TOKENS), byte_tokenizer())
    gradients = GradientPass(model, task, (name,))
    with torch.no_grad():
        gradients.measure(task.collate(a_text(8), [0]), 1)

    def work() -> dict[str, float]:
        with torch.no_grad():
            found = gradients.measure(task.collate(a_text(TOKENS), [0]), 1)
        terms = found.terms
        return {"loss": float(terms.loss.double().mean()), name: float(found.squares[name][0])}

    return work


def ours(model: Any, wanted: frozenset[str]) -> dict[str, float]:
    task = build_task(CausalLM(max_tokens=TOKENS), byte_tokenizer())
    found, _ = measure(
        model,
        task,
        a_text(TOKENS),
        batch_tokens=4 * TOKENS,
        device=torch.device("cpu"),
        wanted=wanted,
    )
    return {name: float(values[0]) for name, values in found.items()}


def plain_losses(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.from_numpy(a_text(TOKENS).arrays["tokens"].astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return logits, ids[0, 1:], functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def plain_scores(model: Any) -> dict[str, float]:
    with torch.no_grad():
        logits, targets, losses = plain_losses(model)
        errors = logits.softmax(-1)
        errors[torch.arange(len(targets)), targets] -= 1
        return {"loss": float(losses.mean()), "error_norms": float(errors.norm(dim=1).mean())}


def plain_gradients(model: Any) -> dict[str, float]:
    _, _, losses = plain_losses(model)
    losses.sum().backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    return {"loss": float(losses.mean()), "grad_sq_norm": squares}


Way = Callable[[Any], Callable[[], dict[str, float]]]
WAYS: dict[str, tuple[bool, Way]] = {
    "scores, plain": (False, lambda model: lambda: plain_scores(model)),
    "**scores**": (False, lambda model: lambda: ours(model, frozenset({"loss"}))),
    "norm, plain": (False, lambda model: lambda: plain_gradients(model)),
    "**norm and scores**": (False, lambda model: steady(model, "grad_sq_norm")),
    "**norm of the head and scores**": (
        False, lambda model: steady(model, "grad_sq_norm[head]")),
    "norm and scores, the check against autograd with it": (
        False, lambda model: lambda: ours(model, frozenset({"grad_sq_norm"}))),
    "norm, tied, plain": (True, lambda model: lambda: plain_gradients(model)),
    "**norm and scores, tied**": (True, lambda model: steady(model, "grad_sq_norm")),
}  # fmt: skip


def run(name: str) -> None:
    """One way, in this process; prints what it found, its peak in MB and its CPU seconds."""
    torch.set_num_threads(1)
    tied, way = WAYS[name]
    work = way(language_model(tied=tied))
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")
    before, started = _status("VmRSS"), time.process_time()
    found = work()
    seconds = time.process_time() - started
    print(json.dumps({"found": found, "mb": _status("VmHWM") - before, "seconds": seconds}))


def _status(field: str) -> float:
    with open("/proc/self/status") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) / 1024


@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_positions_times_vocabulary():
    table: dict[str, dict[str, Any]] = {}
    for name in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, name], capture_output=True, text=True, check=True
        )
        table[name] = json.loads(done.stdout.splitlines()[-1])
    print(f"\nT = {TOKENS}, V = {VOCABULARY}, width {WIDTH}, one thread\n")
    print("| what | peak MB | CPU seconds |\n| --- | ---: | ---: |")
    for name, row in table.items():
        print(f"| {name} | {row['mb']:.0f} | {row['seconds']:.1f} |")
    for name, plain in [
        ("**scores**", "scores, plain"),
        ("**norm and scores**", "norm, plain"),
        ("**norm and scores, tied**", "norm, tied, plain"),
    ]:
        assert table[name]["mb"] <= PEAK_GOAL * table[plain]["mb"]
        for key, value in table[plain]["found"].items():
            assert table[name]["found"][key] == pytest.approx(value, rel=1e-4), (name, key)


if __name__ == "__main__":
    run(sys.argv[1])
