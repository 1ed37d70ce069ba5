"""Settings of `curate write`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError

FormatName = Literal["parquet", "arrow", "jsonl", "mds", "webdataset", "packed", "megatron"]

TOKEN_FORMATS = ("packed", "megatron")
"""Formats that hold token ids in place of texts."""

_LEVELS = {"zstd": (1, 22), "gzip": (1, 9), "lz4": (1, 12)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the formats `packed` and `megatron` make token ids of texts."""

    __pydantic_config__: ClassVar = STRICT

    length: int = 2048
    """Tokens of a packed sequence; `megatron` cuts its own."""
    tokenizer: str | None = None
    """A folder or hub id, the trainer's; by default that of the plan or of the model."""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ConfigError(
                f"length is {self.length}, too short to predict a token",
                fix="set shards.packing.length to the trainer's, such as 2048",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """Phases by a score: the kept examples of each domain, in its order, in equal parts."""

    __pydantic_config__: ClassVar = STRICT

    score: str
    """A score column, such as `el2n` or `length.num_tokens`; no expression."""
    steps: int
    """Number of phases."""
    first: Literal["easiest", "hardest"]
    """What the first phase takes: the lowest scores, or the highest."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ConfigError(
                f"steps is {self.steps}: a curriculum has at least two phases",
                fix="set shards.curriculum.steps to 2 or more, or remove shards.curriculum",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How the kept examples are written."""

    __pydantic_config__: ClassVar = STRICT

    format: FormatName | tuple[FormatName, ...] = "parquet"
    """One format or several: parquet, arrow, jsonl, mds, webdataset, packed, megatron."""
    order: Literal["input", "shuffled", "domain-interleaved", "scheduled"] = "input"
    """Of the rows: as they come; a seeded random order within each domain; one stream of all
    domains in which every stretch from the start follows the mixture; or such streams of all
    phases, one after the other."""
    weights: Literal["column", "copies", "domains"] = "column"
    """How the plan's weights reach the trainer: as a column of loss weights beside written copies;
    as whole numbers of copies alone, drawn without bias; or as a sampling probability of each
    domain, with every example written once."""
    curriculum: Curriculum | None = None
    """Phases by a score, for a mixture that has none."""
    size_mb: float = 128.0
    """Target size of a shard on disk, in 10^6 bytes."""
    min_files: int = 1
    """At least so many shards for each domain that has as many rows: the trainer's ranks times its
    loader workers."""
    row_group_mb: float = 16.0
    """Largest row group in memory, in 10^6 bytes."""
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = "zstd"
    """Parquet codec."""
    compression_level: int | None = None
    """Level of the codec: 1 to 22 for zstd, 1 to 9 for gzip, 1 to 12 for lz4; None is the codec's
    own default, 3 for zstd."""
    content_chunks: bool = False
    """Parquet pages end where the content says, so that a store that keeps equal chunks once, such
    as the Hugging Face Hub, takes in only what a new plan has changed; a tenth of the time of
    encoding."""
    packing: Packing = field(default_factory=Packing)
    """For `packed` and `megatron`."""

    def __post_init__(self) -> None:
        if not (self.size_mb > 0 and self.row_group_mb > 0):
            raise ConfigError(
                f"size_mb is {self.size_mb}, row_group_mb {self.row_group_mb}: both are sizes above"
                " 0",
                fix="remove them to use the defaults",
            )
        if self.min_files < 1:
            raise ConfigError(
                f"min_files is {self.min_files}", fix="set shards.min_files to 1 or more"
            )
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ConfigError(
                f"format is {list(self.formats)}", fix="name each format of the shards once"
            )
        if self.weights == "domains" and self.order in ("domain-interleaved", "scheduled"):
            raise ConfigError(
                f"weights is domains, order is {self.order}: the trainer is to draw from each"
                " domain, but all of them share their files",
                fix="set shards.weights to column or copies, or shards.order to shuffled",
            )
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

    @property
    def level(self) -> int | None:
        """The level, where the codec has any and it is known; Arrow would take 1 for zstd."""
        if self.compression_level is None and self.compression == "zstd":
            return 3
        return self.compression_level

    @property
    def formats(self) -> tuple[FormatName, ...]:
        """The formats, the first of which counts."""
        return (self.format,) if isinstance(self.format, str) else tuple(self.format)
