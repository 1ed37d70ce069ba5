"""`curate embed` as part of a run: vectors of pool and target, restarts, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_models import save_language_model

import curate
from curate.config import plain
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.tables import read_examples, read_table
from curate.errors import ConfigError, CurateError, InputError
from curate.models.encoding import load_encoder
from curate.models.load import pick_device
from curate.vectors.ngrams import hashed_ngrams
from curate.vectors.settings import Embed
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.embedding import embed_run, plan_embed, vectors_digest
from jobs.index import index_run
from jobs.representations import (
    check_representations,
    open_vectors,
    representation,
    representations,
)
from jobs.settings import Settings, parse_settings
from jobs.target import target_folder

INLINE = Pool(InlineExecutor(), 1)
WORDS = ["oak", "elm", "ash", "fir", "yew", "box", "bay", "fig"]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 1 + n % 9)) for n in range(count)]


def made(root: Path, embed: Any, **changes: Any) -> Settings:
    """A run over two files with texts and vectors, and a target; indexed."""
    root.mkdir(parents=True, exist_ok=True)
    vectors = np.random.default_rng(0).standard_normal((70, 4)).astype(np.float32)
    frame = pl.DataFrame({"text": texts(70), "v": vectors.tolist()})
    frame[:50].write_parquet(root / "a.parquet")
    frame[50:].write_parquet(root / "b.parquet")
    pl.DataFrame({"text": texts(6, 1), "v": vectors[:6].tolist()}).write_parquet(root / "t.parquet")
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {"pool": {"path": str(root / "[ab].parquet"), "text": "text"}},
        "target": {"path": str(root / "t.parquet"), "text": "text"},
        "index": {"held_out": 0.1, "partition_rows": 20},
        "embed": embed,
        **changes,
    }
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    return settings


def bytes_of(settings: Settings) -> dict[str, bytes]:
    root = Path(settings.run)
    paths = [*root.glob("vectors/*/part-*"), *root.glob("target/vectors/*/part-*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_every_kind_of_vector(tmp_path: Path):
    model = save_language_model(tmp_path / "model")
    settings = made(
        tmp_path,
        {
            "grams": {"kind": "ngrams", "dim": 64},
            "given": {"kind": "column", "column": "v", "normalize": False},
            "states": {"model": str(model), "max_tokens": 24, "dtype": "float16"},
        },
    )
    summary = embed_run(settings, pool=INLINE)
    run = RunFolder(Path(settings.run))
    assert summary["representations"]["grams"] == {
        "kind": "ngrams", "dim": 64, "rows": 76, "without": 0, "cut": 0,
    }  # fmt: skip
    assert summary["representations"]["states"]["cut"] > 0
    assert summary["target"] == 6
    known = texts(70)
    frame = pl.concat([read_examples(run, part, [*KEY]) for part in run.partitions()])
    assert frame["file"].to_list() == ["a.parquet"] * 50 + ["b.parquet"] * 20

    grams = open_vectors(run, "grams").take(range(70))
    expected = hashed_ngrams(known, dim=64, ngrams=(1, 2), unit="words")
    np.testing.assert_allclose(grams, unit(expected), rtol=1e-6)

    opened = curate.open(settings.run)
    assert opened.representations == ("given", "grams", "states")
    given = opened.vectors("given").take(range(70))
    np.testing.assert_array_equal(
        given, np.random.default_rng(0).standard_normal((70, 4)).astype(np.float32)
    )

    encoder = load_encoder(model, max_tokens=24, device=pick_device("cpu"))
    states = open_vectors(run, "states").take(range(70))
    one_by_one = np.concatenate([encoder.encode([t], batch_tokens=1).vectors for t in known])
    np.testing.assert_allclose(states, unit(one_by_one), atol=2e-3)
    table = pl.concat([read_table(run.vector_rows(p, "states").path) for p in run.partitions()])
    assert table.select(KEY).equals(frame)
    assert table["num_read"].max() == 24

    target = open_vectors(target_folder(run), "grams").take(range(6))
    hashed = hashed_ngrams(texts(6, 1), dim=64, ngrams=(1, 2), unit="words")
    np.testing.assert_allclose(target, unit(hashed), rtol=1e-6)


def test_what_is_done_is_skipped_and_a_change_redoes_its_own(tmp_path: Path):
    embed: dict[str, Any] = {
        "one": {"kind": "ngrams", "dim": 16}, "two": {"kind": "column", "column": "v"}
    }  # fmt: skip
    settings = made(tmp_path, embed)
    assert plan_embed(settings).total == 9  # eight partitions, and the target
    first = embed_run(settings, pool=INLINE)
    assert (first["done"], first["skipped"]) == (10, 0)
    assert plan_embed(settings).done == 10
    assert embed_run(settings, pool=INLINE)["skipped"] == 10
    digest = vectors_digest(settings, "one", RunFolder(Path(settings.run)))

    embed["one"]["dim"] = 32
    other = parse_settings({**plain(settings), "embed": embed})
    assert plan_embed(other).why == ("5 partitions have changed data or settings",)
    assert embed_run(other, pool=INLINE)["done"] == 5
    assert vectors_digest(other, "one", RunFolder(Path(settings.run))) != digest

    frame = pl.read_parquet(tmp_path / "b.parquet")
    frame.with_columns(text=pl.lit("pine")).write_parquet(tmp_path / "b.parquet")
    index_run(other, pool=INLINE)
    assert embed_run(other, pool=INLINE)["done"] == 2

    (tmp_path / "b.parquet").unlink()
    index_run(other, pool=INLINE)
    embed_run(other, pool=INLINE)
    assert len(open_vectors(RunFolder(Path(settings.run)), "one")) == 50
    assert len(list(Path(settings.run).glob("vectors/one/*.npy"))) == 3


def test_a_half_made_stage_goes_on_to_the_same_bytes(tmp_path: Path):
    settings = made(tmp_path / "one", {"grams": {"kind": "ngrams", "dim": 16}})
    embed_run(settings, pool=INLINE)
    whole = bytes_of(settings)
    run = RunFolder(Path(settings.run))
    lost = run.partitions()[1]
    run.vectors(lost, "grams").remove()
    torn = run.vectors(run.partitions()[2], "grams").path
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(InputError, match="curate embed"):
        open_vectors(run, "grams")
    assert embed_run(settings, pool=INLINE)["done"] == 2
    assert bytes_of(settings) == whole


def test_workers_make_the_same_bytes(tmp_path: Path):
    model = save_language_model(tmp_path / "model")
    embed = {"states": {"model": str(model)}, "grams": {"kind": "ngrams"}}
    inline = made(tmp_path / "one", embed)
    embed_run(inline, pool=INLINE)
    spread = made(tmp_path / "two", embed)
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        embed_run(spread, pool=pool)
    ours, theirs = bytes_of(inline), bytes_of(spread)
    assert ours.keys() == theirs.keys()
    for name, content in ours.items():
        assert theirs[name] == content, name


def test_rows_that_cannot_be_embedded_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows: list[Any] = [[1.0, 2.0], None, [0.0, 0.0], [float("nan"), 1.0], [3.0, 4.0]]
    pl.DataFrame({"text": list("abcde"), "v": rows}).write_parquet(tmp_path / "p.parquet")
    settings = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"pool": {"path": str(tmp_path / "p.parquet"), "text": "text"}},
            "index": {"held_out": 0.0},
            "embed": {"v": {"kind": "column", "column": "v"}},
        }
    )
    index_run(settings, pool=INLINE)
    with caplog.at_level(logging.WARNING):
        summary = embed_run(settings, pool=INLINE)
    assert summary["representations"]["v"]["without"] == 3
    assert "3 of 5 examples have no vector" in caplog.text
    run = RunFolder(Path(settings.run))
    vectors = open_vectors(run, "v")
    assert vectors.usable().tolist() == [0, 4]
    np.testing.assert_allclose(vectors.take([4]), [[0.6, 0.8]], rtol=1e-6)
    table = read_table(run.vector_rows(run.partitions()[0], "v").path)
    assert table["has_vector"].to_list() == [True, False, False, False, True]


def test_a_text_of_which_only_the_beginning_is_read_is_marked(tmp_path: Path):
    rows = ["oak elm", "ash " * 2600, "fir"]
    pl.DataFrame({"text": rows}).write_parquet(tmp_path / "p.parquet")
    settings = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"pool": {"path": str(tmp_path / "p.parquet"), "text": "text"}},
            "index": {"held_out": 0.0},
            "embed": {"n": {"kind": "ngrams", "dim": 64}},
        }
    )
    index_run(settings, pool=INLINE)
    assert embed_run(settings, pool=INLINE)["representations"]["n"]["cut"] == 1
    run = RunFolder(Path(settings.run))
    table = read_table(run.vector_rows(run.partitions()[0], "n").path)
    assert table["is_cut"].to_list() == [False, True, False]


def test_a_target_that_no_scorer_reads_is_left_alone(tmp_path: Path):
    """Its file need not even be there."""
    settings = made(
        tmp_path,
        {"v": {"kind": "column", "column": "v"}},
        score={"scorers": [{"duplicates": {"method": "semantic"}}]},
    )
    (tmp_path / "t.parquet").unlink()
    assert embed_run(settings, pool=INLINE)["target"] is None
    assert not (tmp_path / "run" / "target").exists()
    assert bytes_of(settings)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1.0], [1.0, 2.0]], "vectors of 1 and 2 numbers"),
        (["a", "b"], "not lists of numbers"),
        ([None, None], "lists of numbers|no vectors"),
        ([[], []], "numbers"),
    ],
)
def test_a_column_that_holds_no_vectors_is_refused(tmp_path: Path, column: Any, message: str):
    pl.DataFrame({"text": ["a", "b"], "v": column}).write_parquet(tmp_path / "p.parquet")
    settings = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"pool": {"path": str(tmp_path / "p.parquet"), "text": "text"}},
            "embed": {"v": {"kind": "column", "column": "v"}},
        }
    )
    index_run(settings, pool=INLINE)
    with pytest.raises(CurateError, match=message):
        embed_run(settings, pool=INLINE)
    unknown = parse_settings({**plain(settings), "embed": {"v": {"kind": "column", "column": "w"}}})
    with pytest.raises(CurateError, match="'w'"):
        embed_run(unknown, pool=INLINE)


def test_files_of_different_width_are_refused_by_name(tmp_path: Path):
    settings = made(tmp_path, {"v": {"kind": "column", "column": "v"}})
    embed_run(settings, pool=INLINE)
    for file in ("b", "t"):
        frame = pl.read_parquet(tmp_path / f"{file}.parquet")
        wide = frame.with_columns(v=pl.Series([[1.0, 2.0]] * frame.height))
        wide.write_parquet(tmp_path / f"{file}.parquet")
        index_run(settings, pool=INLINE)
        with pytest.raises(InputError, match=r"4 numbers in pool/a\.parquet and 2 numbers in"):
            embed_run(settings, pool=INLINE)
        frame.write_parquet(tmp_path / f"{file}.parquet")


def test_a_model_that_is_not_there_is_named_with_its_setting(tmp_path: Path):
    settings = made(tmp_path, {"m": {"model": str(tmp_path / "nowhere")}})
    with pytest.raises(InputError, match="nowhere") as caught:
        embed_run(settings, pool=INLINE)
    assert "embed.NAME.model" in caught.value.fix


def test_an_empty_target_is_named_as_such(tmp_path: Path):
    settings = made(tmp_path, {})
    pl.DataFrame(schema={"text": pl.String}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError) as caught:
        embed_run(settings, pool=INLINE)
    assert "target" in caught.value.what
    assert "sources" not in caught.value.fix


@pytest.mark.parametrize(
    "section",
    [
        {"plan": {"draw": "k_centre", "vectors": "zzz"}},
        {"score": {"scorers": [{"rds": {"vectors": "zzz"}}]}},
        {"domains": {"clusters": 3, "vectors": "zzz"}},
    ],
)
def test_a_representation_that_does_not_exist_is_refused_before_the_run(section: Any):
    values: dict[str, Any] = {"run": "r", "sources": {"a": {"path": "p"}}, **section}
    check_representations(parse_settings({"run": "r", "sources": {"a": {"path": "p"}}}))
    with pytest.raises(ConfigError, match="no representation 'zzz'"):
        check_representations(parse_settings(values))


def test_without_settings_there_is_one_representation(tmp_path: Path):
    settings = made(tmp_path, {})
    assert representations(settings) == {"ngrams": Embed(kind="ngrams")}
    assert representation(settings, None) == "ngrams"
    named = parse_settings({**plain(settings), "model": {"name": "somewhere"}})
    assert representation(named, None) == "model"
    two = parse_settings(
        {**plain(settings), "embed": {"a": {"kind": "ngrams"}, "b": {"kind": "ngrams", "dim": 8}}}
    )
    assert representation(two, "b") == "b"
    with pytest.raises(ConfigError, match="several representations: a, b"):
        representation(two, None)
    with pytest.raises(ConfigError, match="no representation 'c'"):
        representation(two, "c")


def test_numbers_stand_for_themselves(tmp_path: Path):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3) + 1
    pl.DataFrame({"x": rows.tolist()}).write_parquet(tmp_path / "p.parquet")
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "sources": {"pool": {"path": str(tmp_path / "p.parquet"), "features": "x"}},
        "index": {"held_out": 0.0},
    }
    settings = parse_settings(values)
    index_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    found = open_vectors(RunFolder(Path(settings.run)), "values").take(range(4))
    np.testing.assert_allclose(found, unit(rows), rtol=1e-6)
    texts = parse_settings({**values, "embed": {"m": {"kind": "ngrams"}}})
    with pytest.raises(ConfigError, match="kind: values"):
        embed_run(texts, pool=INLINE)


def test_settings_that_contradict_themselves_are_refused():
    values: dict[str, Any] = {"run": "r", "sources": {"a": {"path": "p"}}}
    for wrong in ({"kind": "column"}, {"column": "v"}, {"kind": "ngrams", "ngrams": [2, 1]},
                  {"max_tokens": 0}):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_settings({**values, "embed": {"a": wrong}})
    with pytest.raises(ConfigError, match="no good name"):
        parse_settings({**values, "embed": {"../up": {"kind": "ngrams"}}})
