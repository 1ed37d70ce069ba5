"""Images as the model sees them, image models against themselves, and a whole run on images."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tr
from gradient_loop import gradient_loop, squares_of
from PIL import Image
from torch import nn
from torch.nn import functional

from curate.config import plain, to_yaml
from curate.errors import ConfigError, CurateError
from curate.models.cnn import CNN
from curate.models.gradients.groups import SQUARES
from curate.models.load import build_model, load_model
from curate.models.quantities import GRADIENT, measure
from curate.models.settings import ImageClassification, Model, TabularClassification
from curate.models.tasks import build_task
from curate.models.training_data import join
from jobs.all_stages import run_stages, stages_for
from jobs.cluster import Cluster, open_pool
from jobs.settings import parse_settings
from jobs.show import shown

CPU = torch.device("cpu")
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2],
          "layer_type": "basic"}  # fmt: skip
VIT = {"model_type": "vit", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
       "num_attention_heads": 2, "patch_size": 4}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")


def picture(height: int, width: int, seed: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels == 3 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def fields(contents: Sequence[bytes | None], labels: Sequence[int | None]) -> pl.DataFrame:
    return pl.DataFrame(
        {"image": pl.Series(contents, dtype=pl.Binary), "label": pl.Series(labels, dtype=pl.Int64)}
    )


def image_settings(**settings: Any) -> ImageClassification:
    values: dict[str, Any] = {"num_classes": 3, **settings}
    return ImageClassification(**values)


def task_of(**settings: Any) -> Any:
    return build_task(image_settings(**settings), None)


# -- from files and arrays to batches -------------------------------------------------------------


def test_pixels_are_scaled_by_255_then_normalised_by_channel():
    pixels = picture(3, 2, 0)
    task = task_of(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    batch = task.collate(task.encode(fields([png(pixels)], [2])), [0])
    wanted = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    found = batch["pixel_values"]
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    np.testing.assert_allclose(found[0].numpy(), wanted.transpose(2, 0, 1), atol=1e-6)
    assert batch["labels"].tolist() == [2]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, 6, 80])
def test_large_files_are_decoded_with_the_batch_to_what_arrays_give(channels: Any, size: Any):
    """100 x 100 is decoded lazily, 6 x 6 at once: the outcome is the same."""
    pixels = [picture(100, 100, seed) for seed in range(3)]
    task = task_of(channels=channels, size=size)
    files = task.encode(fields([png(each) for each in pixels], [0, 1, 2]))
    arrays = task.encode(pl.DataFrame({"image": pl.Series(np.stack(pixels)), "label": [0, 1, 2]}))
    for indices in ([0, 1, 2], [2, 0]):
        left, right = task.collate(files, indices), task.collate(arrays, indices)
        assert left["pixel_values"].shape == (len(indices), channels, size or 100, size or 100)
        torch.testing.assert_close(left, right, rtol=0, atol=2.1 / 255)
    assert files.arrays["content"].nbytes < 100 * 100 * 3 * 3 * 1.1


def test_floats_are_taken_as_they_are_and_large_ones_told(caplog: pytest.LogCaptureFixture):
    pixels = np.linspace(0, 1, 2 * 4 * 4 * 1, dtype=np.float32).reshape(2, 4, 4, 1)
    task = task_of(channels=1, mean=0.0, std=1.0)
    frame = pl.DataFrame({"image": pl.Series(pixels), "label": [0, 1]})
    found = task.collate(task.encode(frame), [0, 1])["pixel_values"]
    np.testing.assert_array_equal(found.numpy(), pixels.transpose(0, 3, 1, 2))
    assert not caplog.records
    task.encode(frame.with_columns(pl.Series("image", pixels * 255)))
    assert "they should lie in [0, 1]" in caplog.text


def test_files_and_floats_of_several_partitions_meet_in_a_batch():
    pixels = picture(4, 4, 0, channels=1)
    task = task_of(channels=1)
    files = task.encode(fields([png(pixels)], [0]))
    floats = pl.DataFrame({"image": pl.Series((pixels / 255).astype(np.float32)[None, ..., None]),
                           "label": [1]})  # fmt: skip
    batch = task.collate(join([files, task.encode(floats)]), [0, 1])
    torch.testing.assert_close(batch["pixel_values"][0], batch["pixel_values"][1])


def test_a_row_without_image_or_label_is_not_scored():
    task = task_of(channels=1)
    good = png(picture(4, 4, 0, channels=1))
    encoded = task.encode(fields([good, None, good, good[:40]], [0, 1, None, 2]))
    assert encoded.num_scored.tolist() == [1, 0, 0, 0]
    assert set(encoded.problems) == {1, 3}


def test_an_image_costs_a_token_for_each_eight_by_eight_pixels():
    contents = [png(picture(28, 28, 0, 1)), png(picture(28, 28, 1, 1))]
    assert task_of(channels=1).encode(fields(contents, [0, 1])).lengths.tolist() == [13, 13]
    assert task_of(size=224).encode(fields(contents, [0, 1])).lengths.tolist() == [784, 784]
    assert task_of(size=4).encode(fields(contents, [0, 1])).lengths.tolist() == [1, 1]


def test_images_of_different_size_are_refused_with_the_row_unless_a_size_is_set():
    contents = [png(picture(8, 8, 0)), png(picture(8, 9, 1))]
    keyed = fields(contents, [0, 1]).with_columns(
        source=pl.lit("s"), file=pl.lit("f.parquet"), row=pl.Series([5, 7])
    )
    with pytest.raises(ConfigError, match=r"8 x 8, and in s/f\.parquet, row 7 8 x 9"):
        task_of().encode(keyed)
    task = task_of()
    parts = [task.encode(fields([content], [0])) for content in contents]
    with pytest.raises(ConfigError, match="different sizes"):
        task.collate(join(parts), [0, 1])
    sized = task_of(size=8)
    assert sized.collate(sized.encode(keyed), [0, 1])["pixel_values"].shape == (2, 3, 8, 8)


def test_settings_that_fit_no_image_are_refused():
    for wrong in ({"mean": (0.5, 0.5)}, {"std": 0.0}, {"size": 0}, {"num_classes": 1}):
        with pytest.raises(ConfigError):
            image_settings(**wrong)
    with pytest.raises(ConfigError, match="names none"):
        task_of().encode(pl.DataFrame({"label": [0]}))
    with pytest.raises(ConfigError, match="num_classes is 3"):
        task_of().encode(fields([b""], [3]))


# -- models ---------------------------------------------------------------------------------------


def varied(model: nn.Module) -> nn.Module:
    """Weights far from their start, running statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "config", [{"model_type": "cnn"}, RESNET, VIT], ids=["cnn", "resnet", "vit"]
)
def test_scores_are_those_of_each_image_alone(tmp_path: Path, config: Any):
    """A saved model, in batches of several; batch normalisation by its running statistics."""
    settings = ImageClassification(num_classes=3, size=12)
    model: Any = varied(build_model(Model(config=config), settings, None, 0))
    model.save_pretrained(tmp_path)
    loaded = load_model(Model(name=str(tmp_path), device="cpu"), settings)
    task = build_task(settings, None)
    contents = [png(picture(12 + seed, 15, seed)) for seed in range(4)]
    labels = [0, 2, 1, 1]
    encoded = task.encode(fields(contents, labels))
    found, _ = measure(
        loaded.model, task, encoded, batch_tokens=36, device=CPU, wanted=frozenset(GRADIENT)
    )
    for index, label in enumerate(labels):
        batch = task.collate(encoded, [index])
        with torch.no_grad():
            out = model.eval()(pixel_values=batch["pixel_values"])
        logits = (out if isinstance(out, torch.Tensor) else out.logits)[0]
        error = logits.softmax(-1) - functional.one_hot(torch.tensor(label), 3)
        loss = functional.cross_entropy(logits, torch.tensor(label))
        assert found["error_norms"][index].item() == pytest.approx(error.norm().item(), abs=1e-5)
        assert found["loss"][index].item() == pytest.approx(loss.item(), abs=1e-5)
    doubles = {key: value.double() if value.is_floating_point() else value
               for key, value in task.collate(encoded, range(4)).items()}  # fmt: skip

    def losses(module: nn.Module, batch: Any) -> torch.Tensor:
        flat = task.logits_and_targets(module, dict(batch))
        return functional.cross_entropy(flat.logits, flat.targets, reduction="none")

    squares = squares_of(gradient_loop(loaded.model.double(), losses, doubles))
    total = torch.stack(list(squares.values())).sum(0)
    torch.testing.assert_close(found[SQUARES].double(), total, rtol=1e-4, atol=1e-9)


def test_a_new_model_takes_channels_and_size_from_the_task():
    settings = ImageClassification(num_classes=3, size=12, channels=1)
    config: Any = build_model(Model(config=VIT), settings, None, 0).config
    assert (config.image_size, config.num_channels, config.num_labels) == (12, 1, 3)


@pytest.mark.parametrize(
    ("config", "task", "said"),
    [
        ({**VIT, "image_size": 16}, {"size": 12}, "set task.size to 16"),
        ({**VIT, "num_channels": 1}, {"size": 12}, "set task.channels to 1"),
        ({**VIT, "hidden_dims": 3}, {"size": 12}, "unknown key model.config.hidden_dims"),
        ({"model_type": "mlp"}, {}, "reads rows of numbers"),
        ({"model_type": "bert"}, {}, "cannot make a bert model"),
    ],
)
def test_a_model_that_cannot_read_the_images_is_refused_before_the_run(
    config: Any, task: Any, said: str
):
    settings = ImageClassification(num_classes=3, **task)
    with pytest.raises(ConfigError) as error:
        build_model(Model(config=config), settings, None, 0)
    assert said in str(error.value)


def test_images_of_a_size_that_the_model_does_not_know_are_told_without_task_size():
    model = build_model(
        Model(config={**VIT, "image_size": 16}), ImageClassification(num_classes=3), None, 0
    )
    task = task_of()
    batch = task.collate(task.encode(fields([png(picture(12, 12, 0))], [0])), [0])
    with pytest.raises(ConfigError, match="cannot read images of 12 x 12"):
        task.logits_and_targets(model, batch)


def test_batch_normalisation_is_not_trained_on_one_image():
    settings = ImageClassification(num_classes=3, size=4)
    model = build_model(Model(config=RESNET), settings, None, 0).train()
    task = build_task(settings, None)
    batch = task.collate(task.encode(fields([png(picture(4, 4, 0))], [0])), [0])
    with pytest.raises(ConfigError, match="batch of one image"):
        task.logits_and_targets(model, batch)


def test_other_pixels_than_the_model_was_trained_on_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = ImageClassification(num_classes=3, size=12, mean=(0.5, 0.5, 0.5))
    model: Any = build_model(Model(config=VIT), settings, None, 0)
    model.save_pretrained(tmp_path)
    facts = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    load_model(Model(name=str(tmp_path), device="cpu"), settings)
    assert "task.std is [0.5, 0.5, 0.5]" in caplog.text
    assert "task.mean" not in caplog.text


def test_a_language_model_is_no_image_model(tmp_path: Path):
    config = tr.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    tr.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(CurateError, match="cannot be loaded for task image-classification"):
        load_model(Model(name=str(tmp_path)), ImageClassification(num_classes=3))
    CNN(channels=3, num_classes=3).save_pretrained(tmp_path / "cnn")
    with pytest.raises(ConfigError, match=r"task\.kind"):
        load_model(Model(name=str(tmp_path / "cnn")), TabularClassification(num_classes=3))


# -- a whole run ----------------------------------------------------------------------------------


def write_hub_like(path: Path, rows: int) -> list[bytes]:
    """Bright and dark squares as `datasets` writes them, one of them damaged."""
    contents: list[bytes] = []
    for row in range(rows):
        pixels = picture(10, 10, row, channels=1) // 2 + np.uint8(127 * (row % 2))
        contents.append(png(pixels))
    contents[4] = contents[4][:50]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])}
    )
    rows_of = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(contents)]
    schema = features.arrow_schema
    table = pa.table(
        {"image": pa.array(rows_of, schema.field("image").type),
         "label": pa.array([row % 2 for row in range(rows)], pa.int64())},
        schema=schema,
    )  # fmt: skip
    pq.write_table(table, path, row_group_size=16)
    return contents


def test_a_run_scores_plans_and_writes_images_that_datasets_reads(tmp_path: Path):
    contents = write_hub_like(tmp_path / "squares.parquet", 48)
    settings = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"squares": {"path": str(tmp_path / "squares.parquet")}},
            "task": {"kind": "image-classification", "num_classes": 2, "channels": 1},
            "model": {"config": {"model_type": "cnn", "widths": [4]}, "device": "cpu"},
            "checkpoints": {"train": {"epochs": 3, "seeds": [0, 1], "lr": 2e-2,
                                      "batch_tokens": 16}},
            "index": {"partition_rows": 16, "max_bad_rows": 0.1},
            "score": {"scorers": ["el2n", "grand", "loss", "random"]},
            "plan": {"score": "el2n", "keep": 0.5, "within": "label"},
        }
    )  # fmt: skip
    with open_pool(Cluster()) as pool:
        summary = run_stages(settings, stages_for(settings, "write"), pool=pool)
    assert summary["index"]["bad"] == {"unreadable_image": 1}
    scores = pl.read_parquet(tmp_path / "run" / "scores" / "el2n" / "*.parquet")
    assert scores.height == 47
    assert scores["el2n"].null_count() == 0
    grand = pl.read_parquet(tmp_path / "run" / "scores" / "grand" / "*.parquet")
    assert grand["grand"].min() > 0  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(plain(settings)))
    highest = shown(tmp_path / "run").highest[0]
    assert highest.label == str(highest.row % 2)
    assert highest.text.startswith("image of 10 x 10 pixels, ")
    shards: Any = datasets.load_dataset(
        str(tmp_path / "run" / "shards"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(shards.features["image"], datasets.Image)
    assert shards.features["label"].names == ["dark", "bright"]
    assert 0 < len(shards) < 47
    for row in shards:
        given = Image.open(io.BytesIO(contents[row["curate_row"]]))
        assert np.array_equal(np.asarray(row["image"]), np.asarray(given))
        assert row["label"] == row["curate_row"] % 2


def test_a_run_learns_what_is_bright_whatever_holds_the_pixels(tmp_path: Path):
    """The same squares as files and as lists of numbers: the same scores."""
    pixels = [
        picture(10, 10, row, channels=1) // 2 + np.uint8(127 * (row % 2)) for row in range(32)
    ]
    labels = [row % 2 for row in range(32)]
    pl.DataFrame({"image": [png(p) for p in pixels], "label": labels}).write_parquet(
        tmp_path / "files.parquet"
    )
    pl.DataFrame({"image": [p.ravel().tolist() for p in pixels], "label": labels}).write_parquet(
        tmp_path / "numbers.parquet"
    )
    found: list[pl.DataFrame] = []
    for name, more in (("files", {}), ("numbers", {"image": "image", "shape": [10, 10]})):
        settings = parse_settings(
            {
                "run": str(tmp_path / name),
                "sources": {"s": {"path": str(tmp_path / f"{name}.parquet"), **more}},
                "task": {"kind": "image-classification", "num_classes": 2, "channels": 1},
                "model": {"config": {"model_type": "cnn", "widths": [4]}, "device": "cpu"},
                "checkpoints": {"train": {"epochs": 12, "lr": 2e-2, "batch_tokens": 16}},
                "index": {"held_out": 0.0},
                "score": {"scorers": ["el2n"], "checkpoints": "last"},
            }
        )
        with open_pool(Cluster()) as pool:
            run_stages(settings, stages_for(settings, "score"), pool=pool)
        found.append(pl.read_parquet(tmp_path / name / "scores" / "el2n" / "*.parquet"))
    assert found[0]["el2n"].to_list() == found[1]["el2n"].to_list()
    assert found[0]["el2n"].mean() < 0.3  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
