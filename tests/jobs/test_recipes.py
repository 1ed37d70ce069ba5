"""Recipes: what is generated, and that loaders draw the mixture with them."""

import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from data.planned_run import Row, planned_run
from datasets import config as datasets_config

from curate.errors import CurateError
from jobs.verify import verify_shards
from tests.jobs.recipe_run import (
    domains_of,
    effective,
    p_value,
    recipe,
    rewrite,
    write_shards,
)

WAYS = ("column", "copies", "domains")
FORMATS = ("parquet", "mds", "webdataset")
LEAST = 1e-6
"""Smallest p value at which domains count as drawn by their probabilities; seeds are fixed."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Way -> folder of shards in all formats."""
    root = tmp_path_factory.mktemp("recipes")
    found: dict[str, Path] = {}
    for way in WAYS:
        (root / way).mkdir()
        found[way] = write_shards(root / way, way, FORMATS)
    return found


# -- what is generated ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_recipes_compile_say_how_weights_are_honoured_and_name_no_place(
    shards: dict[str, Path], way: str
):
    folder = shards[way]
    found = sorted((folder / "recipes").iterdir())
    assert {path.name for path in found if path.is_file()} == {
        "axolotl.yaml",
        "datasets_interleave.py",
        "mosaic.py",
        "torchtitan_mix.py",
        "trainer.py",
        "trl_sft.py",
        "webdataset_mix.py",
    }
    for path in found:
        if path.is_dir():
            continue
        text = path.read_text()
        assert "Weights: " in text
        assert "Unit: " in text
        assert str(folder) not in text
        assert "/tmp" not in text
        assert max(map(len, text.splitlines())) <= 100
        if path.suffix == ".py":
            compile(text, path.name, "exec")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert f"recipes/{path.name}" in manifest["files"]


def test_the_same_plan_gives_the_same_recipes_anywhere(shards: dict[str, Path], tmp_path: Path):
    again = write_shards(tmp_path, "domains", FORMATS)
    for path in (shards["domains"] / "recipes").glob("*.*"):
        assert (again / "recipes" / path.name).read_bytes() == path.read_bytes()
    # What Python leaves beside an imported recipe is no damage and no foreign file.
    (again / "recipes" / "__pycache__").mkdir(exist_ok=True)
    (again / "recipes" / "__pycache__" / "trainer.cpython-311.pyc").write_bytes(b"x")
    verify_shards(again)
    (again / "recipes" / "trainer.py").write_text("import os\n")
    with pytest.raises(CurateError, match=r"recipes/trainer\.py: changed"):
        verify_shards(again)


def test_recipes_of_formats_that_are_written_no_more_go(tmp_path: Path):
    folder = write_shards(tmp_path, "column", ("parquet", "webdataset"))
    assert (folder / "recipes" / "webdataset_mix.py").is_file()
    assert write_shards(tmp_path, "column", ("parquet",)) == folder
    assert not (folder / "recipes" / "webdataset_mix.py").exists()
    assert (folder / "recipes" / "trainer.py").is_file()
    verify_shards(folder)


# -- what loaders draw ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` rests 5 s whenever a stream of Parquet files is closed."""
    monkeypatch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.mark.parametrize("way", WAYS)
def test_datasets_interleaves_the_domains_by_their_probabilities(shards: dict[str, Path], way: str):
    made = recipe(shards[way], "datasets_interleave")
    rows = list(made.mixed(epochs=3.0, seed=1))
    domains = domains_of(shards[way])
    epoch = json.loads((shards[way] / "mixture.json").read_text())["phases"][0]["epoch_rows"]
    assert len(rows) == 3 * epoch
    seen = Counter(row["curate_domain"] for row in rows)
    assert p_value(seen, {d: e["row_probability"] for d, e in domains.items()}) > LEAST
    uniform = dict.fromkeys(domains, 1 / 3)
    assert p_value(seen, uniform) < LEAST  # the test can tell


def test_two_ranks_of_two_workers_share_the_stream_of_datasets(shards: dict[str, Path]):
    from torch.utils.data import DataLoader

    folder = shards["domains"]
    made = recipe(folder, "datasets_interleave")
    seen = Counter[str]()
    for rank in range(2):
        stream = made.mixed(epochs=4.0, seed=2, rank=rank, num_ranks=2)
        loader = DataLoader(stream, batch_size=None, num_workers=2)
        mine = Counter(row["curate_domain"] for row in loader)
        assert mine.total() == round(4 * made.MIXTURE["phases"][0]["epoch_rows"]) // 2
        seen += mine
    probabilities = {d: e["row_probability"] for d, e in domains_of(folder).items()}
    assert p_value(seen, probabilities) > LEAST


def test_the_sampler_draws_the_mixture_and_every_row_equally_often(shards: dict[str, Path]):
    made = recipe(shards["domains"], "trainer")
    sampler = made.MixtureSampler(seed=3, epochs=50.0)
    rows = made.load()
    drawn = Counter(sampler)
    names = list(rows["curate_domain"])
    seen = Counter[str]()
    for domain, entry in domains_of(shards["domains"]).items():
        mine = [n for n, name in enumerate(names) if name == domain]
        assert len(mine) == entry["rows"]
        counts = [drawn[n] for n in mine]
        assert max(counts) - min(counts) <= 1
        seen[domain] = sum(counts)
    assert seen.total() == len(sampler) == sampler.total
    probabilities = {d: e["row_probability"] for d, e in domains_of(shards["domains"]).items()}
    assert p_value(seen, probabilities) > LEAST


def test_the_sampler_gives_every_example_the_weight_of_the_plan(shards: dict[str, Path]):
    """Sum of weights over 200 epochs, over what the column has: one number for all, within the
    sampling error of the domains' draws (5 standard errors) and one draw of a row."""
    made = recipe(shards["domains"], "trainer")
    rows = made.load()
    wanted = effective(recipe(shards["column"], "trainer").load().to_list())
    found = Counter[int]()
    keys, weights = list(rows["curate_row"]), list(rows["curate_weight"])
    names = list(rows["curate_domain"])
    for n in made.MixtureSampler(seed=4, epochs=200.0):
        found[keys[n]] += weights[n]
    domains = domains_of(shards["domains"])
    for n, key in enumerate(keys):
        entry = domains[names[n]]
        draws = 200 * made.MIXTURE["phases"][0]["epoch_rows"] * entry["row_probability"]
        error = 5 / draws**0.5 + entry["rows"] / draws + 1e-3
        assert found[key] / 200 == pytest.approx(wanted[key], rel=error)


def test_the_sampler_deals_to_ranks_resumes_and_changes_with_the_epoch(shards: dict[str, Path]):
    made = recipe(shards["domains"], "trainer")
    every = list(made.MixtureSampler(seed=5))
    ranks = [list(made.MixtureSampler(seed=5, rank=r, num_ranks=3)) for r in range(3)]
    whole = len(every) // 3 * 3
    assert [n for group in zip(*ranks, strict=True) for n in group] == every[:whole]
    for start in (0, 7, 100):
        assert list(made.MixtureSampler(seed=5, start=start)) == every[start:]
        rank = list(made.MixtureSampler(seed=5, start=start, rank=1, num_ranks=2))
        assert rank == every[start:][1::2][: (len(every) - start) // 2]
    other = made.MixtureSampler(seed=5, start=9)
    other.set_epoch(1)
    assert len(list(other)) == len(every)
    assert list(other) != every


def test_the_sampler_has_no_limit_of_rows(shards: dict[str, Path], monkeypatch: Any):
    """Beyond 2^24 rows the weighted sampler of torch fails."""
    made = recipe(shards["domains"], "trainer")
    large = {"rows": (1 << 24) + 1, "row_probability": 1.0}
    monkeypatch.setattr(made, "domains", lambda _phase: {"a": large})
    assert 0 <= next(iter(made.MixtureSampler())) <= 1 << 24


@pytest.mark.parametrize("way", WAYS)
def test_webdataset_mixes_the_archives_by_their_probabilities(shards: dict[str, Path], way: str):
    from torch.utils.data import DataLoader

    made = recipe(shards[way], "webdataset_mix")
    domains = domains_of(shards[way])
    seen = Counter[str]()
    for rank in range(2):
        mixed = made.mixed(epochs=3.0, rank=rank, num_ranks=2, num_workers=2)
        loader = DataLoader(mixed, batch_size=None, num_workers=2)
        seen.update(sample["json"]["curate_domain"] for sample in loader)
    assert seen.total() == 3 * made.MIXTURE["phases"][0]["epoch_rows"]
    assert p_value(seen, {d: e["row_probability"] for d, e in domains.items()}) > LEAST
    with pytest.raises(ValueError, match="fewer archives than there are readers"):
        made.mixed(num_ranks=8, num_workers=8)


@pytest.fixture
def torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of the names that its documentation gives."""

    def config(name: str) -> Any:
        class Made:
            def __init__(self, **values: Any) -> None:
                self.__dict__.update(values)

        Made.Config = Made  # pyright: ignore[reportAttributeAccessIssue]
        Made.__name__ = name
        return Made

    names = ("ConcatThenSplitPackingConfig", "DatasetMixConfig", "HuggingFaceRandomAccessSource")
    data = types.ModuleType("torchtitan.components.data")
    for name in (*names, "SingleDatasetConfig", "WeightedDataset"):
        setattr(data, name, config(name))
    texts = types.ModuleType("torchtitan.hf_datasets.text_datasets")
    texts.TextProcessor = config("TextProcessor")  # pyright: ignore[reportAttributeAccessIssue]
    for module in (data, texts):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("torchtitan", "torchtitan.components", "torchtitan.hf_datasets"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.mark.usefixtures("torchtitan")
def test_torchtitan_gets_a_data_set_and_a_weight_for_each_domain(shards: dict[str, Path]):
    folder = shards["domains"]
    parts = recipe(folder, "torchtitan_mix").mix().dataset.datasets
    found = {part.dataset.source.path: part.weight for part in parts}
    wanted = {e["folder"]: e["row_probability"] for e in domains_of(folder).values()}
    assert found == {str(folder / "data" / place): share for place, share in wanted.items()}
    assert parts[0].dataset.processor.text_fn({"text": "words"}) == "words"


@pytest.mark.parametrize("way", WAYS)
def test_axolotl_takes_parts_that_make_the_mixture(shards: dict[str, Path], way: str):
    domains = domains_of(shards[way])
    values = yaml.safe_load((shards[way] / "recipes" / "axolotl.yaml").read_text())
    by_path = {entry["path"]: entry for entry in values["datasets"]}
    for entry in domains.values():
        mine = by_path[f"data/{entry['folder']}"]
        assert (shards[way] / mine["path"]).is_dir()
        assert mine["field"] == "text"
        part = mine.get("weight", 1.0)
        assert 0 < part <= 1
        assert part * values.get("num_epochs", 1.0) == pytest.approx(entry["repeat"], rel=1e-4)


def test_a_recipe_works_where_the_folder_is_moved_to(shards: dict[str, Path], tmp_path: Path):
    moved = shards["column"].rename(tmp_path / "elsewhere")
    try:
        rows = recipe(moved, "trainer").load()
        assert len(rows) == sum(entry["rows"] for entry in domains_of(moved).values())
    finally:
        moved.rename(shards["column"])


def test_sources_whose_columns_differ_are_read_by_what_they_share(tmp_path: Path):
    """One domain of two sources, in which `more` is a number here and a text there."""
    texts = [f"text {row}" for row in range(30)]
    tables = {
        "a": {"x.parquet": pa.table({"text": texts, "more": range(30)})},
        "b": {"y.parquet": pa.table({"text": texts, "more": texts})},
    }
    settings = planned_run(
        tmp_path, tables, lambda source, _f, row: Row("both" if row % 2 else source)
    )
    folder = rewrite(settings)
    rows = recipe(folder, "trainer").load()
    assert len(rows) == 60
    assert "more" not in rows.column_names
    assert {"text", "curate_weight", "curate_domain"} <= set(rows.column_names)
    assert len(list(recipe(folder, "datasets_interleave").mixed())) == 60


@pytest.mark.usefixtures("torchtitan")
def test_each_source_has_its_own_column_of_text(tmp_path: Path):
    """`mine` holds only a's rows, `both` has rows of both."""
    texts = [f"text {row}" for row in range(30)]
    tables = {
        "a": {"x.parquet": pa.table({"body": texts})},
        "b": {"y.parquet": pa.table({"text": texts})},
    }
    settings = planned_run(
        tmp_path,
        tables,
        lambda source, _f, row: Row("mine" if source == "a" and row % 2 else "both"),
        sources={
            "a": {"path": str(tmp_path / "data" / "a"), "text": "body"},
            "b": {"path": str(tmp_path / "data" / "b"), "text": "text"},
        },
    )
    folder = rewrite(settings)
    text_of = recipe(folder, "torchtitan_mix").text_of
    rows = recipe(folder, "trainer").load()
    assert Counter(map(text_of, rows)) == Counter(texts * 2)
    text = (folder / "recipes" / "axolotl.yaml").read_text()
    fields = {entry["path"]: entry["field"] for entry in yaml.safe_load(text)["datasets"]}
    assert fields["data/mine"] == "body"
    assert fields["data/both"] == "body"
    assert "both (body, text)" in " ".join(text.replace("#", "").split())
