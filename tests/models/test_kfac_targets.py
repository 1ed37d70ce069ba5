"""Mean gradients of target examples against autograd, one example at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, save_language_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from curate.models.kfac_layers import layers_of
from curate.models.kfac_targets import nothing, total_gradient
from curate.models.mlp import MLP
from curate.models.settings import CausalLM, TabularClassification
from curate.models.tasks import Encoded
from curate.models.tasks.causal_lm import CausalLMTask
from curate.models.tasks.classification import TabularTask

CPU = torch.device("cpu")
TEXTS = ["the cat", "in a hat the cat sat", "there", "a cat in the hat sat there then", "hat a"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_sum_of_the_examples_gradients(tmp_path: Path, kind: str, reduction: Any):
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64} if kind == "gpt2" else {}
    save_language_model(tmp_path, kind=kind, **shape)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).double().eval()
    task = CausalLMTask(CausalLM(max_tokens=32), byte_tokenizer())
    encoded = task.encode(pl.DataFrame({"text": TEXTS}))
    layers = layers_of(
        model, only=lambda name: "lm_head" in name or "layers" in name or ".h." in name
    )
    chosen = np.array([0, 1, 3, 4])
    found = total_gradient(
        model, task, encoded, chosen, layers=layers, batch_tokens=40, device=CPU,
        reduction=reduction,
    )  # fmt: skip
    assert (found.num, found.num_left_out) == (4, 0)
    wanted = {layer.name: torch.zeros(1, dtype=torch.float64) for layer in layers}
    for place in chosen:
        batch = task.collate(encoded, np.array([place]))
        model.zero_grad()
        flat = task.logits_and_targets(model, batch)
        functional.cross_entropy(flat.logits, flat.targets, reduction=reduction).backward()
        for layer in layers:
            module: Any = model.get_submodule(layer.name)
            weight = module.weight.grad.T if layer.is_transposed else module.weight.grad
            if layer.bias is not None:
                weight = torch.cat([weight, module.bias.grad[:, None]], 1)
            wanted[layer.name] = wanted[layer.name] + weight
    for name, values in found.mean().items():
        torch.testing.assert_close(values[0], wanted[name] / 4, rtol=1e-9, atol=1e-12)


def test_an_example_whose_gradient_is_not_finite_is_left_out_and_counted():
    torch.manual_seed(0)
    model = MLP(num_features=4, num_classes=3, hidden=(5,)).eval()
    numbers = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    numbers[2] = np.inf
    encoded = Encoded(
        lengths=np.ones(6, dtype=np.int64),
        num_scored=np.ones(6, dtype=np.int64),
        truncated=np.zeros(6, dtype=bool),
        arrays={"features": numbers, "labels": np.array([0, 1, 2, 0, 1, 2])},
        problems={},
    )
    task, layers = TabularTask(TabularClassification(num_classes=3)), layers_of(model)
    more: dict[str, Any] = {"layers": layers, "batch_tokens": 4, "device": CPU}
    found = total_gradient(model, task, encoded, np.arange(6), **more)
    rest = total_gradient(model, task, encoded, np.array([0, 1, 3, 4, 5]), **more)
    assert (found.num, found.num_left_out) == (5, 1)
    for name, values in rest.gradients.items():
        torch.testing.assert_close(found.gradients[name], values, rtol=1e-5, atol=1e-7)
    assert nothing(layers).plus(found).num == 5
