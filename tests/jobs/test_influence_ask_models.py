"""Asking a run about its own checkpoints, images, and a tokenizer that is damaged."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from influence_world import INLINE, make_world, values_of
from tiny_models import byte_tokenizer

from curate.errors import ConfigError, InputError
from curate.models.tokens import load_tokenizer
from jobs.index import index_run
from jobs.influence_ask import ask
from jobs.opening import open_run
from jobs.score import score_run
from jobs.settings import Settings, parse_settings
from jobs.train import train_run

ROW = "target:target.parquet:2"


def built(settings: Settings) -> None:
    """Index, train where it is asked for, and score: each again where something is missing."""
    with open_run(settings) as full:
        index_run(full, pool=INLINE)
        if full.checkpoints.train is not None:
            train_run(full, pool=INLINE)
        score_run(full, pool=INLINE)


def alter(path: Path) -> None:
    """Change the sign of the last weight of a safetensors file."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    assert len(content) > 8 + length
    content[-1] ^= 0x80
    path.write_bytes(content)


def test_a_changed_weight_of_an_own_checkpoint_is_noticed_and_the_fix_works(tmp_path: Path):
    world = make_world(tmp_path)
    train = {"max_steps": 3, "epochs": 9, "lr": 1e-2, "batch_tokens": 10}
    values = values_of(world, {"metric": "dot"})
    values["model"] = {"name": str(world / "step-1"), "device": "cpu"}
    values["checkpoints"] = {"train": train}
    settings = parse_settings(values)
    built(settings)
    before = ask(world / "run", ROW)
    (path,) = (world / "run/checkpoints").glob("seed-0/step-000003/model.safetensors")
    whole = path.read_bytes()
    alter(path)
    with pytest.raises(InputError, match=r"seed-0/step-000003/model.safetensors has changed") as e:
        ask(world / "run", ROW)
    assert f"remove {world}/run/checkpoints/seed-0 and run `curate train" in e.value.fix
    path.write_bytes(whole)
    assert ask(world / "run", ROW) == before
    alter(path)
    for one in sorted((world / "run/checkpoints/seed-0").rglob("*"), reverse=True):
        one.rmdir() if one.is_dir() else one.unlink()
    built(settings)
    assert ask(world / "run", ROW) == before


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 8 x 8 images of two classes; its first is that which `pixels` gives."""
    root = tmp_path_factory.mktemp("images")
    frame = pl.DataFrame(
        {"x": pl.Series(pixels(), dtype=pl.Array(pl.UInt8, (8, 8, 1))), "label": [0, 1] * 6}
    )
    frame.write_parquet(root / "rows.parquet")
    columns = {"path": str(root / "rows.parquet"), "image": "x", "label": "label"}
    settings = parse_settings(
        {
            "run": str(root / "run"),
            "sources": {"rows": columns},
            "target": columns,
            "task": {"kind": "image-classification", "num_classes": 2, "channels": 1},
            "model": {"config": {"model_type": "cnn", "widths": [4], "grid": 2}, "device": "cpu"},
            "checkpoints": {"train": {"max_steps": 1, "lr": 1e-3}},
            "index": {"held_out": 0.0},
            "score": {"scorers": [{"influence": {"metric": "cosine", "dtype": "float32"}}]},
        }
    )
    built(settings)
    return root / "run"


def pixels() -> np.ndarray:
    """(12, 8, 8, 1)"""
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)


def test_an_image_is_asked_by_its_pixels_as_by_row(images: Path):
    by_row = ask(images, "target:rows.parquet:5")
    assert by_row.helps[0].row == 5
    for image in (pixels()[5].tolist(), pixels()[5, :, :, 0].tolist()):
        assert ask(images, json.dumps({"image": image, "label": 1})).helps == by_row.helps


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([1, 2], "its image is not rows of pixels"),
        ("x.parquet", "its image is not rows of pixels"),
        ([[1, 2], [3]], "its image is not rows of pixels"),
        ([], "its image is not rows of pixels"),
        ([[1, 2], [3, 4]], "its image is 2 x 2, those of the run are 8 x 8"),
        (np.zeros((8, 8, 2)).tolist(), "2 channels, not 1 or 3"),
        ([[300] * 8] * 8, "not from 0 to 255"),
    ],
)
def test_what_is_no_image_of_the_run_is_refused(images: Path, image: Any, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        ask(images, json.dumps({"image": image, "label": 1}))
    assert '{"image": [...], "label": 0}' in caught.value.fix


def test_a_tokenizer_whose_merges_miss_a_token_is_named(tmp_path: Path):
    byte_tokenizer(merges=True).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"].append(["nowhere", "else"])
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be loaded"):
        load_tokenizer(tmp_path)
