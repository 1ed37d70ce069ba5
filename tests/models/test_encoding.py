from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import classifier_tokenizer, save_classifier, save_language_model
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from curate.errors import ConfigError, InputError
from curate.models.encoding import Pooling, encode_images, load_body, load_encoder, pool, pooling_of

CPU = torch.device("cpu")
TEXTS = ["the theme in a tin", "the", "a tin in the inn, then another in the inn", "in"]


def by_hand(folder: Path, text: str, pooling: str, layer: int = -1, **limit: Any) -> np.ndarray:
    """One text alone, in float64, pooled with numpy."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", **limit)
    model = AutoModel.from_pretrained(folder, dtype=torch.float64)
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        states = model(**tokens, output_hidden_states=True).hidden_states[layer][0].numpy()
    if layer == -1:
        with torch.no_grad():
            states = model(**tokens).last_hidden_state[0].numpy()
    weights = {
        "mean": np.ones(len(states)),
        "position_weighted": np.arange(1, len(states) + 1, dtype=np.float64),
        "first": np.eye(len(states))[0],
        "last": np.eye(len(states))[-1],
    }[pooling]
    return weights @ states / weights.sum()


@pytest.mark.parametrize("pooling", ["mean", "position_weighted", "first", "last"])
def test_a_batch_gives_what_each_text_alone_gives(tmp_path: Path, pooling: Pooling):
    folder = save_language_model(tmp_path / "model")
    encoder = load_encoder(folder, pooling=pooling, device=CPU)
    for budget in (1, 40, 10_000):
        found = encoder.encode(TEXTS, batch_tokens=budget)
        for row, text in enumerate(TEXTS):
            np.testing.assert_allclose(
                found.vectors[row], by_hand(folder, text, pooling), rtol=1e-4, atol=1e-5
            )


def test_other_layers_and_encoders(tmp_path: Path):
    folder = save_classifier(tmp_path / "model")
    for layer in (0, 1, -2):
        encoder = load_encoder(folder, layer=layer, device=CPU)
        assert encoder.pooling == "mean"
        found = encoder.encode(TEXTS, batch_tokens=100).vectors[2]
        np.testing.assert_allclose(
            found, by_hand(folder, TEXTS[2], "mean", layer), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ConfigError, match="layer is 7"):
        load_encoder(folder, layer=7, device=CPU)


def test_long_texts_are_cut_and_said_so(tmp_path: Path):
    folder = save_classifier(tmp_path / "model")
    encoder = load_encoder(folder, max_tokens=8, device=CPU)
    found = encoder.encode([*TEXTS, ""], batch_tokens=100)
    assert found.is_cut.tolist() == [True, False, True, False, False]
    assert found.num_read.tolist() == [8, 3, 8, 3, 2]
    expected = by_hand(folder, TEXTS[2], "mean", truncation=True, max_length=8)
    np.testing.assert_allclose(found.vectors[2], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(found.vectors[4]).all()  # marks alone say nothing
    assert load_encoder(folder, max_tokens=500, device=CPU).max_tokens == 64
    assert encoder.encode([], batch_tokens=100).vectors.shape == (0, 32)


def test_a_sentence_encoder_says_how_it_pools(tmp_path: Path):
    folder = save_language_model(tmp_path / "model")
    assert pooling_of(folder) == "position_weighted"  # reads from left to right
    (folder / "1_Pooling").mkdir()
    for mode, pooling in (("cls_token", "first"), ("lasttoken", "last"), ("mean_tokens", "mean")):
        (folder / "1_Pooling" / "config.json").write_text(f'{{"pooling_mode_{mode}": true}}')
        assert pooling_of(folder) == pooling


def test_of_an_encoder_and_decoder_the_encoder_reads(tmp_path: Path):
    tokenizer = classifier_tokenizer()
    config = AutoConfig.for_model(
        "t5", vocab_size=len(tokenizer), d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8
    )
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, device=CPU)
    tokens = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model.eval().get_encoder()(input_ids=tokens).last_hidden_state[0]
    np.testing.assert_allclose(
        encoder.encode(TEXTS, batch_tokens=99).vectors[0], states.mean(0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_are_pooled_over_places(tmp_path: Path, kind: str):
    small: dict[str, Any] = (
        {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2,
         "num_hidden_layers": 1, "intermediate_size": 16}
        if kind == "vit"
        else {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **small)).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(3, 3, 8, 8)
    loaded = load_body(tmp_path, dtype="float32", device=CPU)
    found = encode_images(loaded, pixels, layer=-1, device=CPU)
    with torch.no_grad():
        states = model(pixel_values=pixels).last_hidden_state
    places = states.mean((2, 3)) if kind == "resnet" else states.mean(1)
    np.testing.assert_allclose(found, places, rtol=1e-5, atol=1e-6)


def test_padding_does_not_count():
    states = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    short = states[0, :2].numpy()
    np.testing.assert_allclose(pool(states, mask, "mean")[0], short.mean(0))
    weighted = (short[0] + 2 * short[1]) / 3
    np.testing.assert_allclose(pool(states, mask, "position_weighted")[0], weighted)
    np.testing.assert_allclose(pool(states, mask, "last")[0], short[1])


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"config\.json"):
        load_encoder(tmp_path, device=CPU)
