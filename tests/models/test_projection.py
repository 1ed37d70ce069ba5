"""Projections of gradients: what their entries depend on, and what they keep."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from gradient_loop import gradient_loop
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import ConfigError
from curate.models.gradients import Engine, Sides, Wanted
from curate.models.projection import (
    Entries,
    Projection,
    blocks_of,
    check_sides,
    choose_parameters,
    describe,
    draw_side,
    draw_sides,
    flat_rows,
    side_lengths,
    sides_digest,
)
from curate.models.projection_error import agreement, exact_products

ENTRIES: list[Entries] = ["signs", "gaussian"]


def language_model(**fields: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}  # fmt: skip
    config = AutoConfig.for_model("llama", **{**shape, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().double()


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    ids = batch["ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).sum(1)


def ids(rows: int, length: int = 9) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"ids": torch.randint(0, 50, (rows, length), generator=draw)}


def net(*layers: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers:
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
    return nn.Sequential(*layers).double().eval()


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def points(rows: int, *shape: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(rows, *shape, generator=draw, dtype=torch.float64)
    return {"x": x, "y": torch.randint(0, 3, (rows,), generator=draw)}


def measured(model: nn.Module, losses: Any, batch: Any, sides: Any) -> Tensor:
    engine = Engine(model, only=sides.__contains__)
    wanted = Wanted(squares=False, projections=sides)
    count = len(next(iter(batch.values())))
    found = engine.measure(losses, batch, num_examples=count, wanted=wanted)
    return flat_rows(found.projections, sides)


def test_a_small_matrix_has_the_projection_worked_out_by_hand():
    """Oracle O4: tokens x = [[1,2],[0,1],[3,-1]], gradients [[1,0,-1],[2,1,0],[0,-1,1]]."""
    layer = nn.Linear(2, 3, bias=False).double()
    x = torch.tensor([[[1.0, 2], [0, 1], [3, -1]]], dtype=torch.float64)
    g = torch.tensor([[[1.0, 0, -1], [2, 1, 0], [0, -1, 1]]], dtype=torch.float64)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"]) * g).sum((1, 2))

    left = torch.tensor([[1.0, 1], [1, -1], [-1, 1]], dtype=torch.float64) / 2**0.5
    right = torch.tensor([[1.0, -1], [1, 1]], dtype=torch.float64) / 2**0.5
    found = measured(layer, losses, {"x": x}, {"weight": Sides(left, right)})
    wanted = torch.tensor([[2.5, 6.5, 2.5, -3.5]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)


def test_square_orthogonal_sides_give_the_scores_of_whole_gradients():
    model = language_model()
    names = choose_parameters(model, Projection(head=True, embedding=True))
    draw = torch.Generator().manual_seed(3)
    sides = {
        name: Sides(
            *(
                torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]
                for n in lengths
            )
        )
        for name, lengths in side_lengths(model, names).items()
    }
    rows = measured(model, token_losses, ids(4), sides)
    whole = gradient_loop(model, token_losses, ids(4))
    flat = torch.cat([whole[name].flatten(1) for name in names], 1)
    torch.testing.assert_close(rows @ rows.T, flat @ flat.T)


@pytest.mark.parametrize("entries", ENTRIES)
def test_projected_gradients_are_those_of_plain_products(entries: Entries):
    model = language_model()
    names = choose_parameters(model, Projection(parameters="all"))
    sides = draw_sides(model, dim=5, seed=7, layers=names, entries=entries)
    rows = measured(model, token_losses, ids(3), sides)
    whole = gradient_loop(model, token_losses, ids(3))
    wanted = [
        torch.einsum("pi,npq,qj->nij", left, whole[name].reshape(3, len(left), -1), right)
        for name, (left, right) in sides.items()
    ]
    torch.testing.assert_close(rows, torch.cat([value.flatten(1) for value in wanted], 1))
    assert sum(block.size for block in blocks_of(sides)) == rows.shape[1]


def test_convolutions_are_projected_like_their_patches():
    model = net(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(),
                nn.Linear(16, 3))  # fmt: skip
    sides = draw_sides(model, dim=3)
    assert [tuple(map(len, pair)) for pair in sides.values()] == [(4, 18), (4, 18), (3, 16)]
    batch = points(3, 2, 6, 6)
    whole = gradient_loop(model, class_losses, batch)
    wanted = [left.T @ whole[name].reshape(3, len(left), -1) @ right
              for name, (left, right) in sides.items()]  # fmt: skip
    rows = measured(model, class_losses, batch, sides)
    torch.testing.assert_close(rows, torch.cat([value.flatten(1) for value in wanted], 1))


def test_fused_experts_are_projected_as_one_matrix():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral", hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        experts_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().double()
        for parameter in model.parameters():  # experts are not drawn by transformers
            nn.init.normal_(parameter, std=0.3)
    assert all(p.dim() < 3 or name in choose_parameters(model, Projection())
               for name, p in model.named_parameters())  # fmt: skip
    names = [name for name, p in model.named_parameters() if p.dim() == 3]
    sides = draw_sides(model, dim=4, layers=names)
    assert [tuple(map(len, pair)) for pair in sides.values()] == [(144, 16), (48, 24)]
    whole = gradient_loop(model, token_losses, ids(3))
    wanted = [left.T @ whole[name].flatten(1, 2) @ right for name, (left, right) in sides.items()]
    rows = measured(model, token_losses, ids(3), sides)
    torch.testing.assert_close(rows, torch.cat([value.flatten(1) for value in wanted], 1))


@pytest.mark.parametrize("entries", ENTRIES)
def test_inner_products_are_right_on_average(entries: Entries):
    """Over 400 seeds the mean is the exact product, within four of its standard errors."""
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 30, 20))
    b += 0.5 * a
    found = np.empty(400)
    squares = np.empty(400)
    for seed in range(400):
        left = draw_side("w", "left", 30, dim=4, seed=seed, entries=entries)
        right = draw_side("w", "right", 20, dim=4, seed=seed, entries=entries)
        found[seed] = ((left.T @ a @ right) * (left.T @ b @ right)).sum()
        squares[seed] = ((left.T @ a @ right) ** 2).sum()
    for values, exact in ((found, (a * b).sum()), (squares, (a * a).sum())):
        assert abs(values.mean() - exact) < 4 * values.std() / 20
        assert values.std() / 20 < 0.05 * exact


@pytest.mark.parametrize("entries", ENTRIES)
def test_entries_depend_on_seed_parameter_and_side_alone(entries: Entries):
    def drawn(
        name: str = "w", side: str = "left", length: int = 100, dim: int = 8, seed: int = 0
    ) -> Any:
        return draw_side(name, side, length, dim=dim, seed=seed, entries=entries)

    base = drawn()
    np.testing.assert_array_equal(drawn(length=1000)[:100], base)
    np.testing.assert_array_equal(drawn(length=33), base[:33])
    np.testing.assert_allclose(drawn(dim=32)[:, :8] * 2, base)
    for other in (drawn("v"), drawn(side="right"), drawn(seed=1)):
        assert abs(np.corrcoef(other.flatten(), base.flatten())[0, 1]) < 0.15
    assert abs(np.corrcoef(base.T) - np.eye(8)).max() < 0.5


@pytest.mark.parametrize("entries", ENTRIES)
def test_entries_have_mean_zero_and_variance_one_over_dim(entries: Entries):
    found = draw_side("w", "left", 20_000, dim=5, seed=3, entries=entries) * 5**0.5
    assert abs(found.mean()) < 4 / 100_000**0.5
    assert abs(found.var() - 1) < 0.02
    fourth = 3 if entries == "gaussian" else 1
    assert abs((found**4).mean() - fourth) < 0.1


def philox(key: int, column: int, count: int) -> list[int]:
    """Philox-4x64-10 as its paper writes it: 64-bit words of one column."""
    mask, words = 2**64 - 1, list[int]()
    for block in range(1, -(-count // 4) + 1):
        c, k = [block, column, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            one, two = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [two >> 64 ^ c[1] ^ k[0], two & mask, one >> 64 ^ c[3] ^ k[1], one & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words[:count]


def test_entries_are_the_words_of_the_generator_in_its_paper():
    """Nothing of numpy's: an index of an older version must still meet new queries."""
    key = xxhash.xxh3_128_intdigest(b"1/5/a.weight/left")
    signs = draw_side("a.weight", "left", 130, dim=2, seed=5) * 2**0.5
    gaussian = draw_side("a.weight", "left", 9, dim=2, seed=5, entries="gaussian") * 2**0.5
    for j in range(2):
        words = philox(key, j, 9)
        bits = [words[i // 64] >> (i % 64) & 1 for i in range(130)]
        np.testing.assert_allclose(signs[:, j], [1 - 2 * bit for bit in bits])
        pairs = [((word >> 32) + 1, word % 2**32) for word in words]
        wanted = [
            math.sqrt(-2 * math.log(one / 2**32)) * math.cos(2 * math.pi * two / 2**32)
            for one, two in pairs
        ]
        np.testing.assert_allclose(gaussian[:, j], wanted, atol=1e-12)


def test_threads_and_precision_do_not_change_sides():
    model = language_model()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one = draw_sides(model, dim=6)
    torch.set_num_threads(3)
    three = draw_sides(model.float(), dim=6)
    torch.set_num_threads(before)
    assert list(one) == list(three)
    for name, pair in one.items():
        assert pair.left.dtype == torch.float64
        assert three[name].left.dtype == torch.float32
        assert torch.equal(pair.left.float(), three[name].left)
        assert torch.equal(pair.right.float(), three[name].right)
    assert sides_digest(one) == sides_digest(three)


def test_a_side_that_is_short_enough_is_kept_whole():
    model = net(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 3))
    sides = draw_sides(model, dim=8, layers=["0.weight", "2.weight", "2.bias"])
    assert torch.equal(sides["0.weight"].left, torch.eye(8, dtype=torch.float64))
    assert sides["0.weight"].right.shape == (40, 8)
    assert torch.equal(sides["2.bias"].right, torch.ones(1, 1, dtype=torch.float64))
    batch = points(5, 40)
    rows = measured(model, class_losses, batch, draw_sides(model, dim=64))
    whole = gradient_loop(model, class_losses, batch)
    names = ("0.weight", "2.weight")
    torch.testing.assert_close(rows, torch.cat([whole[name].flatten(1) for name in names], 1))


BODY = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


def test_head_and_embedding_are_left_out_unless_asked_for():
    model = language_model()
    body = [f"model.layers.{n}.{name}.weight" for n in range(2) for name in BODY]
    assert choose_parameters(model, Projection()) == body
    assert choose_parameters(model, Projection(head=True)) == [*body, "lm_head.weight"]
    assert choose_parameters(model, Projection(embedding=True)) == [
        "model.embed_tokens.weight", *body]  # fmt: skip
    assert choose_parameters(model, Projection(parameters="head")) == ["lm_head.weight"]
    names = [name for name, _ in model.named_parameters()]
    some = [name for name in names if "up_proj" in name or "norm" in name]
    assert choose_parameters(model, Projection(parameters="up_proj|norm")) == some
    assert len(choose_parameters(model, Projection(parameters="all"))) == 2 * 9 + 3


def test_a_tied_weight_is_chosen_as_head_or_embedding():
    model = language_model(tie_word_embeddings=True)
    assert "model.embed_tokens.weight" not in choose_parameters(model, Projection())
    for chosen in (Projection(head=True), Projection(embedding=True)):
        assert choose_parameters(model, chosen)[0] == "model.embed_tokens.weight"
    sides = draw_sides(model, dim=5, layers=["model.embed_tokens.weight"])
    left, right = sides["model.embed_tokens.weight"]
    whole = gradient_loop(model, token_losses, ids(3))["model.embed_tokens.weight"]
    rows = measured(model, token_losses, ids(3), sides)
    torch.testing.assert_close(rows, (left.T @ whole @ right).flatten(1))


def test_a_classifier_s_last_layer_is_a_matrix_like_any_other():
    model = net(nn.Linear(4, 3))
    assert choose_parameters(model, Projection()) == ["0.weight"]


def test_frozen_parameters_are_not_projected():
    model = language_model()
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no weight that can be trained"):
        choose_parameters(model, Projection())
    with pytest.raises(ConfigError, match="no parameter that can be trained has 'cat'"):
        choose_parameters(language_model(), Projection(parameters="cat"))


def test_sides_of_another_seed_are_refused_at_load():
    model = language_model()
    described = describe(Projection(seed=3), draw_sides(model, seed=3))
    check_sides(described, draw_sides(model, seed=3))
    with pytest.raises(ConfigError, match=r"not the one of seed 3 here"):
        check_sides(described, draw_sides(model, seed=4))
    with pytest.raises(ConfigError):
        check_sides(described, draw_sides(model, seed=3, entries="gaussian"))
    few = {name: side for name, side in draw_sides(model, seed=3).items() if "mlp" in name}
    with pytest.raises(ConfigError):
        check_sides(described, few)


def test_exact_products_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch):
    model = language_model()
    names = choose_parameters(model, Projection())
    whole = gradient_loop(model, token_losses, ids(5))
    flat = torch.cat([whole[name].flatten(1) for name in names], 1)
    monkeypatch.setattr("curate.models.projection_error._EXACT_NUMBERS", 9000)
    found = exact_products(model, token_losses, ids(5), names, num_examples=5)
    torch.testing.assert_close(found, flat @ flat.T)


def test_a_wider_projection_agrees_better_and_a_whole_one_entirely():
    model = language_model()
    names = choose_parameters(model, Projection())
    batch = ids(24)
    exact = exact_products(model, token_losses, batch, names, num_examples=24)
    found = [
        agreement(measured(model, token_losses, batch, draw_sides(model, dim=dim)), exact)
        for dim in (2, 12, 64)
    ]
    assert found[0].spearman < found[1].spearman < found[2].spearman
    assert found[2].spearman == pytest.approx(1)
    assert str(found[2]) == (
        "Spearman correlation 1.000 of projected with exact inner products, 276 pairs"
    )
