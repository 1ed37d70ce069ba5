"""Confident learning as part of a run: fits, tables, flags, restarts, and real wrong labels."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import curate
from curate.config import plain
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.errors import InputError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.label_issues import joint_output
from jobs.label_issues_fit import fit_output
from jobs.score import plan_score, score_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
DATA = os.environ.get("CURATE_DATA")


def noisy_digits() -> pl.DataFrame:
    """1,797 digits; of a fifth the label is another digit."""
    features, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[generator.permutation(len(labels))[: len(labels) // 5]] = True
    other = (labels + generator.integers(1, 10, len(labels))) % 10
    return pl.DataFrame(
        {
            "x": features.astype(np.float32),
            "label": np.where(wrong, other, labels),
            "wrong": wrong,
            "name": np.arange(len(labels)),
        }
    )


def made(root: Path, frame: pl.DataFrame, options: Any = None, **changes: Any) -> Settings:
    """A run over one file, indexed."""
    root.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(root / "rows.parquet")
    content = {"text": "text"} if "text" in frame.columns else {"features": "x"}
    kind = "text" if "text" in frame.columns else "tabular"
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {
            "pool": {"path": str(root / "rows.parquet"), "label": "label", "id": "name", **content}
        },
        "index": {"held_out": 0.0, "partition_rows": 500},
        "task": {
            "kind": f"{kind}-classification",
            "num_classes": int(frame["label"].max() or 0) + 1,  # pyright: ignore[reportArgumentType]
        },
        "score": {"scorers": [{"label_issues": options or {}}]},
        **changes,
    }
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    return settings


def scored(settings: Settings) -> pl.DataFrame:
    """Scores by the examples' own numbers."""
    score_run(settings, pool=INLINE)
    opened = curate.open(settings.run)
    names = opened.examples.select(*KEY, "id", "split", "label")
    return opened.scores.join(names, on=list(KEY)).sort(pl.col("id").cast(pl.Int64)).collect()


def with_options(settings: Settings, options: dict[str, Any]) -> Settings:
    return parse_settings({**plain(settings), "score": {"scorers": [{"label_issues": options}]}})


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, pl.DataFrame, pl.DataFrame]:
    frame = noisy_digits()
    settings = made(tmp_path_factory.mktemp("digits"), frame)
    return settings, frame, scored(settings)


def test_wrong_labels_of_digits_are_found(digits: tuple[Settings, pl.DataFrame, pl.DataFrame]):
    _, frame, scores = digits
    wrong = frame["wrong"].to_numpy()
    assert roc_auc_score(wrong, -scores["self_confidence"]) > 0.99
    assert roc_auc_score(wrong, -scores["label_issue_margin"]) > 0.99
    flagged = scores["label_issue"].to_numpy() == 1
    assert (flagged & wrong).sum() / flagged.sum() > 0.9
    assert (flagged & wrong).sum() / wrong.sum() > 0.8
    true = load_digits(return_X_y=True)[1]
    assert (scores["likely_label"].to_numpy()[wrong] == true[wrong]).mean() > 0.85


def test_the_columns_are_those_of_a_separate_computation(
    digits: tuple[Settings, pl.DataFrame, pl.DataFrame],
):
    """Folds as the run drew them; models, thresholds and flags made again from the formulas."""
    settings, frame, scores = digits
    folds = load_file(fit_output(RunFolder(Path(settings.run))).path)["folds"]
    rows = np.array(frame["x"].to_list(), dtype=np.float64)
    labels = frame["label"].to_numpy()
    rows = (rows - rows.mean(axis=0)) / np.where(rows.std(axis=0) > 0, rows.std(axis=0), 1)
    probabilities = np.zeros((len(labels), 10))
    for fold in range(5):
        model = LogisticRegression(C=0.1, max_iter=500, tol=1e-6)
        model.fit(rows[folds != fold], labels[folds != fold])
        probabilities[folds == fold] = softmax(model.decision_function(rows[folds == fold]), axis=1)
    own = probabilities[np.arange(len(labels)), labels]
    np.testing.assert_allclose(scores["self_confidence"], own, atol=5e-3)  # both stop early
    limits = [own[labels == j].mean() for j in range(10)]
    reached = [[p if p >= t else -1 for p, t in zip(row, limits, strict=True)]
               for row in probabilities]  # fmt: skip
    sure = [int(np.argmax(row)) if max(row) >= 0 else None for row in reached]
    off = np.array([s is not None and s != label for s, label in zip(sure, labels, strict=True)])
    assert (off != (scores["off_diagonal"].to_numpy() == 1)).mean() < 0.005
    flagged = np.zeros(len(labels), dtype=bool)
    for i in range(10):
        mine = np.flatnonzero(labels == i)
        confident = [n for n in mine if sure[n] is not None]
        for j in set(range(10)) - {i}:
            count = sum(sure[n] == j for n in confident)
            ranked = sorted(mine, key=lambda n: probabilities[n, i] - probabilities[n, j])
            flagged[ranked[: round(count / len(confident) * len(mine))]] = True
    flagged &= probabilities.argmax(axis=1) != labels
    assert (flagged != (scores["label_issue"].to_numpy() == 1)).mean() < 0.005


def test_partitions_and_their_order_change_nothing(
    digits: tuple[Settings, pl.DataFrame, pl.DataFrame], tmp_path: Path
):
    _, frame, scores = digits
    shuffled = frame[np.random.default_rng(1).permutation(frame.height)]
    again = scored(made(tmp_path, shuffled, index={"held_out": 0.0, "partition_rows": 211}))
    np.testing.assert_allclose(again["self_confidence"], scores["self_confidence"], atol=1e-4)
    differs = again["label_issue"].to_numpy() != scores["label_issue"].to_numpy()
    assert not differs.any()


def test_a_second_run_does_nothing_and_another_option_all(
    digits: tuple[Settings, pl.DataFrame, pl.DataFrame],
):
    settings = digits[0]
    assert score_run(settings, pool=INLINE)["done"] == 0
    other = with_options(settings, {"folds": 4})
    state = plan_score(other)
    assert state.total - state.done == 1 + 4 + 1 + 4 + 4
    assert score_run(other, pool=INLINE)["done"] == 1 + 4 + 1 + 4
    assert score_run(settings, pool=INLINE)["done"] == 1 + 4 + 1 + 4  # and back


def test_held_out_rows_are_judged_and_change_no_threshold(tmp_path: Path):
    frame = noisy_digits()
    settings = made(tmp_path, frame, index={"held_out": 0.2, "partition_rows": 500})
    scores = scored(settings)
    is_held_out = (scores["split"] == "held_out").to_numpy()
    assert 200 < is_held_out.sum() < 520
    joint = load_file(joint_output(RunFolder(Path(settings.run))).path)
    assert joint["counts"].sum() == (~is_held_out).sum()
    wrong = frame["wrong"].to_numpy()
    for part in (is_held_out, ~is_held_out):
        assert roc_auc_score(wrong[part], -scores["self_confidence"].to_numpy()[part]) > 0.985
    # The limits are the training rows' own means.
    for label in range(10):
        mine = scores.filter(pl.col("split") == "train", pl.col("label") == label)
        mean = mine["self_confidence"].cast(pl.Float64).mean()
        assert mean == pytest.approx(joint["thresholds"][label], abs=1e-6)


TOPICS = ["goal match team win", "bank rate stock fund", "rain wind storm cloud"]


def topic_texts() -> pl.DataFrame:
    """600 short texts of three topics, a tenth with the label of the next; copies and a rarity."""
    generator = np.random.default_rng(0)
    topic = np.arange(600) % 3
    texts = [
        " ".join(generator.choice(TOPICS[t].split(), 6)) + f" n{n}" for n, t in enumerate(topic)
    ]
    wrong = generator.random(600) < 0.1
    label = np.where(wrong, (topic + 1) % 3, topic)
    rare = pl.DataFrame({"text": ["odd one", "odd two", "odd three"], "label": [3, 3, 3],
                         "wrong": [False] * 3})  # fmt: skip
    frame = pl.concat([pl.DataFrame({"text": texts, "label": label, "wrong": wrong}), rare])
    return frame.with_columns(pl.int_range(pl.len()).alias("name"))


def test_texts_are_judged_and_a_class_that_is_too_small_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    frame = topic_texts()
    settings = made(tmp_path, frame)
    with caplog.at_level(logging.WARNING):
        scores = scored(settings)
    assert "1 classes have fewer than 5 different examples and are not judged: 3 (3)" in caplog.text
    assert scores["self_confidence"].null_count() == 3
    assert scores["label_issue"][600:].null_count() == 3
    judged = scores[:600]
    wrong = frame["wrong"][:600].to_numpy()
    flagged = judged["label_issue"].to_numpy() == 1
    assert not (flagged & ~wrong).any()
    assert (flagged & wrong).sum() > 0.95 * wrong.sum()
    assert judged["likely_label"].cast(pl.Int64).to_list() == (np.arange(600) % 3).tolist()
    mark = fit_output(RunFolder(Path(settings.run))).mark() or {}
    assert mark["small_classes"] == {"3": 3}
    assert mark["num_fitted"] == 600


def test_a_copy_with_a_wrong_label_does_not_vouch_for_itself(tmp_path: Path):
    """Ten copies of one text, all with one wrong label: who saw any of them would believe it."""
    copies = pl.DataFrame(
        {"text": ["storm rain wind cloud special"] * 10, "label": [0] * 10, "wrong": [True] * 10}
    )
    frame = pl.concat([topic_texts().drop("name")[:600], copies])
    scores = scored(made(tmp_path, frame.with_columns(pl.int_range(pl.len()).alias("name"))))
    assert (scores["likely_label"][600:] == 2).all()
    assert (scores["label_issue_margin"][600:] < 0).all()


def test_a_small_sample_is_fitted_on_and_all_are_judged(tmp_path: Path):
    frame = topic_texts()[:600]
    settings = made(tmp_path, frame, {"fit_rows": 200})
    scores = scored(settings)
    mark = fit_output(RunFolder(Path(settings.run))).mark() or {}
    assert 190 <= mark["num_fitted"] <= 210
    assert scores["self_confidence"].null_count() == 0
    assert roc_auc_score(frame["wrong"], -scores["self_confidence"]) > 0.95


def test_rows_whose_numbers_are_not_finite_are_set_aside_before(tmp_path: Path):
    frame = noisy_digits()
    rows = np.array(frame["x"].to_list(), dtype=np.float32)
    rows[3, 5], rows[7, 0] = np.nan, np.inf
    scores = scored(made(tmp_path, frame.with_columns(pl.Series("x", rows))))
    assert not {"3", "7"} & set(scores["id"])  # set aside by the index
    assert scores["self_confidence"].null_count() == 0
    assert scores.height == 1795


def given(tmp_path: Path, table: pl.DataFrame, frame: pl.DataFrame) -> Settings:
    path = tmp_path / "probabilities.parquet"
    table.write_parquet(path)
    return made(tmp_path / "pool", frame, {"probabilities": str(path)})


def toy(num_rows: int = 6) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The case of tests/evaluate/test_confident.py, as a pool and a table in another order."""
    first = np.array([0.9, 0.8, 0.1, 0.3, 0.4, 0.8])[:num_rows]
    frame = pl.DataFrame(
        {
            "x": np.arange(12.0, dtype=np.float32).reshape(6, 2)[:num_rows],
            "label": [0, 0, 0, 1, 1, 1][:num_rows],
            "name": np.arange(num_rows),
        }
    )
    table = pl.DataFrame(
        {"id": [str(n) for n in range(num_rows)], "p0": first, "p1": 1 - first}
    ).reverse()
    return frame, table


def test_given_probabilities_take_the_place_of_a_fit(tmp_path: Path):
    frame, table = toy()
    settings = given(tmp_path, table, frame)
    scores = scored(settings)
    assert scores["label_issue"].to_list() == [0, 0, 1, 0, 0, 1]
    assert scores["label_issue_margin"].to_list() == pytest.approx([0.8, 0.6, -0.8, 0.4, 0.2, -0.6])
    assert not fit_output(RunFolder(Path(settings.run))).path.exists()
    # Another table under the same name is read again.
    table.with_columns(p0=pl.col("p1"), p1=pl.col("p0")).write_parquet(
        tmp_path / "probabilities.parquet"
    )
    assert scored(settings)["self_confidence"].to_list() == pytest.approx(
        [0.1, 0.2, 0.9, 0.3, 0.4, 0.8]
    )


def test_an_example_without_given_probabilities_is_not_judged(tmp_path: Path):
    frame, table = toy()
    scores = scored(given(tmp_path, table.filter(pl.col("id") != "4"), frame))
    assert scores["self_confidence"].is_null().to_list() == [False] * 4 + [True, False]


def test_given_numbers_that_are_no_probabilities_are_refused(tmp_path: Path):
    frame, table = toy()
    worse = table.with_columns(p1=pl.when(pl.col("id") == "2").then(0.4).otherwise(pl.col("p1")))
    with pytest.raises(InputError, match=r"rows.parquet.*2\).* are no probabilities"):
        scored(given(tmp_path, worse, frame))
    with pytest.raises(InputError, match="3 number columns, but there are 2 classes"):
        scored(given(tmp_path, table.with_columns(p2=pl.lit(0.0)), frame))
    with pytest.raises(InputError, match="there is no score table"):
        scored(made(tmp_path / "pool", frame, {"probabilities": str(tmp_path / "none.parquet")}))


def test_a_pool_of_one_class_is_refused(tmp_path: Path):
    frame = topic_texts()[:600].with_columns(label=pl.lit(1))
    with pytest.raises(InputError, match="needs two classes or more"):
        scored(made(tmp_path, frame))


@pytest.mark.skipif(DATA is None, reason="needs real data: set CURATE_DATA to its folder")
def test_real_wrong_labels_of_rules_are_found(tmp_path: Path):
    """Short messages labelled by rules, 62 of 1,983 wrongly; a published baseline has 0.875."""
    frame = pl.read_parquet(Path(str(DATA)) / "sms_spam" / "train.parquet")
    frame = frame.filter(pl.col("rule_label") >= 0).select(
        "text", pl.col("rule_label").alias("label"), pl.col("rule_wrong").alias("wrong")
    )
    frame = frame.with_columns(pl.int_range(pl.len()).alias("name"))
    scores = scored(made(tmp_path, frame))
    wrong = frame["wrong"].cast(pl.Int64).to_numpy()
    found = roc_auc_score(wrong, -scores["self_confidence"])
    print(f"sms_spam: AUROC {found:.3f} on {len(wrong)} messages, {wrong.sum()} wrong")
    assert found > 0.8
