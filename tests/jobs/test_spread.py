"""Spreading through a run folder: what is measured stays, what cannot be trusted is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from curate.data.example import KEY
from curate.errors import ConfigError, CurateError, InputError
from curate.models.mlp import MLP
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.own_passes import DrivenPhase
from jobs.score import plan_score, score_run
from jobs.score_check import check_scores
from jobs.settings import Settings, parse_settings
from jobs.spread import passes

INLINE = Pool(InlineExecutor(), 1)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """400 rows whose label follows from their numbers, in two files, and a model that guesses."""
    draw = np.random.default_rng(0)
    numbers = draw.normal(size=(400, 4)).astype(np.float32)
    labels = (numbers[:, 0] + numbers[:, 1] > 0).astype(int) + (numbers[:, 2] > 0.5)
    table = pl.DataFrame({"x": numbers, "label": labels, "note": [f"n{i}" for i in range(400)]})
    (tmp_path / "data").mkdir()
    table[:300].write_parquet(tmp_path / "data" / "a.parquet")
    table[300:].write_parquet(tmp_path / "data" / "b.parquet")
    torch.manual_seed(0)
    MLP(num_features=4, num_classes=3, hidden=(8,)).save_pretrained(tmp_path / "model")
    return tmp_path


def settings_of(world: Path, run: str = "run", **options: Any) -> Settings:
    given = {"scorer": "el2n", "core": 100, **options}
    return parse_settings(values_of(world, run, [{"spread": given}]))


def values_of(world: Path, run: str, scorers: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "run": str(world / run),
        "sources": {
            "rows": {"path": str(world / "data"), "features": "x", "label": "label", "id": "note"}
        },
        "task": {"kind": "tabular-classification", "num_classes": 3},
        "model": {"name": str(world / "model"), "device": "cpu"},
        "index": {"partition_rows": 90, "held_out": 0.1},
        "score": {"scorers": scorers},
        **more,
    }


def scored(settings: Settings, pool: Pool = INLINE) -> dict[str, Any]:
    index_run(settings, pool=pool)
    embed_run(settings, pool=pool)
    return score_run(settings, pool=pool)


def table_of(settings: Settings, scorer: str = "spread") -> pl.DataFrame:
    folder = Path(settings.run) / "scores" / scorer
    tables = [pl.read_parquet(path) for path in folder.glob("part-*.parquet")]
    return pl.concat(tables).sort(KEY)


def measured_of(world: Path, scorer: Any = "el2n") -> pl.DataFrame:
    settings = parse_settings(values_of(world, "measured", [scorer]))
    index_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    return table_of(settings, next(iter(scorer)) if isinstance(scorer, dict) else scorer)


def test_with_all_examples_in_the_core_set_the_scores_are_those_measured(world: Path):
    settings = settings_of(world, core=1.0, neighbours=1, method="neighbours")
    scored(settings)
    found = table_of(settings)
    assert (found["spread_measured"] == 1).all()
    np.testing.assert_allclose(found["el2n"], measured_of(world)["el2n"], rtol=3e-6)


def test_measured_examples_keep_their_score_and_others_get_their_neighbours(world: Path):
    settings = settings_of(world, neighbours=3, temperature=0.1, method="neighbours")
    scored(settings)
    found, truth = table_of(settings), measured_of(world)
    core = found["spread_measured"].to_numpy() == 1
    assert core.sum() == 100
    np.testing.assert_allclose(
        found["el2n"].to_numpy()[core], truth["el2n"].to_numpy()[core], rtol=3e-6
    )
    files = [pl.read_parquet(world / "data" / f"{name}.parquet") for name in "ab"]
    vectors = pl.concat(files)["x"].to_numpy().astype(float)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = truth["el2n"].to_numpy().astype(float)
    for row in np.flatnonzero(~core)[:60]:
        cosines = vectors[core] @ vectors[row]
        near = np.argsort(-cosines)[:3]
        kappa = np.exp(cosines[near] / 0.1)
        wanted = kappa @ scores[core][near] / kappa.sum()
        assert found["el2n"][int(row)] == pytest.approx(wanted, rel=1e-4)


def test_the_core_set_is_a_run_that_opens_by_itself(world: Path):
    from jobs.opening import load_settings

    settings = settings_of(world)
    scored(settings)
    core = Path(settings.run) / "spread" / "el2n" / "core"
    inner = load_settings(core)
    assert inner.score.scorers == ({"el2n": {}},)
    rows = pl.read_parquet(core.parent / "data" / "rows.parquet")
    assert rows.columns == ["x", "label", "note"]
    assert rows.height == 100
    truth = table_of(inner, "el2n")
    choice = pl.read_parquet(core.parent / "choice.parquet")
    found = table_of(settings).join(choice, on=list(KEY), how="inner").sort("core_row")
    np.testing.assert_array_equal(found["el2n"], truth.sort("row")["el2n"])
    notes = [f"n{row + (300 if file == 'b.parquet' else 0)}" for file, row in
             choice.select("file", "row").iter_rows()]  # fmt: skip
    assert rows["note"].to_list() == notes


def test_what_cross_validation_says_is_in_the_summary_and_the_manifest(world: Path):
    settings = settings_of(world)
    summary = scored(settings)
    (says,) = summary["says"]
    facts = json.loads((Path(settings.run) / "spread" / "el2n" / "fidelity.json").read_text())
    figures = facts["fidelity"][facts["method"]]["el2n"]
    assert says.startswith("el2n spread from 100 of 400 examples by ")
    assert f"rank correlation {figures['rank_correlation']:.2f}" in says
    assert f"{100 * figures['top_recall']:.0f} % of the highest tenth" in says
    manifest = json.loads((Path(settings.run) / "manifest.json").read_text())
    gate = manifest["stages"]["score"]["files"]["spread/el2n/gate.json"]
    assert gate["rank_correlation"] == figures["rank_correlation"] > 0.2
    assert gate["top_recall"] == figures["top_recall"]
    best = max(facts["fidelity"], key=lambda m: facts["fidelity"][m]["el2n"]["rank_correlation"])
    assert facts["method"] == best
    # A second run has nothing to do, and says the same.
    again = scored(settings)
    assert again["done"] == 0
    assert again["says"] == summary["says"]


def test_fidelity_is_that_of_predicting_each_fold_from_the_others(world: Path):
    """The same figures by another library's cross-validation, from the files of the run."""
    from scipy.stats import spearmanr
    from sklearn.neighbors import NearestNeighbors

    settings = settings_of(world, method="neighbours", neighbours=4)
    scored(settings)
    root = Path(settings.run) / "spread" / "el2n"
    facts = json.loads((root / "fidelity.json").read_text())
    table = pl.read_parquet(root / "scores.parquet")
    rows = pl.read_parquet(root / "data" / "rows.parquet")["x"].to_numpy().astype(float)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    scores = table["el2n"].to_numpy().astype(float)
    found = []
    for seed in range(20):
        folds = np.random.default_rng(seed).permutation(100) % 5
        estimated = np.empty(100)
        for fold in range(5):
            known = folds != fold
            search = NearestNeighbors(n_neighbors=4, metric="cosine").fit(rows[known])
            distances, near = search.kneighbors(rows[~known])
            kappa = np.exp((1 - distances) / 0.05)
            estimated[~known] = (kappa * scores[known][near]).sum(axis=1) / kappa.sum(axis=1)
        found.append(np.asarray(spearmanr(scores, estimated))[0])
    rho = facts["fidelity"]["neighbours"]["el2n"]["rank_correlation"]
    # Other folds: the same but for their luck.
    assert min(found) - 0.02 < rho < max(found) + 0.02


def test_scores_that_are_noise_are_refused_with_both_figures(world: Path):
    """Labels drawn at random make el2n noise under a model that does not look at them."""
    draw = np.random.default_rng(1)
    for name in "ab":
        path = world / "data" / f"{name}.parquet"
        table = pl.read_parquet(path)
        labels = pl.Series("label", draw.integers(0, 3, size=table.height))
        table.with_columns(labels).write_parquet(path)
    settings = settings_of(world, min_rank_correlation=0.3)
    with pytest.raises(CurateError) as caught:
        scored(settings)
    assert "rank correlation" in str(caught.value)
    assert "% of the highest tenth" in str(caught.value)
    assert "spread.force: true" in caught.value.fix
    root = Path(settings.run)
    assert not list((root / "quantities").glob("spread/part-*"))
    facts = json.loads((root / "manifest.json").read_text())["stages"]["score"]["files"]
    assert "spread/el2n/fidelity.safetensors" in facts
    # And again, not skipped as something that is done.
    with pytest.raises(CurateError, match="does not spread"):
        scored(settings)
    forced = settings_of(world, min_rank_correlation=0.3, force=True)
    summary = scored(forced)
    assert "forced" in summary["says"][0]
    assert table_of(forced)["el2n"].null_count() == 0


ODD = '''
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Odd:
    """A score, and digits of it that mean nothing."""

    needs: ClassVar = frozenset({"error_norms"})
    columns: ClassVar = {"whole": "as el2n", "digits": "far behind the point"}

    def score(self, quantities):
        norm = quantities["error_norms"]
        return {"whole": norm, "digits": (norm * 1e5) % 1}
'''


def test_columns_below_the_gate_are_left_out(world: Path, monkeypatch: pytest.MonkeyPatch):
    """A scorer of the user's own with two columns, one of them noise."""
    (world / "code").mkdir()
    (world / "code" / "odd_scorer.py").write_text(ODD)
    monkeypatch.syspath_prepend(world / "code")
    settings = settings_of(world, scorer="odd_scorer:Odd", core=200)
    (says,) = scored(settings)["says"]
    assert says.startswith("whole spread from 200 of 400")
    assert says.endswith("; not spread: digits")
    found = table_of(settings)
    assert found["whole"].null_count() == 0
    core = found["spread_measured"] == 1
    assert found.filter(core)["digits"].null_count() == 0
    assert found.filter(~core)["digits"].null_count() == 200
    forced = settings_of(world, scorer="odd_scorer:Odd", core=200, force=True)
    scored(forced)
    assert table_of(forced)["digits"].null_count() == 0


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_without_a_direction_get_no_score(world: Path, normalize: bool):
    path = world / "data" / "b.parquet"
    table = pl.read_parquet(path)
    numbers = table["x"].to_numpy().copy()
    numbers[[3, 50]] = 0.0
    table.with_columns(pl.Series("x", numbers)).write_parquet(path)
    embed = {"raw": {"kind": "values", "normalize": normalize}}
    options = {"scorer": "el2n", "core": 1.0}
    settings = parse_settings(values_of(world, "run", [{"spread": options}], embed=embed))
    scored(settings)
    assert pl.read_parquet(world / "run" / "spread" / "el2n" / "choice.parquet").height == 398
    found = table_of(settings).filter(pl.col("file") == "b.parquet")
    missing = found.filter(pl.col("el2n").is_null())
    assert missing["row"].to_list() == [3, 50]
    assert missing["spread_measured"].null_count() == 2
    folder = world / "run" / "quantities" / "spread" / ".done"
    marks = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert sum(mark["unscored"] for mark in marks) == 2


@pytest.mark.parametrize("choose", ["stratified", "uniform", "median"])
def test_every_way_to_choose_gives_that_many_different_rows(world: Path, choose: str):
    settings = settings_of(world, choose=choose, core=0.25)
    scored(settings)
    choice = pl.read_parquet(Path(settings.run) / "spread" / "el2n" / "choice.parquet")
    assert choice.height == choice.select(KEY).n_unique() == 100
    other = settings_of(world, run="other", choose=choose, core=0.25, seed=1)
    scored(other)
    second = pl.read_parquet(Path(other.run) / "spread" / "el2n" / "choice.parquet")
    # At the median distance nothing is left to chance.
    assert choice.equals(second) == (choose == "median")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"core": 500}, ConfigError, "asks for 500 examples, and 400 have a vector"),
        ({"core": 0.01}, ConfigError, "a core set of 4 of 400 examples"),
        ({"core": 1}, ConfigError, "a core set of 1 of 400 examples"),
        ({"core": 40, "neighbours": 41}, ConfigError, "neighbours is 41, but the core set has 40"),
        ({"core": 40, "clusters": 401}, ConfigError, "401"),
    ],
)
def test_core_sets_that_cannot_be_are_refused(
    world: Path, options: dict[str, Any], kind: type[CurateError], words: str
):
    with pytest.raises(kind, match=words):
        scored(settings_of(world, **options))


def test_a_pool_of_one_example_is_refused(world: Path):
    pl.read_parquet(world / "data" / "a.parquet")[:1].write_parquet(world / "data" / "a.parquet")
    (world / "data" / "b.parquet").unlink()
    with pytest.raises(InputError, match="1 example has a vector of 1: too few"):
        scored(settings_of(world))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scorer": "length"}, "needs no model"),
        ({"scorer": "random"}, "needs no model"),
        ({"scorer": "spread"}, "measures nothing itself"),
        ({"scorer": "external"}, "measures nothing itself"),
        ({"scorer": "label_issues"}, "looks at all examples together"),
        ({"scorer": {"el2n": {}, "grand": {}}}, "2 scorers, not one"),
        ({"scorer": {"grand": {"by_layer": True}}}, "depend on the model"),
        ({"scorer": {"grand": {"parameters": "["}}}, "no regular expression"),
        ({"scorer": "el3n"}, "el3n"),
        ({"core": 0}, "core is 0"),
        ({"core": 1.5}, r"core is 1\.5"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"min_rank_correlation": 2.0}, r"min_rank_correlation is 2\.0"),
        ({"vectors": "minilm"}, "no representation 'minilm'"),
        ({"scorer": "vog"}, "vog compares checkpoints"),
    ],
)
def test_what_cannot_be_spread_is_refused_before_anything_is_indexed(
    world: Path, options: dict[str, Any], words: str
):
    with pytest.raises(ConfigError, match=words):
        check_scores(settings_of(world, **options))


def test_a_training_log_is_not_worth_spreading(world: Path):
    values = values_of(world, "run", [{"spread": {"scorer": "forgetting"}}])
    values |= {"model": {"config": {"model_type": "mlp", "hidden": [8]}, "device": "cpu"},
               "checkpoints": {"train": {"epochs": 2}}}  # fmt: skip
    with pytest.raises(ConfigError, match="read from the log of a training"):
        check_scores(parse_settings(values))
    # Read from checkpoints it costs passes like any other.
    values["score"] = {
        "scorers": [{"spread": {"scorer": {"forgetting": {"history": "checkpoints"}}}}]
    }
    check_scores(parse_settings(values))


def test_a_dry_run_counts_the_phases_and_a_changed_option_redoes_what_depends_on_it(world: Path):
    settings = settings_of(world, method="neighbours")
    index_run(settings, pool=INLINE)
    before = plan_score(settings)
    # Choice, rows, core, fidelity, gate; five partitions; five score tables.
    assert (before.total, before.done) == (15, 0)
    embed_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    after = plan_score(settings)
    assert (after.total, after.done) == (15, 15)
    warmer = plan_score(settings_of(world, method="neighbours", temperature=0.5))
    assert (warmer.total, warmer.done) == (15, 3)
    larger = plan_score(settings_of(world, method="neighbours", core=120))
    assert (larger.total, larger.done) == (15, 0)


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(world: Path):
    first = settings_of(world, run="one")
    scored(first)
    second = settings_of(world, run="two")
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        scored(second, pool)
    for folder in ("scores/spread", "quantities/spread", "spread/el2n"):
        one, two = (Path(s.run) / folder for s in (first, second))
        names = sorted(path.name for path in one.iterdir() if path.is_file())
        assert names == sorted(path.name for path in two.iterdir() if path.is_file())
        for name in names:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


class Killed(BaseException):
    """As a signal would end the process."""


def test_killed_in_every_phase_it_goes_on_to_the_same_bytes(
    world: Path, monkeypatch: pytest.MonkeyPatch
):
    """The phase's last task has written its output, and dies before its mark is there."""
    from curate.data.partitions import Output

    whole = settings_of(world, run="whole")
    scored(whole)
    settings = settings_of(world)
    index_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    found = passes(settings, next(iter(_scorers(settings)))).phases
    assert [isinstance(one, DrivenPhase) for one in found] == [0, 0, 1, 0, 0, 0]
    adopt = Output.adopt
    for one in found:
        doomed = one.tasks[-1].output.path

        def dies(
            self: Output, fingerprint: str, doomed: Path = doomed, **facts: Any
        ) -> dict[str, Any]:
            if self.path == doomed:
                raise Killed
            return adopt(self, fingerprint, **facts)

        monkeypatch.setattr(Output, "adopt", dies)
        with pytest.raises(Killed):
            score_run(settings, pool=INLINE)
        assert doomed.exists()
        assert Output(doomed).mark() is None
    monkeypatch.undo()
    score_run(settings, pool=INLINE)
    for path in (Path(whole.run) / "scores" / "spread").glob("part-*.parquet"):
        other = Path(settings.run) / "scores" / "spread" / path.name
        assert other.read_bytes() == path.read_bytes()


def test_killed_while_the_core_set_is_measured_it_goes_on_there(
    world: Path, monkeypatch: pytest.MonkeyPatch
):
    from curate.data.partitions import Output

    settings = settings_of(world, core=300)
    index_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    quantities = Path(settings.run) / "spread" / "el2n" / "core" / "quantities" / "model"
    adopt = Output.adopt

    def dies(self: Output, fingerprint: str, **facts: Any) -> dict[str, Any]:
        if self.path.parent == quantities and len(list(quantities.glob(".done/*"))) == 1:
            raise Killed
        return adopt(self, fingerprint, **facts)

    monkeypatch.setattr(Output, "adopt", dies)
    with pytest.raises(Killed):
        score_run(settings, pool=INLINE)
    monkeypatch.undo()
    (done,) = quantities.glob(".done/*")
    first = done.stat().st_mtime_ns
    score_run(settings, pool=INLINE)
    assert len(list(quantities.glob(".done/*"))) == 4
    assert done.stat().st_mtime_ns == first


def _scorers(settings: Settings) -> list[Any]:
    from jobs.chosen import chosen_scorers

    return [entry.scorer for entry in chosen_scorers(settings.score.named)]


def test_the_run_of_the_core_set_has_the_checkpoints_that_were_trained_on_all(world: Path):
    from jobs.opening import load_settings
    from jobs.train import train_run

    values = values_of(world, "run", [{"spread": {"scorer": "el2n", "core": 200}}])
    values |= {"model": {"config": {"model_type": "mlp", "hidden": [8]}, "device": "cpu"},
               "checkpoints": {"train": {"epochs": 6, "seeds": [0, 1], "batch_tokens": 20,
                                         "lr": 0.02, "save_every_epochs": 3}}}  # fmt: skip
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    train_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    inner = load_settings(Path(settings.run) / "spread" / "el2n" / "core")
    assert inner.checkpoints.train is None
    assert len(inner.checkpoints.paths) == 4
    values["run"] = str(world / "run")
    values["score"] = {"scorers": ["el2n"]}
    whole = parse_settings(values)
    score_run(whole, pool=INLINE)
    truth, found = table_of(whole, "el2n"), table_of(settings)
    core = found["spread_measured"].to_numpy() == 1
    # Seeds are known in the core set too, and averaged as they are in the whole run.
    np.testing.assert_allclose(
        found["el2n"].to_numpy()[core], truth["el2n"].to_numpy()[core], rtol=3e-6
    )
