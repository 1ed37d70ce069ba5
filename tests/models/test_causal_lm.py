"""The language-model task against a plain loop over single sequences and the model's own logits."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import byte_tokenizer, save_language_model
from torch.nn import functional

from curate.errors import ConfigError, CurateError
from curate.models.load import LoadedModel, load_model
from curate.models.quantities import measure
from curate.models.settings import CausalLM, Model
from curate.models.tasks import Encoded, Task, build_task
from curate.models.tasks.chat import ChatEncoder

TEXTS = ["the cat in the hat", "a", "", "in", "the longest of them all, by far the longest", "ü"]

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Forgets what was thought in earlier turns, as reasoning models do.
REWRITING = (
    "{% for m in messages %}[{{ m['role'] }}]{% if not loop.last and m['role'] == 'assistant' %}"
    "{{ m['content'][:1] }}{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "because"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(save_language_model(tmp_path_factory.mktemp("llama")))


def load(folder: Path, **settings: object) -> LoadedModel:
    return load_model(Model(name=str(folder), device="cpu", **settings), CausalLM())  # pyright: ignore[reportArgumentType]


def run(
    loaded: LoadedModel, fields: pl.DataFrame, *, budget: int = 256, max_tokens: int = 1024
) -> dict[str, torch.Tensor]:
    task = build_task(CausalLM(max_tokens=max_tokens), loaded.tokenizer)
    found, _ = measure(
        loaded.model, task, task.encode(fields), batch_tokens=budget, device=loaded.device
    )
    return found


def alone(loaded: LoadedModel, tokens: list[int], first: int) -> dict[str, float]:
    """Quantities of one sequence, by the model's own logits and the textbook formulas."""
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([tokens])).logits[0, first - 1 : -1].double()
    targets = torch.tensor(tokens[first:])
    probabilities = logits.softmax(-1)
    errors = (probabilities - functional.one_hot(targets, logits.shape[1])).norm(dim=-1)
    own = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -math.inf).max(-1).values
    return {
        "loss": float(functional.cross_entropy(logits, targets)),
        "error_norms": float(errors.mean()),
        "error_frob": float(errors.norm()),
        "margin": float((own - others).mean()),
        "entropy": float(-(probabilities * probabilities.log()).sum(-1).mean()),
        "correct": float((logits.argmax(-1) == targets).double().mean()),
        "num_scored": len(targets),
    }


def agree(found: dict[str, torch.Tensor], index: int, wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert found[name][index].item() == pytest.approx(value, rel=2e-5, abs=2e-6), name


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


BOS = byte_tokenizer().bos_token_id


def test_every_quantity_equals_a_plain_loop_over_single_texts(llama: LoadedModel):
    found = run(llama, pl.DataFrame({"text": TEXTS}))
    for index, text in enumerate(TEXTS):
        if text:
            agree(found, index, alone(llama, [BOS, *ids(text)], 1))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.1}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_models_that_scale_or_cap_their_logits_are_measured_by_their_own(
    tmp_path: Path, kind: str, fields: dict[str, Any]
):
    loaded = load(save_language_model(tmp_path / kind, kind=kind, **fields))
    found = run(loaded, pl.DataFrame({"text": TEXTS}))
    for index in (0, 4):
        agree(found, index, alone(loaded, [BOS, *ids(TEXTS[index])], 1))


def test_batch_size_and_padding_change_nothing_beyond_rounding(llama: LoadedModel):
    fields = pl.DataFrame({"text": [text * n for n in (1, 3, 7) for text in TEXTS]})
    together = run(llama, fields, budget=4096)
    for budget in (1, 37, 512):
        for name, values in run(llama, fields, budget=budget).items():
            torch.testing.assert_close(values, together[name], atol=1e-6, rtol=1e-6, equal_nan=True)


def test_order_of_the_examples_only_moves_their_values(llama: LoadedModel):
    forward = run(llama, pl.DataFrame({"text": TEXTS}))
    backward = run(llama, pl.DataFrame({"text": TEXTS[::-1]}))
    for name, values in forward.items():
        torch.testing.assert_close(
            values, backward[name].flip(0), atol=1e-6, rtol=1e-6, equal_nan=True
        )


def test_the_prompt_is_read_but_not_counted(llama: LoadedModel):
    fields = pl.DataFrame({"prompt": ["the cat", "in"], "response": [" in a hat", " the"]})
    found = run(llama, fields)
    for index, (prompt, response) in enumerate(fields.rows()):
        given = [BOS, *ids(prompt)]
        agree(found, index, alone(llama, given + ids(response), len(given)))


def test_another_prompt_changes_the_loss_of_the_same_response(llama: LoadedModel):
    fields = pl.DataFrame({"prompt": ["the cat", "a dog!!"], "response": [" in a hat"] * 2})
    loss = run(llama, fields)["loss"]
    assert abs(float(loss[0] - loss[1])) > 1e-3


def test_a_long_text_is_cut_and_says_how_many_tokens_counted(llama: LoadedModel):
    found = run(llama, pl.DataFrame({"text": [TEXTS[4]]}), max_tokens=8)
    agree(found, 0, alone(llama, [BOS, *ids(TEXTS[4])][:8], 1))
    assert found["num_scored"].tolist() == [7]


def test_what_has_nothing_to_count_is_not_scored(llama: LoadedModel):
    texts = run(llama, pl.DataFrame({"text": ["", None, "the"]}))
    cut = run(
        llama, pl.DataFrame({"prompt": ["a very long prompt"], "response": ["x"]}), max_tokens=4
    )
    assert np.isnan(cut["loss"].numpy()).all()
    for values in texts.values():
        assert np.isnan(values.numpy()).tolist() == [True, True, False]


def test_without_a_beginning_token_the_first_token_is_not_counted(tmp_path: Path):
    tokenizer = byte_tokenizer(bos=False, eos=False)
    loaded = load(save_language_model(tmp_path, tokenizer=tokenizer))
    found = run(loaded, pl.DataFrame({"text": ["cat", "c", "a long one to pad the others"]}))
    agree(found, 0, alone(loaded, ids("cat"), 1))
    assert found["num_scored"].tolist()[0] == 2
    assert math.isnan(found["loss"][1])


def encode_chat(template: str, turns: str, messages: object) -> tuple[Encoded, Task]:
    task = build_task(CausalLM(turns=turns), byte_tokenizer(template=template))  # pyright: ignore[reportArgumentType]
    return task.encode(pl.DataFrame({"messages": [messages]})), task


def counted_text(encoded: Encoded) -> str:
    counted = encoded.arrays["tokens"][encoded.arrays["counted"]]
    return byte_tokenizer().decode(counted)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize(
    ("turns", "said"), [("all", "yes?</s>because</s>"), ("last", "because</s>")]
)
def test_only_what_the_assistant_says_counts(template: str, turns: str, said: str):
    encoded, _ = encode_chat(template, turns, TURNS)
    assert counted_text(encoded) == said
    whole = byte_tokenizer().decode(encoded.arrays["tokens"])
    assert whole.startswith("[user]hi</s>[assistant]yes?</s>[user]why")
    assert encoded.num_scored.tolist() == [len(ids(said))]


def test_what_follows_the_last_assistant_turn_is_left_out_of_last():
    encoded, _ = encode_chat(PLAIN, "last", [*TURNS, {"role": "user", "content": "thanks"}])
    assert counted_text(encoded) == "because</s>"
    assert "thanks" not in byte_tokenizer().decode(encoded.arrays["tokens"])


def test_a_chat_is_scored_like_its_tokens(llama: LoadedModel):
    tokenizer = byte_tokenizer(template=PLAIN)
    task = build_task(CausalLM(turns="last"), tokenizer)
    encoded = task.encode(pl.DataFrame({"messages": [TURNS, TURNS[:2]]}))
    found, _ = measure(llama.model, task, encoded, batch_tokens=256, device=torch.device("cpu"))
    given = ids("[user]hi</s>[assistant]yes?</s>[user]why</s>[assistant]")
    agree(found, 0, alone(llama, given + ids("because</s>"), len(given)))


def test_a_chat_without_an_assistant_is_not_scored():
    encoded, _ = encode_chat(PLAIN, "all", TURNS[:1])
    assert encoded.num_scored.tolist() == [0]


def test_a_template_that_rewrites_earlier_turns_is_refused_naming_the_row():
    task = build_task(CausalLM(), byte_tokenizer(template=REWRITING))
    fields = pl.DataFrame(
        {"source": ["chats"], "file": ["a.jsonl"], "row": [17], "messages": [TURNS]}
    )
    with pytest.raises(CurateError, match=r"chats, a\.jsonl, row 17: .*message 1"):
        task.encode(fields)
    last = build_task(CausalLM(turns="last"), byte_tokenizer(template=REWRITING))
    assert counted_text(last.encode(fields)) == "because</s>"


def test_a_row_that_the_template_refuses_is_set_aside_with_its_reason():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    task = build_task(CausalLM(), byte_tokenizer(template=strict + PLAIN))
    encoded = task.encode(pl.DataFrame({"messages": [TURNS[1:], TURNS]}))
    assert encoded.num_scored[0] == 0
    assert encoded.num_scored[1] > 0
    assert "user first" in encoded.problems[0]


def test_a_tokenizer_without_a_chat_template_is_refused():
    task = build_task(CausalLM(), byte_tokenizer())
    with pytest.raises(ConfigError, match="no chat template"):
        task.encode(pl.DataFrame({"messages": [TURNS]}))


def test_the_template_is_part_of_what_the_numbers_depend_on():
    digests = {
        ChatEncoder(byte_tokenizer(template=template), "all").digest
        for template in (None, PLAIN, MARKED)
    }
    assert len(digests) == 3
    facts = build_task(CausalLM(), byte_tokenizer(template=PLAIN)).facts()
    assert facts["template"] in digests


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day():
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }}"
    )
    encoded, _ = encode_chat(dated + PLAIN, "all", TURNS)
    assert byte_tokenizer().decode(encoded.arrays["tokens"]).startswith("01 Jan 2025")


def test_bfloat16_weights_are_measured_with_float32_logits(tmp_path: Path):
    folder = save_language_model(tmp_path)
    half = load(folder, dtype="bfloat16")
    task = build_task(CausalLM(), half.tokenizer)
    batch = task.collate(task.encode(pl.DataFrame({"text": TEXTS[:2]})), [0, 1])
    with torch.no_grad():
        (flat,) = task.pieces(half.model, batch)
        hidden = half.model.model(input_ids=batch["input_ids"], use_cache=False)[0]  # pyright: ignore
        first = hidden[0, 0].double() @ half.model.lm_head.weight.double().T  # pyright: ignore
    assert flat.logits.dtype == torch.float32
    torch.testing.assert_close(flat.logits[0].double(), first, atol=1e-5, rtol=1e-5)


def test_the_training_loss_is_the_mean_over_all_counted_tokens(llama: LoadedModel):
    task = build_task(CausalLM(), llama.tokenizer)
    fields = pl.DataFrame({"text": [TEXTS[0], TEXTS[4]]})
    batch = task.collate(task.encode(fields), [0, 1])
    found = run(llama, fields)
    weights = found["num_scored"] / found["num_scored"].sum()
    loss = task.loss(llama.model, batch)
    torch.testing.assert_close(loss.detach(), (weights * found["loss"]).sum())
    loss.backward()
    head = llama.model.lm_head.weight  # pyright: ignore
    assert head.grad is not None
    llama.model.zero_grad(set_to_none=True)
