"""Two trainings with a class that does not exist, and the flags that follow from them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import curate
from curate.config import plain
from curate.data.example import KEY
from curate.errors import ConfigError
from jobs.aum_threshold import own_folder, passes, relabelled
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.score import plan_score, score_run
from jobs.settings import Settings, parse_settings
from jobs.training_work import open_workshop
from scorers.aum_threshold import AUMThreshold

INLINE = Pool(InlineExecutor(), 1)
EPOCHS = 6


def settings(root: Path, **changes: Any) -> Settings:
    train = {"epochs": EPOCHS, "seeds": [5], "lr": 2e-2, "batch_tokens": 16,
             "schedule": "constant"}  # fmt: skip
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {"toy": {"path": str(root / "rows.parquet"), "features": "x", "label": "label"}},
        "index": {"held_out": 0.1, "partition_rows": 120},
        "task": {"kind": "tabular-classification", "num_classes": 3},
        "model": {"config": {"model_type": "mlp", "hidden": [16]}, "device": "cpu"},
        "checkpoints": {"train": train},
        "score": {"scorers": [{"aum_threshold": {"percentile": 0.9, "skip_first": 1}}]},
        **changes,
    }
    return parse_settings(values)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, np.ndarray]:
    """300 points around three corners, a sixth of the labels wrong; and which."""
    root = tmp_path_factory.mktemp("toy")
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 300)
    rows = np.eye(3)[true] * 3 + generator.normal(size=(300, 3))
    wrong = generator.random(300) < 1 / 6
    label = np.where(wrong, (true + 1) % 3, true)
    frame = pl.DataFrame({"x": rows.astype(np.float32), "label": label})
    frame.write_parquet(root / "rows.parquet")
    made = settings(root)
    index_run(made, pool=INLINE)
    score_run(made, pool=INLINE)
    return made, wrong


def payload_of(made: Settings, number: int) -> dict[str, Any]:
    scorer = AUMThreshold(percentile=0.9, skip_first=1)
    return passes(made, scorer).phases[0].tasks[number].payload


def test_flags_are_those_of_a_plain_loop_over_the_logs(toy: tuple[Settings, np.ndarray]):
    made, _ = toy
    opened = curate.open(made.run)
    scores = opened.scores.join(opened.examples, on=list(KEY)).sort("row").collect()
    shop = open_workshop(payload_of(made, 0))
    everything = range(len(shop.partitions))
    labels = scores["label"].to_numpy()
    given = [relabelled(shop, everything, number).arrays["labels"] for number in (0, 1)]
    is_sample = [np.asarray(found == 3) for found in given]
    assert not (is_sample[0] & is_sample[1]).any()
    assert all(50 < found.sum() < 100 for found in is_sample)  # a quarter of 300
    verdicts: list[list[bool | None]] = []
    areas: list[list[float]] = []
    for number in (0, 1):
        assert (given[number][~is_sample[number]] == labels[~is_sample[number]]).all()
        folder = own_folder(shop.run).checkpoints / f"seed-{number}" / "log"
        tables = [
            pl.concat([pl.read_parquet(e / f"{p.name}.parquet") for p in shop.partitions])
            for e in sorted(folder.iterdir())
        ]
        assert len(tables) == EPOCHS
        margins = [[t["margin"][n] for t in tables[1:]] for n in range(300)]
        area = [math.nan if m[0] is None else sum(m) / len(m) for m in margins]
        samples = [a for a, mine in zip(area, is_sample[number], strict=True)
                   if mine and not math.isnan(a)]  # fmt: skip
        areas.append(area)
        verdicts.append(
            [
                None if mine else sum(s > a for s in samples) > 0.1 * len(samples)
                for a, mine in zip(area, is_sample[number], strict=True)
            ]
        )
    for n in range(300):
        kept = [number for number in (0, 1) if verdicts[number][n] is not None]
        if math.isnan(areas[0][n]):
            assert scores["split"][n] == "held_out"
            assert scores["aum_threshold"][n] is None
            assert scores["aum_flag"][n] is None
            continue
        assert scores["aum_flag"][n] == all(verdicts[number][n] for number in kept)
        mean = sum(areas[number][n] for number in kept) / len(kept)
        assert scores["aum_threshold"][n] == pytest.approx(mean, abs=1e-5)


def test_wrong_labels_are_flagged_and_most_right_ones_are_not(toy: tuple[Settings, np.ndarray]):
    made, wrong = toy
    flags = curate.open(made.run).scores.sort("row").collect()["aum_flag"].to_numpy()
    known = ~np.isnan(flags)
    assert flags[known & wrong].mean() > 0.7
    assert flags[known & ~wrong].mean() < 0.3


def test_a_second_run_trains_nothing_and_another_percentile_neither(
    toy: tuple[Settings, np.ndarray],
):
    made, _ = toy
    state = plan_score(made)
    assert state.total == state.done
    other = parse_settings({**plain(made), "score": {"scorers": ["aum_threshold"]}})
    state = plan_score(other)
    assert state.total - state.done == 2 + 3 + 3  # limits, judgements, columns
    assert not list((Path(made.run) / "aum_threshold").rglob("*.safetensors"))


def test_without_classes_or_training_it_is_refused(toy: tuple[Settings, np.ndarray]):
    made, _ = toy
    text = parse_settings({**plain(made), "task": {"kind": "causal-lm"}})
    with pytest.raises(ConfigError, match="the task has no classes"):
        passes(text, AUMThreshold())
    untrained = parse_settings({**plain(made), "checkpoints": {}})
    with pytest.raises(ConfigError, match="nothing says how"):
        passes(untrained, AUMThreshold())
