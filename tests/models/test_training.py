"""The training loop: it learns, logs what it saw, and goes on after a stop as if there was none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from curate.errors import CurateError
from curate.models.checkpoints import list_checkpoints, load_moments
from curate.models.epochs import Lengths, epoch_windows, plan_epochs
from curate.models.mlp import MLP
from curate.models.optimiser import Optimiser
from curate.models.settings import TabularClassification, Train
from curate.models.tasks import Encoded, Flat, build_task
from curate.models.training import run_steps, train
from curate.models.training_data import Data, Files, join
from curate.models.training_log import Sums, batch_losses, log_table

TASK = build_task(TabularClassification(num_classes=3), None)
SETTINGS = Train(epochs=2, lr=0.02, batch_tokens=8, save_every_epochs=0.5, resume_every_seconds=0)


def _table(seed: int, rows: int) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    label = random.integers(0, 3, rows)
    features = random.normal(size=(rows, 4)).astype(np.float32)
    features[np.arange(rows), label] += 3.0
    return pl.DataFrame({"features": features.tolist(), "label": label})


def _encoded(seed: int, rows: int) -> Encoded:
    return TASK.encode(_table(seed, rows))


class _Case:
    """Four partitions of rows of numbers; every seventh row is held out."""

    def __init__(self, root: Path, settings: Train = SETTINGS, *, fingerprint: str = "f") -> None:
        self.parts = [_encoded(seed, rows) for seed, rows in enumerate((30, 11, 25, 7))]
        self.lengths: list[Lengths] = []
        for part in self.parts:
            lengths = part.lengths.astype(np.int32)
            lengths[::7] = 0
            self.lengths.append(lengths)
        self.logs: dict[tuple[int, int], Any] = {}
        self.settings = settings
        self.schedule = plan_epochs(
            self.lengths,
            seed=1,
            batch_tokens=settings.batch_tokens,
            epochs=settings.epochs,
            save_every_epochs=settings.save_every_epochs,
            max_steps=settings.max_steps,
        )
        torch.manual_seed(0)
        self.model: nn.Module = MLP(num_features=4, num_classes=3, hidden=[8])
        self.files = Files(root=root, seed=1, fingerprint=fingerprint, write_model=self.write_model)
        self.stop_after: int | None = None
        self.optimiser = Optimiser(
            self.model,
            settings,
            seed=1,
            total_steps=self.schedule.total_steps,
            device=torch.device("cpu"),
        )

    def write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        if self.stop_after is not None and self.optimiser.step_number >= self.stop_after:
            raise KeyboardInterrupt

    def write_log(self, epoch: int, part: int, values: Any) -> None:
        self.logs[epoch, part] = None if values is None else values.copy()

    def run(self, task: Any = TASK) -> list[dict[str, Any]]:
        data = Data(
            lengths=self.lengths,
            encoded=lambda parts: join([self.parts[part] for part in parts]),
            held_out=_encoded(99, 20),
            write_log=self.write_log,
        )
        return train(self.optimiser, task, data, self.schedule, self.files)


def _bytes(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "resume" not in path.parts
    }


def test_it_learns_and_the_curve_says_so(tmp_path: Path):
    points = _Case(tmp_path, replace(SETTINGS, epochs=20, save_every_epochs=10)).run()
    assert points[0]["loss"] > 0.9
    assert points[-1]["loss"] < 0.3
    assert points[-1]["held_out_loss"] < 0.4
    assert points[-1]["epoch"] == 20
    assert points[-1]["tokens"] == 20 * 61
    curve = pl.read_parquet(tmp_path / "seed-1" / "curve.parquet")
    assert curve.to_dicts() == points


def test_checkpoints_are_saved_where_the_schedule_says(tmp_path: Path):
    case = _Case(tmp_path, replace(SETTINGS, save_moments=True))
    case.run()
    found = list_checkpoints(tmp_path)
    assert [checkpoint.step for checkpoint in found] == sorted(case.schedule.save_steps)
    assert len(found) == 4
    assert found[-1].epoch == 2
    last = MLP.from_pretrained(found[-1].path)
    for name, parameter in last.named_parameters():
        assert torch.equal(parameter, case.model.get_parameter(name))
    moments = load_moments(found[-1])
    assert set(moments.gradient) == set(dict(last.named_parameters())) == set(moments.square)


def test_the_log_holds_what_each_example_showed_when_it_was_trained_on(tmp_path: Path):
    """Replayed with torch's own AdamW and formulas of its own, batch by batch."""
    case = _Case(tmp_path, replace(SETTINGS, clip_norm=0.0, schedule="constant", warmup=0.0))
    torch.manual_seed(0)
    model = MLP(num_features=4, num_classes=3, hidden=[8])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=0.02
    )
    expected: dict[tuple[int, int], np.ndarray] = {}
    for epoch in (0, 1):
        for window in epoch_windows(case.lengths, seed=1, epoch=epoch, batch_tokens=8):
            rows = [(part, row) for part in window.parts for row in range(len(case.lengths[part]))]
            for batch in window.batches:
                places = [rows[i] for i in batch]
                x = np.stack([case.parts[p].arrays["features"][r] for p, r in places])
                y = [int(case.parts[p].arrays["labels"][r]) for p, r in places]
                logits = model(torch.from_numpy(x))
                chance = torch.softmax(logits, dim=1)
                loss = -torch.stack([chance[i, c].log() for i, c in enumerate(y)])
                adam.zero_grad()
                loss.mean().backward()
                adam.step()
                for i, (part, row) in enumerate(places):
                    seen = logits[i].tolist()
                    rivals = [value for c, value in enumerate(seen) if c != y[i]]
                    values = expected.setdefault(
                        (epoch, part), np.full((3, len(case.lengths[part])), np.nan)
                    )
                    lead = seen[y[i]] - max(rivals)
                    values[:, row] = (loss[i].item(), float(lead > 0), lead)
    case.run()
    assert case.logs.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(case.logs[key], values, atol=2e-5)


@pytest.mark.parametrize("stop", [1, 9, 14])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, stop: int):
    every_step = replace(SETTINGS, save_every_epochs=0.1)
    whole = _Case(tmp_path / "whole", every_step)
    points = whole.run()
    stopped = _Case(tmp_path / "stopped", every_step)
    stopped.stop_after = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = _Case(tmp_path / "stopped", every_step)
    torch.manual_seed(77)
    assert resumed.run() == points
    assert _bytes(tmp_path / "stopped") == _bytes(tmp_path / "whole")
    logs = stopped.logs | resumed.logs
    assert logs.keys() == whole.logs.keys()
    for key, values in whole.logs.items():
        np.testing.assert_array_equal(logs[key], values)


def test_only_the_steps_after_the_stop_are_done_again(tmp_path: Path):
    stopped = _Case(tmp_path)
    stopped.stop_after = 10
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    saved_at = stopped.optimiser.step_number
    resumed = _Case(tmp_path)
    seen = list[int]()
    resumed.model.register_forward_pre_hook(
        lambda module, _: seen.append(1) if module.training else None
    )
    resumed.run()
    # The state of the very step that was stopped had not been written yet.
    assert len(seen) == resumed.schedule.total_steps - (saved_at - 1)


def test_a_state_of_other_settings_is_not_resumed(tmp_path: Path):
    fresh = _Case(tmp_path / "fresh", fingerprint="new")
    fresh.run()
    _Case(tmp_path / "used", fingerprint="old").run()
    again = _Case(tmp_path / "used", fingerprint="new")
    again.run()
    assert _bytes(tmp_path / "used") == _bytes(tmp_path / "fresh")


def test_training_that_stops_inside_an_epoch_leaves_empty_records(tmp_path: Path):
    case = _Case(tmp_path, replace(SETTINGS, max_steps=3))
    case.run()
    trained = sum(int(np.isfinite(values[0]).sum()) for values in case.logs.values())
    assert set(case.logs) == {(0, part) for part in range(4)}
    (window,) = epoch_windows(case.lengths, seed=1, epoch=0, batch_tokens=8)
    assert trained == sum(len(batch) for batch in window.batches[:3])
    assert all(np.isnan(case.logs[0, part][:, ::7]).all() for part in range(4))


class _Explodes:
    """A task whose loss turns to NaN at the fifth training step."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(TASK, name)

    def logits_and_targets(self, model: nn.Module, batch: Any) -> Flat:
        flat = TASK.logits_and_targets(model, batch)
        self.calls += model.training
        bad = model.training and self.calls == 5
        return flat._replace(logits=flat.logits * torch.nan) if bad else flat


def test_a_loss_that_is_not_finite_stops_with_seed_and_step_and_keeps_what_is_done(tmp_path: Path):
    case = _Case(tmp_path, replace(SETTINGS, save_every_epochs=0.25))
    with pytest.raises(CurateError, match=r"seed 1: the loss at step 5 is nan\n.*lower.*lr"):
        case.run(_Explodes())
    kept = list_checkpoints(tmp_path)
    before = sorted(step for step in case.schedule.save_steps if step < 5)
    assert [checkpoint.step for checkpoint in kept] == before
    assert len(before) == 2
    for tensor in MLP.from_pretrained(kept[-1].path).parameters():
        assert tensor.isfinite().all()


def test_a_step_that_ruins_the_weights_is_not_saved(tmp_path: Path):
    case = _Case(tmp_path, replace(SETTINGS, clip_norm=0.0, max_steps=1, warmup=0.0))
    case.model.get_parameter("layers.0.weight").register_hook(lambda g: g * torch.inf)
    with pytest.raises(CurateError, match="step 1 left weights that are not finite"):
        case.run()
    assert list_checkpoints(tmp_path) == []


def test_joined_partitions_collate_like_each_by_itself():
    ragged = [
        Encoded(
            lengths=np.array([2, 0, 3]),
            num_scored=np.array([1, 0, 2]),
            truncated=np.zeros(3, dtype=bool),
            arrays={"tokens": np.arange(5), "starts": np.array([0, 2, 2, 5])},
            problems={1: "empty"},
        ),
        Encoded(
            lengths=np.array([1, 2]),
            num_scored=np.array([0, 1]),
            truncated=np.ones(2, dtype=bool),
            arrays={"tokens": np.arange(10, 13), "starts": np.array([0, 1, 3])},
            problems={0: "bad"},
        ),
    ]
    both = join(ragged)
    starts = both.arrays["starts"]
    rows = [both.arrays["tokens"][starts[i] : starts[i + 1]].tolist() for i in range(5)]
    assert rows == [[0, 1], [], [2, 3, 4], [10], [11, 12]]
    assert both.problems == {1: "empty", 3: "bad"}
    assert len(both) == 5


def test_losses_of_examples_are_means_over_their_own_positions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator)
    flat = Flat(logits, torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 0, 2, 2, 2]))
    losses = batch_losses(flat, 4)
    each = [-float(torch.softmax(logits[i], 0)[t].log()) for i, t in enumerate(flat.targets)]
    assert losses.mean.item() == pytest.approx(np.mean(each), rel=1e-6)
    assert losses.examples[0].tolist() == pytest.approx(
        [np.mean(each[:2]), 0.0, np.mean(each[2:]), 0.0], rel=1e-5
    )
    assert losses.num_counted == 5


def test_a_weighted_loss_drives_the_same_steps():
    """The thin coupling that proxies use: any items in, each step's result out before the next."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimiser = Optimiser(
        model, Train(lr=0.1), seed=0, total_steps=3, device=torch.device("cpu")
    )  # fmt: skip
    weights = [1.0, 0.0, 2.0]

    def losses(model: nn.Module, weight: float) -> Any:
        mean = weight * model(torch.ones(2, 3)).square().mean()
        return type("Loss", (), {"mean": mean})

    step: Callable[..., Any] = run_steps
    seen = [(weight, result.step) for weight, result in step(optimiser, weights, losses)]
    assert seen == [(1.0, 1), (0.0, 2), (2.0, 3)]


def test_sums_weigh_steps_by_their_counted_positions():
    sums = Sums()
    sums.add(1.0, 10)
    sums.add(2.0, 30)
    sums.point(step=2, epoch=0.5, lr=0.1, held_out_loss=None)
    assert sums.points[0]["loss"] == 1.75
    assert Sums(**sums.facts()) == sums


def test_log_tables_have_nulls_where_nothing_was_seen():
    keys = pl.DataFrame({"source": ["a"] * 2, "file": ["f"] * 2, "row": [3, 5]})
    values = np.array([[1.0, np.nan], [0.5, np.nan], [-1.0, np.nan]], dtype=np.float32)
    table = log_table(keys, values)
    assert table.rows() == [("a", "f", 3, 1.0, 0.5, -1.0), ("a", "f", 5, None, None, None)]
    assert log_table(keys, None)["margin"].null_count() == 2
    assert table.schema["loss"] == pl.Float32
