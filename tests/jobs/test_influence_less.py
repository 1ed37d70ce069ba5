"""LESS through a run folder: Adam's updates of the pool beside plain gradients of the target."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from influence_dense import gradients
from influence_world import (
    INLINE,
    TOPICS,
    make_world,
    pool,
    scored,
    settings_of,
    target,
    values_of,
)
from safetensors.torch import load_file

from curate.errors import CurateError
from jobs.index import index_run
from jobs.measurers import measurers
from jobs.settings import Settings, parse_settings
from jobs.train import train_run


def trained(world: Path, options: Any) -> Settings:
    train = {"max_steps": 3, "epochs": 9, "lr": 1e-2, "batch_tokens": 10, "save_moments": True}
    values = values_of(world, {"metric": "cosine", "aggregate": "max", **options})
    values["model"] = {"name": str(world / "step-1"), "device": "cpu"}
    values["checkpoints"] = {"train": train}
    values["score"]["checkpoints"] = "last"
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    train_run(settings, pool=INLINE)
    return settings


def update(folder: Path, rows: np.ndarray) -> np.ndarray:
    """g / sqrt(V + eps), V raised to the 1st percentile of its values above 0."""
    kept = load_file(folder / "moments.safetensors")
    found: list[np.ndarray] = []
    for name in ("layers.0.weight", "layers.2.weight"):
        second = kept[f"square.{name}"].double().numpy().ravel()
        ranked = np.sort(second[second > 0])
        second = np.maximum(second, ranked[int(np.ceil(len(ranked) / 100)) - 1])
        found.append(1 / np.sqrt(second / (1 - 0.999**3) + 1e-16))
    return rows * np.concatenate(found)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_pool_moves_as_adam_would_and_the_target_stays_plain(tmp_path: Path):
    settings = trained(make_world(tmp_path), {"adam": "diagonal"})
    found = scored(settings)["influence"].to_numpy()
    (measurer,) = measurers(settings)
    own = update(measurer.folder, gradients(measurer.folder, pool()))
    other = gradients(measurer.folder, target())
    matrix = unit(own) @ unit(other).T
    topics = np.array(TOPICS)
    wanted = np.max([matrix[:, topics == name].mean(1) for name in "ab"], 0)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    plain = scored(trained(tmp_path, {}))["influence"].to_numpy()
    assert np.abs(plain - found).max() > 0.05


def test_checkpoints_without_moments_are_refused(tmp_path: Path):
    settings = settings_of(make_world(tmp_path), {"metric": "dot", "adam": "exact"})
    with pytest.raises(CurateError, match="moments"):
        scored(settings)
