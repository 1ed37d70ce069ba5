"""Formats that shards are written in: one file each, behind the protocol of `sink.py`."""

from importlib import import_module

from curate.data.shard_formats.sink import Format

FORMATS = {
    "parquet": "curate.data.shard_formats.parquet:PARQUET",
    "arrow": "curate.data.shard_formats.arrow:ARROW",
    "jsonl": "curate.data.shard_formats.jsonl:JSONL",
    "mds": "curate.data.shard_formats.mds:MDS",
    "webdataset": "curate.data.shard_formats.webdataset:WEBDATASET",
    "packed": "curate.data.shard_formats.packed:PACKED",
    "megatron": "curate.data.shard_formats.megatron:MEGATRON",
}
"""Name in the settings -> where its `Format` stands."""


def open_format(name: str) -> Format:
    """The format of a name in the settings."""
    module, attribute = FORMATS[name].split(":")
    return getattr(import_module(module), attribute)
