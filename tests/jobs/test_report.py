"""What the page of a run is told, against figures taken from the tables by other means."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

import curate
import jobs.report_survey
from curate.cli import main
from curate.config import to_yaml
from curate.errors import CurateError, InputError
from curate.plan.settings import Keep, Plan
from curate.report.document import QUANTILES, SECTIONS, Document, ScoreColumn, values
from jobs.report import gather
from jobs.report_plan import rule_of

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
EXAM = " ".join(f"q{number}" for number in range(30))
SIZES = {"large": 300, "middle": 200, "small": 100}


def write_world(root: Path) -> None:
    """600 texts of three domains and three labels, scores from elsewhere, an evaluation set."""
    (root / "data").mkdir(parents=True)
    random = np.random.default_rng(7)
    scores: list[pl.DataFrame] = []
    for number, (domain, rows) in enumerate(SIZES.items()):
        texts = [
            f"{domain} {row}: " + " ".join(random.choice(WORDS, 3 + row % 40))
            for row in range(rows)
        ]
        texts[5] = "before. " + EXAM.upper().replace(" ", ", ") + "! after"
        texts[6] = ""  # is set aside
        texts[7] = texts[8] = "the same words twice"
        label = [None if row % 10 == 9 else "no" if row % 3 else "yes" for row in range(rows)]
        frame = pl.DataFrame({"text": texts, "domain": [domain] * rows, "label": label})
        frame.write_parquet(root / "data" / f"{domain}.parquet")
        quality = random.normal(number, 1.0, rows)
        quality[random.random(rows) < 0.05] = np.nan
        keys = {"file": f"{domain}.parquet", "row": np.arange(rows)}
        scores.append(pl.DataFrame(keys | {"quality": quality, "odd": np.exp(3 * quality)}))
    pl.concat(scores).write_parquet(root / "quality.parquet")
    pl.DataFrame({"q": [EXAM, "short one"]}).write_parquet(root / "exam.parquet")


def values_of(root: Path, run: str = "run", **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "run": str(root / run),
        "sources": {
            "web": {"path": str(root / "data"), "text": "text", "domain": "domain",
                    "label": "label", "classes": ["no", "yes"]}
        },
        "evaluation": {"exam": {"path": str(root / "exam.parquet"), "text": "q"}},
        "index": {"partition_rows": 70, "max_bad_rows": 0.1},
        "score": {"scorers": ["length", "random", "duplicates", "leakage",
                              {"external": {"quality": str(root / "quality.parquet")}}]},
        "plan": {"score": "quality.quality", "keep": 0.4, "drop_first": 0.1, "within": "domain",
                 "drop": "duplicate_keep == 0", "weights": {"score": "odd", "clip": [0.5, 3.0]}},
    }  # fmt: skip
    return found | changes


def made(root: Path, command: str = "plan", run: str = "run", **changes: Any) -> Path:
    config = root / f"{run}.yaml"
    config.write_text(to_yaml(values_of(root, run, **changes)), encoding="utf-8")
    assert main([command, str(config), "--quiet"]) == 0
    return root / run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    made(root)
    return root


@pytest.fixture(scope="module")
def document(world: Path) -> Document:
    return gather(world / "run", examples=5)


@pytest.fixture(scope="module")
def rows(world: Path) -> pl.DataFrame:
    """All tables of the run side by side, read with pyarrow alone."""
    run = world / "run"
    names = [part["name"] for part in json.loads((run / "examples" / "partitions.json").read_text())
             ["partitions"]]  # fmt: skip
    frames: list[pl.DataFrame] = []
    for folder in ("examples", "plan", "scores/quality", "scores/length",
                   "scores/duplicates", "scores/random"):  # fmt: skip
        (found,) = run.glob(folder)
        tables = [pq.read_table(found / f"{name}.parquet") for name in names]
        table = pa.concat_tables(tables)
        keep = [c for c in table.column_names if c not in ("source", "file", "row")]
        keep = table.column_names if folder == "examples" else keep
        frame = pl.DataFrame({name: table.column(name).to_pylist() for name in keep})
        frames.append(frame)
    frames[0] = frames[0].with_columns(tokens="num_chars")
    frames[3] = frames[3].drop("num_tokens", "num_chars")
    return pl.concat(frames, how="horizontal")


def training(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(pl.col("split") == "train")


def column(document: Document, name: str) -> ScoreColumn:
    assert document.scores is not None
    (found,) = [column for column in document.scores.columns if column.name == name]
    return found


def of(rows: pl.DataFrame, name: str) -> np.ndarray:
    found = rows[name].cast(pl.Float64).to_numpy().astype(np.float32).astype(float)
    return found[np.isfinite(found)]


@pytest.mark.parametrize("name", ["quality.quality", "quality.odd", "length.num_chars",
                                  "duplicates.duplicate_size", "random.random"])  # fmt: skip
def test_histograms_are_numpy_s_over_the_same_edges(
    document: Document, rows: pl.DataFrame, name: str
):
    found, train = column(document, name), training(rows)
    own = name.partition(".")[2]
    assert found.kept is not None
    for told, there in [
        (found.everything, train),
        (found.kept, train.filter("keep")),
        *((g.distribution, train.filter(pl.col("domain") == g.name)) for g in found.by_domain),
    ]:
        numbers = of(there, own)
        counts, _ = np.histogram(numbers, found.edges)
        assert told.counts == counts.tolist()
        assert told.below == (numbers < found.edges[0]).sum()
        assert told.above == (numbers > found.edges[-1]).sum()
        assert (told.rows, told.missing) == (len(numbers), there.height - len(numbers))
        assert told.mean == pytest.approx(numbers.mean(), rel=1e-4)
        assert told.std == pytest.approx(numbers.std(), rel=1e-3, abs=1e-6)
        exact = np.quantile(numbers, QUANTILES, method="inverted_cdf")
        width = np.diff(found.edges).max()
        assert np.abs(np.array(told.quantiles) - exact).max() <= width
        assert told.quantiles[0] == pytest.approx(numbers.min(), rel=1e-5)
        assert told.quantiles[-1] == pytest.approx(numbers.max(), rel=1e-5)
    assert [group.name for group in found.by_domain] == list(SIZES)


def test_labels_are_told_by_name_and_rows_without_one_apart(document: Document, rows: pl.DataFrame):
    found = column(document, "quality.quality")
    sizes = {None: "no label", 0: "no", 1: "yes"}
    for label, name in sizes.items():
        own = training(rows).filter(pl.col("label").eq_missing(label))
        (group,) = [group for group in found.by_label if group.name == name]
        assert group.distribution.rows == len(of(own, "quality"))
        assert group.kept == len(of(own.filter("keep"), "quality"))
    assert document.shifts is not None
    assert {shift.name for shift in document.shifts.labels} == set(sizes.values())


def test_what_is_kept_lies_between_the_cuts_of_its_domain(document: Document, rows: pl.DataFrame):
    found = column(document, "quality.quality")
    assert found.is_planned
    assert not found.cuts  # each domain has its own
    for group in found.by_domain:
        low, high = group.cuts
        own = training(rows).filter(pl.col("domain") == group.name)
        kept = of(own.filter("keep"), "quality")
        assert low is not None
        assert high is not None
        assert kept.min() > low - 1e-5
        assert kept.max() == pytest.approx(high, rel=1e-5)
        extreme = of(own.filter(pl.col("reason") == "dropped_extreme"), "quality")
        assert extreme.min() > high
        others = of(own.filter(pl.col("reason") == "score"), "quality")
        assert others.max() == pytest.approx(low, rel=1e-5)  # the first that is not taken
    assert not any(group.cuts for group in found.by_label)
    assert not any(group.cuts for group in column(document, "quality.odd").by_domain)


def test_a_mixture_has_a_cut_in_each_domain_whatever_the_plan_chooses_within(world: Path):
    plan = {"score": "quality.quality", "keep": 0.3, "within": "all"}
    score = {"scorers": [{"external": {"quality": str(world / "quality.parquet")}}]}
    mix = {"mixer": "natural"}
    run = made(world, run="shared", plan=plan, mix=mix, evaluation={}, score=score)
    found = column(gather(run, examples=0), "quality.quality")
    tables = curate.open(run)
    scores, planned = tables.scores.select("quality"), tables.plan.select("keep")
    frame = pl.concat([tables.examples, scores, planned], how="horizontal").collect()
    for group in found.by_domain:
        low, high = group.cuts
        own = frame.filter(pl.col("domain") == group.name, pl.col("keep"))
        assert low is not None
        assert high is None
        assert low - 1e-5 < of(own, "quality").min() < low + 0.5


def test_a_plan_by_an_expression_has_a_column_of_its_own(world: Path):
    text = "0.7*rank(quality.quality) + 0.3*rank(num_chars)"
    rule = {"score": text, "keep": 0.3, "drop": "duplicate_keep == 0"}
    run = made(world, run="mixed", plan=rule)
    found = gather(run, examples=3)
    assert found.scores is not None
    first = found.scores.columns[0]
    assert (first.name, first.title, first.is_planned) == ("plan.score", "plan.score", True)
    assert text in first.measures
    assert "Scored them by quality, " in found.summary[1]  # the expression is no scorer
    tables = curate.open(run)
    frame = pl.concat(
        [tables.examples, tables.scores.select("quality", "duplicate_keep"),
         tables.plan.select("keep")], how="horizontal",
    ).filter(split="train").collect()  # fmt: skip
    expected: list[np.ndarray] = []
    for domain in SIZES:
        own = frame.filter(pl.col("domain") == domain)
        left = (own["duplicate_keep"] != 0).to_numpy()
        parts: list[np.ndarray] = []
        for name in ("quality", "num_chars"):
            numbers = own[name].cast(pl.Float64).to_numpy().astype(np.float32)
            known = left & np.isfinite(numbers)
            ranks = np.full(own.height, np.nan)
            ranks[known] = (stats.rankdata(numbers[known]) - 1) / (known.sum() - 1)
            parts.append(ranks)
        score = 0.7 * parts[0] + 0.3 * parts[1]
        expected.append(score[left & np.isfinite(score)])
        (group,) = [group for group in first.by_domain if group.name == domain]
        low, high = group.cuts
        assert low is not None
        assert high is None
        kept = score[own["keep"].to_numpy()]
        assert kept.min() > low - 1e-5
        assert group.distribution.quantiles[-1] == pytest.approx(np.nanmax(score), abs=1e-5)
    everything = np.concatenate(expected)
    dropped = frame.filter(pl.col("duplicate_keep") == 0, pl.col("quality").is_finite()).height
    assert first.everything.rows == len(everything) + dropped


def test_every_row_has_its_reason(document: Document, rows: pl.DataFrame):
    assert document.removed is not None
    assert document.samples is not None
    told = {reason.reason: reason.rows for reason in document.removed.reasons}
    assert told == dict(rows["reason"].value_counts().iter_rows())
    assert sum(told.values()) == document.removed.rows == rows.height
    assert document.removed.reasons[0].reason == "kept"
    for reason in document.removed.reasons:
        shown = [document.samples.examples[at] for at in reason.examples]
        assert len(shown) == min(4, reason.rows)
        assert {example.reason for example in shown} == {reason.reason}


def test_before_and_after_are_the_sums_of_the_plan(document: Document, rows: pl.DataFrame):
    assert document.shifts is not None
    train = training(rows)
    all_tokens = float(train["tokens"].sum())
    kept_tokens = float((train["tokens"] * train["copies"]).sum())
    assert document.unit == document.shifts.unit == "characters"
    for shift in document.shifts.domains:
        own = train.filter(pl.col("domain") == shift.name)
        assert (shift.rows, shift.tokens) == (own.height, own["tokens"].sum())
        assert shift.kept_rows == own["keep"].sum()
        assert shift.kept_tokens == (own["tokens"] * own["copies"]).sum()
        assert shift.share == pytest.approx(float(own["tokens"].sum()) / all_tokens, rel=1e-5)
        assert shift.kept_share == pytest.approx((shift.kept_tokens or 0) / kept_tokens, rel=1e-5)
    assert sum(shift.random_share or 0 for shift in document.shifts.domains) == pytest.approx(1)
    lengths = document.shifts.lengths
    assert lengths is not None
    before, _ = np.histogram(train["tokens"], lengths.edges)
    after, _ = np.histogram(train["tokens"], lengths.edges, weights=train["copies"].to_numpy())
    assert lengths.before.counts == before.tolist()
    assert lengths.after.counts == after.astype(int).tolist()
    assert [entry.name for entry in document.shifts.yardsticks][:2] == ["plan", "random"]


def test_the_plan_has_its_tokens_and_its_rule_names_what_is_shared(
    document: Document, rows: pl.DataFrame
):
    assert document.shifts is not None
    assert document.removed is not None
    kept = training(rows).filter(pl.col("keep"))
    plan = document.shifts.yardsticks[0]
    assert plan.name == "plan"
    assert plan.tokens == (kept["tokens"] * kept["copies"]).sum()
    rule = {fact.name: fact.value for fact in document.removed.rule}
    assert rule["keep"] == "40 % of the examples"
    assert not any("pip install curate-data" in line for line in document.provenance.reproduce)
    assert any("-e . " in line for line in document.provenance.reproduce)
    (index,) = [stage for stage in document.provenance.stages if stage.name == "index"]
    assert index.done > 0


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (0.35, "35 % of the examples"),
        (Keep(token_share=0.125), "12.5 % of the tokens"),
        (Keep(tokens=2e9), "2,000,000,000 tokens"),
        (Keep(examples=1500), "1,500 examples"),
    ],
)
def test_what_is_kept_is_said_in_full(keep: float | Keep, told: str):
    rule = {fact.name: fact.value for fact in rule_of(Plan(keep=keep), None)}
    assert rule["keep"] == told


def test_the_effective_size_is_kish_s_of_the_plan_s_weights(document: Document, rows: pl.DataFrame):
    assert document.weights is not None
    kept = rows.filter("keep")
    total = (kept["weight"].cast(pl.Float64) * kept["copies"]).to_numpy()
    assert document.weights.effective_size == pytest.approx(
        total.sum() ** 2 / (total**2).sum(), rel=1e-4
    )
    assert document.weights.rows == kept.height
    weights = kept["weight"].to_numpy().astype(float)
    counts, _ = np.histogram(weights, document.weights.edges)
    assert document.weights.distribution.counts == counts.tolist()
    assert document.weights.by_copies == [("1", kept.height)]


def test_steep_weights_are_counted_on_a_logarithmic_scale_and_say_so(world: Path):
    weights = {"score": "odd", "clip": [1e-3, 1e3]}
    plan = {"score": "quality.quality", "keep": 0.4, "weights": weights, "force": True}
    score = {"scorers": [{"external": {"quality": str(world / "quality.parquet")}}]}
    run = made(world, run="steep", plan=plan, evaluation={}, score=score)
    found = gather(run, examples=0).weights
    assert found is not None
    assert found.scale == "log"
    steps = np.diff(np.log(found.edges))
    assert steps == pytest.approx(steps.mean(), rel=1e-6)


def test_agreement_is_spearman_s_over_rows_that_both_have(document: Document, rows: pl.DataFrame):
    found = document.agreement
    assert found is not None
    train = training(rows)
    assert (found.rows, found.of_rows) == (train.height, train.height)
    for left, first in enumerate(found.columns):
        for right, second in enumerate(found.columns):
            names = [name.partition(".")[2] for name in (first, second)]
            if not set(names) <= set(train.columns):
                continue
            pair = np.stack([train[n].cast(pl.Float64).to_numpy() for n in names], axis=1)
            pair = pair.astype(np.float32)[np.isfinite(pair).all(axis=1)]
            if min(len(set(pair[:, 0])), len(set(pair[:, 1]))) < 2:
                assert found.matrix[left][right] is None
                continue
            expected, _ = stats.spearmanr(pair[:, 0], pair[:, 1])
            assert found.matrix[left][right] == pytest.approx(expected, abs=1e-5)


def test_the_ends_of_a_score_are_its_ends_and_the_text_is_theirs(
    world: Path, document: Document, rows: pl.DataFrame
):
    assert document.samples is not None
    train = training(rows).filter(pl.col("quality").is_finite())
    texts = {d: pq.read_table(world / "data" / f"{d}.parquet")["text"].to_pylist() for d in SIZES}
    for which, descending in (("highest", True), ("lowest", False)):
        (pick,) = [p for p in document.samples.picks
                   if (p.name, p.which) == ("quality.quality", which)]  # fmt: skip
        expected = train.sort("quality", descending=descending).head(5)
        shown = [document.samples.examples[at] for at in pick.examples]
        assert [(e.file, e.row) for e in shown] == expected.select("file", "row").rows()
        for example, row in zip(shown, expected.iter_rows(named=True), strict=True):
            whole = texts[example.domain][example.row]
            assert whole.startswith(example.text)
            assert example.is_cut == (len(whole) > 700)
            assert example.scores["quality.quality"] == pytest.approx(row["quality"], rel=1e-4)
            assert example.reason == row["reason"]
            assert example.weight == pytest.approx(row["weight"], rel=1e-4)
            assert example.label == {None: None, 0: "no", 1: "yes"}[row["label"]]


def test_words_of_an_evaluation_example_are_marked_in_the_training_text(document: Document):
    found = document.leakage
    assert found is not None
    assert document.samples is not None
    (exam,) = found.sets
    assert (exam.name, exam.examples, exam.short) == ("exam", 2, 1)
    assert exam.rows_kept + exam.rows_left_out == len(found.examples) <= 3
    assert found.examples
    for at in found.examples:
        example = document.samples.examples[at]
        (mark,) = example.marks
        marked = example.text[mark.start : mark.end]
        assert marked == EXAM.upper().replace(" ", ", ")
        assert mark.kind == "leakage"
        assert "100 % of the words" in example.facts[0].value


def test_duplicates_and_rows_set_aside_are_counted(document: Document, rows: pl.DataFrame):
    assert document.duplicates is not None
    assert document.quarantine is not None
    # One text stands twice in each domain; some of them may be held out.
    sizes = training(rows).filter(pl.col("duplicate_size") > 1)["duplicate_size"]
    assert sum(rows for _, rows in document.duplicates.sizes) == len(sizes)
    assert document.duplicates.groups[0].text == "the same words twice"
    assert document.duplicates.groups[0].size == sizes.max()
    assert document.quarantine.counts == {"empty": 3}
    assert {(aside.file, aside.row) for aside in document.quarantine.rows} == {
        (f"{domain}.parquet", 6) for domain in SIZES
    }


def test_the_document_is_json_and_says_why_sections_are_missing(document: Document):
    text = json.dumps(values(document), allow_nan=False)
    assert json.loads(text)["schema_version"] == 1
    absent = {name for name in SECTIONS if getattr(document, name) is None}
    assert absent == document.missing.keys() == {"mixture", "stability", "comparison"}
    assert 2 <= len(document.summary) <= 5
    assert "curate compare" in document.missing["comparison"]


def test_the_same_run_in_other_partitions_draws_the_same_examples(
    world: Path, monkeypatch: pytest.MonkeyPatch
):
    made(world, run="other", index={"partition_rows": 1000, "max_bad_rows": 0.1})
    monkeypatch.setattr(jobs.report_survey, "SAMPLE_ROWS", 100)
    one, two = (gather(world / name, examples=5) for name in ("run", "other"))
    assert one.agreement is not None
    assert (one.agreement.rows, one.agreement.of_rows) == (100, 564)
    assert one.agreement == two.agreement
    assert one.samples is not None
    assert two.samples is not None
    assert one.samples.picks == two.samples.picks
    assert one.samples.examples == two.samples.examples
    assert one.scores is not None
    assert two.scores is not None
    for first, second in zip(one.scores.columns, two.scores.columns, strict=True):
        assert first == second, first.name


def test_an_unfinished_run_gives_a_document_at_every_point(world: Path):
    index = made(world, "index", run="young")
    found = gather(index)
    assert found.removed is found.shifts is found.scores is None
    assert "curate plan" in found.missing["shifts"]
    assert found.samples is not None
    assert len(found.samples.picks) == 1  # at random
    made(world, "score", run="young")
    found = gather(index)
    assert found.scores is not None
    assert column(found, "quality.quality").kept is None
    assert found.leakage is not None
    assert found.leakage.sets[0].found_left_out == 1
    table = sorted((index / "scores" / "quality").glob("*.parquet"))[2]
    (table.parent / ".done" / f"{table.name}.json").unlink()
    found = gather(index)
    assert found.scores is not None
    assert all(c.scorer != "quality" for c in found.scores.columns)
    assert any(note.startswith("quality is left out: 1 of") for note in found.notes)
    (index / "examples" / "partitions.json").unlink()
    found = gather(index)
    assert found.samples is None
    assert "no index" in found.missing["scores"]
    json.dumps(values(found), allow_nan=False)


def test_a_damaged_table_is_named_and_damaged_results_are_left_out(world: Path, tmp_path: Path):
    run = shutil.copytree(world / "run", tmp_path / "moved")
    (run / "compare").mkdir()
    (run / "compare" / "comparison.json").write_text('{"question": {}}', encoding="utf-8")
    assert "is damaged" in gather(run).missing["comparison"]
    table = sorted((run / "scores" / "quality").glob("*.parquet"))[1]
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    with pytest.raises(InputError, match=table.name):
        gather(run)


def test_inputs_that_have_gone_cost_the_texts_alone(world: Path, tmp_path: Path):
    for name in ("data", "quality.parquet", "exam.parquet"):
        source = world / name
        if source.is_dir():
            (tmp_path / name).mkdir()
            for path in source.iterdir():
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
        else:
            (tmp_path / name).write_bytes(source.read_bytes())
    run = made(tmp_path)
    (tmp_path / "data" / "large.parquet").unlink()
    found = gather(run)
    assert found.samples is not None
    assert "large.parquet cannot be read" in found.samples.notes[0]
    texts = {e.domain: bool(e.text) for e in found.samples.examples if e.row != 6}
    assert texts == {"large": False, "middle": True, "small": True}


def test_of_very_many_domains_the_largest_are_told_and_the_rest_together(tmp_path: Path):
    count = 3000
    random = np.random.default_rng(0)
    domains = [f"d{number}" for number in np.minimum(random.zipf(1.3, count), 2000)]
    frame = pl.DataFrame({"text": [f"text {n}" for n in range(count)], "domain": domains})
    (tmp_path / "data").mkdir()
    frame.write_parquet(tmp_path / "data" / "all.parquet")
    source = {"path": str(tmp_path / "data"), "text": "text", "domain": "domain"}
    run = made(
        tmp_path, sources={"a": source}, evaluation={}, index={}, mix={"mixer": "natural"},
        score={"scorers": ["length"]}, plan={"score": "num_chars", "within": "all", "keep": 0.5},
    )  # fmt: skip
    found = gather(run)
    length = column(found, "length.num_chars")
    assert found.shifts is not None
    assert found.mixture is not None
    assert sum(g.distribution.rows for g in length.by_domain) == length.everything.rows
    index = curate.open(run).examples.filter(pl.col("split") == "train").collect()
    distinct = index["domain"].n_unique()
    for named in (
        [group.num_groups for group in length.by_domain],
        [shift.num_names for shift in found.shifts.domains],
        [domain.num_domains for domain in found.mixture.domains],
    ):
        assert sum(named) == distinct
        assert set(named[:-1]) == {1}
        assert len(named) <= 201
    assert sum(shift.rows for shift in found.shifts.domains) == length.everything.rows
    assert sum(domain.asked for domain in found.mixture.domains) == pytest.approx(1, abs=1e-4)
    (budget,) = [fact.value for fact in found.mixture.facts if fact.name == "budget"]
    assert budget.endswith(" characters")  # as no tokenizer is set
    assert found.mixture.domains[-1].domain == f"{found.mixture.domains[-1].num_domains:,} others"
    assert length.by_label == found.shifts.labels == []
    assert len(json.dumps(values(found))) < 300_000


def test_a_plan_older_than_its_settings_is_told(world: Path, tmp_path: Path):
    run = shutil.copytree(world / "run", tmp_path / "moved")
    assert not gather(run).notes
    config = (run / "config.yaml").read_text(encoding="utf-8")
    assert "keep: 0.4" in config
    (run / "config.yaml").write_text(config.replace("keep: 0.4", "keep: 0.2"), encoding="utf-8")
    assert "older" in gather(run).notes[0]


def texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value
    return [text for part in parts for text in texts_in(part)] if isinstance(
        value, Mapping | list | tuple) else []  # fmt: skip


def test_without_samples_no_word_of_the_data_is_told(world: Path):
    found = gather(world / "run", examples=0)
    assert found.samples is None
    assert found.missing["samples"]
    words = {"alpha", "kappa", "twice", "Q3", "q3"}
    told = " ".join(texts_in(values(found))).replace("\n", " ")
    assert not words & set(told.replace(",", " ").split())


def test_the_command_writes_one_file_and_tells_where(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = world / "run"
    page = tmp_path / "folder" / "page.html"
    assert main(["report", str(run), "--out", str(page), "--samples", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(page)
    assert told["size_bytes"] == page.stat().st_size
    assert told["document"]["removed"]["rows"] == 597
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    assert curate.open(run).report() == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_page_of_a_run_in_a_store_lies_where_the_command_was_given(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    places: list[str] = []

    def fetch(place: Path) -> Path:
        places.append(str(place))
        return world / "run"

    monkeypatch.setattr("jobs.report.at_hand", fetch)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "s3://bucket/folder/news", "--no-samples"]) == 0
    assert places == ["s3:/bucket/folder/news"]
    assert [path.name for path in tmp_path.iterdir()] == ["news-report.html"]


def test_the_command_s_errors_have_their_codes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert main(["report", str(tmp_path / "nothing")]) == 3
    assert main(["report", str(world / "data")]) == 5
    assert main(["report", str(world / "run"), "--out", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
    monkeypatch.setattr("jobs.report.find_spec", lambda name: None if name == "jinja2" else 1)
    assert main(["report", str(world / "run")]) == 6
    assert "pip install 'curate-data[report]'" in capsys.readouterr().err
    with pytest.raises(CurateError, match="jinja2"):
        curate.open(world / "run").report()
