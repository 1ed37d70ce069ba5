"""A compiled pass gives the numbers of a plain one."""

from collections.abc import Collection
from pathlib import Path

import polars as pl
import pytest
import torch
from tiny_models import save_language_model
from torch import Tensor

from curate.models.load import load_model
from curate.models.quantities import measure
from curate.models.settings import CausalLM, Model
from curate.models.tasks import build_task


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own modules
def test_compiled_quantities_are_the_plain_ones_and_gradients_still_work(tmp_path: Path):
    settings = CausalLM(max_tokens=32)
    loaded = load_model(Model(name=str(save_language_model(tmp_path / "lm"))), settings)
    task = build_task(settings, loaded.tokenizer)
    texts = ["the cat sat in a hat"[: 4 + index] for index in range(12)]
    encoded = task.encode(pl.DataFrame({"text": texts}))

    def run(is_compiled: bool, wanted: Collection[str] = ()) -> dict[str, Tensor]:
        cpu = torch.device("cpu")
        model = loaded.model
        return measure(
            model,
            task,
            encoded,
            batch_tokens=64,
            device=cpu,
            wanted=wanted,
            is_compiled=is_compiled,
        )[0]

    plain = run(is_compiled=False)
    for _ in range(2):  # the second time nothing is compiled again
        found = run(is_compiled=True)
        for name, values in plain.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5)
    wanted = {"grad_sq_norm", "num_positions"}
    exact = run(is_compiled=False, wanted=wanted)
    again = run(is_compiled=True, wanted=wanted)
    torch.testing.assert_close(again["grad_sq_norm"], exact["grad_sq_norm"], rtol=0, atol=0)
