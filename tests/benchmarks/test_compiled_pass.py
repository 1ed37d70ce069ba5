"""What compiling the model's body does to a pass without gradients, and what compiling costs.

    pytest tests/benchmarks/test_compiled_pass.py -s -o addopts=--import-mode=importlib

CPU time of one thread; plain and compiled passes take turns, and the ratio is the median.
"""

import statistics
import time
import warnings
from pathlib import Path

import polars as pl
import torch
from gradient_ways import language_model, tokens
from tiny_models import save_language_model
from torch import Tensor

from curate.models.load import load_model
from curate.models.quantities import measure
from curate.models.settings import CausalLM, Model
from curate.models.tasks import build_task

ROUNDS, NUM_TEXTS, LENGTH = 5, 64, 128


def test_a_compiled_pass_against_a_plain_one(tmp_path: Path):
    torch.set_num_threads(1)
    settings = CausalLM(max_tokens=LENGTH)
    small = load_model(Model(name=str(save_language_model(tmp_path / "lm"))), settings)
    task = build_task(settings, small.tokenizer)
    model = language_model("neox-9m")
    assert small.tokenizer is not None
    words = tokens(NUM_TEXTS, LENGTH) % len(small.tokenizer)
    texts = [" ".join(f"w{int(word)}" for word in row) for row in words]
    encoded = task.encode(pl.DataFrame({"text": texts}))

    found: dict[bool, dict[str, Tensor]] = {}

    def seconds(*, is_compiled: bool) -> float:
        started = time.process_time()
        found[is_compiled], _ = measure(
            model, task, encoded, batch_tokens=1024, device=torch.device("cpu"),
            is_compiled=is_compiled,
        )  # fmt: skip
        return time.process_time() - started

    seconds(is_compiled=False)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        seconds(is_compiled=True)
        once = time.perf_counter() - started
        pairs = [(seconds(is_compiled=True), seconds(is_compiled=False)) for _ in range(ROUNDS)]
    ratios = [compiled / plain for compiled, plain in pairs]
    plain = statistics.median(plain for _, plain in pairs)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"\n{millions:.1f} M parameters, {NUM_TEXTS} texts of {LENGTH} tokens:"
          f" {statistics.median(ratios):.2f} of the plain pass ({min(ratios):.2f} to"
          f" {max(ratios):.2f}), {plain:.2f} s; the first compiled pass {once:.0f} s")  # fmt: skip
    for name, values in found[False].items():
        torch.testing.assert_close(found[True][name], values, rtol=1e-4, atol=1e-5)
