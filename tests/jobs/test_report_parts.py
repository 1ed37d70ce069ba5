"""The parts of the page's figures: bins, ends, marks, mixtures, seeds, comparisons, images."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from curate.cli import main
from curate.config import to_yaml
from curate.data.layout import RunFolder
from curate.data.tables import write_table
from curate.plan.mixture import DomainSize, Mixture, Phase, save_mixture
from curate.report.document import QUANTILES
from jobs.compare_judging import judge_table
from jobs.compare_results import write_results
from jobs.contents import picture
from jobs.report import gather
from jobs.report_best import Best, Place
from jobs.report_bins import Spread, Tally, bins_for
from jobs.report_compare import comparison_of
from jobs.report_marks import shared_marks
from jobs.report_mixture import mixture_of
from jobs.report_scores import by_power

_numbers = st.one_of(
    st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, 1.0, 2.0]), st.just(float("nan"))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_numbers, st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=60))
def test_a_tally_is_numpy_s_histogram_of_each_group(rows: list[tuple[float, int, int]]):
    numbers = np.array([number for number, _, _ in rows])
    groups = np.array([group for _, group, _ in rows])
    times = np.array([count for _, _, count in rows])
    spread = Spread()
    spread.add(numbers)
    bins = bins_for(spread)
    if bins is None:
        assert np.isnan(numbers).all()
        return
    tally = Tally(bins, 3)
    half = len(rows) // 2
    tally.add(numbers[:half], groups[:half], times[:half])
    tally.add(numbers[half:], groups[half:], times[half:])
    for chosen in ([0], [1], [0, 1, 2]):
        own = np.isin(groups, chosen)
        each = np.repeat(numbers[own], times[own])
        known = each[np.isfinite(each)]
        found = tally.distribution(chosen)
        assert (found.rows, found.missing) == (len(known), len(each) - len(known))
        assert found.counts == np.histogram(known, bins.edges)[0].tolist()
        assert found.below + found.above + sum(found.counts) == found.rows
        if len(known):
            assert found.quantiles[0] == pytest.approx(known.min(), rel=1e-5)
            assert found.quantiles[-1] == pytest.approx(known.max(), rel=1e-5)
            assert found.mean == pytest.approx(known.mean(), rel=1e-3, abs=1e-3)
            assert sorted(found.quantiles) == found.quantiles


@pytest.mark.parametrize("kind", ["normal", "long", "skewed", "negative", "flags"])
def test_quantiles_are_near_those_of_all_values(kind: str):
    random = np.random.default_rng(0)
    normal = random.normal(size=20_000)
    numbers = {
        "normal": normal,
        "long": np.concatenate([normal, [1e6, -1e5]]),
        "skewed": np.exp(3 * normal),
        "negative": -np.exp(normal),
        "flags": (normal > 1).astype(float),
    }[kind].astype(np.float32)
    spread = Spread()
    for piece in np.array_split(numbers, 7):
        spread.add(piece)
    bins = bins_for(spread)
    assert bins is not None
    assert bins.scale == ("log" if kind == "skewed" else "linear")
    tally = Tally(bins, 1)
    tally.add(numbers.astype(float), np.zeros(len(numbers), np.int64))
    found = tally.distribution([0])
    exact = np.quantile(numbers.astype(float), QUANTILES)
    inner = np.array(found.quantiles)[1:-1]
    spread_of = np.abs(exact[1:-1]) if kind == "skewed" else float(np.std(exact[1:-1]))
    assert (np.abs(inner - exact[1:-1]) <= 0.06 * spread_of + 1e-3).all()
    assert found.below + found.above <= 0.003 * len(numbers)  # long tails lie outside


def test_a_few_values_far_off_do_not_move_the_quantiles_of_the_rest():
    """Not those of all, nor those of groups that lie in one bin, or beyond the last one."""
    random = np.random.default_rng(0)
    numbers = np.concatenate([random.normal(size=2997), [1e9, 2e9, 3e9], 1e5 + np.arange(9.0)])
    groups = np.concatenate([np.arange(2997) % 2, [0, 0, 0], np.full(9, 2)])
    spread = Spread()
    for piece in np.array_split(numbers, 5):
        spread.add(piece)
    bins = bins_for(spread)
    assert bins is not None
    tally = Tally(bins, 3)
    tally.add(numbers, groups)
    for chosen in ([0], [1], [2], [0, 1, 2]):
        own = numbers[np.isin(groups, chosen)]
        found = tally.distribution(chosen)
        exact = np.quantile(own, QUANTILES)
        assert np.array(found.quantiles)[1:-2] == pytest.approx(exact[1:-2], rel=0.02, abs=0.05)
        assert found.counts == np.histogram(own, bins.edges)[0].tolist()
        assert found.below == (own < bins.edges[0]).sum()
        assert found.above == (own > bins.edges[-1]).sum()
    assert sum(tally.distribution([0, 1, 2]).counts) > 2900
    assert np.count_nonzero(tally.distribution([0, 1, 2]).counts) > 20  # there is something to see


def test_values_that_float32_rounds_are_not_beyond_the_ends():
    numbers = np.array([0.1, 0.2, 0.7, 1e39])  # the first is less, the third more, as float32
    for own in (numbers[:3], numbers):
        spread = Spread()
        spread.add(own)
        bins = bins_for(spread)
        assert bins is not None
        tally = Tally(bins, 1)
        tally.add(own, np.zeros(len(own), np.int64))
        found = tally.distribution([0])
        assert (found.below, found.above, sum(found.counts)) == (0, 0, len(own))
        assert (found.rows, spread.rows) == (len(own), len(own))


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(0, 8), st.integers(1, 7))
def test_the_best_rows_are_the_first_of_all_sorted(keys: list[int], count: int, pieces: int):
    random = np.random.default_rng(0)
    ties = random.permutation(len(keys)).astype(np.uint64)
    best = Best(count)
    for part, rows in enumerate(np.array_split(np.arange(len(keys)), pieces)):
        best.add(np.array(keys, float)[rows], ties[rows], part, rows)
    order = sorted(range(len(keys)), key=lambda row: (keys[row], ties[row]))[:count]
    assert [place.place for place in best.places()] == order
    assert all(isinstance(place, Place) for place in best.places())


def test_numbers_are_put_together_by_powers_of_two():
    found = by_power({1: 5, 2: 4, 3: 3, 4: 1, 7: 1, 8: 2, 1000: 1})
    assert found == [("1", 5), ("2", 4), ("3", 3), ("4 to 7", 2), ("8 to 15", 2),
                     ("512 to 1,023", 1)]  # fmt: skip


def test_marks_are_the_words_that_both_texts_have_in_runs():
    other = "one two three four five six seven eight"
    text = "Zero; ONE, two three - four! no five six seven eight nine. three four"
    found = shared_marks(text, other, words=4, kind="leakage")
    assert [text[mark.start : mark.end] for mark in found] == [
        "ONE, two three - four",
        "five six seven eight",
    ]
    assert not shared_marks(text, other, words=9, kind="leakage")
    assert not shared_marks("", other, words=2, kind="leakage")
    (whole,) = shared_marks("a b one two", "One. Two?", words=13, kind="x")  # its own length
    assert (whole.start, whole.end, whole.kind) == (4, 11, "x")


def test_letters_without_spaces_are_half_words_and_forms_are_made_one():
    other = "数据清洗很重要"
    text = "前言数据清洗很好"
    (mark,) = shared_marks(text, other, words=2, kind="leakage")
    assert text[mark.start : mark.end] == "数据清洗很"
    (mark,) = shared_marks("ﬁve Six", "five six", words=2, kind="leakage")
    assert (mark.start, mark.end) == (0, 7)


def test_a_trained_mixture_shows_phases_and_the_path_of_its_weights(tmp_path: Path):
    run = RunFolder(tmp_path)
    domains = [f"d{number:02}" for number in range(50)]
    weights = np.random.default_rng(0).dirichlet(np.ones(50), 2)
    phases = tuple(Phase(share, dict(zip(domains, w.tolist(), strict=True)))
                   for share, w in zip((0.75, 0.25), weights, strict=True))  # fmt: skip
    asked = Mixture("dga", phases, dict.fromkeys(domains, "because"), ("look",))
    sizes = {name: DomainSize(10, 100 + at) for at, name in enumerate(domains)}
    folder = tmp_path / "mixtures" / "dga"
    folder.mkdir(parents=True)
    save_mixture(folder / "mixture.json", asked, sizes)
    rows = [
        {"run": f"seed-{seed}", "step": step, "domain": name, "weight": step + at / 100,
         "loss": None if step < 3 else float(at)}
        for seed in range(2) for step in range(1, 1002, 2) for at, name in enumerate(domains)
    ]  # fmt: skip
    write_table(pl.DataFrame(rows), folder / "trajectory.parquet")
    found = mixture_of(run, "dga", [])
    assert found is not None
    mean = 0.75 * weights[0] + 0.25 * weights[1]
    order = np.argsort(-mean)
    assert [d.domain for d in found.domains[:-1]] == [domains[at] for at in order[:30]]
    assert found.domains[-1].num_domains == 20
    for at, domain in zip(order[:30], found.domains, strict=False):
        assert domain.asked == pytest.approx(mean[at], rel=1e-4)
        assert domain.by_phase == pytest.approx(weights[:, at].tolist(), rel=1e-4)
        assert domain.natural == pytest.approx((100 + at) / sum(range(100, 150)), rel=1e-4)
        assert domain.kept is None
    assert sum(domain.asked for domain in found.domains) == pytest.approx(1, abs=1e-4)
    assert found.phases == [0.75, 0.25]
    assert [path.run for path in found.paths] == ["seed-0", "seed-1"]
    path = found.paths[0]
    assert len(path.steps) <= 201
    assert (path.steps[0], path.steps[-1]) == (1, 1001)
    assert [line.name for line in path.weights] == [domains[at] for at in order[:12]]
    assert path.weights[0].values == pytest.approx([s + order[0] / 100 for s in path.steps])
    assert path.losses[0].values[0] is None
    assert path.losses[0].values[-1] == order[0]


def test_a_comparison_keeps_words_intervals_and_every_run(tmp_path: Path):
    random = np.random.default_rng(0)
    seeds = range(6)
    numbers = {arm: random.normal(mean, 0.01, 6) for arm, mean in
               {"plan": 0.8, "random": 0.7, "everything": 0.7}.items()}  # fmt: skip
    rows = [
        {"arm": arm, "seed": seed, "step": 10, "tokens": 100, "part": "held_out",
         "metric": "accuracy", "value": float(own[seed]), "num_examples": 9, "note": None}
        for arm, own in numbers.items() for seed in seeds
    ]  # fmt: skip
    rows[-1] |= {"part": None, "metric": None, "value": None, "note": "diverged: loss"}
    schema = {"arm": pl.String, "seed": pl.Int64, "step": pl.Int64, "tokens": pl.Int64,
              "part": pl.String, "metric": pl.String, "value": pl.Float64,
              "num_examples": pl.Int64, "note": pl.String}  # fmt: skip
    table = pl.DataFrame(rows, schema=schema)
    luck = {"plan": 0.0, "random": 0.0, "everything": 0.0}
    judged = judge_table(table, list(numbers), luck, metric=None, better=None, on=None)
    cost = {"runs": 18, "steps": 1, "tokens": 1800, "seconds": 2.0}
    more = {"seeds": list(seeds), "scale": "mlp", "cost": cost, "unit": "examples", "notes": ["n"],
            "arms": {"plan": {"steps": 6.0}, "random": {"steps": 6.0}, "plan@0.5": {"steps": 3.0},
                     "everything": {"steps": 200.0}}}  # fmt: skip
    write_results(tmp_path / "compare", table, {"schema_version": 1, **judged, **more})
    found = comparison_of(tmp_path)
    assert found is not None
    plan, everything = found.verdicts
    gaps = numbers["plan"] - numbers["random"]
    low, high = stats.t.interval(0.95, 5, gaps.mean(), stats.sem(gaps))
    assert plan.word == "helps"
    assert plan.difference == pytest.approx(gaps.mean(), rel=1e-4)
    assert [plan.low, plan.high] == pytest.approx([low, high], rel=1e-4)
    assert everything.mean_arm is None or everything.word == "no verdict"
    assert len(found.points) == 18
    assert sum(point.value is None for point in found.points) == 1
    by_key = {(point.arm, point.seed): point.value for point in found.points}
    assert by_key["plan", 3] == pytest.approx(numbers["plan"][3], rel=1e-5)
    assert found.metric == "accuracy on held-out examples"
    assert {fact.name for fact in found.facts} == {"seeds", "scale", "cost"}
    (doubt,) = found.doubts
    assert doubt.startswith("plan, random: trained for 6 steps only")
    assert found.notes == ["n"]


def pixels_of(uri: str) -> np.ndarray:
    head, _, content = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_pictures_are_reduced_and_small_ones_kept_as_they_are():
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (28, 28), dtype=np.uint8)
    assert (pixels_of(picture(small.tolist()) or "") == small).all()
    file = io.BytesIO()
    wide = random.integers(0, 256, (300, 900, 3), dtype=np.uint8)
    Image.fromarray(wide).save(file, "PNG")
    shown = picture(file.getvalue())
    assert shown is not None
    assert pixels_of(shown).shape == (32, 96, 3)
    assert len(shown) < 6000
    floats = np.linspace(-2, 5, 64).reshape(8, 8, 1)
    stretched = pixels_of(picture(floats.tolist()) or "")
    assert (stretched.min(), stretched.max()) == (0, 255)
    assert picture(b"no image") is None


def run_of(root: Path, values: dict[str, Any], command: str = "score") -> Path:
    config = root / "config.yaml"
    config.write_text(to_yaml({"run": str(root / "run"), **values}), encoding="utf-8")
    assert main([command, str(config), "--quiet"]) == 0
    return root / "run"


def test_images_stand_in_the_document_as_they_are(tmp_path: Path):
    random = np.random.default_rng(0)
    files: list[bytes] = []
    for number in range(30):
        file = io.BytesIO()
        pixels = random.integers(0, 256, (10 + number, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    frame = pl.DataFrame({"image": files, "label": [n % 2 for n in range(30)]})
    frame.write_parquet(tmp_path / "data.parquet")
    source = {"path": str(tmp_path / "data.parquet"), "image": "image", "label": "label"}
    run = run_of(tmp_path, {"sources": {"a": source}, "score": {"scorers": ["random"]}})
    found = gather(run, examples=4)
    assert found.samples is not None
    for example in found.samples.examples:
        assert example.picture is not None
        with Image.open(io.BytesIO(files[example.row])) as image:
            assert (pixels_of(example.picture) == np.asarray(image)).all()
    assert found.shifts is None


def test_seeds_are_held_against_each_other_on_what_each_has_measured(tmp_path: Path):
    random = np.random.default_rng(0)
    x = random.normal(size=(240, 4)).astype(np.float32)
    labels = (x[:, 0] + 0.7 * random.normal(size=240) > 0).astype(int)
    pl.DataFrame({"x": x, "label": labels}).write_parquet(tmp_path / "data.parquet")
    run = run_of(
        tmp_path,
        {
            "sources": {"a": {"path": str(tmp_path / "data.parquet"), "features": "x",
                              "label": "label"}},
            "task": {"kind": "tabular-classification", "num_classes": 2},
            "model": {"config": {"model_type": "mlp", "hidden": [4]}},
            "checkpoints": {"train": {"epochs": 2, "seeds": [0, 1, 2], "batch_tokens": 32,
                                      "lr": 0.02}},
            "index": {"partition_rows": 100},
            "score": {"scorers": ["loss", "random"], "checkpoints": "all"},
        },
    )  # fmt: skip
    found = gather(run, examples=2)
    assert found.stability is not None
    (loss,) = [column for column in found.stability.columns if column.name == "loss.loss"]
    index = pl.concat([pl.read_parquet(p) for p in sorted((run / "examples").glob("*.parquet"))])
    train = (index["split"] == "train").to_numpy()
    by_seed: dict[str, list[np.ndarray]] = {}
    for folder in sorted((run / "quantities").iterdir()):
        table = pl.concat([pl.read_parquet(p) for p in sorted(folder.glob("*.parquet"))])
        by_seed.setdefault(folder.name.split("-step")[0], []).append(table["loss"].to_numpy())
    means = np.stack([np.mean(own, axis=0, dtype=np.float64) for own in by_seed.values()])[:, train]
    pairs = [float(stats.spearmanr(means[a], means[b])[0]) for a, b in ((0, 1), (0, 2), (1, 2))]  # pyright: ignore[reportArgumentType]
    assert loss.seeds == 3
    assert loss.rank_correlation == pytest.approx(np.mean(pairs), abs=1e-4)
    assert loss.lowest == pytest.approx(min(pairs), abs=1e-4)
    noise = means.var(axis=0, ddof=1)
    expected = 1 - noise.mean() / 3 / means.mean(axis=0).var()
    assert loss.reliability == pytest.approx(max(0, expected), abs=1e-3)
    assert loss.mean_std == pytest.approx(np.sqrt(noise).mean(), rel=1e-3)
    assert found.stability.rows == train.sum()
    assert all(column.name != "random.random" for column in found.stability.columns)
    told = json.dumps([fact.name for fact in found.samples.examples[0].facts]) if (
        found.samples) else ""  # fmt: skip
    assert "spread of loss over seeds" in told


def test_results_of_an_earlier_plan_are_told(tmp_path: Path):
    random = np.random.default_rng(0)
    x = random.normal(size=(80, 3)).astype(np.float32)
    pl.DataFrame({"x": x, "label": (x[:, 0] > 0).astype(int)}).write_parquet(tmp_path / "d.parquet")
    source = {"path": str(tmp_path / "d.parquet"), "features": "x", "label": "label"}
    values: dict[str, Any] = {
        "sources": {"a": source},
        "task": {"kind": "tabular-classification", "num_classes": 2},
        "model": {"config": {"model_type": "mlp", "hidden": [2]}},
        "checkpoints": {"train": {"epochs": 1, "seeds": [0], "batch_tokens": 16, "lr": 0.02}},
        "index": {"held_out": 0.3},
        "score": {"scorers": ["random"]},
        "plan": {"score": "random", "keep": 0.5},
        "compare": {"seeds": [0, 1, 2], "steps": 2, "arms": ["plan", "random"], "plot": "none"},
    }
    run_of(tmp_path, values, "write")
    run = run_of(tmp_path, values, "compare")

    def older() -> list[str]:
        found = gather(run, examples=0)
        assert found.comparison is not None
        told = [note for note in found.notes if "not the plan as it is now" in note]
        assert len(told) == sum("not the plan as it is" in text for text in found.comparison.doubts)
        return told + [note for note in found.notes if "shards are not those" in note]

    assert older() == []
    run_of(tmp_path, {**values, "plan": {"score": "random", "keep": 0.25}}, "plan")
    assert len(older()) == 2
    run_of(tmp_path, {**values, "plan": {"score": "random", "keep": 0.5}}, "plan")
    assert older() == []  # it is the plan that was compared and written


def test_a_run_whose_index_has_failed_says_so(tmp_path: Path):
    pl.DataFrame({"text": ["", "", ""]}).write_parquet(tmp_path / "d.parquet")
    values = {"run": str(tmp_path / "run"),
              "sources": {"a": {"path": str(tmp_path / "d.parquet"), "text": "text"}}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(values), encoding="utf-8")
    assert main(["index", str(tmp_path / "config.yaml"), "--quiet"]) != 0
    found = gather(tmp_path / "run")
    assert found.summary == ["No example could be used: 3 rows set aside."]
    (note,) = found.notes
    assert note.startswith("index has failed: 3 of 3 rows were set aside")
