"""Recipes: one small file per trainer, which draws the shards as the mixture says.

A recipe finds the shards by where it lies itself, so the folder can be moved; it holds no time, no
host and no path. It is written only for formats that were written.
"""

from collections.abc import Callable, Mapping
from typing import Any

from curate.data.recipe import Written
from curate.data.recipes import axolotl, interleave, megatron, mosaic, stream, torchtitan, trainer
from curate.data.recipes import webdataset as webdataset_mix
from curate.data.recipes.blend import Blend

RECIPES: dict[str, tuple[str, Callable[[Blend], str]]] = {
    "datasets_interleave.py": ("parquet", interleave.rows),
    "trainer.py": ("parquet", trainer.transformers),
    "trl_sft.py": ("parquet", trainer.trl),
    "torchtitan_mix.py": ("parquet", torchtitan.text),
    "axolotl.yaml": ("parquet", axolotl.text),
    "packed_interleave.py": ("packed", interleave.packed),
    "mosaic.py": ("mds", mosaic.text),
    "webdataset_mix.py": ("webdataset", webdataset_mix.text),
    "megatron.py": ("megatron", megatron.text),
}
"""File -> format that it reads, and what writes it."""

STREAMS: dict[str, tuple[str, Callable[[Blend], str]]] = {
    "stream.py": ("parquet", stream.text),
    "megatron.py": ("megatron", megatron.text),
}
"""The same where domains share their files, so that none can be drawn from."""


def recipes(
    written: Written, mixture: Mapping[str, Any], texts: Mapping[str, str | None]
) -> dict[str, str]:
    """The recipes of a shards folder.

    Args:
        written: the shards.
        mixture: what stands in `mixture.json`.
        texts: source -> its column of text, if it has one.

    Returns:
        Path relative to the shards folder -> text.
    """
    blend = Blend(
        way=written.weights,
        mixture=mixture,
        shards=(*written.shards, *written.others),
        columns=None if written.is_uniform else _common(written.columns),
        texts=texts,
        sources=written.sources,
    )
    return {
        f"recipes/{file}": make(blend)
        for file, (name, make) in (STREAMS if written.is_stream else RECIPES).items()
        if name in written.formats
    }


def _common(columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Columns that all sources have with the same type."""
    first, *others = columns.values()
    return [name for name, kind in first.items() if all(c.get(name) == kind for c in others)]
