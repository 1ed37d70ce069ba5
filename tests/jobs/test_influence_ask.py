"""Asking a run's influence index: the same as scoring with that target, and clear refusals."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_models import byte_tokenizer, save_language_model

import curate
from curate.cli.asking import print_answer
from curate.errors import ConfigError, CurateError, InputError
from curate.models.mlp import MLP
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.influence_ask import Answer, Found, ask
from jobs.influence_query import read_query
from jobs.opening import load_settings, open_run
from jobs.score import score_run
from jobs.settings import parse_settings

INLINE = Pool(InlineExecutor(), 1)
WORDS = ["the", "cat", "in", "a", "hat", "then", "sat", "there", "until", "dawn"]
TEXTS = [" ".join(WORDS[(i * k) % 10] for k in range(1, 4 + i % 9)) for i in range(24)]
QUERY = "a cat sat there until dawn"


def made(world: Path, options: dict[str, Any], query: str = QUERY, **more: Any) -> Path:
    """A scored run whose target is the query."""
    texts = {"text": [*TEXTS, "", "the cat"], "kind": ["odd", "even"] * 13}
    pl.DataFrame(texts).write_parquet(world / "rows.parquet")
    pl.DataFrame({"text": [query]}).write_parquet(world / "target.parquet")
    names = [str(path) for path in sorted(world.glob("lm-*"))]
    source = {"path": str(world / "rows.parquet"), "text": "text", "domain": "kind"}
    values: dict[str, Any] = {
        "run": str(world / "run"),
        "sources": {"rows": source},
        "target": {"path": str(world / "target.parquet"), "text": "text"},
        "task": {"kind": "causal-lm", "max_tokens": 64},
        "model": {"device": "cpu"},
        "checkpoints": {"paths": names},
        "index": {"partition_rows": 7, "held_out": 0.1, "max_bad_rows": 0.5},
        "score": {"scorers": [{"influence": {"dtype": "float32", "dim": 4, **options}}]},
        **more,
    }
    with open_run(parse_settings(values)) as settings:
        index_run(settings, pool=INLINE)
        score_run(settings, pool=INLINE)
    return world / "run"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    for number, rate in enumerate((0.4, 0.2)):
        save_language_model(tmp_path / f"lm-{number}", seed=number)
        facts = {"seed": 0, "step": number, "lr": rate}
        (tmp_path / f"lm-{number}" / "checkpoint.json").write_text(json.dumps(facts))
    return tmp_path


def keys_of(found: list[Found]) -> list[int]:
    return [one.row for one in found]


def wanted(run: Path) -> pl.DataFrame:
    """Training rows and their scores, the best first."""
    tables = [
        pl.concat([pl.read_parquet(path) for path in sorted((run / name).glob("part-*.parquet"))])
        for name in ("examples", "scores/influence")
    ]
    both = tables[0].hstack([tables[1]["influence"]]).drop_nulls("influence")
    return both.filter(split="train").sort("influence", descending=True)


METRICS = [
    {"metric": "influence"},
    {"metric": "influence", "curvature": "full", "damping": 0.3},
    {"metric": "influence", "whiten": True},
    {"metric": "influence", "init": "pca", "sample": 10},
    {"metric": "dot", "reduction": "sum"},
    {"metric": "cosine", "dtype": "float16"},
    {"metric": "trak"},
]


@pytest.mark.parametrize("options", METRICS)
def test_the_ends_are_those_of_a_run_with_that_target(world: Path, options: dict[str, Any]):
    run = made(world, options)
    answer = ask(run, QUERY, examples=4)
    best = wanted(run)
    assert keys_of(answer.helps) == best["row"].to_list()[:4]
    assert keys_of(answer.hurts) == best["row"].to_list()[::-1][:4]
    scores = [one.score for one in answer.helps]
    np.testing.assert_allclose(scores, best["influence"][:4], rtol=2e-3)
    assert [one.text for one in answer.helps] == [TEXTS[one.row] for one in answer.helps]
    assert [one.rank for one in answer.hurts] == [1, 2, 3, 4]
    assert answer.loss > 0
    assert answer.notes == []


def test_a_file_fields_and_a_row_of_the_target_are_the_same_query(world: Path):
    run = made(world, {})
    (world / "query.txt").write_text(QUERY)
    typed = ask(run, QUERY)
    for given in (f"@{world}/query.txt", json.dumps({"text": QUERY}), "target:target.parquet:0"):
        found = curate.open(run).ask(given)
        assert (found.helps, found.hurts) == (typed.helps, typed.hurts)
    assert typed.query == QUERY
    assert curate.open(run).ask({"text": QUERY}).helps == typed.helps
    odd = ask(run, QUERY, domain="odd")
    assert {one.domain for one in odd.helps + odd.hurts} == {"odd"}


def test_a_row_of_the_run_helps_itself_most_by_cosine(world: Path):
    run = made(world, {"metric": "cosine"})
    train = wanted(run)["row"].to_list()
    row = max(train, key=lambda i: len(TEXTS[i]) if i < len(TEXTS) else 0)
    first = ask(run, f"rows:rows.parquet:{row}").helps[0]
    assert TEXTS[first.row] == TEXTS[row]
    assert first.score == pytest.approx(1, abs=1e-4)


def test_a_query_longer_than_the_context_is_cut_and_says_so(world: Path):
    run = made(world, {})
    long = ask(run, f"{QUERY} {' dawn' * 50}")
    (note,) = long.notes
    assert "longer than the 64 tokens that the task reads, and was cut" in note
    assert long.num_scored == 63


def test_what_cannot_be_asked_says_what_to_do(world: Path):
    run = made(world, {})
    for given, message in {
        " ": "the query is empty",
        "@nowhere.txt": "cannot be read",
        "{text: 1}": "no JSON object of fields",
        "rows:rows.parquet:99": "no example rows:rows.parquet:99",
        '{"label": 1}': "lacks what the task reads",
        '{"text": 5}': "its text is 5, not a text",
        '{"messages": "the cat"}': "its messages are no list",
        "\udcff\udcfe": "no UTF-8 text",
        '{"text": "\\ud800"}': "its fields cannot be read",
        "rows:rows.parquet:999999999999999999999": "there is no row",
        "rows:rows.parquet:99999999999999999": "no example",
        "rows:rows.parquet:-1": "there is no row '-1'",
        "nosuch:rows.parquet:1": "there is no such source",
        "nosuch:target.parquet:1": "there is no such source",
    }.items():
        with pytest.raises(CurateError, match=message):
            ask(run, given)


@pytest.mark.parametrize("given", [None, 3, b"the cat", ["the cat"]])
def test_what_is_no_text_and_no_example_is_refused(given: Any):
    with pytest.raises(ConfigError, match=f"of type {type(given).__name__}, not a text"):
        read_query(
            parse_settings({"run": "r", "sources": {"rows": {"path": "rows.parquet"}}}), given
        )


@pytest.mark.parametrize("count", [0, -1, "x", 1.5, True])
def test_examples_are_counted_from_one_up(world: Path, count: Any):
    with pytest.raises(ConfigError, match="examples cannot be listed"):
        ask(world, QUERY, examples=count)


def test_an_unknown_domain_is_refused_with_those_that_there_are(world: Path):
    with pytest.raises(ConfigError, match=r"no domain 'nosuch'(.|\n)*use one of even, odd"):
        ask(made(world, {}), QUERY, domain="nosuch")


def followed(run: Path, message: str) -> None:
    """Do what a fix says: remove the files that it names, and score."""
    fix = message.split("fix: ")[1]
    for name in re.findall(r"/\S+\.(?:parquet|vectors|safetensors)", fix.split("then run")[0]):
        Path(name).unlink()
    assert f"run `curate score {run}`" in fix
    with open_run(load_settings(run)) as settings:
        score_run(settings, pool=INLINE)


@pytest.mark.parametrize(
    "name", ["part-*.vectors", "curvature.safetensors", "whitened/part-*.vectors"]
)
def test_a_file_cut_short_is_named_and_the_fix_makes_it_again(world: Path, name: str):
    run = made(world, {"whiten": True})
    before = ask(run, QUERY)
    path = sorted((run / "influence/lm-1").glob(name))[-1]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=path.name) as caught:
        ask(run, QUERY)
    followed(run, str(caught.value))
    assert ask(run, QUERY) == before


def test_a_changed_byte_is_noticed_and_the_fix_makes_it_again(world: Path):
    run = made(world, {"metric": "dot"})
    before = ask(run, QUERY)
    path = sorted((run / "influence/lm-1").glob("part-*.vectors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=path.name) as caught:
        ask(run, QUERY)
    followed(run, str(caught.value))
    assert ask(run, QUERY) == before


def test_without_its_index_a_run_cannot_be_asked_until_it_is_scored_again(world: Path):
    run = made(world, {})
    before = ask(run, QUERY)
    shutil.rmtree(run / "influence/lm-1")
    with pytest.raises(InputError, match="no whole influence index of lm-1") as caught:
        ask(run, QUERY)
    followed(run, str(caught.value))
    assert ask(run, QUERY) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"metric": "ekfac", "fit_examples": 8}, "keeps no index"), (None, "no influence index")],
)
def test_a_run_that_keeps_no_index_says_so(
    world: Path, options: dict[str, Any] | None, message: str
):
    score = {"scorers": ["loss"]} if options is None else {"scorers": [{"influence": options}]}
    run = made(world, {}, score=score)
    with pytest.raises(InputError, match=message):
        ask(run, QUERY)


@pytest.mark.parametrize("what", ["model", "tokenizer", "task"])
def test_another_model_tokenizer_or_task_is_refused(world: Path, what: str):
    run = made(world, {})
    folder = world / "lm-1"
    if what == "model":
        save_language_model(folder, seed=7)
        (folder / "checkpoint.json").write_text('{"seed": 0, "step": 1, "lr": 0.2}')
    elif what == "tokenizer":
        byte_tokenizer(merges=False).save_pretrained(folder)
    else:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("max_tokens: 64", "max_tokens: 16"))
    with pytest.raises(ConfigError, match=rf"they differ in (.|\n)*{what}(.|\n)*curate score"):
        ask(run, QUERY)


def test_a_changed_damping_waits_for_scoring(world: Path):
    run = made(world, {"damping": 0.1})
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("damping: 0.1", "damping: 0.2"))
    with pytest.raises(InputError, match="was made with"):
        ask(run, QUERY)


def test_a_table_is_asked_by_row_or_by_its_fields(tmp_path: Path):
    MLP(num_features=3, num_classes=2, hidden=(4,)).save_pretrained(tmp_path / "lm-0")
    numbers = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    frame = pl.DataFrame({"x": numbers, "label": [i % 2 for i in range(12)]})
    frame.write_parquet(tmp_path / "rows.parquet")
    columns = {"path": str(tmp_path / "rows.parquet"), "features": "x", "label": "label"}
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "sources": {"rows": columns},
        "target": columns,
        "task": {"kind": "tabular-classification", "num_classes": 2},
        "model": {"device": "cpu"},
        "checkpoints": {"paths": [str(tmp_path / "lm-0")]},
        "index": {"partition_rows": 7, "held_out": 0.0},
        "score": {"scorers": [{"influence": {"metric": "cosine", "dtype": "float32"}}]},
    }
    with open_run(parse_settings(values)) as settings:
        index_run(settings, pool=INLINE)
        score_run(settings, pool=INLINE)
    by_row = ask(tmp_path / "run", "target:rows.parquet:5")
    fields = json.dumps({"features": numbers[5].tolist(), "label": 1})
    assert by_row.helps[0].row == 5
    assert ask(tmp_path / "run", fields).helps == by_row.helps
    assert ask(tmp_path / "run", {"features": numbers[5], "label": 1}).helps == by_row.helps
    with pytest.raises(ConfigError, match=r'SOURCE:FILE:ROW(.|\n)*{"features"'):
        ask(tmp_path / "run", "a text")
    for given, message in {
        '{"features": [0.1, 0.2], "label": 1}': "it has 2 features, the examples have 3",
        '{"features": [], "label": 1}': "its features is not a list of numbers",
        '{"features": "x", "label": 1}': "its features is not a list of numbers",
        '{"features": [[1], [2, 3]], "label": 1}': "its features is not a list of numbers",
        '{"features": [1, NaN, 2], "label": 1}': "not finite",
        '{"features": [1, 2, 3], "label": "a"}': "its label is 'a'",
        '{"features": [1, 2, 3], "label": 2}': "label 2 does not exist",
        '{"features": [1, 2, 3], "label": -1}': "there is no class -1",
    }.items():
        with pytest.raises(ConfigError, match=message) as caught:
            ask(tmp_path / "run", given)
        assert '{"features"' in caught.value.fix


def test_the_page_escapes_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    row: dict[str, Any] = {"source": "s", "file": "f", "row": 3, "domain": "d"}
    found = Found(rank=1, score=0.25, text="red \x1b[31m\nline", **row)
    answer = Answer(
        run="/r", query="the cat", metric="dot", checkpoints=["a", "b"], loss=1.5, num_scored=4,
        notes=["cut"], helps=[found], hurts=[],
    )  # fmt: skip

    def given(*_: Any, **__: Any) -> Answer:
        return answer

    monkeypatch.setattr("jobs.influence_ask.ask", given)
    more: dict[str, Any] = {"examples": 2, "domain": None, "others": {}}
    print_answer(Path("/r"), "x", as_json=False, **more)
    out = capsys.readouterr().out
    assert "query the cat: 4 positions with a loss of 1.5 nats; metric dot at 2 checkpoints" in out
    assert "note: cut" in out
    assert "\x1b" not in out
    assert "no training example has a score" in out
    print_answer(Path("/r"), "x", as_json=True, **more)
    assert json.loads(capsys.readouterr().out)["helps"][0]["score"] == 0.25
    more["others"] = {"--score": "loss"}
    with pytest.raises(ConfigError, match="--score does not go with --query"):
        print_answer(Path("/r"), "x", as_json=True, **more)


def test_the_settings_of_a_run_stay_as_they_are(world: Path):
    run = made(world, {})
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    ask(run, QUERY)
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
