"""One stream of all domains: read in order, and nothing else."""

from curate.data.recipes.blend import Blend, header

_USE = """Use: `from stream import rows`, then `rows(rank=0, num_ranks=1)`: an IterableDataset.
Needs `datasets`, not curate."""

_UNIT = """Unit: rows. The first rows, however many, hold each domain in its share of all rows, to
within two rows."""

_ORDER = """Order: do not shuffle. Each rank reads all files and keeps every `num_ranks`-th row, so
that all ranks are at the same place. Workers of a DataLoader take whole files each: use at most one
where phases follow one another."""

_HONOURED = {
    "column": """Weights: rows carry curate_weight; `datasets` applies nothing, your loss must.""",
    "copies": """Weights: honoured by the copies; nothing else is to be done.""",
}

_CODE = '''import json
from pathlib import Path

from datasets import load_dataset

SHARDS = Path(__file__).resolve().parents[1]
MANIFEST = json.loads((SHARDS / "manifest.json").read_text(encoding="utf-8"))


def files(phase=None):
    """All files in order, or those of one phase: 1, 2 and so on."""
    found = [shard for shard in MANIFEST["shards"] if shard["format"] == "parquet"]
    return [str(SHARDS / shard["file"]) for shard in found if phase in (None, shard["phase"])]


def rows(phase=None, *, rank=0, num_ranks=1):
    """The stream, or one of `num_ranks` equal parts of it."""
    every = load_dataset(
        "parquet", data_files={"train": files(phase)}, split="train", streaming=True
    )
    if num_ranks == 1:
        return every
    return every.filter(lambda _, place: place % num_ranks == rank, with_indices=True)
'''


def text(blend: Blend) -> str:
    """`stream.py`."""
    title = "The mixture as one stream."
    return header(blend, title, _USE, _UNIT, _ORDER, _HONOURED[blend.way]) + _CODE
