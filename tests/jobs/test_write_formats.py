"""One plan in all formats at once: every loader finds the rows of the plan, and a kill at any
moment leaves nothing that a rerun does not bring to the same bytes."""

import dataclasses
import gc
import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import webdataset
from data.planned_run import Row, Tables, planned_run
from data.shards_by_hand import all_types
from mosaic.environment import needs_mosaic, result, start
from tiny_models import byte_tokenizer

from curate.config import plain, to_yaml
from curate.data.shard_folder import DamageError
from curate.data.shard_formats import FORMATS
from curate.errors import CurateError
from jobs.cluster import open_pool
from jobs.settings import Settings
from jobs.verify import verify_shards
from jobs.write import write_run

wds: Any = webdataset
READ_MOSAIC = Path(__file__).parents[1] / "mosaic" / "read.py"
TEXTS = tuple(name for name in FORMATS if name not in ("packed", "megatron"))

TABLES: Tables = {
    "news": {"x.parquet": all_types(120, nulls=True)},
    "forum": {"y.parquet": all_types(60, nulls=False)},
}
DOMAINS = ("forum", "news-even", "news-odd")


def decide(source: str, _file: str, row: int) -> Row | None:
    if row % 11 == 10:
        return None
    domain = "forum" if source == "forum" else f"news-{'odd' if row % 2 else 'even'}"
    return Row(domain, copies=row % 3, weight=0.5 + row % 2)


def wanted() -> Counter[tuple[str, int, str, float]]:
    found = Counter[tuple[str, int, str, float]]()
    for source, files in TABLES.items():
        for file, table in files.items():
            for row in range(table.num_rows):
                decided = decide(source, file, row)
                if decided is not None and decided.copies:
                    assert isinstance(decided.copies, int)
                    found[source, row, decided.domain, decided.weight] += decided.copies
    return found


def counted(rows: Iterable[Any]) -> Counter[tuple[str, int, str, float]]:
    names = ("source", "row", "domain", "weight")
    return Counter(tuple(row[f"curate_{name}"] for name in names) for row in rows)


def settings_of(root: Path, formats: Iterable[str] = TEXTS, **shards: Any) -> Settings:
    values: dict[str, Any] = {"format": list(formats), "size_mb": 0.02, **shards}
    if set(formats) - set(TEXTS):
        byte_tokenizer().save_pretrained(str(root / "tokenizer"))
        values["packing"] = {"length": 256, "tokenizer": str(root / "tokenizer")}
    settings = planned_run(root, TABLES, decide, shards=values)
    sources = {
        name: dataclasses.replace(source, text="text", image="image")
        for name, source in settings.sources.items()
    }
    return dataclasses.replace(settings, sources=sources)


def write(settings: Settings) -> Path:
    with open_pool(settings.cluster) as pool:
        write_run(settings, pool=pool)
    return Path(settings.run) / "shards"


def snapshot(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(settings_of(tmp_path_factory.mktemp("written"), FORMATS))


def test_every_format_has_a_folder_and_the_manifest_knows_every_file(folder: Path):
    files = set(snapshot(folder))
    roots = {"parquet": "data"}
    assert {roots.get(name, name) for name in FORMATS} <= {file.split("/")[0] for file in files}
    text = (folder / "manifest.json").read_text()
    # The card is the user's to change.
    assert {file for file in files if f'"{file}"' not in text} == {"manifest.json", "README.md"}
    assert verify_shards(folder)["rows"] == sum(wanted().values())


@pytest.mark.parametrize("domain", DOMAINS)
def test_datasets_finds_the_rows_in_arrow_json_and_parquet(
    folder: Path, domain: str, tmp_path: Path
):
    rows = Counter({row: copies for row, copies in wanted().items() if row[2] == domain})
    arrow = datasets.load_from_disk(str(folder / "arrow" / domain))
    assert isinstance(arrow, datasets.Dataset)
    assert isinstance(arrow.features["image"], datasets.Image)
    parquet = pq.read_table(sorted((folder / "data" / domain).glob("*.parquet")))
    mapped: Any = arrow.with_format("arrow")[:]
    assert mapped.to_pylist() == parquet.to_pylist()
    assert counted(parquet.to_pylist()) == rows
    lines = [str(path) for path in sorted((folder / "jsonl" / domain).iterdir())]
    streamed = datasets.load_dataset(
        "json", data_files=lines, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    assert counted(streamed) == rows


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_webdataset_finds_the_rows(folder: Path):
    files = [str(path) for path in sorted((folder / "webdataset").rglob("*.tar"))]
    samples = list(wds.WebDataset(files, shardshuffle=False))
    assert counted(json.loads(sample["json"]) for sample in samples) == wanted()
    for sample in samples:
        row = json.loads(sample["json"])
        table = TABLES[row["curate_source"]][row["curate_file"]]
        original = table.slice(row["curate_row"], 1).to_pylist()[0]
        assert sample["txt"].decode() == original["text"]
        assert sample["png"] == original["image"]["bytes"]


@needs_mosaic
def test_mosaic_streaming_finds_the_rows(folder: Path):
    folders = [str(folder / "mds" / domain) for domain in DOMAINS]
    found = result(start(READ_MOSAIC, "samples", *folders))
    rows = [
        {name: value for name, (_, value, *_) in sample.items()}
        for samples in found.values()
        for sample in samples
    ]
    assert counted(rows) == wanted()


@pytest.mark.parametrize("name", TEXTS)
def test_a_flipped_byte_a_missing_file_and_a_lost_document_are_found(folder: Path, name: str):
    root = folder / {"parquet": "data"}.get(name, name)
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    for path in (files[0], files[-1]):
        whole = path.read_bytes()
        half = len(whole) // 2
        try:
            path.write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])
            with pytest.raises(DamageError, match=path.name):
                verify_shards(folder)
            path.unlink()
            with pytest.raises(DamageError, match="missing"):
                verify_shards(folder)
        finally:
            path.write_bytes(whole)


def test_a_format_that_is_no_longer_asked_for_goes(tmp_path: Path):
    both = settings_of(tmp_path, ["parquet", "jsonl", "mds"])
    first = snapshot(write(both))
    one = dataclasses.replace(both, shards=dataclasses.replace(both.shards, format="jsonl"))
    left = snapshot(write(one))
    assert {file.split("/")[0] for file in left if "/" in file} - {"recipes"} == {"jsonl"}
    assert all(first[file] == left[file] for file in left if file.startswith("jsonl/"))


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_cannot_grow_names_itself_and_leaves_nothing(tmp_path: Path, name: str):
    settings = settings_of(tmp_path, [name], size_mb=100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        with pytest.raises(CurateError, match=r"shard .* could not be written"):
            write(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    gc.collect()
    assert [path for path in (Path(settings.run) / "shards").rglob("*") if path.is_file()] == []


DYING = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import curate.data.shard_writer as writer
from curate.config import read_yaml
from curate.data.shard_formats import FORMATS, open_format
from jobs.cluster import open_pool
from jobs.settings import parse_settings
from jobs.write import write_run
calls = 0
def dying(original):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)
    return call
writer.publish = dying(writer.publish)
opening = writer.open_format
class Dying:
    def __init__(self, layout):
        self._layout = layout
    def open(self, *args):
        sink = self._layout.open(*args)
        return DyingSink(sink)
    def __getattr__(self, name):
        return getattr(self._layout, name)
class DyingSink:
    def __init__(self, sink):
        self.write, self.close = dying(sink.write), dying(sink.close)
        self.discard = sink.discard
writer.open_format = lambda name: Dying(opening(name))
settings = parse_settings(read_yaml(open({config!r}).read(), where="test"))
with open_pool(settings.cluster) as pool:
    write_run(settings, pool=pool)
print(calls)
"""


def test_killed_at_any_moment_a_rerun_gives_the_same_bytes(folder: Path, tmp_path: Path):
    settings = settings_of(tmp_path, FORMATS)
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(plain(settings)))
    shards = Path(settings.run) / "shards"
    whole = snapshot(folder)
    for call in (40, 9):
        script = DYING.format(tests=str(Path(__file__).parents[1]), call=call, config=str(config))
        died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert died.returncode == -9, died.stderr + died.stdout
        left = snapshot(shards)
        assert "manifest.json" not in left
        # Whatever has a name is whole.
        assert all(whole[file] == left[file] for file in left if not file.endswith(".tmp"))
    write(settings)
    assert snapshot(shards) == whole
