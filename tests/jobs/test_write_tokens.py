"""`curate write` with the formats of tokens, from the plan to the files."""

import json
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.planned_run import Row, planned_run
from tiny_models import byte_tokenizer

from curate.data.files import digest_file
from curate.data.shard_folder import check_shards
from curate.errors import ConfigError
from jobs.cluster import open_pool
from jobs.settings import Settings
from jobs.write import plan_write, write_run

TABLES = {
    "web": {
        "a.parquet": pa.table({"text": [f"the {n} in {'x' * (7 * n % 50)}" for n in range(60)]})
    },
    "chat": {
        "b.parquet": pa.table(
            {"prompt": [f"a {n}?" for n in range(40)], "response": ["the " * n for n in range(40)]}
        )
    },
}


def decide(source: str, _: str, row: int) -> Row:
    return Row(source, copies=row % 3)


def settings_of(root: Path, **shards: Any) -> Settings:
    place = root / "tokenizer"
    byte_tokenizer().save_pretrained(str(place))
    shards = {
        "format": ["parquet", "packed", "megatron"],
        "packing": {"length": 32, "tokenizer": str(place)},
        **shards,
    }
    return planned_run(root, TABLES, decide, shards=shards)


def write(settings: Settings) -> dict[str, Any]:
    with open_pool(settings.cluster) as pool:
        return write_run(settings, pool=pool)


def tokens_of(row: dict[str, Any], tokenizer: Any) -> list[int]:
    texts = [row["text"]] if row["text"] is not None else [row["prompt"], row["response"]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [tokenizer.bos_token_id, *chain.from_iterable(ids), tokenizer.eos_token_id]


def indexed(path: Path) -> list[list[int]]:
    """The documents of a Megatron file, by its index."""
    index = path.with_suffix(".idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    starts = np.append(0, np.frombuffer(index, "<i4", count, 34).cumsum())
    ids = np.fromfile(path, "<u2")
    return [ids[a:b].tolist() for a, b in pairwise(starts)]


@pytest.mark.parametrize("order", ["input", "shuffled", "domain-interleaved"])
def test_tokens_are_those_of_the_rows_beside_them(tmp_path: Path, order: str):
    settings = settings_of(tmp_path, order=order)
    summary = write(settings)
    shards = Path(settings.run) / "shards"
    manifest = json.loads((shards / "manifest.json").read_text())
    tokenizer = byte_tokenizer()
    seen = 0
    for entry in manifest["shards"]:
        if entry["format"] != "parquet":
            continue
        room, _, rest = entry["file"].partition("/")
        assert room == "data"
        rows = pq.read_table(shards / entry["file"]).to_pylist()
        expected = [tokens_of({"text": None, **row}, tokenizer) for row in rows]
        assert indexed(shards / "megatron" / Path(rest).with_suffix(".bin")) == expected
        packed = pq.read_table(shards / "packed" / rest).to_pylist()
        flat = [token for row in packed for token in row["input_ids"][: row["num_tokens"]]]
        assert flat == [token for ids in expected for token in ids]
        seen += len(rows)
    assert seen == summary["rows"] == 99
    assert check_shards(shards)["rows"] == seen
    assert write(settings)["done"] == 0


def test_another_tokenizer_is_another_result_and_its_place_is_not(tmp_path: Path):
    settings = settings_of(tmp_path)
    write(settings)
    shards = Path(settings.run) / "shards"
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    moved = settings_of(tmp_path / "again")
    assert (
        plan_write(settings_with(settings, tmp_path / "elsewhere")).done
        == plan_write(settings_with(settings, tmp_path / "elsewhere")).total
    )
    before = digest_file(shards / "manifest.json")
    write(moved)
    assert digest_file(Path(moved.run) / "shards" / "manifest.json") == before
    byte_tokenizer(merges=False).save_pretrained(str(tmp_path / "elsewhere"))
    other = settings_with(settings, tmp_path / "elsewhere")
    assert plan_write(other).done == 0
    write(other)
    assert digest_file(shards / "manifest.json") != before


def settings_with(settings: Settings, place: Path) -> Settings:
    from curate.config import plain
    from jobs.settings import parse_settings

    values = plain(settings)
    values["shards"]["packing"]["tokenizer"] = str(place)
    return parse_settings(values)


def test_a_plan_writes_no_tokenizer_and_refusals_come_before_the_first_file(tmp_path: Path):
    settings = settings_of(tmp_path)
    assert plan_write(settings).done == 0
    assert not (Path(settings.run) / "shards.tokenizer").exists()
    images = pa.table({"image": [[[1, 2], [3, 4]]] * 3})
    place = {"tokenizer": str(tmp_path / "tokenizer")}
    refused = planned_run(
        tmp_path / "images", {"web": {"a.parquet": images}}, decide,
        shards={"format": "packed", "packing": place},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="has image"):
        write(refused)
    assert not (Path(refused.run) / "shards").exists()


@pytest.mark.parametrize("way", ["column", "copies"])
def test_weights_that_tokens_cannot_hold_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str
):
    place = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(str(place))
    shards = {
        "format": ["parquet", "packed", "megatron"],
        "weights": way,
        "packing": {"length": 32, "tokenizer": str(place)},
    }
    settings = planned_run(
        tmp_path, TABLES, lambda s, _f, row: Row(s, weight=1.5 if row % 4 else 1.0), shards=shards
    )
    write(settings)
    told = [r.getMessage() for r in caplog.records if "--weights copies" in r.getMessage()]
    # 45 of 60 rows and 30 of 40 do not weigh 1.
    begins = "75 rows of weight other than 1"
    assert [text[: len(begins)] for text in told] == ([begins] if way == "column" else [])
    card = (Path(settings.run) / "shards" / "README.md").read_text()
    assert ("the 75 rows that do not weigh 1 are lost" in card) == (way == "column")
