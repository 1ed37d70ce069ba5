"""Formats that shards are written in: one file each, behind the protocol of `sink.py`."""

from importlib import import_module

from curate.data.shard_formats.sink import Format

FORMATS = {
    "parquet": "curate.data.shard_formats.parquet:PARQUET",
}
"""Name in the settings -> where its `Format` stands."""


def open_format(name: str) -> Format:
    """The format of a name in the settings."""
    module, attribute = FORMATS[name].split(":")
    return getattr(import_module(module), attribute)
