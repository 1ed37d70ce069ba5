"""What all scores of the forward pass cost together, as a ratio to one plain forward pass.

    pytest tests/benchmarks/test_score_speed.py -s -o addopts=--import-mode=importlib

`CURATE_BENCH_MODEL=50m` takes the 50 M model of the goal (some minutes); the default is smaller.
"""

import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tiny_models import byte_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from curate.models.quantities import measure
from curate.models.settings import CausalLM
from curate.models.tasks import Encoded, build_task

SIZES = {
    "9m": {"hidden_size": 256, "layers": 4, "vocabulary": 8192, "batch": 8, "rounds": 7},
    "50m": {"hidden_size": 512, "layers": 6, "vocabulary": 32000, "batch": 8, "rounds": 5},
}
GOAL = {"9m": 1.25, "50m": 1.05}
LENGTH = 256


def language_model(size: str) -> nn.Module:
    shape = SIZES[size]
    config = AutoConfig.for_model(
        "llama",
        hidden_size=shape["hidden_size"],
        intermediate_size=int(2.75 * shape["hidden_size"]),
        num_hidden_layers=shape["layers"],
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=shape["vocabulary"],
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def encoded(size: str) -> Encoded:
    count, vocabulary = SIZES[size]["batch"], SIZES[size]["vocabulary"]
    tokens = np.random.default_rng(0).integers(vocabulary, size=count * LENGTH).astype(np.int32)
    counted = np.ones(count * LENGTH, dtype=bool)
    counted[::LENGTH] = False
    return Encoded(
        lengths=np.full(count, LENGTH),
        num_scored=np.full(count, LENGTH - 1),
        truncated=np.zeros(count, dtype=bool),
        arrays={"tokens": tokens, "starts": np.arange(count + 1) * LENGTH, "counted": counted},
        problems={},
    )


def seconds(work: Callable[[], object]) -> float:
    """Of CPU time: one thread, so that a busy machine disturbs little."""
    started = time.process_time()
    work()
    return time.process_time() - started


def test_all_scores_of_the_pass_cost_little_more_than_a_plain_forward():
    torch.set_num_threads(1)
    size = os.environ.get("CURATE_BENCH_MODEL", "9m")
    model, batch = language_model(size), encoded(size)
    task = build_task(CausalLM(), byte_tokenizer())
    ids = torch.from_numpy(batch.arrays["tokens"]).long().reshape(-1, LENGTH)

    def plain() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    def scores() -> None:
        measure(model, task, batch, batch_tokens=ids.numel(), device=torch.device("cpu"))

    plain()
    scores()
    rounds = [(seconds(plain), seconds(scores)) for _ in range(SIZES[size]["rounds"])]
    ratio = statistics.median(mine / theirs for theirs, mine in rounds)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{parameters / 1e6:.0f} M parameters, {ids.numel()} tokens, one thread")
    print("| what | CPU seconds, median | ratio |\n| --- | --- | --- |")
    print(f"| plain forward | {statistics.median(r[0] for r in rounds):.2f} | 1 |")
    print(
        "| EL2N, loss, margin, entropy together |"
        f" {statistics.median(r[1] for r in rounds):.2f} | {ratio:.3f} |"
    )
    assert ratio <= GOAL[size]
