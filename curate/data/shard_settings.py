"""Settings of `curate write`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How the kept examples are written."""

    __pydantic_config__: ClassVar = STRICT

    size_mb: float = 128.0
    """Target size of a shard on disk, in 10^6 bytes."""
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = "zstd"
    """Parquet codec."""
    compression_level: int | None = None
    """Level of the codec; None is the codec's own default."""
    format: Literal["parquet"] = "parquet"
    """Format of the shards."""

    def __post_init__(self) -> None:
        if self.size_mb <= 0:
            raise ConfigError(f"size_mb is {self.size_mb}", fix="set shards.size_mb to 128")
