"""Columns and folders of images: every form they come in, and what is wrong with some of them."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.data import images as image_files
from curate.data.columns import resolve_columns
from curate.data.example import Source
from curate.data.images import UnusableImageError, damage_of, decoded, fitted, size_of
from curate.data.index import Indexed, Rules, index_rows
from curate.data.reading import field_frame, read_fields
from curate.data.sources import find_files
from curate.errors import ConfigError, InputError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
RULES = Rules(seed=0, held_out=0.0, num_classes=None, several_sources=False)


def picture(height: int = 5, width: int = 4, mode: str = "RGB", seed: int = 0) -> Any:
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def coded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def index(table: pa.Table, **settings: Any) -> Indexed:
    source = resolve_columns(Source(path="x", **settings), table.schema)
    return index_rows(table, source, name="s", file="f", first_row=0, rules=RULES)


def fields(table: pa.Table, **settings: Any) -> pl.DataFrame:
    return field_frame(table, resolve_columns(Source(path="x", **settings), table.schema))


def reasons(found: Indexed) -> dict[int, tuple[str, str]]:
    rows = found.quarantine.select("row", "reason", "detail").iter_rows()
    return {row: (reason, detail) for row, reason, detail in rows}


# -- image files ----------------------------------------------------------------------------------


def test_a_lossless_file_has_the_pixels_that_went_in():
    image = picture()
    assert np.array_equal(decoded(coded(image), channels=3, size=None), np.asarray(image))
    assert size_of(coded(image)) == (5, 4)
    assert damage_of(coded(image)) is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_wanted_channels(mode: str, channels: int):
    image = picture().convert(mode)
    content = coded(image, "TIFF" if mode == "CMYK" else "PNG")
    found = decoded(content, channels=channels, size=None)
    assert found.shape == (5, 4, channels)
    assert found.dtype == np.uint8
    wanted = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    assert np.array_equal(found.squeeze(), wanted)


def test_sixteen_bits_keep_their_order_where_pillow_would_clip_them():
    deep = np.array([[0, 255, 256], [4096, 32768, 65535]], np.uint16)
    content = coded(Image.fromarray(deep))
    assert decoded(content, channels=1, size=None)[..., 0].tolist() == [[0, 0, 1], [16, 128, 255]]
    assert decoded(content, channels=3, size=None)[0, 2].tolist() == [1, 1, 1]


def test_pixels_without_a_known_range_are_not_guessed():
    content = coded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    assert "mode F" in str(damage_of(content))
    with pytest.raises(UnusableImageError, match="mode F"):
        decoded(content, channels=1, size=None)


def test_a_photograph_is_turned_as_its_notes_say():
    image, exif = picture(6, 3), Image.Exif()
    exif[0x0112] = 6  # turn right
    content = coded(image, "JPEG", exif=exif, quality=100, subsampling=0)
    assert size_of(content) == (3, 6)
    found = decoded(content, channels=3, size=None)
    plain = decoded(coded(image, "JPEG", quality=100, subsampling=0), channels=3, size=None)
    assert np.array_equal(found, np.rot90(plain, -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_that_is_cut_anywhere_is_damaged_or_whole_and_never_an_error(kind: str):
    content = coded(picture(40, 50), kind)
    assert damage_of(content) is None
    for length in range(0, len(content) - 1, max(1, len(content) // 60)):
        damage_of(content[:length])
    assert damage_of(content[: len(content) // 2])
    assert damage_of(b"") == "it is empty"
    assert damage_of(b"no image at all") == "it is no image of a known kind"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_bytes_at_random_places_never_raise_more_than_an_unusable_image(kind: str):
    content = coded(picture(20, 20), kind)
    generator = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(content)
        for place in generator.integers(0, len(broken), 4):
            broken[place] = generator.integers(256)
        if damage_of(bytes(broken)) is None:
            decoded(bytes(broken), channels=3, size=8)


def test_an_image_of_a_billion_pixels_is_refused_before_it_is_decoded():
    content = bytearray(coded(picture()))
    content[16:24] = struct.pack(">II", 40_000, 40_000)  # width and height of the PNG header
    assert damage_of(bytes(content)) is not None


def test_the_largest_centred_square_is_scaled():
    pixels = np.zeros((4, 10, 1), np.uint8)
    pixels[:, 3:5], pixels[:, 5:7] = 100, 200  # the square is columns 3 to 6
    assert fitted(pixels, channels=1, size=2)[..., 0].tolist() == [[114, 186], [114, 186]]
    same = fitted(pixels[:, 3:7], channels=1, size=4)
    assert np.array_equal(same, pixels[:, 3:7])


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_scaled_like_files(channels: int):
    image = picture(9, 12)
    one = decoded(coded(image), channels=channels, size=5)
    other = fitted(np.asarray(image), channels=channels, size=5)
    assert np.abs(one.astype(int) - other).max() <= 1
    floats = fitted(np.asarray(image, np.float32) / 255, channels=channels, size=5)
    assert floats.dtype == np.float32
    assert np.abs(floats * 255 - other).max() <= 1.01


# -- columns --------------------------------------------------------------------------------------

CONTENT = [coded(picture(seed=seed)) for seed in range(3)]
HUB = pa.array([{"bytes": content, "path": None} for content in CONTENT])


@pytest.mark.parametrize("name", ["image", "img"])
@pytest.mark.parametrize(
    "column",
    [
        HUB,
        pa.array(CONTENT),
        pa.array(CONTENT, pa.large_binary()),
        pa.array([{"bytes": content} for content in CONTENT]),
        pa.array([{"path": "a", "bytes": c} for c in CONTENT],
                 pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())])),
    ],
    ids=str,
)  # fmt: skip
def test_image_files_are_known_in_every_type(column: pa.Array, name: str):
    table = pa.table({name: column, "label": [0, 1, 2]})
    found = index(table)
    assert found.quarantine.height == 0
    assert (
        found.examples["content"].to_list()
        == index(pa.table({"image": HUB})).examples["content"].to_list()
    )
    assert found.examples["num_chars"].to_list() == [0, 0, 0]
    assert fields(table)["image"].to_list() == CONTENT


PIXELS = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)


@pytest.mark.parametrize(
    ("pixels", "shape"),
    [
        (PIXELS, None),
        (PIXELS.reshape(2, -1), (3, 4, 3)),
        (PIXELS.transpose(0, 3, 1, 2), None),
        (PIXELS.transpose(0, 3, 1, 2).reshape(2, -1), (3, 3, 4)),
        (PIXELS.reshape(2, 3, 12), (3, 4, 3)),
    ],
)
@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float64])
def test_numbers_become_height_width_and_channels(pixels: Any, shape: Any, kind: Any):
    table = pa.table({"image": pixels.astype(kind).tolist()})
    found = fields(table, image="image", shape=shape)["image"]
    assert found.dtype == pl.Array(pl.UInt8 if kind is not np.float64 else pl.Float32, (3, 4, 3))
    assert np.array_equal(found.to_numpy(), PIXELS)


def test_grey_pixels_get_a_channel_and_fixed_lists_of_datasets_are_read():
    grey = PIXELS[..., 0]
    kind = datasets.Features({"image": datasets.Array2D((3, 4), "uint8")})
    table = datasets.Dataset.from_dict({"image": list(grey)}, features=kind).data.table
    assert np.array_equal(fields(table)["image"].to_numpy(), grey[..., None])
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(grey.ravel()), 12)
    found = fields(pa.table({"image": fixed}), image="image", shape=(3, 4))["image"]
    assert np.array_equal(found.to_numpy(), grey[..., None])


def test_truth_values_are_black_and_white():
    found = fields(pa.table({"image": [[[True, False]]]}))["image"]
    assert found.to_numpy().ravel().tolist() == [255, 0]


def test_each_row_that_cannot_be_used_is_set_aside_with_its_reason():
    rows = [CONTENT[0], None, b"", CONTENT[1][:60], b"text", CONTENT[2]]
    found = reasons(index(pa.table({"image": rows})))
    assert {row: reason for row, (reason, _) in found.items()} == {
        1: "missing_image",
        2: "unreadable_image",
        3: "unreadable_image",
        4: "unreadable_image",
    }
    assert found[2][1] == "it is empty"


def test_pixels_that_cannot_be_used_are_set_aside():
    good = [[1, 2], [3, 4]]
    rows = [good, [[1, 2]], [[1], [2, 3]], None, [[1, 2], [3, None]], [[1, 2], [3, 256]],
            [[0, 0], [-1, 0]], [], good]  # fmt: skip
    found = index(pa.table({"image": pa.array(rows, pa.list_(pa.list_(pa.int32())))}))
    assert set(reasons(found)) == {1, 2, 3, 4, 5, 6, 7}
    assert found.examples["row"].to_list() == [0, 8]
    why = {row: detail for row, (_, detail) in reasons(found).items()}
    assert why[1] == "image: 1 x 2, most images are 2 x 2"
    assert why[2] == "image: its rows differ in length, most images are 2 x 2"
    assert why[5] == why[6] == "image has a pixel outside 0 to 255"
    nan = index(pa.table({"image": [[[0.5, float("nan")]], [[0.5, 0.25]]]}))
    assert reasons(nan) == {0: ("wrong_type", "image has a pixel that is not finite")}


def test_a_list_of_another_length_than_the_shape_is_set_aside():
    table = pa.table({"x": [[1, 2, 3, 4], [1, 2, 3], [5, 6, 7, 8]]})
    found = reasons(index(table, image="x", shape=(2, 2)))
    assert found == {1: ("wrong_type", "x has 3 numbers, 2 x 2 are 4")}


def test_lists_of_another_depth_than_an_image_are_told():
    with pytest.raises(InputError, match="one list of numbers"):
        index(pa.table({"x": [[1, 2]]}), image="x")
    with pytest.raises(InputError, match="4 lists in each other"):
        index(pa.table({"x": [[[[[1]]]]]}), image="x")
    with pytest.raises(InputError, match="to be the image"):
        index(pa.table({"x": [1.5]}), image="x")
    with pytest.raises(ConfigError, match="no image's"):
        Source(path="x", image="x", shape=(4, 4, 7))
    found = index(pa.table({"x": [np.ones((5, 5, 5), int).tolist()]}), image="x")
    assert reasons(found)[0] == ("wrong_type", "x is 5 x 5 x 5: no image")


def test_a_text_goes_before_the_image_beside_it():
    table = pa.table({"text": ["a"], "image": CONTENT[:1]})
    assert list(fields(table).columns) == ["text"]
    assert list(fields(table, image="image").columns) == ["image"]


def test_content_tells_images_apart_by_their_bytes():
    table = pa.table({"image": [CONTENT[0], CONTENT[1], CONTENT[0]]})
    first, second, third = index(table).examples["content"]
    assert first == third != second


# -- paths ----------------------------------------------------------------------------------------


def settings(tmp_path: Path, data: Path, **source: Any) -> Settings:
    values = {"run": str(tmp_path / "run"), "sources": {"s": {"path": str(data), **source}},
              "index": {"held_out": 0.0, "max_bad_rows": 1.0}}  # fmt: skip
    return parse_settings(values)


def read(chosen: Settings) -> pl.DataFrame:
    from curate.data.layout import RunFolder

    index_run(chosen, pool=INLINE)
    run = RunFolder(Path(chosen.run))
    found = [read_fields(run, part, chosen.sources["s"]) for part in run.partitions()]
    return pl.concat(found)


@pytest.mark.parametrize("form", ["parquet text", "parquet struct", "jsonl", "jsonl in a folder"])
def test_paths_are_relative_to_the_file_that_names_them(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "data" / "part"
    (folder / "pictures").mkdir(parents=True)
    for number in (0, 1):
        (folder / "pictures" / f"{number}.png").write_bytes(CONTENT[number])
    paths = ["pictures/0.png", "pictures/none.png", str(folder / "pictures" / "1.png")]
    data = folder / ("list.parquet" if "parquet" in form else "list.jsonl")
    if form == "parquet struct":
        rows = [{"bytes": None, "path": path} for path in paths]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"image": pa.array(rows, kind)}), data)
    elif form == "parquet text":
        pq.write_table(pa.table({"image": paths}), data)
    else:
        data.write_text("".join(json.dumps({"image": path}) + "\n" for path in paths))
    if form == "jsonl in a folder":
        data = tmp_path / "data"
        monkeypatch.chdir(tmp_path)
    source = {"include": "**/*.jsonl"} if form == "jsonl in a folder" else {}
    chosen = settings(tmp_path, data, image="image", **source)
    assert read(chosen)["image"].to_list() == [CONTENT[0], CONTENT[1]]
    aside = pl.read_parquet(tmp_path / "run" / "quarantine" / "*.parquet")
    assert aside.select("row", "reason").rows() == [(1, "missing_image")]
    assert "pictures/none.png" in aside["detail"][0]


def test_a_relative_path_without_a_file_is_set_aside():
    found = reasons(index(pa.table({"image": ["a.png"]}), image="image"))
    assert found == {0: ("missing_image", "a.png is relative to no folder")}


# -- folders --------------------------------------------------------------------------------------


def write_folder(root: Path, *, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    for at, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            content = coded(picture(seed=100 * at + number))
            (root / name / f"{number}.png").write_bytes(content)
    return root


def test_a_folder_of_folders_is_a_labelled_data_set(tmp_path: Path):
    root = write_folder(tmp_path / "pets")
    (root / "dog" / "broken.JPG").write_bytes(coded(picture(40, 40), "JPEG")[:300])
    (root / ".hidden.png").write_bytes(b"")
    found = read(settings(tmp_path, root))
    wanted = {path.read_bytes(): int(path.parent.name == "dog") for path in root.glob("*/*.png")}
    assert dict(zip(found["image"], found["label"], strict=True)) == wanted
    aside = pl.read_parquet(tmp_path / "run" / "quarantine" / "*.parquet")
    assert aside["reason"].to_list() == ["unreadable_image"]
    assert aside["detail"][0].startswith("broken.JPG: ")
    (copy,) = (tmp_path / "run" / "examples" / "data").rglob("*.parquet")
    features = datasets.Features.from_arrow_schema(pq.read_schema(copy))
    assert features["label"] == datasets.ClassLabel(names=["cat", "dog"])
    assert isinstance(features["image"], datasets.Image)


def test_classes_are_mixed_and_named_in_the_order_of_the_settings(tmp_path: Path):
    root = write_folder(tmp_path / "pets", each=20)
    found = read(settings(tmp_path, root, classes=["dog", "cat"]))
    labels = found["label"].to_list()
    assert sorted(labels) == [0] * 20 + [1] * 20
    assert (np.diff(labels) != 0).sum() > 5
    dogs = {path.read_bytes() for path in (root / "dog").iterdir()}
    assert all((image in dogs) == (label == 0) for image, label in found.rows())
    with pytest.raises(InputError, match="the folder cat is none of the classes dog"):
        find_files("s", Source(path=str(root), classes=("dog",)))


def test_a_large_folder_is_several_tables_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("curate.data.formats.images._TABLE_IMAGES", 8)
    root = write_folder(tmp_path / "pets", each=12)
    chosen = settings(tmp_path, root)
    assert len(find_files("s", chosen.sources["s"])) == 4
    found = read(chosen)
    wanted = sorted(path.read_bytes() for path in root.rglob("*.png"))
    assert sorted(found["image"].to_list()) == wanted


def test_a_changed_or_a_new_image_is_noticed(tmp_path: Path):
    root = write_folder(tmp_path / "pets")
    source = Source(path=str(root))
    (before,) = find_files("s", source)
    assert before == find_files("s", source)[0]
    (root / "cat" / "9.png").write_bytes(CONTENT[0])
    (after,) = find_files("s", source)
    assert before.stamp != after.stamp


def test_images_of_one_folder_have_no_label(tmp_path: Path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(CONTENT[0])
    found = read(settings(tmp_path, tmp_path / "flat"))
    assert found.rows() == [(CONTENT[0], None)]


def test_include_chooses_among_the_images_of_a_folder(tmp_path: Path):
    root = write_folder(tmp_path / "pets", classes=("train/cat", "train/dog", "test/cat"))
    assert read(settings(tmp_path, root, include="train/**")).height == 6


@pytest.mark.parametrize("path", ["pets/cat/0.png", "pets/*/*.png"])
def test_images_are_named_by_their_folder(tmp_path: Path, path: str):
    write_folder(tmp_path / "pets")
    with pytest.raises(InputError, match="read by the folder"):
        find_files("s", Source(path=str(tmp_path / path)))


def test_other_files_in_the_folder_are_left_out_on_request(tmp_path: Path):
    root = write_folder(tmp_path / "pets")
    (root / "notes.txt").write_text("about")
    with pytest.raises(InputError, match="mixes formats"):
        find_files("s", Source(path=str(root)))
    assert read(settings(tmp_path, root, format="images")).height == 6


def test_without_pillow_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    import sys

    from curate.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match="Pillow"):
        image_files.size_of(CONTENT[0])
