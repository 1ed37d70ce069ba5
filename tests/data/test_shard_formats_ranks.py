"""Two ranks with two loader workers each see every row once, with each trainer's own loader."""

import json
import socket
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import webdataset
from data.shards_by_hand import finished, write_by_hand
from datasets.distributed import split_dataset_by_node
from mosaic.environment import needs_mosaic, result, start
from torch.utils.data import DataLoader

from curate.data.example import Source

# Its names are looked up when they are used, unseen by type checkers.
wds: Any = webdataset

READ_MOSAIC = Path(__file__).parents[1] / "mosaic" / "read.py"
ROWS, FILES, RANKS, WORKERS = 100, 8, 2, 2


def numbered(domain: str = "web") -> pa.Table:
    return finished(pa.table({"text": [f"text {row}" for row in range(ROWS)]}), domain=domain)


def rows_of(data: Any) -> list[int]:
    loader: DataLoader[Any] = DataLoader(data, batch_size=None, num_workers=WORKERS)
    return [int(sample["curate_row"]) for sample in loader]


def check_shares(shares: list[list[int]]) -> None:
    """Together everything, once; each about as much."""
    assert sorted(row for share in shares for row in share) == list(range(ROWS))
    assert min(len(share) for share in shares) > ROWS / RANKS / 2


def test_arrow_with_datasets(tmp_path: Path):
    write_by_hand("arrow", tmp_path, numbered(), shards=FILES)
    loaded = datasets.load_from_disk(str(tmp_path / "arrow" / "web"))
    assert isinstance(loaded, datasets.Dataset)
    stream = loaded.to_iterable_dataset(num_shards=FILES)
    check_shares([rows_of(split_dataset_by_node(stream, rank, RANKS)) for rank in range(RANKS)])


def test_json_lines_with_datasets(tmp_path: Path):
    paths = write_by_hand("jsonl", tmp_path, numbered(), shards=FILES)
    files = [str(path) for path in paths]
    stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    check_shares([rows_of(split_dataset_by_node(stream, rank, RANKS)) for rank in range(RANKS)])


# The reader leaves files open.
@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources = {"a": Source(path="x", text="text")}
    paths = write_by_hand("webdataset", tmp_path, numbered(), shards=FILES, sources=sources)
    shares: list[list[int]] = []
    monkeypatch.setenv("WORLD_SIZE", str(RANKS))
    for rank in range(RANKS):
        monkeypatch.setenv("RANK", str(rank))
        data = wds.WebDataset(
            [str(path) for path in paths],
            nodesplitter=wds.split_by_node,
            shardshuffle=False,
        )
        loader = wds.WebLoader(data, batch_size=None, num_workers=WORKERS)
        shares.append([json.loads(sample["json"])["curate_row"] for sample in loader])
    check_shares(shares)


@needs_mosaic
def test_mosaic_streaming(tmp_path: Path):
    paths = write_by_hand("mds", tmp_path, numbered(), shards=FILES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        start(
            READ_MOSAIC,
            "share",
            str(paths[0].parent),
            str(WORKERS),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            MASTER_PORT=port,
            **world,
        )
        for rank in range(RANKS)
    ]
    check_shares([result(process) for process in ranks])


@needs_mosaic
def test_mosaic_streams_are_mixed_in_the_proportions_asked_for(tmp_path: Path):
    folders = {
        domain: write_by_hand("mds", tmp_path, numbered(domain), shards=2, domain=domain)[0].parent
        for domain in ("web", "code", "news")
    }
    shares = {"web": 0.5, "code": 0.3, "news": 0.2}
    parts = [f"{folders[domain]}={share}" for domain, share in shares.items()]
    found = result(start(READ_MOSAIC, "mixed", "200", *parts))
    assert found == {domain: round(200 * share) for domain, share in shares.items()}
