"""Packed windows: against a plain loop over the texts, and against each text alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, save_language_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from curate.errors import ConfigError
from curate.models.load import load_model
from curate.models.packing import Packed, check_packing, pack
from curate.models.settings import CausalLM, Model
from curate.models.tasks import Encoded, Task, build_task

PADDING = 999
TEXTS = [
    "the cat in the hat",
    "a",
    "",
    "the longest of them all, by far the longest",
    "xyz",
    "in a",
]
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def documents(sizes: list[int], counted: list[list[bool]] | None = None) -> Encoded:
    """Texts whose tokens are all different, so that each can be told apart in a window."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    marks = counted or [[place > 0 for place in range(size)] for size in sizes]
    flat = np.array([mark for own in marks for mark in own], dtype=np.bool_)
    return Encoded(
        lengths=np.maximum(np.array(sizes, dtype=np.int64), 1),
        num_scored=np.array([sum(own) for own in marks], dtype=np.int64),
        truncated=np.zeros(len(sizes), dtype=np.bool_),
        arrays={
            "tokens": np.arange(1000, 1000 + sum(sizes), dtype=np.int32),
            "starts": starts,
            "counted": flat,
        },
        problems={},
    )


def tables(packed: Packed, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, counted and positions, a row for each window."""
    arrays = packed.encoded.arrays
    return tuple(arrays[n].reshape(-1, length) for n in ("tokens", "counted", "positions"))  # type: ignore[return-value]


def test_windows_hold_the_texts_of_a_group_one_behind_the_other():
    packed = pack(documents([3, 4, 2, 3]), np.array([0, 1, 0, 0]), length=6, padding=PADDING)
    tokens, counted, positions = tables(packed, 6)
    assert tokens.tolist() == [
        [1000, 1001, 1002, 1007, 1008, PADDING],  # one place left holds nothing to predict
        [1009, 1010, 1011, PADDING, PADDING, PADDING],
        [1003, 1004, 1005, 1006, PADDING, PADDING],
    ]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]]
    assert counted.astype(int).tolist() == [
        [0, 1, 1, 0, 1, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
    ]
    assert packed.groups.tolist() == [0, 0, 1]
    assert packed.encoded.num_scored.tolist() == [3, 2, 3]


def test_a_text_that_is_cut_goes_on_with_its_last_token_read_again():
    packed = pack(documents([3, 8]), np.array([0, 0]), length=5, padding=PADDING)
    tokens, counted, positions = tables(packed, 5)
    assert tokens.tolist() == [
        [1000, 1001, 1002, 1003, 1004],
        [1004, 1005, 1006, 1007, 1008],
        [1008, 1009, 1010, PADDING, PADDING],
    ]
    assert counted.astype(int).tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_token_that_counts_is_predicted_once_from_what_stood_before_it(data: Any):
    marks = data.draw(st.lists(st.lists(st.booleans(), max_size=13), max_size=12))
    marks = [[place > 0 and mark for place, mark in enumerate(own)] for own in marks]
    groups = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=len(marks),
                                         max_size=len(marks))), dtype=np.int64)  # fmt: skip
    length = data.draw(st.integers(2, 9))
    given_texts = documents([len(own) for own in marks], marks)
    packed = pack(given_texts, groups, length=length, padding=PADDING)
    tokens, counted, positions = tables(packed, length)
    wanted: list[tuple[int, int]] = []
    token = 1000
    for group, own in zip(groups.tolist(), marks, strict=True):
        wanted += [(group, token + i) for i, mark in enumerate(own) if mark and group >= 0]
        token += len(own)
    found: list[tuple[int, int]] = []
    for row, group in enumerate(packed.groups.tolist()):
        assert counted[row].any()
        assert positions[row, 0] == 0
        for place in range(length):
            if counted[row, place]:
                found.append((group, int(tokens[row, place])))
                assert tokens[row, place - 1] == tokens[row, place] - 1  # the token before it
            if positions[row, place]:
                assert positions[row, place] == positions[row, place - 1] + 1
                same = tokens[row, place - 1] == tokens[row, place] - 1
                padded = tokens[row, place - 1] == tokens[row, place] == PADDING
                assert same or padded
    assert Counter(found) == Counter(wanted)
    assert packed.encoded.num_scored.tolist() == counted.sum(axis=1).tolist()
    assert sorted(packed.groups.tolist()) == packed.groups.tolist()


def test_the_number_of_windows_is_that_of_a_count_by_hand():
    sizes = [50] * 20
    packed = pack(documents(sizes), np.zeros(20, np.int64), length=32, padding=PADDING)
    # 1000 tokens, one of which is read twice at each cut.
    assert 1000 / 32 < len(packed.groups) <= (1000 + len(packed.groups)) / 32 + 1
    assert packed.encoded.num_scored.sum() == 49 * 20


def test_a_window_of_one_token_is_refused():
    with pytest.raises(ConfigError, match="nothing to predict"):
        pack(documents([3]), np.zeros(1, np.int64), length=1, padding=0)


def test_nothing_becomes_no_window():
    packed = pack(documents([0, 1]), np.zeros(2, np.int64), length=8, padding=0)
    assert len(packed.encoded) == len(packed.groups) == 0
    assert packed.encoded.arrays["starts"].tolist() == [0]


def language_model(folder: Path, kind: str, attention: str) -> tuple[Any, Task]:
    save_language_model(folder, kind=kind, **(SMALL if kind == "gpt2" else {}))
    loaded = load_model(Model(name=str(folder), device="cpu"), CausalLM())
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    return model.double().eval(), build_task(CausalLM(max_tokens=2**31 - 1), loaded.tokenizer)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_packed_text_has_the_losses_it_has_alone(tmp_path: Path, kind: str, attention: str):
    model, task = language_model(tmp_path, kind, attention)
    encoded = task.encode(pl.DataFrame({"text": TEXTS}))
    packed = pack(encoded, np.zeros(len(TEXTS), np.int64), length=40, padding=0)
    assert len(packed.encoded) == 2
    batch = task.collate(packed.encoded, range(2))
    assert set(batch) == {"input_ids", "targets", "position_ids"}
    flat = task.logits_and_targets(model, batch)
    found = functional.cross_entropy(flat.logits, flat.targets, reduction="none")
    wanted: list[torch.Tensor] = []
    tokenizer: Any = byte_tokenizer()
    ids = [[tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False).input_ids]
           for t in TEXTS]  # fmt: skip
    room = 40
    for own in ids:
        if len(own) < 2:
            continue
        pieces = [own[:room], own[room - 1 :]] if len(own) > room else [own]
        for piece in pieces:
            logits = model(input_ids=torch.tensor([piece])).logits[0, :-1]
            wanted.append(functional.cross_entropy(logits, torch.tensor(piece[1:]),
                                                   reduction="none"))  # fmt: skip
        room = room - len(own) if len(own) <= room else 40 - len(pieces[1])
    torch.testing.assert_close(
        found, torch.cat(wanted), rtol=0, atol=2e-6
    )  # eager softmax is float32
    assert flat.owner.tolist() == sorted(flat.owner.tolist())


def test_packed_windows_train_as_their_texts_padded(tmp_path: Path):
    model, task = language_model(tmp_path, "llama", "sdpa")
    encoded = task.encode(pl.DataFrame({"text": TEXTS[:2]}))
    packed = pack(encoded, np.zeros(2, np.int64), length=40, padding=0)
    gradients: list[list[torch.Tensor]] = []
    for given_batch in (task.collate(packed.encoded, [0]), task.collate(encoded, [0, 1])):
        model.zero_grad()
        task.loss(model, given_batch).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kind", "turns"), [("prompt", 0), ("messages", 2)])
def test_answers_and_chats_count_what_they_count_alone(kind: str, turns: int):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    task = build_task(CausalLM(max_tokens=2**31 - 1), byte_tokenizer(template=template))
    if kind == "prompt":
        fields = pl.DataFrame({"prompt": ["ask", "another one"], "response": ["yes", "no, never"]})
    else:
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
        fields = pl.DataFrame({"messages": [chat] * turns})
    encoded = task.encode(fields)
    packed = pack(encoded, np.zeros(2, np.int64), length=16, padding=0)
    arrays, windows = encoded.arrays, packed.encoded.arrays
    wanted = arrays["tokens"][arrays["counted"]].tolist()
    assert windows["tokens"][windows["counted"]].tolist() == wanted


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_models_that_keep_texts_apart_are_taken(kind: str):
    check_packing(fresh(kind))


@pytest.mark.parametrize("kind", ["opt", "bloom"])
def test_models_that_do_not_keep_texts_apart_are_refused(kind: str):
    model = fresh(kind).train()
    with pytest.raises(ConfigError, match="does not keep the texts of a packed row apart"):
        check_packing(model)
    assert model.training


def fresh(kind: str) -> Any:
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shapes: dict[str, dict[str, Any]] = {
        "llama": {**wide, "intermediate_size": 32},
        "qwen2": {**wide, "intermediate_size": 32, "num_key_value_heads": 4},
        "gpt_neox": {**wide, "intermediate_size": 32},
        "gpt2": SMALL,
        "opt": {**wide, "ffn_dim": 32, "word_embed_proj_dim": 32},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    }
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=64, **ends, **shapes[kind])
    return AutoModelForCausalLM.from_config(config)
