"""Each format, loaded by its own library: every value of every type comes back as the page of
formats says, and the same rows give the same bytes."""

import base64
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from data.shards_by_hand import all_types, finished, picture, write_by_hand
from mosaic.environment import needs_mosaic, result, start
from PIL import Image

from curate.data.example import Source
from curate.data.shard_formats import open_format

# Its names are looked up when they are used, unseen by type checkers.
wds: Any = webdataset

READ_MOSAIC = Path(__file__).parents[1] / "mosaic" / "read.py"
DATA = os.environ.get("CURATE_DATA")
KINDS = ("PNG", "JPEG", "WEBP", "GIF")
FORMATS = ("arrow", "jsonl", "mds", "webdataset")
SOURCES = {"a": Source(path="x", text="text", image="image")}
leaves_files_open = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
"""What WebDataset does with every tar file."""
both = pytest.mark.parametrize("nulls", [False, True], ids=["full", "nulls"])


def as_json(value: Any) -> Any:
    """A value as the JSON of a shard has it."""
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [as_json(part) for part in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def json_rows(table: pa.Table) -> list[dict[str, Any]]:
    return [as_json(row) for row in table.to_pylist()]


@both
def test_datasets_opens_arrow_shards_from_disk(tmp_path: Path, nulls: bool):
    table = finished(all_types(40, nulls=nulls))
    write_by_hand("arrow", tmp_path, table, shards=3)
    loaded = datasets.load_from_disk(str(tmp_path / "arrow" / "web"))
    assert isinstance(loaded, datasets.Dataset)
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded.features["label"].names == ["cat", "dog", "cow"]
    assert loaded[3]["image"].getpixel((0, 0)) == 3
    stored: Any = loaded.with_format("arrow")[:]
    assert stored.to_pylist() == table.to_pylist()
    assert loaded.select(range(2)).cast_column("image", datasets.Image(decode=False))[0][
        "image"
    ] == {"bytes": picture("PNG", 0), "path": "0.png"}


@both
def test_json_lines_hold_every_value(tmp_path: Path, nulls: bool):
    table = finished(all_types(40, nulls=nulls))
    paths = write_by_hand("jsonl", tmp_path, table, shards=2)
    out = b"".join(
        subprocess.run(["zstdcat", path], capture_output=True, check=True).stdout for path in paths
    )
    assert [json.loads(line) for line in out.split(b"\n")[:-1]] == json_rows(table)


def test_datasets_reads_json_lines(tmp_path: Path):
    table = finished(all_types(40, nulls=True)).drop_columns(["raw", "nested"])
    paths = write_by_hand("jsonl", tmp_path, table, shards=2, row_groups=3)
    streamed = datasets.load_dataset(
        "json", data_files=[str(path) for path in paths], split="train", streaming=True
    )
    rows = list(streamed)
    assert [row["text"] for row in rows] == table.column("text").to_pylist()
    assert [row["maybe_count"] for row in rows] == table.column("maybe_count").to_pylist()
    loaded = datasets.load_dataset(
        "json",
        data_files=[str(path) for path in paths],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert isinstance(loaded, datasets.Dataset)
    assert loaded["text"][:] == table.column("text").to_pylist()
    assert loaded["messages"][:] == table.column("messages").to_pylist()


@leaves_files_open
@both
def test_webdataset_and_tar_read_text_image_and_the_rest(tmp_path: Path, nulls: bool):
    table = finished(all_types(40, nulls=nulls))
    paths = write_by_hand("webdataset", tmp_path, table, shards=2, sources=SOURCES)
    reader = wds.WebDataset([str(path) for path in paths], shardshuffle=False)
    found = list(reader.decode("pil"))
    assert len({sample["__key__"] for sample in found}) == 40
    for sample, row, whole in zip(found, json_rows(table), table.to_pylist(), strict=True):
        assert sample["txt"] == row.pop("text")
        assert sample["png"].getpixel((0, 0)) == (whole["curate_row"],) * 3
        row["image"].pop("bytes")
        assert sample["json"] == row
    for path in paths:
        subprocess.run(["tar", "tf", path], capture_output=True, check=True)


@leaves_files_open
def test_each_image_of_a_tar_has_the_suffix_of_what_it_is(tmp_path: Path):
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
    files = [{"bytes": picture(kind, 9), "path": None} for kind in kinds]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    one = pa.table({"picture": pa.array([*files, None], image)})
    (path,) = write_by_hand("webdataset", tmp_path / "one", finished(one))
    samples = list(wds.WebDataset(str(path), shardshuffle=False))
    for sample, suffix, file in zip(
        samples, ("png", "jpg", "webp", "gif", "bmp"), files, strict=False
    ):
        assert sample[suffix] == file["bytes"]
        assert json.loads(sample["json"])["picture"] == {"path": None}
    assert {name for name in samples[-1] if not name.startswith("_")} == {"json"}
    assert json.loads(samples[-1]["json"])["picture"] is None
    two = one.append_column("A/b.c", one.column("picture"))
    (path,) = write_by_hand("webdataset", tmp_path / "two", finished(two))
    first = next(iter(wds.WebDataset(str(path), shardshuffle=False)))
    assert first["picture.png"] == first["a_b_c.png"] == files[0]["bytes"]


@leaves_files_open
def test_the_text_of_a_tar_is_the_column_that_the_row_s_source_names(tmp_path: Path):
    rows = finished(pa.table({"text": ["t0", "t1", "t2"], "body": ["b0", "b1", "b2"]}))
    at = rows.column_names.index("curate_source")
    mixed = rows.set_column(at, rows.field(at), pa.array(["a", "b", "none"]))
    sources = {"a": Source(path="x", text="text"), "b": Source(path="y", text="body")}
    (path,) = write_by_hand("webdataset", tmp_path, mixed, sources=sources, row_groups=1)
    a, b, none = wds.WebDataset(str(path), shardshuffle=False)
    assert (a["txt"], b["txt"]) == (b"t0", b"b1")
    assert json.loads(a["json"])["body"] == "b0"
    assert "text" not in json.loads(a["json"])
    assert "txt" not in none
    assert json.loads(none["json"])["text"] == "t2"


@pytest.fixture(scope="module")
def mosaic_found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What Mosaic Streaming finds, all asked at once: it takes seconds to start."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "mixed": [picture(kind, 9) for kind in KINDS],
        "shots": [picture("JPEG", shade) for shade in range(4)],
        "sounds": [b"RIFF....WAVE"] * 4,
    }
    images = {
        name: pa.array([{"bytes": file, "path": None} for file in files], image)
        for name, files in columns.items()
    }
    tables = {
        "full": finished(all_types(40, nulls=False)),
        "nulls": finished(all_types(40, nulls=True)),
        "images": finished(pa.table(images)),
    }
    roots = {name: tmp_path_factory.mktemp(name) for name in tables}
    for name, table in tables.items():
        write_by_hand("mds", roots[name], table, shards=3)
    folders = {name: str(root / "mds" / "web") for name, root in roots.items()}
    found = result(start(READ_MOSAIC, "samples", *folders.values()))
    return {name: found[folder] for name, folder in folders.items()}


@needs_mosaic
@both
def test_mosaic_streaming_reads_its_shards(
    mosaic_found: dict[str, list[dict[str, Any]]], nulls: bool
):
    table = finished(all_types(40, nulls=nulls))
    found = mosaic_found["nulls" if nulls else "full"]
    for sample, row, whole in zip(found, json_rows(table), table.to_pylist(), strict=True):
        number = whole["curate_row"]
        wanted = {name: [type(value).__name__, value] for name, value in row.items()}
        wanted |= {
            "image": ["image", "PNG", [6, 4], number],
            "raw": ["bytes", whole["raw"].hex()],
            "fixed": ["array", "int16", row["fixed"]],
            "label": ["int64", row["label"]],
            "small": ["uint8", row["small"]],
            "ratio": ["float64", row["ratio"]],
            "curate_row": ["int64", number],
            "curate_weight": ["float32", row["curate_weight"]],
        }
        if not nulls:
            wanted |= {
                "maybe_numbers": ["array", "float32", row["maybe_numbers"]],
                "maybe_count": ["int64", row["maybe_count"]],
                "maybe_price": ["Decimal", row["maybe_price"]],
            }
        assert sample == wanted


@needs_mosaic
def test_mosaic_streaming_opens_images_of_several_kinds(
    mosaic_found: dict[str, list[dict[str, Any]]],
):
    found = mosaic_found["images"]
    assert [sample["mixed"][1] for sample in found] == list(KINDS)
    assert [sample["shots"][1] for sample in found] == ["JPEG"] * 4
    assert [sample["sounds"] for sample in found] == [["bytes", b"RIFF....WAVE".hex()]] * 4


@needs_mosaic
@leaves_files_open
@pytest.mark.skipif(DATA is None, reason="needs real data: set CURATE_DATA to its folder")
def test_real_images_kept_as_bytes_are_images_to_every_loader(tmp_path: Path):
    """Photographs of hands and scanned digits, whose column the settings call the image."""
    sources = {"a": Source(path="x", image="image")}
    wanted: dict[str, list[Any]] = {}
    for name, suffix in (("sign_digits", "jpg"), ("mnist", "png")):
        table = finished(pq.read_table(Path(str(DATA)) / name / "train.parquet").slice(0, 60))
        files = table.column("image").to_pylist()
        root = tmp_path / name
        tars = write_by_hand("webdataset", root, table, shards=2, sources=sources)
        samples = list(wds.WebDataset([str(path) for path in tars], shardshuffle=False))
        assert [sample[suffix] for sample in samples] == files
        others = json_rows(table.drop_columns(["image"]))
        assert [json.loads(sample["json"]) for sample in samples] == others
        write_by_hand("mds", root, table, shards=2, sources=sources)
        shown = [Image.open(io.BytesIO(file)) for file in files]
        wanted[str(root / "mds" / "web")] = [
            ["image", image.format, list(image.size), image.getpixel((0, 0))] for image in shown
        ]
    found = result(start(READ_MOSAIC, "samples", *wanted))
    for folder, images in wanted.items():
        assert [sample["image"] for sample in found[folder]] == json.loads(json.dumps(images))


@leaves_files_open
@pytest.mark.skipif(DATA is None, reason="needs real data: set CURATE_DATA to its folder")
def test_real_texts_in_many_scripts_come_back(tmp_path: Path):
    table = finished(pq.read_table(Path(str(DATA)) / "udhr" / "train.parquet"))
    rows = json_rows(table)
    for name in ("arrow", "jsonl", "webdataset"):
        write_by_hand(name, tmp_path, table, shards=3, row_groups=3, sources=SOURCES)
    loaded: Any = datasets.load_from_disk(str(tmp_path / "arrow" / "web"))
    assert loaded.with_format("arrow")[:].equals(table)
    lines = [str(path) for path in sorted((tmp_path / "jsonl" / "web").iterdir())]
    streamed = datasets.load_dataset("json", data_files=lines, split="train", streaming=True)
    assert list(streamed) == rows
    urls = [str(path) for path in sorted((tmp_path / "webdataset" / "web").iterdir())]
    for sample, row in zip(wds.WebDataset(urls, shardshuffle=False), rows, strict=True):
        assert {"text": sample["txt"].decode(), **json.loads(sample["json"])} == row


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, name: str):
    table = finished(all_types(40, nulls=True))
    once = write_by_hand(name, tmp_path / "once", table, shards=3, sources=SOURCES)
    # Chunked otherwise, and with memory that lies elsewhere.
    parts = pa.concat_tables([table.slice(at, 7) for at in range(0, 40, 7)])
    twice = write_by_hand(name, tmp_path / "twice", parts, shards=3, sources=SOURCES)
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in twice]
    beside = [sorted(path.parent.glob("*.json")) for path in (once[0], twice[0])]
    assert [file.read_bytes() for file in beside[0]] == [file.read_bytes() for file in beside[1]]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_off_is_noticed_when_its_rows_are_counted(tmp_path: Path, name: str):
    table = finished(all_types(40, nulls=False))
    (path,) = write_by_hand(name, tmp_path, table, row_groups=4, sources=SOURCES)
    layout = open_format(name)
    whole = path.read_bytes()
    assert layout.count_rows([path]) == 40
    # Behind the end-of-archive mark of a tar there are only zeros, which nobody misses.
    ends = {len(whole) * share // 100 for share in (0, 1, 10, 33, 50, 75, 90)}
    # A stream without the mark at its end, which Arrow takes for a whole one; a tar without it.
    ends.add(len(whole) - 8 if name == "arrow" else len(whole.rstrip(b"\0")) - 1)
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises((OSError, pa.ArrowException)):
            layout.count_rows([path])


@pytest.mark.parametrize("name", FORMATS)
def test_every_file_matches_the_pattern_of_its_format(tmp_path: Path, name: str):
    import re

    table = finished(all_types(6, nulls=False))
    write_by_hand(name, tmp_path, table, shards=2, row_groups=1)
    write_by_hand(name, tmp_path, table, shards=1, phase=2)
    write_by_hand(name, tmp_path, table, shards=1, domain="")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        assert re.fullmatch(open_format(name).pattern, path.relative_to(tmp_path).as_posix())


@pytest.mark.parametrize("name", FORMATS)
def test_a_sink_that_is_let_go_of_leaves_nothing_open(tmp_path: Path, name: str):
    from curate.data.shard_formats.sink import Context
    from curate.data.shard_settings import Shards

    table = finished(all_types(6, nulls=False))
    path = tmp_path / ".train-00000-of-00001.x.1.tmp"
    sink = open_format(name).open([path], table.schema, Context(Shards(), SOURCES, None))
    sink.write(table)
    sink.discard()
    sink.discard()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
