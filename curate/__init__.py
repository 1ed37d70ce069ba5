"""Measure every training example, choose a domain mixture, write pruned and reweighted shards."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["diff", "open", "score"]

if TYPE_CHECKING:
    from curate.api import diff, open, score  # noqa: A004


def __getattr__(name: str) -> object:
    """`curate.open`, `curate.score` and `curate.diff` load their libraries at first use."""
    if name in __all__:
        from curate import api

        return getattr(api, name)
    raise AttributeError(f"module 'curate' has no attribute {name!r}")
