"""LISA: which blocks learn, and that the others do not."""

from typing import Any

import pytest
import torch
from online_training import language_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from curate.errors import ConfigError
from curate.models.optimiser import Optimiser
from curate.models.settings import Train
from mixers.lisa import Lisa, Sampled, find_blocks, learning

TRAIN = Train(lr=0.1, schedule="constant", warmup=0.0, weight_decay=0.5)


def optimiser(*, blocks: int = 4, seed: int = 0, **fields: Any) -> Optimiser:
    return Optimiser(
        language_model(seed, num_hidden_layers=blocks, **fields),
        TRAIN,
        seed=5,
        total_steps=100,
        device=torch.device("cpu"),
    )


def loss(model: Any) -> Tensor:
    ids = torch.arange(8)[None]
    return model(input_ids=ids, labels=ids).loss


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Blocks with a weight that moved, and `rest`."""
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return {name.split(".")[2] if ".layers." in name else "rest" for name in moved}


def test_blocks_are_drawn_for_a_period_and_all_have_their_turn():
    settings = Lisa(blocks=2, every=5)
    drawn = [settings.drawn(step, num_blocks=6, seed=1) for step in range(1, 501)]
    assert all(len(set(each)) == 2 and list(each) == sorted(each) for each in drawn)
    periods = [drawn[first : first + 5] for first in range(0, 500, 5)]
    assert all(len(set(period)) == 1 for period in periods)
    counts = [sum(block in period[0] for period in periods) for block in range(6)]
    assert min(counts) > 18
    assert max(counts) < 50  # a third of 100
    assert drawn != [settings.drawn(step, num_blocks=6, seed=2) for step in range(1, 501)]
    assert drawn == [settings.drawn(step, num_blocks=6, seed=1) for step in range(1, 501)]


@pytest.mark.parametrize(
    ("kind", "fields", "path"),
    [
        ("llama", {"num_hidden_layers": 3, "num_attention_heads": 2}, "model.layers"),
        ("gpt2", {"n_layer": 3, "n_head": 2}, "transformer.h"),
        (
            "mixtral",
            {"num_hidden_layers": 3, "num_attention_heads": 2, "num_local_experts": 5},
            "model.layers",
        ),
    ],
)
def test_the_blocks_of_a_transformer_are_found(kind: str, fields: dict[str, Any], path: str):
    if kind == "mixtral":
        fields = {**fields, "num_key_value_heads": 2}
    sizes = {"hidden_size": 8, "intermediate_size": 8} if kind != "gpt2" else {"n_embd": 8}
    config = AutoConfig.for_model(kind, vocab_size=11, **sizes, **fields)
    model: Any = AutoModelForCausalLM.from_config(config)
    assert list(find_blocks(model)) == list(model.get_submodule(path))


def test_lists_inside_of_blocks_and_lists_of_other_things_are_no_blocks():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])

    model = nn.Module()
    model.heads = nn.ModuleList([nn.Linear(2, 2), nn.Bilinear(2, 2, 2), nn.Linear(2, 2)])
    model.body = nn.ModuleList([Block(), Block()])
    assert list(find_blocks(model)) == list(model.body)
    with pytest.raises(ConfigError, match="is not made of equal blocks"):
        find_blocks(nn.Linear(2, 2))


def test_only_drawn_blocks_and_what_is_outside_of_all_learn():
    given = optimiser()
    sampled = Sampled(Lisa(blocks=1, every=2), [given])
    for step in range(1, 13):
        before = weights(given.model)
        given.begin()
        with sampled.learning(step):
            given.backward(loss(given.model))
        given.finish()
        wanted = {str(block) for block in sampled.drawn(step)} | {"rest"}
        assert changed(before, given.model) == wanted  # decay of .5 would show at once
    assert len({sampled.drawn(step) for step in range(1, 13)}) > 1
    assert all(parameter.requires_grad for parameter in given.model.parameters())


def test_frozen_blocks_have_no_moments_and_start_anew():
    given = optimiser()
    sampled = Sampled(Lisa(blocks=1, every=1), [given])

    def step(number: int) -> None:
        given.begin()
        with sampled.learning(number):
            given.backward(loss(given.model))
        given.finish()

    first = sampled.drawn(1)[0]
    later = next(n for n in range(2, 50) if sampled.drawn(n)[0] != first)
    again = next(n for n in range(later + 1, 50) if sampled.drawn(n)[0] == first)
    with_moments = {"1": {str(first)}, "2": {str(sampled.drawn(later)[0])}, "3": {str(first)}}
    for number, key in ((1, "1"), (later, "2"), (again, "3")):
        step(number)
        names = {name.split(".")[2] for name in given.moments().gradient if ".layers." in name}
        assert names == with_moments[key]
    counts = {k: float(v) for k, v in given.state().items() if k.startswith("adamw.step")}
    assert {v for k, v in counts.items() if f".layers.{first}." in k} == {1.0}
    assert {v for k, v in counts.items() if ".layers." not in k} == {3.0}


def test_two_models_have_one_draw():
    one, two = optimiser(), optimiser(seed=4)
    sampled = Sampled(Lisa(blocks=2, every=1), [one, two])
    for number in range(1, 6):
        before = [weights(each.model) for each in (one, two)]
        one.begin()
        two.begin()
        with sampled.learning(number):
            for each in (one, two):
                each.backward(loss(each.model))
        for each in (one, two):
            each.finish()
        moved = [changed(b, each.model) for b, each in zip(before, (one, two), strict=True)]
        assert moved[0] == moved[1]
        assert len(moved[0]) == 3


def test_weights_that_blocks_share_learn_where_one_of_them_does():
    class Block(nn.Module):
        def __init__(self, shared: nn.Linear) -> None:
            super().__init__()
            self.own, self.shared = nn.Linear(2, 2), shared

    shared = nn.Linear(2, 2)
    blocks = [Block(shared), Block(shared)]
    blocks[1].own.bias.requires_grad_(False)
    with learning(blocks, [0]) as frozen:
        assert [id(p) for p in frozen] == [id(blocks[1].own.weight)]
        assert shared.weight.requires_grad
        assert not blocks[1].own.weight.requires_grad
    assert blocks[1].own.weight.requires_grad
    assert not blocks[1].own.bias.requires_grad  # as it was


def test_what_the_settings_cannot_mean_is_refused():
    with pytest.raises(ConfigError, match="but the model has 4 blocks"):
        Sampled(Lisa(blocks=5), [optimiser()])
    for fields in ({"blocks": 0}, {"every": 0}):
        with pytest.raises(ConfigError, match="not above 0"):
            Lisa(**fields)
