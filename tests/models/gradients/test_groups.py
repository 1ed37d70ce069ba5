"""Names of squared norms, and which parameters each is over."""

from typing import Any

import pytest
import transformers as tr
from torch import nn

from curate.errors import ConfigError
from curate.models.gradients.groups import (
    Squared,
    by_group,
    groups_of,
    last_layer,
    matching,
    parse_name,
    selected,
)
from curate.models.mlp import MLP

HEADS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
SIZES: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, **HEADS}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("grad_sq_norm", Squared("all")),
        ("grad_sq_norm[head]", Squared("head")),
        ("grad_sq_norm/*", Squared("all", "*")),
        ("grad_sq_norm/layer_3", Squared("all", "layer_3")),
        (r"grad_sq_norm[mlp\.(up|down)]/head", Squared(r"mlp\.(up|down)", "head")),
        ("grad_sq_norm[[qk]_proj/]", Squared("[qk]_proj/")),
    ],
)
def test_a_name_says_what_it_is_over_and_back(name: str, wanted: Squared):
    assert parse_name(name) == wanted
    assert wanted.name == name


@pytest.mark.parametrize("name", ["loss", "grad_sq_norms", "grad_sq_norm[]", "grad_sq_norm/"])
def test_other_names_are_none_of_them(name: str):
    assert parse_name(name) is None


def test_a_family_asks_for_the_groups_of_its_own_selection():
    held = ["loss", "grad_sq_norm", "grad_sq_norm/head", "grad_sq_norm[mlp]/head", "margin"]
    assert matching({"loss", "grad_sq_norm/*"}, held) == ["grad_sq_norm/head", "loss"]
    assert matching({"grad_sq_norm[mlp]/*"}, held) == ["grad_sq_norm[mlp]/head"]
    assert matching({"grad_sq_norm"}, held) == ["grad_sq_norm"]


def groups(model: nn.Module) -> dict[str, int]:
    """Group -> its number of parameters."""
    head = last_layer(model)
    names = [name for name, _ in model.named_parameters()]
    elsewhere = {p for m in model.modules() if m is not head for p in m.parameters(recurse=False)}
    own = {
        n for n, p in model.named_parameters()
        if any(p is q for q in head.parameters()) and p not in elsewhere
    }  # fmt: skip
    return {group: len(found) for group, found in by_group(names, groups_of(names, own)).items()}


def test_groups_are_the_blocks_and_what_is_around_them():
    llama = tr.LlamaForCausalLM(tr.LlamaConfig(**SIZES))
    assert groups(llama) == {"embeddings": 1, "layer_0": 9, "layer_1": 9, "final": 1, "head": 1}


def test_a_tied_head_belongs_to_the_embeddings():
    config = tr.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)
    assert groups(tr.GPT2LMHeadModel(config)) == {
        "embeddings": 2, "layer_0": 12, "layer_1": 12, "final": 2,
    }  # fmt: skip


def test_a_classifier_of_texts_has_its_last_layer_as_head():
    bert = tr.BertForSequenceClassification(tr.BertConfig(**SIZES))
    assert last_layer(bert) is bert.classifier
    assert groups(bert) == {"embeddings": 5, "layer_0": 16, "layer_1": 16, "final": 2, "head": 2}


def test_two_lists_of_blocks_have_their_names_in_front():
    sizes: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    found = groups(tr.T5ForConditionalGeneration(tr.T5Config(vocab_size=20, **sizes)))
    assert {"encoder_block_0", "decoder_block_0"} < found.keys()


def test_stages_of_an_image_model_are_groups():
    config = tr.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    assert list(groups(tr.ResNetForImageClassification(config))) == [
        "embeddings", "layer_0", "layer_1", "head",
    ]  # fmt: skip


def test_a_network_for_tables_has_one_group_for_each_layer():
    model = MLP(num_features=3, num_classes=2, hidden=(4, 4))
    assert groups(model) == {"layer_0": 2, "layer_2": 2, "head": 2}


def test_an_expression_that_finds_nothing_names_what_there_is():
    with pytest.raises(ConfigError, match=r"no parameter .* 'attn'(.|\n)*layers\.0\.weight"):
        selected("attn", ["layers.0.weight", "layers.0.bias"], [])
    assert selected("weight$", ["layers.0.weight", "layers.0.bias"], []) == ["layers.0.weight"]


def test_a_model_without_a_linear_layer_has_no_head():
    with pytest.raises(ConfigError, match="no linear layer"):
        last_layer(nn.Sequential(nn.Conv2d(1, 1, 1)))
