"""Long documents read in windows, against a plain loop over the windows of one document."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, save_language_model
from torch import Tensor
from torch.nn import functional

from curate.errors import ConfigError
from curate.models.load import LoadedModel, load_model
from curate.models.quantities import FORWARD, GRADIENT, measure
from curate.models.settings import CausalLM, Model, Window
from curate.models.tasks import Task, build_task, windows
from curate.models.tasks.windows import window_bounds

CPU = torch.device("cpu")
SIZE, OVERLAP = 12, 4
TEXTS = [
    "the cat in the hat",
    "a",
    "the longest of them all, by far the longest of all of them, so long that it does not end",
    "",
    "xyzxyzxyzxyz",
    "of middle length, longer than one window",
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        save_language_model(folder)
    else:
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        save_language_model(folder, kind="gpt2", **shape)
    found = load_model(Model(name=str(folder), device="cpu"), CausalLM())
    found.model.double()
    return found


def task_of(tokenizer: Any, **window: Any) -> Task:
    settings = CausalLM(max_tokens=SIZE, window=Window(overlap=OVERLAP, **window))
    return build_task(settings, tokenizer)


def token_losses(model: Any, tokens: list[int], counts: list[bool]) -> list[Tensor]:
    """Loss of each counted token, predicted from its window: the textbook loop."""
    losses: list[Tensor] = []
    done = 0
    while done < len(tokens):
        start = max(0, done - OVERLAP)
        window = tokens[start : start + SIZE]
        logits = model(input_ids=torch.tensor([window])).logits[0].double()
        for place in range(max(done, 1), start + len(window)):
            if counts[place]:
                row = logits[place - start - 1]
                losses.append(row.logsumexp(0) - row[tokens[place]])
        done = start + len(window)
    return losses


def measured(loaded: LoadedModel, task: Task, fields: pl.DataFrame, **how: Any) -> dict[str, Any]:
    how = {"batch_tokens": 200, **how}
    return measure(loaded.model, task, task.encode(fields), device=CPU, **how)[0]


def tokens_of(loaded: LoadedModel, text: str) -> list[int]:
    tokenizer: Any = loaded.tokenizer
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]


@pytest.mark.parametrize("budget", [30, 200, 5000])
def test_every_token_counts_once_with_the_overlap_as_context(loaded: LoadedModel, budget: int):
    fields = pl.DataFrame({"text": TEXTS})
    task = task_of(loaded.tokenizer)
    found = measured(loaded, task, fields, batch_tokens=budget)
    for index, text in enumerate(TEXTS):
        tokens = tokens_of(loaded, text)
        with torch.no_grad():
            losses = token_losses(loaded.model, tokens, [True] * len(tokens))
        if not losses:
            assert math.isnan(found["loss"][index])
            continue
        assert found["num_scored"][index] == len(losses) == len(tokens) - 1
        assert float(found["loss"][index]) == pytest.approx(
            float(torch.stack(losses).mean()), rel=1e-6
        )


def test_many_windows_are_read_some_at_a_time(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    task = task_of(loaded.tokenizer)
    fields = pl.DataFrame({"text": TEXTS})
    together = measured(loaded, task, fields)
    seen: list[int] = []
    hook = loaded.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    body: Any = loaded.model.base_model
    inner = body.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setitem(windows._GROUP_TOKENS, "cpu", 2 * SIZE)  # pyright: ignore[reportPrivateUsage]
    apart = measured(loaded, task, fields, batch_tokens=5000)
    hook.remove()
    inner.remove()
    assert max(seen) <= 2
    for name in FORWARD:
        np.testing.assert_allclose(apart[name], together[name], rtol=1e-6)


def test_the_gradient_is_that_of_the_whole_document(loaded: LoadedModel):
    fields = pl.DataFrame({"text": TEXTS})
    task = task_of(loaded.tokenizer)
    wanted = frozenset(FORWARD | GRADIENT)
    found = measured(loaded, task, fields, batch_tokens=800, wanted=wanted)
    parameters = list(loaded.model.parameters())
    for index, text in enumerate(TEXTS):
        tokens = tokens_of(loaded, text)
        losses = token_losses(loaded.model, tokens, [True] * len(tokens))
        if not losses:
            continue
        total = torch.stack(losses).sum()
        grads: Any = torch.autograd.grad(total, parameters, allow_unused=True)
        squares = sum(float(g.square().sum()) for g in grads if g is not None)
        assert float(found["grad_sq_norm"][index]) == pytest.approx(squares, rel=1e-5)
        assert int(found["num_positions"][index]) == len(losses)


def test_windows_of_the_prompt_alone_are_left_out(loaded: LoadedModel):
    prompt, response = "a prompt that is longer than two windows", "and a response of two of them"
    task = task_of(loaded.tokenizer)
    fields = pl.DataFrame({"prompt": [prompt, "why"], "response": [response, "so"]})
    encoded = task.encode(fields)
    before, after = tokens_of(loaded, prompt), tokens_of(loaded, response)[1:]
    batch = task.collate(encoded, [0, 1])
    windows = batch["input_ids"].shape[1]
    assert windows < math.ceil((len(before) + len(after)) / (SIZE - OVERLAP))
    assert encoded.lengths[0] == windows * SIZE
    assert encoded.num_scored.tolist() == [len(after), 2]
    found = measured(loaded, task, fields)
    with torch.no_grad():
        counts = [False] * len(before) + [True] * len(after)
        losses = token_losses(loaded.model, before + after, counts)
    assert float(found["loss"][0]) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)


def test_the_share_that_was_scored_is_known(loaded: LoadedModel):
    fields = pl.DataFrame({"text": TEXTS})
    whole = task_of(loaded.tokenizer).encode(fields)
    assert whole.scored_share is not None
    assert whole.scored_share.tolist() == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert not whole.truncated.any()
    task = task_of(loaded.tokenizer, max_windows=2)
    encoded = task.encode(fields)
    assert encoded.scored_share is not None
    length = len(tokens_of(loaded, TEXTS[2])) - 1
    counted = SIZE - 1 + SIZE - OVERLAP
    assert encoded.num_scored[2] == counted
    assert encoded.scored_share[2] == pytest.approx(counted / length)
    assert encoded.truncated.tolist() == [False, False, True, False, False, True]
    found = measured(loaded, task, fields)
    assert float(found["scored_share"][2]) == pytest.approx(counted / length)
    assert task.collate(encoded, [2])["input_ids"].shape == (1, 2, SIZE)


def test_short_documents_are_what_they_are_without_windows(loaded: LoadedModel):
    fields = pl.DataFrame({"text": ["the cat", "a hat"]})
    plain = measured(loaded, build_task(CausalLM(max_tokens=SIZE), loaded.tokenizer), fields)
    task = task_of(loaded.tokenizer)
    assert task.collate(task.encode(fields), [0, 1])["input_ids"].dim() == 2
    found = measured(loaded, task, fields)
    for name in FORWARD:
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-6)


def test_a_training_loss_is_the_mean_over_all_windows(loaded: LoadedModel):
    task = task_of(loaded.tokenizer)
    fields = pl.DataFrame({"text": TEXTS[:3]})
    batch = task.collate(task.encode(fields), [0, 1, 2])
    documents = [tokens_of(loaded, text) for text in TEXTS[:3]]
    losses = [
        loss for ids in documents for loss in token_losses(loaded.model, ids, [True] * len(ids))
    ]
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(task.loss(loaded.model, batch), expected)
    flat = task.logits_and_targets(loaded.model, batch)
    pieces = list(task.pieces(loaded.model, batch))
    torch.testing.assert_close(torch.cat([piece.logits for piece in pieces]), flat.logits)
    assert torch.cat([piece.owner for piece in pieces]).equal(flat.owner)
    each = functional.cross_entropy(flat.logits, flat.targets, reduction="none")
    torch.testing.assert_close(each, torch.stack(losses))


def test_bounds_cover_each_place_once():
    for length in range(1, 60):
        for size, overlap in ((12, 4), (5, 1), (5, 4), (100, 10)):
            bounds = window_bounds(np.ones(length, dtype=bool), size, overlap)
            covered = [place for _, first, end in bounds for place in range(first, end)]
            assert covered == list(range(length))
            assert all(end - start <= size for start, _, end in bounds)
            assert all(first - start == overlap for start, first, _ in bounds[1:])


def test_an_overlap_must_leave_room():
    with pytest.raises(ConfigError, match="overlap is 12, but a window has 12 tokens"):
        CausalLM(max_tokens=12, window=Window(overlap=12))
    with pytest.raises(ConfigError, match="would have nothing before it"):
        Window(overlap=0)
    settings = CausalLM(max_tokens=1000, window=Window(overlap=64))
    with pytest.raises(ConfigError, match="overlap is 64, but the model reads 32 tokens"):
        build_task(settings, byte_tokenizer(), max_positions=32)
    with pytest.raises(ConfigError, match="max_windows is 0"):
        Window(max_windows=0)


def test_the_share_stands_beside_the_score(tmp_path: Path):
    import curate

    found = curate.score(
        pl.DataFrame({"text": TEXTS}),
        scorers=["loss"],
        model=save_language_model(tmp_path / "lm"),
        task={"kind": "causal-lm", "max_tokens": SIZE,
              "window": {"overlap": OVERLAP, "max_windows": 2}},
    )  # fmt: skip
    assert found["num_scored"].to_list()[:2] == [12, 1]
    assert found["scored_share"].to_list()[:2] == [1.0, 1.0]
