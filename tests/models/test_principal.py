"""Principal axes: what they keep, and what they leave to random sides."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from gradient_loop import gradient_loop
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import InputError
from curate.models.gradients import Engine, Sides, Wanted
from curate.models.mlp import MLP
from curate.models.principal import Moments, load_sides, save_sides
from curate.models.projection import draw_sides, flat_rows
from curate.models.settings import TabularClassification
from curate.models.tasks import build_task

CPU = torch.device("cpu")


def flat_points(count: int = 40) -> pl.DataFrame:
    """Points of a plane through the origin, in eight dimensions."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(count, 2)) @ draw.normal(size=(2, 8))
    return pl.DataFrame({"features": x.astype(np.float32), "label": np.arange(count) % 2})


def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@pytest.mark.parametrize("batch_tokens", [4000, 12])
def test_axes_of_inputs_in_a_plane_lose_nothing(batch_tokens: int):
    """Two axes of eight hold every input: inner products are those of whole gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MLP(num_features=8, num_classes=2).eval()
    rows = flat_points()
    task = build_task(TabularClassification(num_classes=2), None)
    drawn = draw_sides(model, dim=2, layers=["layers.0.weight", "layers.0.bias"])
    moments = Moments(model, task, drawn, reduction="mean")
    moments.add(task.encode(rows), batch_tokens=batch_tokens, device=CPU)
    sides = moments.sides()
    assert torch.equal(sides["layers.0.weight"].left, torch.eye(2))  # two rows are kept whole
    assert sides["layers.0.bias"] == drawn["layers.0.bias"]
    batch = {"x": rows["features"].to_torch(), "y": rows["label"].to_torch()}
    whole = gradient_loop(model, losses, batch)
    flat = torch.cat([value.flatten(1) for value in whole.values()], 1)
    for chosen, is_exact in ((sides, True), (drawn, False)):
        wanted = Wanted(squares=False, projections=chosen)
        found = Engine(model).measure(losses, batch, num_examples=40, wanted=wanted)
        values = flat_rows(found.projections, chosen).double()
        close = torch.allclose(values @ values.T, flat @ flat.T, rtol=1e-4, atol=1e-5)
        assert close == is_exact


def test_sides_come_back_from_the_disk_in_the_order_that_is_asked_for(tmp_path: Path):
    sides = {name: Sides(torch.randn(4, 2), torch.randn(3, 2)) for name in ("b", "a")}
    save_sides(sides, tmp_path / "x.safetensors")
    like = {name: Sides(*(side.double() for side in pair)) for name, pair in sides.items()}
    found = load_sides(tmp_path / "x.safetensors", ["a", "b"], like)
    assert list(found) == ["a", "b"]
    assert torch.equal(found["b"].right, sides["b"].right.double())
    with pytest.raises(InputError, match=r"x\.safetensors is damaged"):
        load_sides(tmp_path / "x.safetensors", ["c"], {"c": sides["a"]})
    (tmp_path / "x.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match="damaged"):
        load_sides(tmp_path / "x.safetensors", ["a"], like)
