"""How far sketched gradient norms are from exact ones, before and after training on text.

    pytest tests/benchmarks/test_gradients_sketch.py -s -o addopts=--import-mode=importlib

A small Llama-like model (width 192) is measured with random weights and again after it was trained
on sentences in which each word says much of the next one: trained gradients have lower rank. The
error is that of the norm; the order's is one minus Spearman's correlation of exact and sketched.
"""

import os

import pytest
import torch
from gradient_ways import losses
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from curate.models.gradients import Engine, Wanted
from curate.models.gradients.sketch import Sketch

WORDS, LENGTH, EXAMPLES = 512, 384, 24
STEPS = int(os.environ.get("CURATE_BENCH_STEPS", "150"))


def sentences(rows: int, seed: int) -> Tensor:
    """A Markov chain in which four words can follow each; examples differ in how noisy they are."""
    fixed = torch.Generator().manual_seed(0)
    follow = torch.randint(0, WORDS, (WORDS, 4), generator=fixed)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.linspace(0, 0.6, rows)
    ids = torch.randint(0, WORDS, (rows, 1), generator=draw)
    for _ in range(LENGTH - 1):
        choice = torch.randint(0, 4, (rows, 1), generator=draw)
        following = follow[ids[:, -1:], choice].view(rows, 1)
        wild = torch.randint(0, WORDS, (rows, 1), generator=draw)
        is_wild = torch.rand(rows, 1, generator=draw) < noise[:, None]
        ids = torch.cat([ids, torch.where(is_wild, wild, following)], 1)
    return ids


@pytest.mark.timeout(3600)
def test_sketched_norms_are_within_five_per_cent_before_and_after_training():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=WORDS, hidden_size=192, intermediate_size=512,
                         num_hidden_layers=3, num_attention_heads=6,
                         num_key_value_heads=6, tie_word_embeddings=False)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = {"input_ids": sentences(EXAMPLES, 1)}
    print("\n| weights | loss, nats | k | mean error | largest error | 1 - Spearman |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for state in ("random", f"after {STEPS} steps"):
        if state != "random":
            train(model)
        with torch.no_grad():
            loss = float(losses(model, batch).mean()) / (LENGTH - 1)
        engine = Engine(model)
        exact = engine.measure(losses, batch, num_examples=EXAMPLES).total().sqrt()
        for size in (63, 127):
            wanted = Wanted(sketch=Sketch(size))
            found = engine.measure(losses, batch, num_examples=EXAMPLES, wanted=wanted)
            error = (found.total().sqrt() / exact - 1).abs()
            order = float(spearmanr(exact, found.total())[0])  # pyright: ignore
            print(f"| {state} | {loss:.2f} | {size} | {float(error.mean()):.1%} |"
                  f" {float(error.max()):.1%} | {1 - order:.0e} |")  # fmt: skip
            if size == 127:
                assert float(error.max()) <= 0.05


def train(model: AutoModelForCausalLM) -> None:
    """AdamW on fresh sentences."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)  # pyright: ignore
    for step in range(STEPS):
        ids = sentences(4, 100 + step)
        loss = losses(model, {"input_ids": ids}).mean() / (LENGTH - 1)  # pyright: ignore
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
