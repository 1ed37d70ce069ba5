from pathlib import Path
from typing import Any, cast

import pytest
import torch
from gradient_loop import assert_squares, gradient_loop, squares_of
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import ConfigError, InputError
from curate.models.cnn import CNN
from curate.models.gradients import Engine
from curate.models.load import build_model, load_model
from curate.models.settings import ImageClassification, Model, TextClassification

GREY = ImageClassification(num_classes=3, channels=1)


def losses(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["pixel_values"]), batch["labels"], reduction="none")


@pytest.mark.parametrize("norm", ["group", "none"])
def test_every_layer_has_a_rule_and_the_squares_of_the_loop(norm: Any):
    torch.manual_seed(0)
    model = CNN(channels=3, num_classes=4, widths=[6, 9], hidden=[5], norm=norm, grid=2).double()
    batch = {"pixel_values": torch.randn(3, 3, 11, 7).double(), "labels": torch.tensor([0, 3, 1])}
    engine = Engine(model.eval())
    found = engine.measure(losses, batch, num_examples=3)
    assert_squares(found.squares, squares_of(gradient_loop(model, losses, batch)), rtol=1e-9)
    assert engine.slow == []


@pytest.mark.parametrize("size", [1, 2, 7, 28, 33])
def test_images_of_any_size_have_logits(size: int):
    model = CNN(channels=1, num_classes=3, widths=[4, 8])
    assert model(torch.zeros(2, 1, size, size + 1)).shape == (2, 3)


def test_an_example_has_the_same_logits_in_any_batch():
    torch.manual_seed(0)
    model = CNN(channels=1, num_classes=3)
    images = torch.randn(5, 1, 9, 9)
    together = model(images)
    for index in range(5):
        torch.testing.assert_close(model(images[index : index + 1])[0], together[index])


def test_what_was_saved_is_loaded_without_a_pickle(tmp_path: Path):
    torch.manual_seed(0)
    model = CNN(channels=1, num_classes=3, widths=[4], hidden=[6], norm="none", grid=3)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    images = torch.randn(2, 1, 8, 8)
    found = load_model(Model(name=str(tmp_path), device="cpu"), GREY).model
    torch.testing.assert_close(found(images), model(images), rtol=0, atol=0)
    assert CNN.from_pretrained(tmp_path).config == model.config


def test_weights_of_another_shape_are_refused(tmp_path: Path):
    CNN(channels=1, num_classes=3, widths=[4]).save_pretrained(tmp_path)
    CNN(channels=1, num_classes=3, widths=[5]).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        CNN.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (ImageClassification(num_classes=4, channels=1), "3 classes"),
        (ImageClassification(num_classes=3), "reads 1 channels, but task.channels is 3"),
        (TextClassification(num_classes=3), "network for image-classification"),
    ],
)
def test_a_saved_network_that_does_not_suit_the_task_is_refused(
    tmp_path: Path, task: Any, said: str
):
    CNN(channels=1, num_classes=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said):
        load_model(Model(name=str(tmp_path), device="cpu"), task)


def test_a_new_network_takes_its_shape_from_settings_and_its_weights_from_the_seed():
    model = Model(config={"model_type": "cnn", "widths": [4, 6], "grid": 2})
    first, again, other = (build_model(model, GREY, None, seed) for seed in (1, 1, 2))
    assert cast(CNN, first).config == {
        "model_type": "cnn", "channels": 1, "num_classes": 3, "widths": [4, 6], "hidden": [],
        "norm": "group", "grid": 2,
    }  # fmt: skip
    for left, right in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
    pairs = zip(first.parameters(), other.parameters(), strict=True)
    assert not all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"width": [4]}, "unknown key model.config.width"),
        ({"widths": []}, "positive numbers"),
        ({"widths": [4, 0]}, "positive numbers"),
        ({"norm": "batch"}, "use group or none"),
    ],
)
def test_settings_that_make_no_network_are_refused(config: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as error:
        build_model(Model(config={"model_type": "cnn", **config}), GREY, None, 0)
    assert said in str(error.value)
