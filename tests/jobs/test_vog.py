"""VoG through a run folder: the definition, what is redone, what is refused, kills."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from killed import curate_command, found, is_killed, run_to_end
from tiny_models import save_classifier, save_language_model
from torch import Tensor, nn

from curate.errors import ConfigError, InputError
from curate.models.cnn import CNN
from curate.models.mlp import MLP
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.index import index_run
from jobs.score import plan_score, score_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
ROOT = Path(__file__).parents[2]
WORDS = ["the", "cat", "in", "a", "hat", "then", "sat", "there", "until", "dawn"]


def save_mlp(folder: Path, *, seed: int | None, draw: int, hidden: Sequence[int] = (8,)) -> str:
    """A checkpoint as any training might leave it; `seed` is of the run that it says it is from."""
    torch.manual_seed(draw)
    MLP(num_features=4, num_classes=3, hidden=hidden).save_pretrained(folder)
    if seed is not None:
        (folder / "checkpoint.json").write_text(json.dumps({"seed": seed, "step": draw}))
    return str(folder)


def rows(count: int = 60) -> pl.DataFrame:
    numbers = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    return pl.DataFrame({"x": numbers, "label": [i % 3 for i in range(count)]})


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A table and two training runs of four checkpoints each."""
    rows().write_parquet(tmp_path / "rows.parquet")
    for seed in (0, 1):
        for step in range(1, 5):
            save_mlp(tmp_path / f"run-{seed}" / f"step-{step}", seed=seed, draw=10 * seed + step)
    return tmp_path


def values_of(world: Path, options: Any = None, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": str(world / "run"),
        "sources": {
            "rows": {"path": str(world / "rows.parquet"), "features": "x", "label": "label"}
        },
        "task": {"kind": "tabular-classification", "num_classes": 3},
        "model": {"device": "cpu"},
        "checkpoints": {"paths": [str(path) for path in sorted(world.glob("run-*/step-*"))]},
        "index": {"partition_rows": 25, "held_out": 0.0},
        "score": {"scorers": [{"vog": options or {}}], "batch_tokens": 64},
    }
    for key, value in more.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return values


def settings_of(world: Path, options: Any = None, **more: Any) -> Settings:
    settings = parse_settings(values_of(world, options, **more))
    index_run(settings, pool=INLINE)
    return settings


def scored(settings: Settings) -> pl.DataFrame:
    score_run(settings, pool=INLINE)
    return table(settings, "scores/vog")


def table(settings: Settings, folder: str) -> pl.DataFrame:
    paths = sorted((Path(settings.run) / folder).glob("*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths]).sort("source", "file", "row")


def tables(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for folder in ("quantities", "scores")
        for path in sorted((run / folder).rglob("*"))
        if path.is_file() and path.suffix in (".parquet", ".json") and ".done" not in path.parts
    }


def raw_scores(folders: Sequence[Path], numbers: np.ndarray, labels: Iterable[int]) -> np.ndarray:
    """The definition, one example at a time."""
    models: list[nn.Module] = [MLP.from_pretrained(folder).double() for folder in folders]
    found: list[float] = []
    for row, label in zip(numbers, labels, strict=True):
        gradients: list[Tensor] = []
        for model in models:
            leaf = torch.tensor(row, dtype=torch.float64)[None].requires_grad_()
            model(leaf)[0, label].backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad[0])
        found.append(float(np.stack([g.numpy() for g in gradients]).std(axis=0).mean()))
    return np.array(found)


def z_scores(raw: np.ndarray, groups: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    score = np.zeros(len(raw))
    for group in np.unique(groups):
        mine = raw[(groups == group) & is_train]
        score[groups == group] = (raw[groups == group] - mine.mean()) / mine.std()
    return score


def test_scores_are_the_definition_averaged_over_seeds(world: Path):
    found = scored(settings_of(world))
    frame = rows()
    labels = frame["label"].to_numpy()
    raw = [
        raw_scores(sorted(world.glob(f"run-{seed}/*")), frame["x"].to_numpy(), labels)
        for seed in (0, 1)
    ]
    each = [z_scores(one, labels, np.full(60, True)) for one in raw]
    np.testing.assert_allclose(found["vog_raw"], np.mean(raw, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["vog"], np.mean(each, axis=0), atol=1e-4)
    np.testing.assert_allclose(found["vog_std"], np.std(each, axis=0, ddof=1), atol=1e-4)
    assert found.columns == ["source", "file", "row", "vog", "vog_std", "vog_raw", "vog_raw_std"]


def test_classes_are_normalised_by_their_training_rows(world: Path):
    settings = settings_of(world, index={"held_out": 0.3})
    found = scored(settings)
    is_train = (table(settings, "examples")["split"] == "train").to_numpy()
    assert 5 < (~is_train).sum() < 40
    labels = rows()["label"].to_numpy()
    raws = [table(settings, f"quantities/vog-seed-{seed}")["vog_raw"].to_numpy() for seed in (0, 1)]
    each = [z_scores(raw.astype(np.float64), labels, is_train) for raw in raws]
    np.testing.assert_allclose(found["vog"], np.mean(each, axis=0), atol=1e-6)
    other = np.mean([z_scores(raw, labels, np.full(60, True)) for raw in raws], axis=0)
    assert np.abs(found["vog"].to_numpy() - other).max() > 0.01


def test_a_linear_model_ties_every_class_at_0_and_says_so(
    world: Path, caplog: pytest.LogCaptureFixture
):
    paths = [save_mlp(world / f"linear-{k}", seed=0, draw=k, hidden=()) for k in range(3)]
    settings = settings_of(world, checkpoints={"paths": paths})
    found = scored(settings)
    assert found["vog"].to_list() == [0.0] * 60
    assert found["vog_raw"].n_unique() == 3
    assert "3 of 3 groups have one training example, none, or no spread; their 60" in caplog.text
    groups = json.loads((world / "run/quantities/vog-raw-seed-0/groups.json").read_text())
    assert (groups["flat_groups"], groups["flat_examples"]) == (3, 60)


def test_a_class_with_one_example_gets_0(world: Path, caplog: pytest.LogCaptureFixture):
    frame = rows().with_columns(label=pl.Series([2] + [i % 2 for i in range(59)]))
    frame.write_parquet(world / "rows.parquet")
    found = scored(settings_of(world))
    assert found["vog"][0] == 0.0
    assert found["vog_raw"][0] > 0
    assert found["vog"][1:].is_finite().all()
    assert found["vog"][1:].n_unique() > 50
    assert "1 of 3 groups have one training example" in caplog.text


def test_a_row_that_is_not_finite_is_null_and_spoils_no_class(world: Path):
    large = MLP.from_pretrained(world / "run-0" / "step-2")
    with torch.no_grad():
        next(large.parameters()).mul_(100)
    large.save_pretrained(world / "run-0" / "step-2")
    whole = scored(settings_of(world))
    numbers = rows()["x"].to_numpy().copy()
    numbers[7] = 3e38
    rows().with_columns(x=pl.Series(numbers)).write_parquet(world / "rows.parquet")
    settings = settings_of(world, run=str(world / "other"))
    found = scored(settings)
    assert found["vog"].null_count() == found["vog_raw"].null_count() == 1
    assert found["vog"][7] is None
    others = [i for i in range(60) if i % 3 != 1]  # of the other two classes
    np.testing.assert_allclose(found["vog"].gather(others), whole["vog"].gather(others), atol=1e-5)
    marks = [json.loads(p.read_text()) for p in (world / "other").rglob("vog-raw-seed-0/.done/p*")]
    assert sum(mark["not_finite"] for mark in marks) == 1


@pytest.mark.parametrize(
    ("stage", "steps"), [("early", (1, 2, 3)), ("middle", (2, 3, 4)), ("late", (3, 4, 5))]
)
def test_a_stage_takes_three_checkpoints(world: Path, stage: str, steps: tuple[int, ...]):
    save_mlp(world / "run-0" / "step-5", seed=0, draw=5)
    paths = sorted(world.glob("run-0/*"))
    given = {"paths": [str(path) for path in paths]}
    settings = settings_of(world, {"stage": stage}, checkpoints=given)
    frame = rows()
    wanted = raw_scores(
        [world / "run-0" / f"step-{k}" for k in steps], frame["x"].to_numpy(), frame["label"]
    )
    np.testing.assert_allclose(scored(settings)["vog_raw"], wanted, rtol=1e-5)


def test_folders_of_unknown_origin_are_one_training_run(world: Path):
    paths = [save_mlp(world / f"mine-{k}", seed=None, draw=k) for k in range(3)]
    settings = settings_of(world, checkpoints={"paths": paths})
    frame = rows()
    wanted = raw_scores([Path(path) for path in paths], frame["x"].to_numpy(), frame["label"])
    found = scored(settings)
    np.testing.assert_allclose(found["vog_raw"], wanted, rtol=1e-5)
    assert found["vog_std"].null_count() == 60


def test_partitions_and_batches_do_not_matter(world: Path):
    whole = scored(settings_of(world))
    other = scored(
        settings_of(
            world,
            run=str(world / "other"),
            index={"partition_rows": 7},
            score={"scorers": ["vog"], "batch_tokens": 1},
        )
    )
    np.testing.assert_allclose(other["vog"], whole["vog"], atol=1e-4)
    np.testing.assert_allclose(other["vog_raw"], whole["vog_raw"], rtol=1e-5)


def test_predicted_classes_take_no_notice_of_the_labels(world: Path):
    frame = rows()
    frame.with_columns(label=pl.lit(0, pl.Int64)).write_parquet(world / "rows.parquet")
    found = scored(settings_of(world, {"target": "predicted"}))
    numbers = frame["x"].to_numpy()
    wanted: list[np.ndarray] = []
    each: list[np.ndarray] = []
    for seed in (0, 1):
        folders = sorted(world.glob(f"run-{seed}/*"))
        last = MLP.from_pretrained(folders[-1]).double()
        classes = last(torch.tensor(numbers).double()).argmax(1).tolist()
        wanted.append(raw_scores(folders, numbers, classes))
        each.append(z_scores(wanted[-1], np.array(classes), np.full(60, True)))
        assert len(set(classes)) > 1
    np.testing.assert_allclose(found["vog_raw"], np.mean(wanted, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["vog"], np.mean(each, axis=0), atol=1e-4)


def test_a_language_model_is_compared_within_domain_and_length(tmp_path: Path):
    texts = [" ".join(WORDS[(i * k) % 10] for k in range(1, 2 + i % 11)) for i in range(40)]
    frame = pl.DataFrame({"text": texts, "topic": ["a" if i % 3 else "b" for i in range(40)]})
    frame.write_parquet(tmp_path / "rows.parquet")
    paths = [str(save_language_model(tmp_path / f"lm-{k}", seed=k)) for k in range(2)]
    source = {"path": str(tmp_path / "rows.parquet"), "text": "text", "domain": "topic"}
    values = {
        **values_of(tmp_path),
        "sources": {"rows": source},
        "task": {"kind": "causal-lm", "max_tokens": 64},
        "checkpoints": {"paths": paths},
    }
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    found = scored(settings)
    kept = table(settings, "quantities/vog-paths")
    assert found["num_scored"].to_list() == kept["num_scored"].to_list()
    length = kept["num_scored"].to_numpy() + 1  # the first token is read and not scored
    bucket = np.floor(np.log2(length)).astype(int)
    groups = bucket * 2 + (frame["topic"] == "a").to_numpy()
    raw = found["vog_raw"].to_numpy().astype(np.float64)
    for group in np.unique(groups):
        mine = groups == group
        wanted = (raw[mine] - raw[mine].mean()) / raw[mine].std() if mine.sum() > 1 else 0.0
        np.testing.assert_allclose(found["vog"].to_numpy()[mine], wanted, atol=1e-4)
    assert len(np.unique(groups)) > 4


@pytest.mark.parametrize("channel", ["mean", "none"])
def test_images_are_the_definition_on_normalised_pixels(tmp_path: Path, channel: str):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    labels = [i % 2 for i in range(12)]
    frame = pl.DataFrame({"x": pixels, "label": labels})
    frame.write_parquet(tmp_path / "rows.parquet")
    models: list[CNN] = []
    for draw in range(3):
        torch.manual_seed(draw)
        models.append(CNN(channels=3, num_classes=2, widths=(4, 8), grid=2))
        models[-1].save_pretrained(tmp_path / f"cnn-{draw}")
    values = {
        **values_of(tmp_path, {"channel": channel}),
        "sources": {
            "rows": {"path": str(tmp_path / "rows.parquet"), "image": "x", "label": "label"}
        },
        "task": {"kind": "image-classification", "num_classes": 2},
        "checkpoints": {"paths": [str(tmp_path / f"cnn-{draw}") for draw in range(3)]},
    }
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    found = scored(settings)
    for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        gradients: list[np.ndarray] = []
        for model in models:
            leaf = torch.tensor(image / 255 * 2 - 1).permute(2, 0, 1)[None].requires_grad_()
            model.double()(leaf)[0, label].backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad[0].numpy())
        each = np.stack(gradients)
        each = each.mean(axis=1) if channel == "mean" else each
        assert found["vog_raw"][row] == pytest.approx(each.std(axis=0).mean(), rel=1e-4)


def test_what_is_done_is_not_done_again_and_a_changed_option_is(world: Path):
    settings = settings_of(world)
    first = score_run(settings, pool=INLINE)
    assert first["done"] == 2 * (3 + 1 + 3)
    assert plan_score(settings).done == plan_score(settings).total
    before = tables(world / "run")
    assert score_run(settings, pool=INLINE)["done"] == 0
    other = parse_settings(values_of(world, {"unit": True}))
    state = plan_score(other)
    assert state.total - state.done == 14 + 3
    score_run(other, pool=INLINE)
    assert tables(world / "run") != before
    score_run(settings, pool=INLINE)
    assert tables(world / "run") == before


def test_another_split_costs_no_pass_of_a_model(world: Path):
    score_run(settings_of(world), pool=INLINE)
    raw = {k: v for k, v in tables(world / "run").items() if "vog-raw" in k and "part" in k}
    state = plan_score(settings_of(world, index={"held_out": 0.3}))
    assert state.total - state.done == 2 * (1 + 3) + 3
    score_run(settings_of(world, index={"held_out": 0.3}), pool=INLINE)
    again = tables(world / "run")
    assert {key: again[key] for key in raw} == raw


def test_partitions_that_are_gone_leave_nothing_behind(world: Path):
    score_run(settings_of(world), pool=INLINE)
    rows(30).write_parquet(world / "rows.parquet")
    settings = settings_of(world)
    score_run(settings, pool=INLINE)
    count = len(list((world / "run" / "examples").glob("part-*.parquet")))
    assert count < 3
    for folder in (world / "run" / "quantities").iterdir():
        assert len(list(folder.glob("part-*.parquet"))) == count, folder


@pytest.mark.parametrize("stage", ["complete", "late"])
def test_too_few_checkpoints_are_refused(world: Path, stage: str):
    count = 1 if stage == "complete" else 2
    paths = [str(path) for path in sorted(world.glob("run-0/*"))[:count]]
    settings = settings_of(world, {"stage": stage}, checkpoints={"paths": paths})
    with pytest.raises(ConfigError, match=rf"stage {stage} takes \d or more, and there is {count}"):
        score_run(settings, pool=INLINE)
    with pytest.raises(ConfigError, match="save_every_epochs"):
        plan_score(settings)


def test_one_checkpoint_of_each_seed_is_refused(world: Path):
    settings = settings_of(world, score={"scorers": ["vog"], "checkpoints": "last"})
    with pytest.raises(ConfigError, match="there is 1"):
        score_run(settings, pool=INLINE)


def test_a_checkpoint_of_another_shape_is_named_before_anything_is_measured(world: Path):
    save_mlp(world / "run-0" / "step-9", seed=0, draw=1, hidden=(9,))
    settings = settings_of(world)
    with pytest.raises(ConfigError, match=r"step-9 has another architecture than .*step-1: layers"):
        score_run(settings, pool=INLINE)
    assert not (world / "run" / "quantities").exists()


def test_a_checkpoint_of_another_kind_of_model_is_named(world: Path):
    save_classifier(world / "run-0" / "step-9")
    (world / "run-0" / "step-9" / "checkpoint.json").write_text('{"seed": 0}')
    settings = settings_of(world)
    with pytest.raises(ConfigError, match=r"step-9 .* it is bert, not mlp"):
        score_run(settings, pool=INLINE)


def test_a_damaged_checkpoint_is_named(world: Path):
    settings = settings_of(world)
    (world / "run-1" / "step-2" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"step-2/model\.safetensors cannot be read"):
        score_run(settings, pool=INLINE)


def test_options_that_do_not_suit_the_task_are_refused(world: Path):
    with pytest.raises(ConfigError, match="reduce: l2 takes norms of tokens"):
        score_run(settings_of(world, {"reduce": "l2"}), pool=INLINE)
    with pytest.raises(ConfigError, match="stage"):
        score_run(settings_of(world, {"stage": "last"}), pool=INLINE)
    values = {**values_of(world, {"target": "predicted"}), "task": {"kind": "causal-lm"}}
    with pytest.raises(ConfigError, match="target: predicted is for classes"):
        score_run(parse_settings(values), pool=INLINE)
    values["task"] = {"kind": "causal-lm", "window": {}}
    with pytest.raises(ConfigError, match="the task reads windows"):
        score_run(parse_settings(values), pool=INLINE)


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(world: Path):
    inline = settings_of(world, run=str(world / "inline"))
    score_run(inline, pool=INLINE)
    settings = settings_of(world)
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        score_run(settings, pool=pool)
    assert tables(world / "run") == tables(world / "inline")


def command(world: Path, run: str) -> list[str]:
    """`curate score` as a user types it."""
    values = values_of(world, index={"partition_rows": 10}, run=str(world / run))
    config = world / f"{run}.yaml"
    config.write_text(yaml.safe_dump(values))
    return curate_command("score", config, "--json")


@pytest.mark.slow
def test_killed_from_the_command_line_it_goes_on_and_writes_the_same_bytes(world: Path):
    rows(600).write_parquet(world / "rows.parquet")
    run_to_end(command(world, "whole"))
    folder = world / "run" / "quantities"
    survived: list[int] = []
    for pattern in ("vog-raw-seed-0/part-*", "vog-raw-seed-1/part-*", "vog-seed-0/part-*"):
        enough = found(folder, pattern) + 4
        assert is_killed(
            command(world, "run"),
            lambda pattern=pattern, enough=enough: found(folder, pattern) >= enough,
        )
        survived.append(found(folder, "vog-*/.done/*"))
    assert survived == sorted(set(survived))
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("vog-*/part-*.parquet")
            if (p.parent / ".done" / f"{p.name}.json").exists()}  # fmt: skip
    assert json.loads(run_to_end(command(world, "run")))
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert tables(world / "run") == tables(world / "whole")
