"""`evaluate-attribution` from settings to the table, on small networks that are really trained."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from evaluate.compared_digits import digits_settings, write_digits
from killed import curate_command, found, is_killed, run_to_end
from scipy import stats
from sklearn.metrics import roc_auc_score

from curate.config import parse, plain, to_yaml
from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError
from curate.models.settings import Train
from jobs.all_stages import run_stages, stages_for
from jobs.cluster import Cluster, open_pool
from jobs.evaluate_attribution import check_evaluate_attribution, plan_evaluate_attribution
from jobs.evaluate_attribution_training import (
    pool_lengths,
    subset_members,
    training_settings,
)
from jobs.score_finished import Finished
from jobs.settings import Settings, parse_settings

ROWS, TARGETS = 200, 30
TRAIN = {"epochs": 5, "lr": 2e-2, "batch_tokens": 32, "resume_every_seconds": 0.01}
LDS = "lds"


def write_data(folder: Path) -> tuple[Path, Path]:
    """A pool with wrong labels, which a column tells; and a target of other digits."""
    pool, target = write_digits(folder, rows=ROWS, flipped=0.2)
    table = pl.read_parquet(pool)
    table.with_columns(wrong=pl.col("domain") == "noise").write_parquet(pool)
    pl.read_parquet(target).head(TARGETS).write_parquet(target)
    return pool, target


def matrix_of(pool: Path, target: Path, *, sign: float = 1.0) -> pl.DataFrame:
    """1 where an example and a target example have the same label."""
    one, two = (pl.read_parquet(path)["label"].to_numpy() for path in (pool, target))
    same = sign * (one[:, None] == two).astype(np.float32)
    keys = {"source": ["digits"] * len(one), "file": [pool.name] * len(one)}
    frame = pl.DataFrame({**keys, "row": np.arange(len(one))})
    return frame.hstack([pl.Series(f"target-{n}", own) for n, own in enumerate(same.T)])


def settings_of(run: Path, data: tuple[Path, Path], **changes: Any) -> Settings:
    own = {"subsets": 8, "queries": 20, "train": TRAIN, **changes.pop("attribution", {})}
    return digits_settings(run, *data, checkpoints={}, attribution=own, **changes)


def evaluate(settings: Settings, cluster: Cluster | None = None) -> dict[str, Any]:
    stages = stages_for(settings, "evaluate-attribution")
    with open_pool(cluster or Cluster()) as pool:
        return run_stages(settings, stages, pool=pool)["evaluate-attribution"]


def rows_of(summary: dict[str, Any], measure: str = LDS) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in summary["rows"] if row["measure"] == measure}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def evaluated(
    data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated")
    matrix_of(*data).write_parquet(folder / "same.parquet")
    (folder / "parts").mkdir()
    opposite = matrix_of(*data, sign=-1).sample(fraction=1, shuffle=True, seed=3)
    opposite[:90].write_parquet(folder / "parts" / "a.parquet")
    opposite[90:].write_parquet(folder / "parts" / "b.parquet")
    matrices = {"same": str(folder / "same.parquet"), "opposite": str(folder / "parts")}
    settings = settings_of(folder / "run", data, attribution={"matrices": matrices})
    return settings, evaluate(settings)


def test_a_known_help_is_found_and_its_opposite_is_the_mirror_image(
    evaluated: tuple[Settings, dict[str, Any]],
):
    """Examples of the same class help: which also says that the sign is right."""
    rows = rows_of(evaluated[1])
    assert rows["same"]["low"] > 0.2
    assert rows["opposite"]["value"] == pytest.approx(-rows["same"]["value"])
    assert rows["same"]["num"] == 20
    assert rows["same"]["missing"] == 0


def test_the_score_is_that_of_the_files_by_scipy(
    evaluated: tuple[Settings, dict[str, Any]], data: tuple[Path, Path]
):
    settings, summary = evaluated
    root = Path(settings.run) / "attribution"
    run = RunFolder(Path(settings.run))
    lengths = pool_lengths(run)
    labels = pl.read_parquet(data[0])["label"].to_numpy()
    rows = [pl.read_parquet(run.examples(part).path)["row"].to_numpy() for part in run.partitions()]
    target = pl.read_parquet(data[1])["label"].to_numpy()
    queries = pl.read_parquet(root / "queries.parquet")
    wanted = target[queries["row"].to_numpy()]
    predicted, outputs = [], []
    for subset in range(8):
        parts = subset_members(settings, lengths, subset)
        own = np.concatenate([place[inside] for place, inside in zip(rows, parts, strict=True)])
        predicted.append([(labels[own] == label).sum() for label in wanted])
        losses = [
            pl.read_parquet(root / "trained" / f"subset-{subset:04d}-model-{m}" / "losses.parquet")
            for m in (0, 1)
        ]
        assert (losses[0]["row"] == queries["row"]).all()
        outputs.append([-(a + b) / 2 for a, b in zip(losses[0]["loss"], losses[1]["loss"],
                                                     strict=True)])  # fmt: skip
    each: list[float] = []
    for query in range(20):
        rho: Any = stats.spearmanr([p[query] for p in predicted], [o[query] for o in outputs])
        each.append(float(rho[0]))
    assert rows_of(summary)["same"]["value"] == pytest.approx(np.mean(each), abs=1e-9)


def test_subsets_are_halves_of_the_training_rows_whatever_the_partitions(
    evaluated: tuple[Settings, dict[str, Any]], data: tuple[Path, Path], tmp_path: Path
):
    settings, _ = evaluated
    other = settings_of(tmp_path / "run", data, index={"held_out": 0.2, "partition_rows": 37},
                        attribution={"subsets": 3, "models": 1})  # fmt: skip
    evaluate(other)
    found: list[np.ndarray] = []
    for one in (settings, other):
        run = RunFolder(Path(one.run))
        lengths = pool_lengths(run)
        tables = [pl.read_parquet(run.examples(part).path) for part in run.partitions()]
        training = (pl.concat(tables)["split"] == "train").to_numpy()
        members = np.concatenate(subset_members(one, lengths, 2))
        assert members.sum() == round(training.sum() / 2)
        assert not members[~training].any()
        found.append(members)
    assert (found[0] == found[1]).all()
    third = np.concatenate(subset_members(other, pool_lengths(RunFolder(Path(other.run))), 1))
    assert 0.2 < (third & found[1]).sum() / third.sum() < 0.8


def test_a_second_run_trains_nothing_and_more_subsets_only_what_is_new(
    evaluated: tuple[Settings, dict[str, Any]], data: tuple[Path, Path]
):
    settings, first = evaluated
    assert first["done"] == 16
    state = plan_evaluate_attribution(settings)
    assert (state.done, state.total) == (16, 16)
    table = Path(settings.run) / "attribution" / "table.parquet"
    before = table.read_bytes()
    assert evaluate(settings)["done"] == 0
    assert table.read_bytes() == before
    more = settings_of(Path(settings.run), data, attribution={"subsets": 10})
    assert plan_evaluate_attribution(more).done == 16
    assert plan_evaluate_attribution(more).total == 20
    longer = settings_of(Path(settings.run), data, attribution={"train": {**TRAIN, "epochs": 6}})
    assert plan_evaluate_attribution(longer).done == 0
    assert not list((Path(settings.run) / "attribution" / "trained").glob("*/checkpoints"))


def test_dask_workers_give_the_same_table(
    evaluated: tuple[Settings, dict[str, Any]], data: tuple[Path, Path], tmp_path: Path
):
    settings, _ = evaluated
    changes = {"matrices": dict(settings.attribution.matrices)}
    other = settings_of(tmp_path / "run", data, attribution=changes)
    evaluate(other, Cluster(kind="local", workers=2))
    for name in ("attribution/table.parquet", "attribution/queries.parquet"):
        assert (Path(settings.run) / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_the_ceiling_comes_from_halves_and_one_model_has_none(
    evaluated: tuple[Settings, dict[str, Any]], data: tuple[Path, Path], tmp_path: Path
):
    summary = evaluated[1]
    top = summary["ceiling"]
    assert 0 < top["low"] <= top["value"] <= top["high"] <= 1
    assert summary["reachable"] == pytest.approx(top["value"] ** 0.5)
    assert rows_of(summary)["same"]["ceiling"] == top["value"]
    one = settings_of(tmp_path / "run", data, attribution={"models": 1, "subsets": 3})
    found = evaluate(one)
    assert (found["ceiling"], found["reachable"]) == (None, None)
    assert any("no matrix and no score" in note for note in found["notes"])


def test_the_scorer_influence_is_found_by_itself(data: tuple[Path, Path], tmp_path: Path):
    settings = settings_of(
        tmp_path / "run", data,
        model={"config": {"model_type": "mlp", "hidden": []}},
        attribution={"subsets": 12, "models": 1, "train": None},
        score={"scorers": [{"influence": {"matrix": True, "dim": 64}}, "random"]},
    )  # fmt: skip
    values = {**plain(settings), "checkpoints": {"train": TRAIN}}
    summary = evaluate(parse_settings(values))
    assert rows_of(summary)["influence"]["low"] > 0.2
    of_mean = rows_of(summary, "lds of the mean loss")
    assert {"influence", "influence.influence_self", "random"} <= set(of_mean)
    own = of_mean["influence"]  # one query, twelve subsets: the interval is wide
    assert -1 <= own["low"] < own["value"] < own["high"] <= 1


def with_influence(run: Path, data: tuple[Path, Path], **changes: Any) -> Settings:
    """Trained and scored in the run; a change replaces a whole key."""
    values: dict[str, Any] = {
        "model": {"config": {"model_type": "mlp", "hidden": []}},
        "checkpoints": {"train": {**TRAIN, "epochs": 1}},
        "attribution": {"subsets": 3, "models": 1, "queries": 10},
        "score": {"scorers": [{"influence": {"matrix": True, "dim": 8}}, "el2n", "random"]},
        **changes,
    }
    return parse_settings({**plain(digits_settings(run, *data)), **values})


def test_what_other_settings_left_in_the_run_is_not_tested_and_told(
    data: tuple[Path, Path], tmp_path: Path
):
    run = tmp_path / "run"
    first = evaluate(with_influence(run, data))
    assert set(rows_of(first)) == {"influence"}
    assert {"el2n", "random", "influence"} <= set(rows_of(first, "lds of the mean loss"))
    assert not first["notes"]
    again = evaluate(with_influence(run, data))
    assert (again["rows"], again["notes"]) == (first["rows"], [])

    train = {**TRAIN, "epochs": 1, "lr": 1e-3}
    dot = {"influence": {"matrix": True, "dim": 8, "metric": "dot"}}
    other = {"checkpoints": {"train": train}, "score": {"scorers": [dot, "random"]}}
    second = evaluate(with_influence(run, data, **other))
    assert set(rows_of(second)) == {"dot"}
    assert "el2n" not in rows_of(second, "lds of the mean loss")
    assert second["notes"] == [
        "left out, as of other settings than these: the matrix influence, the scores el2n"
    ]

    named = {"subsets": 3, "models": 1, "queries": 10, "scores": ["el2n"],
             "matrices": {"old": str(run / "influence" / "influence" / "matrix")}}  # fmt: skip
    third = evaluate(with_influence(run, data, **other, attribution=named))
    assert set(rows_of(third)) == {"dot", "old"}
    assert set(rows_of(third, "lds of the mean loss")) == {"el2n"}
    assert "el2n: tested as named, but of other settings than these" in third["notes"]


def test_a_score_whose_model_or_data_has_changed_is_not_of_these_settings(
    data: tuple[Path, Path], tmp_path: Path
):
    run = tmp_path / "run"
    settings = with_influence(run, data)
    evaluate(settings)
    folder = run / "influence" / "influence" / "matrix"
    assert Finished.of(settings) == Finished(frozenset({"influence", "el2n", "random"}), (folder,))
    fewer = tmp_path / "target.parquet"
    pl.read_parquet(data[1]).head(TARGETS - 3).write_parquet(fewer)
    moved = with_influence(run, (data[0], fewer))
    assert Finished.of(moved) == Finished(frozenset({"el2n", "random"}), ())
    score = {"scorers": [{"influence": {"matrix": True, "dim": 4}}, "el2n", "random"]}
    assert Finished.of(with_influence(run, data, score=score)).matrices == ()
    finer = with_influence(run, data, cluster={"threads": 2})
    assert Finished.of(finer).scorers == {"random"}


def test_trainings_on_subsets_are_as_the_run_s_own_but_for_what_is_given(
    data: tuple[Path, Path], tmp_path: Path
):
    settings = with_influence(tmp_path / "run", data, attribution={"train": {"epochs": 7}})
    wanted = replace(parse(Train, TRAIN), epochs=7)
    assert training_settings(settings).checkpoints.train == wanted
    assert parse_settings(plain(settings)) == settings
    alone = settings_of(tmp_path / "run", data, attribution={"train": {"epochs": 7}})
    assert training_settings(alone).checkpoints.train == Train(epochs=7)


def test_wrong_labels_are_found_as_scikit_learn_counts_them(
    data: tuple[Path, Path], tmp_path: Path
):
    settings = settings_of(
        tmp_path / "run", data,
        attribution={"subsets": 0, "labels": "wrong", "scores": ["el2n", "random"]},
        score={"scorers": ["el2n", "random"]},
    )  # fmt: skip
    values = {**plain(settings), "checkpoints": {"train": TRAIN}, "target": None}
    settings = parse_settings(values)
    rows = rows_of(evaluate(settings), "auc of wrong labels")
    run = RunFolder(tmp_path / "run")
    part = run.partitions()[0]
    examples = pl.read_parquet(run.examples(part).path)
    scores = pl.read_parquet(run.scores(part, "el2n").path)["el2n"]
    training = examples["split"] == "train"
    wrong = pl.read_parquet(data[0])["wrong"].gather(examples["row"])
    expected = roc_auc_score(wrong.filter(training), scores.filter(training))
    assert rows["el2n"]["value"] == pytest.approx(expected)
    assert rows["el2n"]["low"] > 0.7
    assert abs(rows["random"]["value"] - 0.5) < 0.2
    assert rows["el2n"]["num"] == wrong.filter(training).sum()


def test_right_labels_tell_which_are_wrong(data: tuple[Path, Path], tmp_path: Path):
    pool = tmp_path / "pool.parquet"
    table = pl.read_parquet(data[0])
    right = pl.when(pl.col("wrong")).then((pl.col("label") + 1) % 10).otherwise(pl.col("label"))
    table.with_columns(truth=right).write_parquet(pool)
    settings = settings_of(
        tmp_path / "run", (pool, data[1]),
        attribution={"subsets": 0, "labels": "truth"}, score={"scorers": ["random"]},
    )  # fmt: skip
    row = rows_of(evaluate(settings), "auc of wrong labels")["random"]
    run = RunFolder(tmp_path / "run")
    examples = pl.read_parquet(run.examples(run.partitions()[0]).path)
    training = examples.filter(pl.col("split") == "train")["row"]
    assert row["num"] == table["wrong"].gather(training).sum()


def test_models_that_diverge_are_results_and_told_of(data: tuple[Path, Path], tmp_path: Path):
    train = {"lr": 1e30, "clip_norm": 0, "warmup": 0, "epochs": 3, "batch_tokens": 32}
    matrix_of(*data).write_parquet(tmp_path / "same.parquet")
    settings = settings_of(
        tmp_path / "run", data,
        attribution={"subsets": 3, "train": train,
                     "matrices": {"same": str(tmp_path / "same.parquet")}},
    )  # fmt: skip
    summary = evaluate(settings)
    assert rows_of(summary)["same"]["value"] is None
    assert any("6 trainings have diverged" in note for note in summary["notes"])
    assert any("20 queries have no loss" in note for note in summary["notes"])
    assert evaluate(settings)["done"] == 0
    json.loads((tmp_path / "run" / "attribution" / "evaluation.json").read_text())


def broken(pool: Path, target: Path) -> dict[str, tuple[pl.DataFrame, str]]:
    good = matrix_of(pool, target)
    return {
        "a column short": (good.drop("target-3"), f"{TARGETS - 1} columns of scores"),
        "no key": (good.drop("row"), "has no column 'row'"),
        "twice": (pl.concat([good, good[:1]]), "stand there twice"),
        "words": (good.with_columns(pl.lit("x").alias("target-0")), "holds String"),
    }


@pytest.mark.parametrize("kind", ["a column short", "no key", "twice", "words"])
def test_a_matrix_that_does_not_fit_is_refused(
    evaluated: tuple[Settings, dict[str, Any]],
    data: tuple[Path, Path],
    tmp_path: Path,
    kind: str,
):
    table, words = broken(*data)[kind]
    table.write_parquet(tmp_path / "odd.parquet")
    matrices = {"odd": str(tmp_path / "odd.parquet")}
    settings = settings_of(Path(evaluated[0].run), data, attribution={"matrices": matrices})
    with pytest.raises(InputError, match=words) as error:
        evaluate(settings)
    assert "odd" in error.value.what


def test_what_does_not_fit_is_refused_before_anything_is_trained(
    data: tuple[Path, Path], tmp_path: Path
):
    matrix_of(*data).drop("target-0").write_parquet(tmp_path / "odd.parquet")
    matrices = {"odd": str(tmp_path / "odd.parquet")}
    with pytest.raises(InputError, match="columns of scores"):
        evaluate(settings_of(tmp_path / "run", data, attribution={"matrices": matrices}))
    with pytest.raises(InputError, match="no column 'wrogn'"):
        evaluate(settings_of(tmp_path / "run", data, attribution={"labels": "wrogn"}))
    assert not (tmp_path / "run" / "attribution" / "trained").exists()


def test_rows_that_a_matrix_lacks_are_counted(
    evaluated: tuple[Settings, dict[str, Any]], data: tuple[Path, Path], tmp_path: Path
):
    run = RunFolder(Path(evaluated[0].run))
    examples = pl.concat([pl.read_parquet(run.examples(part).path) for part in run.partitions()])
    first = examples.filter(pl.col("split") == "train")["row"][:7]
    matrix_of(*data).filter(~pl.col("row").is_in(first.to_list())).write_parquet(
        tmp_path / "few.parquet"
    )
    matrices = {"few": str(tmp_path / "few.parquet")}
    settings = settings_of(Path(evaluated[0].run), data, attribution={"matrices": matrices})
    assert 5 <= rows_of(evaluate(settings))["few"]["missing"] <= 7  # those in any subset


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"matrices": {"gone": "/nowhere/at/all.parquet"}}, InputError, "no Parquet file at"),
        ({"scores": ["el3n"]}, ConfigError, "has not been scored"),
        ({"labels": "wrogn"}, InputError, "no column 'wrogn'"),
        ({"labels": "domain"}, InputError, "neither true and false nor labels"),
        ({"share": 0.001}, InputError, "is no subset"),
    ],
)
def test_what_is_not_there_is_named(
    evaluated: tuple[Settings, dict[str, Any]],
    data: tuple[Path, Path],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
):
    settings = settings_of(Path(evaluated[0].run), data, attribution=changes)
    if "share" in changes:  # its trainings are others
        settings = settings_of(tmp_path / "run", data, attribution=changes)
    with pytest.raises(error, match=words):
        evaluate(settings)


def test_nothing_to_evaluate_is_said_before_anything_is_done(
    data: tuple[Path, Path], tmp_path: Path
):
    alone = digits_settings(tmp_path / "run", data[0])
    with pytest.raises(ConfigError, match="there is nothing to evaluate"):
        check_evaluate_attribution(alone)
    with pytest.raises(ConfigError, match="no model to train"):
        check_evaluate_attribution(settings_of(tmp_path / "run", data, model={}))
    for odd in ({"subsets": 2}, {"share": 1.0}, {"models": 0}):
        with pytest.raises(ConfigError):
            settings_of(tmp_path / "run", data, attribution=odd)


def command_line(settings: Settings, config: Path, *more: str) -> Sequence[str]:
    config.write_text(to_yaml(plain(settings)))
    return curate_command("evaluate-attribution", config, *more)


def test_the_command_counts_its_trainings_and_prints_a_table(
    data: tuple[Path, Path], tmp_path: Path
):
    matrix_of(*data).write_parquet(tmp_path / "same.parquet")
    own = {"subsets": 3, "matrices": {"same": str(tmp_path / "same.parquet")}}
    settings = settings_of(tmp_path / "run", data, attribution=own)
    told = json.loads(run_to_end(command_line(settings, tmp_path / "c.yaml", "--dry-run",
                                              "--json")))  # fmt: skip
    assert told["stages"]["evaluate-attribution"]["due"] == 6
    assert not (tmp_path / "run").exists()
    printed = run_to_end(command_line(settings, tmp_path / "c.yaml", "--quiet"))
    assert "same" in printed
    assert "3 subsets of 0.5 of the training examples, 2 models on each" in printed
    assert "evaluation.json" in printed


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_table(data: tuple[Path, Path], tmp_path: Path):
    matrix_of(*data).write_parquet(tmp_path / "same.parquet")
    own = {"subsets": 6, "models": 1, "train": {**TRAIN, "epochs": 60},
           "matrices": {"same": str(tmp_path / "same.parquet")}}  # fmt: skip
    undisturbed, killed = (
        settings_of(tmp_path / name, data, attribution=own) for name in ("undisturbed", "killed")
    )
    evaluate(undisturbed)
    trained = Path(killed.run) / "attribution" / "trained"
    command = command_line(killed, tmp_path / "killed.yaml")
    kills = 0
    for finished, states, delay in ((0, 1, 0.0), (1, 1, 0.1), (3, 0, 0.0), (4, 1, 0.0)):
        kills += is_killed(
            command,
            lambda finished=finished, states=states: (
                found(trained, "*/.done/losses.parquet.json") >= finished
                and found(trained, "*/checkpoints/*/resume/state.safetensors") >= states
            ),
            delay=delay,
        )
    assert kills >= 3
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*/losses.parquet")}
    assert 3 <= len(before) < 6
    assert evaluate(killed)["done"] == 6 - len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    tables = [
        [Path(each.run) / "attribution" / "table.parquet",
         *sorted((Path(each.run) / "attribution" / "trained").glob("*/losses.parquet"))]
        for each in (undisturbed, killed)
    ]  # fmt: skip
    for one, other in zip(*tables, strict=True):
        assert one.read_bytes() == other.read_bytes()
