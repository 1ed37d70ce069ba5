"""Loads shards with Mosaic Streaming and prints what it found, as JSON.

read.py samples FOLDER            folder -> its samples, each value with its type
read.py share FOLDER WORKERS      the numbers of the rows that this rank sees in an epoch
read.py mixed SAMPLES FOLDER=PROPORTION...   how many samples of each domain come
"""

# pyright: reportMissingImports=false

import collections
import json
import sys
from typing import Any


def described(value: Any) -> Any:
    import numpy as np
    from PIL import Image

    if isinstance(value, Image.Image):
        return ["image", value.format, list(value.size), value.getpixel((0, 0))]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), value.tolist()]
    if isinstance(value, np.generic):
        return [str(value.dtype), value.item()]
    if isinstance(value, str | int | float | bool | list | dict | None):
        return [type(value).__name__, value]
    return [type(value).__name__, str(value)]


def samples(*folders: str) -> Any:
    from streaming import LocalDataset

    found: dict[str, Any] = {}
    for folder in folders:
        data = LocalDataset(folder)
        rows = (data[at] for at in range(len(data)))
        found[folder] = [{name: described(value) for name, value in row.items()} for row in rows]
    return found


def share(folder: str, workers: str) -> Any:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(local=folder, shuffle=True, batch_size=4, validate_hash="xxh3_128")
    loader = DataLoader(data, batch_size=4, num_workers=int(workers))
    return [int(row) for batch in loader for row in batch["curate_row"]]


def mixed(num_samples: str, *parts: str) -> Any:
    from streaming import Stream, StreamingDataset

    streams = [
        Stream(local=folder, proportion=float(proportion))
        for folder, _, proportion in (part.rpartition("=") for part in parts)
    ]
    data = StreamingDataset(streams=streams, epoch_size=int(num_samples), batch_size=1)
    return collections.Counter(sample["curate_domain"] for sample in data)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    found = {"samples": samples, "share": share, "mixed": mixed}[command](*arguments)
    print("\n" + json.dumps(found))
