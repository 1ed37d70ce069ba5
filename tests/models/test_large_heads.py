"""Passes of a language model with a large vocabulary: no number for each position and token."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from largest_tensor import Largest
from tiny_models import byte_tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from curate.models.quantities import measure
from curate.models.settings import CausalLM
from curate.models.tasks import build_task

VOCABULARY = 5000
TEXTS = ["the longest of them all, by far the longest, and longer still " * 2, "the cat sat there"]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a vocabulary of a million would have it."""
    monkeypatch.setattr("curate.models.gradients.softmax.KEPT_NUMBERS", {"cpu": 0})
    monkeypatch.setattr("curate.models.gradients.softmax.BLOCK_NUMBERS", {"cpu": 60_000})
    monkeypatch.setattr("curate.models.head._PIECE_NUMBERS", {"cpu": 60_000})


def language_model(*, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def pass_over(model: nn.Module, *wanted: str) -> tuple[dict[str, Tensor], int, int]:
    """Quantities, numbers of the largest tensor, and counted positions times vocabulary."""
    task = build_task(CausalLM(), byte_tokenizer())
    encoded = task.encode(pl.DataFrame({"text": TEXTS}))
    with Largest() as largest:
        found, _ = measure(
            model,
            task,
            encoded,
            batch_tokens=4096,
            device=torch.device("cpu"),
            wanted=wanted or ("loss",),
        )
    return found, largest.numbers, int(encoded.num_scored.max()) * VOCABULARY


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wanted", ["loss", "grad_sq_norm", "grad_sq_norm[head]"])
def test_the_largest_tensor_is_far_below_positions_times_vocabulary(tied: bool, wanted: str):
    model = language_model(tied=tied)
    _, largest, whole = pass_over(model, wanted)
    assert largest < whole / 4
    assert largest <= max(p.numel() for p in model.parameters())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("tied", [False, True])
def test_scores_and_norms_are_those_of_the_model_s_own_logits(tied: bool):
    model = language_model(tied=tied)
    found, _, _ = pass_over(model, "grad_sq_norm", "grad_sq_norm[head]")
    tokenizer, exact = byte_tokenizer(), language_model(tied=tied).double()
    parameters: Any = list(exact.parameters())
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        ids = ids[:, 1:] if ids[0, 1] == tokenizer.bos_token_id else ids
        logits = exact(input_ids=ids).logits[0, :-1]
        loss = functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        squares = sum(g.square().sum() for g in torch.autograd.grad(loss, parameters))
        assert found["grad_sq_norm"][row].item() == pytest.approx(float(squares), rel=2e-5)
        mean = float(loss.detach()) / len(logits)
        assert found["loss"][row].item() == pytest.approx(mean, rel=1e-5)
        errors = logits.softmax(-1) - functional.one_hot(ids[0, 1:], VOCABULARY)
        assert found["error_norms"][row].item() == pytest.approx(
            float(errors.norm(dim=1).mean().detach()), rel=1e-5
        )


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype):
    model = language_model(tied=True)
    exact, _, _ = pass_over(model, "grad_sq_norm")
    found, _, _ = pass_over(language_model(tied=True).to(dtype), "grad_sq_norm")
    np.testing.assert_allclose(found["grad_sq_norm"], exact["grad_sq_norm"], rtol=0.03)
