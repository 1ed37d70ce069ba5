"""Settings of `curate write`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError

_LEVELS = {"zstd": (1, 22), "gzip": (1, 9), "lz4": (1, 12)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How the kept examples are written."""

    __pydantic_config__: ClassVar = STRICT

    size_mb: float = 128.0
    """Target size of a shard on disk, in 10^6 bytes."""
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = "zstd"
    """Parquet codec."""
    compression_level: int | None = None
    """Level of the codec: 1 to 22 for zstd, 1 to 9 for gzip, 1 to 12 for lz4; None is the codec's
    own default."""
    format: Literal["parquet"] = "parquet"
    """Format of the shards."""

    def __post_init__(self) -> None:
        if not self.size_mb > 0:
            raise ConfigError(f"size_mb is {self.size_mb}", fix="set shards.size_mb to 128")
        if self.compression_level is None:
            return
        if self.compression not in _LEVELS:
            raise ConfigError(
                f"compression_level is {self.compression_level}, but {self.compression} has no"
                " levels",
                fix="remove shards.compression_level, or set shards.compression to zstd",
            )
        low, high = _LEVELS[self.compression]
        if not low <= self.compression_level <= high:
            raise ConfigError(
                f"compression_level is {self.compression_level}; {self.compression} takes"
                f" {low} to {high}",
                fix="remove shards.compression_level to use the codec's own default",
            )
