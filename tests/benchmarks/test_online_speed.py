"""What weights and a stream cost in a `Trainer`: CPU time of a step against the plain one.

    python -m pytest tests/benchmarks/test_online_speed.py -s

A Llama of 4 layers, width 192, vocabulary 4,000; 8 sequences of 128 tokens in a micro-batch, AdamW,
one thread. Every round runs each way once; a way's time is that of its fastest step, since on a
machine that others use too the middle of them says more about the others.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from online_training import language_model, trainer
from transformers import TrainerCallback

from mixers.online import (
    LossReweighting,
    MixtureCallback,
    MixtureStream,
    TokenWeights,
    apply_weights,
)

pytestmark = pytest.mark.timeout(1800)

ROUNDS, STEPS = 3, 6
LLAMA: dict[str, Any] = {
    "vocab_size": 4000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
WAYS: dict[str, tuple[int, Callable[[], Any] | None]] = {
    "plain": (1, None),
    "a column": (1, lambda: "curate_weight"),
    "losses": (1, lambda: LossReweighting(uniform_share=0)),
    "losses, robust": (1, lambda: LossReweighting(uniform_share=0, robust=True)),
    "tokens (tldr)": (1, lambda: TokenWeights(kind="tldr")),
    "a stream of two domains": (1, None),
    "plain, 2 micro-batches": (2, None),
    "losses, 2 micro-batches": (2, lambda: LossReweighting(uniform_share=0)),
}


class Clock(TrainerCallback):
    """CPU seconds from the end of a step to the end of the next: data, loss and all."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.process_time())

    def fastest(self) -> float:
        return min(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


def seconds(folder: Path, way: str, rows: list[dict[str, Any]]) -> float:
    accumulation, weights = WAYS[way]
    clock = Clock()
    callbacks: list[TrainerCallback] = [clock]
    data: Any = rows
    if "stream" in way:
        half = len(rows) // 2
        data = MixtureStream({"a": rows[:half], "b": rows[half:]}, {"a": 0.7, "b": 0.3})
        callbacks.append(MixtureCallback(data))
    made = trainer(
        folder,
        language_model(**LLAMA),
        data,
        steps=STEPS,
        batch=8,
        accumulation=accumulation,
        callbacks=callbacks,
        logging_strategy="no",
        optim="adamw_torch",
        learning_rate=1e-4,
        remove_unused_columns=way != "a column",
    )
    if weights is not None:
        apply_weights(made, weights())
    made.train()
    return clock.fastest()


def test_cost_of_weights_and_streams(tmp_path: Path):
    torch.set_num_threads(1)
    source = torch.Generator().manual_seed(0)
    ids = [torch.randint(4000, (128,), generator=source).tolist() for _ in range(160)]
    rows = [{"input_ids": row, "labels": row, "curate_weight": 1.0} for row in ids]
    times = {way: list[float]() for way in WAYS}
    for _ in range(ROUNDS):
        for way, found in times.items():
            found.append(seconds(tmp_path, way, rows))
    print("\n| way | CPU ms a step | ratio to the plain one |\n| --- | ---: | ---: |")
    for way, found in times.items():
        base = times["plain" if WAYS[way][0] == 1 else "plain, 2 micro-batches"]
        print(f"| {way} | {1000 * min(found):.0f} | {min(found) / min(base):.3f} |")
