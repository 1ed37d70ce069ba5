"""The loop at its edges: numbers that are none, few sequences, many domains, half precision."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
import torch
from proxy_case import (
    LENGTH,
    VOCABULARY,
    make_model,
    make_optimiser,
    make_task,
    open_data,
    write_domains,
)
from torch import Tensor

from curate.errors import ConfigError, DivergedError
from curate.models.checkpoints import load_state
from curate.models.optimiser import Optimiser
from mixers.doremi import DoReMi, DoReMiRule
from mixers.plain import PlainRule
from mixers.proxy import Files, run_proxy
from mixers.proxy_settings import Proxy
from mixers.proxy_step import Data
from mixers.rules import Rule, Seen
from mixers.trajectory import Trajectory

SIZES = {"count": 24, "noise": 24, "repeat": 24}


def uniform(num: int = 3) -> Tensor:
    return torch.full((num,), 1 / num, dtype=torch.float64)


def reference(numbers: np.ndarray) -> np.ndarray:
    return np.full(len(numbers) * (LENGTH - 1), 2.0, dtype=np.float32)


def run(data: Data, rule: Rule, folder: Path, settings: Proxy, **more: Any) -> Any:
    files = Files(folder=folder, fingerprint="f")
    optimiser = more.pop("optimiser", None) or make_optimiser(settings)
    return run_proxy(optimiser, make_task(), data, rule, settings, files, **more)


def test_a_rule_that_stops_in_the_middle_of_a_step_names_the_domain(tmp_path: Path):
    """DoReMi's rule knows domains by number only."""
    settings = Proxy(steps=9, sequences=6, held_out=0)
    data = open_data([write_domains(tmp_path / "data.safetensors", SIZES)], reference=reference)
    optimiser = make_optimiser(settings)

    def told(step: int, _: Tensor) -> None:
        if step == 4:
            with torch.no_grad():
                next(optimiser.model.parameters()).fill_(torch.nan)

    rule = DoReMiRule(DoReMi(), 3)
    with pytest.raises(DivergedError, match="loss of domain count at step 5 is nan"):
        run(data, rule, tmp_path, settings, optimiser=optimiser, told=told)
    assert pl.read_parquet(tmp_path / "trajectory.parquet")["step"].max() == 4


def test_fewer_sequences_than_domains_still_see_them_all(tmp_path: Path):
    sizes = {f"count-{number}": 16 for number in range(10)}
    data = open_data([write_domains(tmp_path / "data.safetensors", sizes)], reference=reference)
    settings = Proxy(steps=30, sequences=3, held_out=0)
    result = run(data, DoReMiRule(DoReMi(), 10), tmp_path, settings)
    assert sum(result.num_tokens.values()) == 30 * 3 * (LENGTH - 1)
    assert min(result.num_tokens.values()) >= 5 * (LENGTH - 1)
    table = pl.read_parquet(tmp_path / "trajectory.parquet")
    absent = table.filter(pl.col("num_tokens") == 0)
    assert absent.height == 30 * 7
    assert absent["loss"].null_count() == absent.height
    assert table["weight"].null_count() == 0


def test_a_state_before_the_first_row_of_a_trajectory_is_resumed(tmp_path: Path):
    """A stretch of several steps, and a rule without columns of its own."""
    settings = Proxy(steps=2500, sequences=3, held_out=0, resume_every_seconds=0.0)
    data = open_data([write_domains(tmp_path / "data.safetensors", SIZES)])
    steps: list[int] = []

    for last in (3, 6):

        def told(step: int, _: Tensor, last: int = last) -> None:
            steps.append(step)
            if step == last:
                raise KeyboardInterrupt

        rule = PlainRule(uniform()[None], torch.ones(1), total_steps=2500)
        with pytest.raises(KeyboardInterrupt):
            run(data, rule, tmp_path, settings, told=told)
    assert steps == [1, 2, 3, 3, 4, 5, 6]
    saved = load_state(tmp_path / "resume" / "state.safetensors")
    assert saved is not None
    assert saved[1]["optimiser"]["step"] == 5
    table = pl.read_parquet(tmp_path / "trajectory.parquet")
    assert table["step"].unique().to_list() == [3, 5]
    assert table.group_by("step").agg(pl.col("num_tokens").sum())[
        "num_tokens"
    ].sort().to_list() == [
        2 * 3 * (LENGTH - 1),
        3 * 3 * (LENGTH - 1),
    ]


def test_states_that_take_long_to_write_are_written_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A clock that moves by a second with each step, and by ten with each state."""
    now = [0.0]
    kept: list[float] = []

    def save(path: Path, tensors: Any, facts: Any) -> None:
        kept.append(now[0])
        now[0] += 10

    def told(step: int, _: Tensor) -> None:
        now[0] += 1

    monkeypatch.setattr("mixers.proxy.time.monotonic", lambda: now[0])
    monkeypatch.setattr("mixers.proxy.save_state", save)
    settings = Proxy(steps=700, sequences=3, held_out=0, resume_every_seconds=30)
    data = open_data([write_domains(tmp_path / "data.safetensors", SIZES)])
    rule = PlainRule(uniform()[None], torch.ones(1), total_steps=700)
    run(data, rule, tmp_path, settings, told=told)
    assert kept == [30, 340, 650]


def test_a_trajectory_of_many_domains_has_fewer_rows():
    num, steps = 1000, 5000
    names = [str(number) for number in range(num)]
    trajectory = Trajectory(names, ("excess",), steps)
    ones = torch.ones(num, dtype=torch.float64)
    for step in range(1, steps + 1):
        trajectory.add(step, Seen(ones / num, step * ones, ones, {"excess": step * ones}))
    table = trajectory.table(steps)
    assert table.height == 200 * num
    last = table.tail(num)
    assert last["step"].unique().to_list() == [steps]
    assert last["loss"].to_list() == pytest.approx([steps - 12] * num)
    assert last["excess"].to_list() == last["loss"].to_list()
    few = Trajectory(names[:3], (), steps)
    for step in range(1, steps + 1):
        few.add(step, Seen(ones[:3] / 3, ones[:3], ones[:3]))
    assert few.table(steps).height == 1000 * 3


class _Half:
    """An optimiser in float16, which a CPU has not."""

    dtype = "float16"


def test_float16_is_refused_for_gradients_of_domains_and_bfloat16_trains(tmp_path: Path):
    settings = Proxy(steps=20, sequences=6, lr=1e-2, held_out=4)
    data = open_data([write_domains(tmp_path / "data.safetensors", SIZES)])

    class ByDomain(PlainRule):
        by_domain: ClassVar[bool] = True

    rule = ByDomain(uniform()[None], torch.ones(1), total_steps=20)
    half: Any = _Half()
    with pytest.raises(ConfigError, match=r"model\.dtype is float16"):
        run(data, rule, tmp_path, settings, optimiser=half)
    optimiser = Optimiser(
        make_model(),
        settings.train,
        seed=0,
        total_steps=20,
        device=torch.device("cpu"),
        dtype="bfloat16",
    )
    result = run(data, rule, tmp_path, settings, optimiser=optimiser)
    assert all(p.dtype == torch.float32 for p in optimiser.model.parameters())
    assert result.held_out["repeat"] < np.log(VOCABULARY) - 0.3
