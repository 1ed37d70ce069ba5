"""The preference task against plain loops over single sequences in float64."""

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, save_language_model
from torch import Tensor

from curate.errors import ConfigError, InputError
from curate.models.gradients import softmax
from curate.models.load import LoadedModel, load_model
from curate.models.quantities import FORWARD, GRADIENT, measure
from curate.models.settings import Model, Preference
from curate.models.tasks import build_task
from curate.models.tasks.preference import REFERENCE, PreferenceTask

CPU = torch.device("cpu")
BETA = 0.3
PROMPTS = ["which hat?", "", "a or b", "the longest of the prompts, by far", "why"]
CHOSEN = ["the cat in the hat", "yes", "a", "thin", "the same beginning, a good end"]
REJECTED = ["no", "the other one", "b", "the one that is not thin at all", "the same beginning"]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def load(folder: Path) -> LoadedModel:
    found = load_model(Model(name=str(folder), device="cpu"), Preference())
    found.model.double()
    return found


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, LoadedModel]:
    """The model and its reference."""
    folder = tmp_path_factory.mktemp(request.param)
    shape: dict[str, Any] = {}
    if request.param == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
    for seed in (0, 1):
        save_language_model(folder / str(seed), kind=request.param, seed=seed, **shape)
    return load(folder / "0"), load(folder / "1")


def answer(model: Any, tokenizer: Any, prompt: str, text: str) -> Tensor:
    """Log-probability of all tokens of an answer behind its prompt, one sequence at a time."""
    given = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    tokens = [*given, *tokenizer(text, add_special_tokens=False).input_ids]
    logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
    return sum(
        (logits[i - 1].log_softmax(0)[tokens[i]] for i in range(len(given), len(tokens))),
        torch.zeros((), dtype=torch.float64),
    )


def margins(model: Any, reference: Any, tokenizer: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for prompt, good, bad in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        with torch.no_grad():
            was = [answer(reference, tokenizer, prompt, text) for text in (good, bad)]
        now = [answer(model, tokenizer, prompt, text) for text in (good, bad)]
        found.append(BETA * ((now[0] - was[0]) - (now[1] - was[1])))
    return found


def with_reference(task: PreferenceTask, reference: Any, fields: pl.DataFrame) -> pl.DataFrame:
    """The fields and what the reference says of them, all in one batch."""
    encoded = task.encode(fields)
    with torch.no_grad():
        found = task.log_probabilities(reference, task.collate(encoded, range(len(encoded))))
    return fields.with_columns(
        pl.Series(name, found[:, side].numpy()) for side, name in enumerate(REFERENCE)
    )


def pairs(**more: Any) -> pl.DataFrame:
    return pl.DataFrame({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED, **more})


def task_of(tokenizer: Any, **settings: Any) -> PreferenceTask:
    task = build_task(Preference(beta=BETA, **settings), tokenizer)
    assert isinstance(task, PreferenceTask)
    return task


@pytest.mark.parametrize("budget", [1, 200, 5000])
def test_all_quantities_are_those_of_a_loop(
    models: tuple[LoadedModel, LoadedModel], budget: int
) -> None:
    loaded, reference = models
    task = task_of(loaded.tokenizer)
    fields = with_reference(task, reference.model, pairs())
    found, _ = measure(loaded.model, task, task.encode(fields), batch_tokens=budget, device=CPU)
    with torch.no_grad():
        wanted = margins(loaded.model, reference.model, loaded.tokenizer)
    for index, margin in enumerate(map(float, wanted)):
        right = 1 / (1 + math.exp(-margin))
        entropy = -right * math.log(right) - (1 - right) * math.log(1 - right)
        expected = {
            "loss": -math.log(right),
            "margin": margin,
            "correct": float(margin > 0),
            "error_norms": math.sqrt(2) * (1 - right),
            "entropy": entropy,
        }
        for name, value in expected.items():
            assert float(found[name][index]) == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("is_large", [False, True])
def test_gradients_are_those_of_single_examples(
    models: tuple[LoadedModel, LoadedModel], is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, reference = models
    if is_large:  # as a vocabulary of 128,000 would be
        monkeypatch.setitem(softmax.KEPT_NUMBERS, "cpu", 100)
        monkeypatch.setitem(softmax.BLOCK_NUMBERS, "cpu", 2000)
    task = task_of(loaded.tokenizer)
    fields = with_reference(task, reference.model, pairs())
    found, _ = measure(
        loaded.model,
        task,
        task.encode(fields),
        batch_tokens=800,
        device=CPU,
        wanted=frozenset(FORWARD | GRADIENT),
    )
    parameters = list(loaded.model.parameters())
    for index, margin in enumerate(margins(loaded.model, reference.model, loaded.tokenizer)):
        loss = -margin.sigmoid().log()
        grads: Any = torch.autograd.grad(loss, parameters, allow_unused=True)
        squares = sum(float(g.square().sum()) for g in grads if g is not None)
        assert float(found["grad_sq_norm"][index]) == pytest.approx(squares, rel=1e-5)
        assert float(found["num_positions"][index]) == 1


def test_a_model_that_is_its_own_reference_has_no_margin(
    models: tuple[LoadedModel, LoadedModel],
) -> None:
    loaded, _ = models
    task = task_of(loaded.tokenizer)
    fields = with_reference(task, loaded.model, pairs())
    batch = task.collate(task.encode(fields), range(len(PROMPTS)))
    flat = task.logits_and_targets(loaded.model, batch)
    torch.testing.assert_close(flat.logits, torch.zeros_like(flat.logits), atol=1e-9, rtol=0)
    assert task.loss(loaded.model, batch).item() == pytest.approx(math.log(2))


def test_what_both_answers_begin_with_need_not_count(
    models: tuple[LoadedModel, LoadedModel],
) -> None:
    """The prompt inside the answers gives the margin of the prompt apart."""
    loaded, reference = models
    task = task_of(loaded.tokenizer)
    apart = pl.DataFrame({"prompt": ["ab "], "chosen": ["xyz"], "rejected": ["qq"]})
    inside = pl.DataFrame({"chosen": ["ab xyz"], "rejected": ["ab qq"]})
    found: list[Tensor] = []
    for fields in (apart, inside):
        whole = with_reference(task, reference.model, fields)
        encoded = task.encode(whole)
        assert encoded.num_scored.tolist() == [5]
        found.append(task.logits_and_targets(loaded.model, task.collate(encoded, [0])).logits)
    torch.testing.assert_close(found[0], found[1])


def test_answers_that_do_not_differ_are_not_scored() -> None:
    task = task_of(byte_tokenizer(), max_tokens=6)
    fields = pl.DataFrame(
        {
            "prompt": ["p", "long prompt", "p"],
            "chosen": ["same", "one", "same so far"],
            "rejected": ["same", "two", "same so long"],
        }
    )
    encoded = task.encode(fields)
    assert encoded.num_scored.tolist() == [0, 0, 0]
    assert encoded.truncated.tolist() == [False, True, True]
    wide = task_of(byte_tokenizer()).encode(fields)
    assert wide.num_scored.tolist() == [0, 6, 7]


@pytest.mark.parametrize("implicit", [False, True])
def test_chats_are_two_conversations_with_one_beginning(implicit: bool) -> None:
    asked = [{"role": "user", "content": "hi"}]
    good = [{"role": "assistant", "content": "yes"}]
    bad = [{"role": "assistant", "content": "go away"}]
    columns: dict[str, Any] = {"prompt": [asked], "chosen": [good], "rejected": [bad]}
    if implicit:
        columns = {"chosen": [asked + good], "rejected": [asked + bad]}
    tokenizer = byte_tokenizer(template=TEMPLATE)
    task = task_of(tokenizer)
    encoded = task.encode(pl.DataFrame(columns))
    batch = task.collate(encoded, [0])
    assert batch["input_ids"].shape[:2] == (1, 2)
    counted = [
        tokenizer.decode([token for token in row if token != -100])
        for row in batch["targets"][0].tolist()
    ]
    assert counted == ["yes</s>", "go away</s>"]
    beginning = tokenizer.decode(batch["input_ids"][0, 0][batch["attention_mask"][0, 0] > 0])
    assert beginning == "[user]hi</s>[assistant]yes</s>"


def test_without_the_reference_it_says_what_is_missing(
    models: tuple[LoadedModel, LoadedModel],
) -> None:
    task = task_of(models[0].tokenizer)
    batch = task.collate(task.encode(pairs()), [0])
    with pytest.raises(InputError, match="reference's log-probabilities"):
        task.logits_and_targets(models[0].model, batch)
    with pytest.raises(ConfigError, match="compares two answers"):
        task.encode(pl.DataFrame({"text": ["a"]}))
    with pytest.raises(ConfigError, match="beta is 0"):
        Preference(beta=0)


@pytest.mark.parametrize("is_large", [False, True])
def test_training_goes_down_the_gradient_of_the_mean(
    models: tuple[LoadedModel, LoadedModel], is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, reference = models
    if is_large:
        monkeypatch.setitem(softmax.KEPT_NUMBERS, "cpu", 100)
        monkeypatch.setitem(softmax.BLOCK_NUMBERS, "cpu", 2000)
    task = task_of(loaded.tokenizer)
    fields = with_reference(task, reference.model, pairs())
    batch = task.collate(task.encode(fields), range(len(PROMPTS)))
    parameters = list(loaded.model.parameters())
    found: Any = torch.autograd.grad(task.loss(loaded.model, batch), parameters)
    losses = [-m.sigmoid().log() for m in margins(loaded.model, reference.model, loaded.tokenizer)]
    wanted: Any = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_half_precision_sums_up_in_float64(models: tuple[LoadedModel, LoadedModel]) -> None:
    """A long answer's log-probability is thousands of nats; the margin is a small difference."""
    loaded, reference = models
    task = task_of(loaded.tokenizer)
    fields = with_reference(task, reference.model, pairs())
    batch = task.collate(task.encode(fields), [0, 1])
    found = task.log_probabilities(loaded.model.float(), batch)
    assert found.dtype == torch.float64
    flat = task.logits_and_targets(loaded.model, batch)
    loaded.model.double()
    assert flat.logits.dtype == torch.float32
    exact = task.logits_and_targets(loaded.model, batch).logits
    torch.testing.assert_close(flat.logits.double(), exact, rtol=1e-4, atol=1e-4)
