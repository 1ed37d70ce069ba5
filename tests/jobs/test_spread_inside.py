"""What can be spread: scorers with passes of their own, texts, pairs, images, several sources."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_models import save_classifier, save_language_model

from curate.cli import main
from curate.config import plain, to_yaml
from curate.data.example import KEY
from curate.data.layout import RunFolder
from jobs.cluster import InlineExecutor, Pool
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.opening import load_settings
from jobs.score import score_run
from jobs.settings import Settings, parse_settings
from jobs.tokenizer import tokenizer_run
from jobs.train import train_run

INLINE = Pool(InlineExecutor(), 1)
WORDS = ["the", "cat", "in", "a", "hat", "then", "sat", "there", "until", "dawn"]
TRAIN = {"epochs": 2, "lr": 0.03, "batch_tokens": 32, "save_every_epochs": 1}


def texts(count: int) -> list[str]:
    return [" ".join(WORDS[(i * k) % 10] for k in range(1, 2 + i % 7)) for i in range(count)]


def write_rows(path: Path, count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    numbers = draw.normal(size=(count, 4)).astype(np.float32)
    pl.DataFrame({"x": numbers, "label": (numbers[:, 0] > 0).astype(int)}).write_parquet(path)


def settings_of(root: Path, inside: Any, **more: Any) -> Settings:
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {"pool": {"path": str(root / "pool.parquet"), "features": "x"}},
        "task": {"kind": "tabular-classification", "num_classes": 2},
        "model": {"config": {"model_type": "mlp", "hidden": [6]}, "device": "cpu"},
        "index": {"partition_rows": 50, "held_out": 0.1},
        "score": {"scorers": [{"spread": {"scorer": inside, "core": 40, "force": True}}]},
    }
    return parse_settings(values | more)


def scored(settings: Settings) -> pl.DataFrame:
    index_run(settings, pool=INLINE)
    tokenizer_run(settings)
    train_run(settings, pool=INLINE)
    embed_run(settings, pool=INLINE)
    score_run(settings, pool=INLINE)
    run = RunFolder(Path(settings.run))
    return pl.concat([pl.read_parquet(run.scores(p, "spread").path) for p in run.partitions()])


def core_of(settings: Settings, name: str) -> Settings:
    return load_settings(Path(settings.run) / "spread" / name / "core")


def test_pvi_trains_on_the_core_set_as_the_run_would(tmp_path: Path):
    write_rows(tmp_path / "pool.parquet", 120, 0)
    settings = settings_of(tmp_path, "pvi", checkpoints={"train": TRAIN})
    found = scored(settings)
    assert found["pvi"].null_count() == 0
    core = core_of(settings, "pvi")
    assert core.checkpoints.train is None
    ((name, options),) = core.score.named.items()
    assert name == "pvi"
    assert options["train"]["lr"] == 0.03
    assert not (Path(core.run) / "checkpoints").exists()


def test_dvgs_has_its_target_in_the_core_set_too(tmp_path: Path):
    write_rows(tmp_path / "pool.parquet", 120, 0)
    write_rows(tmp_path / "target.parquet", 30, 1)
    inside = {"dvgs": {"epochs": 2, "lr": 0.05, "batch_size": 10}}
    target = {"path": str(tmp_path / "target.parquet"), "features": "x"}
    found = scored(settings_of(tmp_path, inside, target=target))
    assert found["dvgs"].null_count() == 0
    assert found["spread_measured"].sum() == 40


def test_vog_finds_all_checkpoints_of_every_seed(tmp_path: Path):
    write_rows(tmp_path / "pool.parquet", 120, 0)
    train = {"train": {**TRAIN, "epochs": 3, "seeds": [0, 1]}}
    settings = settings_of(tmp_path, "vog", checkpoints=train)
    found = scored(settings)
    assert found["vog"].null_count() == 0
    slugs = {path.name for path in (Path(core_of(settings, "vog").run) / "quantities").iterdir()}
    assert {"vog-seed-0", "vog-seed-1"} <= slugs


def test_a_tokenizer_of_the_run_serves_the_core_set(tmp_path: Path):
    table = pl.DataFrame({"text": texts(120), "label": [i % 2 for i in range(120)]})
    table.write_parquet(tmp_path / "pool.parquet")
    shape = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32,
             "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    settings = settings_of(
        tmp_path,
        "el2n",
        sources={"pool": {"path": str(tmp_path / "pool.parquet"), "text": "text"}},
        task={"kind": "text-classification", "num_classes": 2, "max_tokens": 32},
        model={"config": shape, "tokenizer": {"train": "bpe", "vocab_size": 300}, "device": "cpu"},
        checkpoints={"train": {**TRAIN, "batch_tokens": 256}},
        embed={"words": {"kind": "ngrams", "dim": 64}},
    )
    found = scored(settings)
    assert found["el2n"].null_count() == 0
    core = core_of(settings, "el2n")
    assert core.model.tokenizer == str(tmp_path / "run" / "tokenizer")
    assert not (Path(core.run) / "tokenizer").exists()


def test_of_pairs_the_reference_reads_the_core_set_only(tmp_path: Path):
    pl.DataFrame(
        {
            "prompt": [f"{text}?" for text in texts(60)],
            "chosen": [f" {text} yes" for text in texts(60)],
            "rejected": [f" {text} no" for text in texts(61)[1:]],
            "place": np.random.default_rng(0).normal(size=(60, 3)),
        }
    ).write_parquet(tmp_path / "pool.parquet")
    save_language_model(tmp_path / "model")
    save_language_model(tmp_path / "other", seed=1)
    settings = settings_of(
        tmp_path,
        "loss",
        sources={"pool": {"path": str(tmp_path / "pool.parquet")}},
        task={"kind": "preference", "max_tokens": 64, "reference": str(tmp_path / "other")},
        model={"name": str(tmp_path / "model"), "device": "cpu"},
        embed={"places": {"kind": "column", "column": "place"}},
    )
    found = scored(settings)
    assert found["loss"].null_count() == 0
    assert not list((tmp_path / "run" / "quantities").glob("reference-*"))
    core = Path(core_of(settings, "loss").run)
    rows = [pl.read_parquet(p).height for p in core.glob("quantities/reference-*/*.parquet")]
    assert sum(rows) == 40


def test_images_named_by_relative_paths_are_found_from_the_core_set(tmp_path: Path):
    from PIL import Image

    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    names = [f"images/{i}.png" for i in range(60)]
    for i, name in enumerate(names):
        pixels = draw.integers(0, 120, size=(8, 8), dtype=np.uint8) + 100 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
    table = pl.DataFrame({"image": names, "label": [i % 2 for i in range(60)]})
    table.write_parquet(tmp_path / "pool.parquet")
    settings = settings_of(
        tmp_path,
        "el2n",
        sources={"pool": {"path": str(tmp_path / "pool.parquet"), "image": "image"}},
        task={"kind": "image-classification", "num_classes": 2, "channels": 1},
        model={"config": {"model_type": "cnn", "widths": [4]}, "device": "cpu"},
        checkpoints={"train": TRAIN},
    )
    found = scored(settings)
    assert found["el2n"].null_count() == 0
    copied = pl.read_parquet(tmp_path / "run" / "spread" / "el2n" / "data" / "pool.parquet")
    assert all(Path(path).is_absolute() for path in copied["image"])


def test_sources_of_several_files_with_other_columns_meet_in_one_file_each(tmp_path: Path):
    (tmp_path / "first").mkdir()
    write_rows(tmp_path / "first" / "a.parquet", 60, 0)
    write_rows(tmp_path / "first" / "b.parquet", 60, 1)
    odd = pl.read_parquet(tmp_path / "first" / "b.parquet")
    odd = odd.with_columns(pl.lit("more").alias("extra"), pl.col("label").cast(pl.Int8))
    odd.write_parquet(tmp_path / "first" / "b.parquet")
    numbers = {"a": [0.1 * i for i in range(40)], "b": [1.0] * 40, "c": [0.0] * 40}
    more = {"d": [-1.0] * 40, "label": [0, 1] * 20}
    pl.DataFrame(numbers | more).write_csv(tmp_path / "rows.csv")
    sources = {
        "first": {"path": str(tmp_path / "first"), "features": "x"},
        "second": {"path": str(tmp_path / "rows.csv"), "features": ["a", "b", "c", "d"]},
    }
    settings = settings_of(
        tmp_path, "el2n", sources=sources, checkpoints={"train": TRAIN}, index={"held_out": 0.1}
    )
    found = scored(settings)
    assert found.height == 160
    assert found["el2n"].null_count() == 0
    data = tmp_path / "run" / "spread" / "el2n" / "data"
    assert "extra" in pl.read_parquet(data / "first.parquet").columns
    choice = pl.read_parquet(data.parent / "choice.parquet")
    for source, copied in (("first", "x"), ("second", "a")):
        own = choice.filter(pl.col("source") == source)
        assert own["core_row"].to_list() == list(range(own.height))
        assert pl.read_parquet(data / f"{source}.parquet", columns=[copied]).height == own.height


@pytest.mark.parametrize("method", ["neighbours", "ridge"])
def test_the_command_line_scores_shows_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
):
    """Texts about two things; the model has seen which is which, and grand follows from that."""
    table = pl.DataFrame({"text": texts(150), "label": [int(i % 7 > 2) for i in range(150)]})
    table.write_parquet(tmp_path / "pool.parquet")
    save_classifier(tmp_path / "model", num_labels=2)
    config = tmp_path / "config.yaml"
    options = {"scorer": {"grand": {"parameters": "head"}}, "core": 60, "method": method,
               "min_rank_correlation": 0.0}  # fmt: skip
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "sources": {"pool": {"path": str(tmp_path / "pool.parquet"), "text": "text"}},
        "task": {"kind": "text-classification", "num_classes": 2, "max_tokens": 32},
        "model": {"name": str(tmp_path / "model"), "device": "cpu"},
        "embed": {"words": {"kind": "ngrams", "dim": 128}},
        "score": {"scorers": ["el2n", {"spread": options}]},
        "plan": {"score": "spread.grand", "keep": 0.5},
    }
    config.write_text(to_yaml(values))
    assert main(["run", str(config)]) == 0
    out = capsys.readouterr().out
    assert f"grand spread from 60 of 150 examples by {method}: rank correlation" in out
    assert main(["score", str(tmp_path / "run")]) == 0
    core = tmp_path / "run" / "spread" / "grand" / "core"
    assert main(["show", str(core)]) == 0
    assert main(["status", str(core)]) == 0
    assert "60" in capsys.readouterr().out
    run = RunFolder(tmp_path / "run")
    frame = pl.concat([pl.read_parquet(run.scores(p, "spread").path) for p in run.partitions()])
    choice = pl.read_parquet(core.parent / "choice.parquet")
    assert frame.filter(pl.col("spread_measured") == 1).select(KEY).equals(choice.select(KEY))


def test_methods_and_the_plan_of_passes_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from jobs.starter import guess_settings

    assert main(["methods", "spread"]) == 0
    assert "core set" in capsys.readouterr().out
    write_rows(tmp_path / "pool.parquet", 60, 0)
    settings = settings_of(tmp_path, "el2n", checkpoints={"train": TRAIN})
    scored(settings)
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(plain(settings)))
    assert main(["methods", "--plan", str(config)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "spread: core (1 task)" in told
    save_classifier(tmp_path / "model", num_labels=2)
    flags = {"scorer": ["spread"], "model": str(tmp_path / "model")}
    guessed = guess_settings(str(tmp_path / "pool.parquet"), flags)
    assert guessed["task"]["kind"] == "text-classification"
