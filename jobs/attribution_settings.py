"""Settings of `curate evaluate-attribution`."""

from dataclasses import dataclass, field
from typing import ClassVar

from curate.config import STRICT
from curate.errors import ConfigError
from curate.models.settings import Train


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """On how many subsets attributions are tested, and which ones."""

    __pydantic_config__: ClassVar = STRICT

    subsets: int = 50
    """Random subsets of the training examples; 0: only `labels` is looked at."""
    share: float = 0.5
    """Of the training examples that is in each subset."""
    models: int = 2
    """Trained on each subset, with other weights and shuffles; their mean is what is to be
    foretold. From two on there is a ceiling."""
    queries: int = 200
    """Most target examples whose losses are to be foretold, chosen by a hash of their content."""
    seed: int = 0
    """Of the subsets, the trainings and the intervals; beside the run's own."""
    train: Train | None = None
    """How each model is trained; what is not given here is as in `checkpoints.train`. Its `seeds`
    are not used."""
    matrices: dict[str, str] = field(default_factory=dict[str, str])
    """Name -> Parquet file or folder from elsewhere: source, file, row, then a column of scores for
    each target example, in the target's order. Those that these settings make in this run are found
    by themselves."""
    scores: tuple[str, ...] = ()
    """Score columns that are tested too, `scorer.column` or a name that only one scorer has; by
    default all of `score.scorers`. One that is named may be of other settings."""
    labels: str | None = None
    """Column of the sources that tells which labels are wrong: true where it is, or the right
    label itself."""

    def __post_init__(self) -> None:
        if self.subsets < 0 or self.subsets in (1, 2):
            raise ConfigError(
                f"subsets is {self.subsets}, and an order of fewer than three says nothing",
                fix="set attribution.subsets to 50, or to 0 to look at labels only",
            )
        if not 0 < self.share < 1:
            raise ConfigError(
                f"share is {self.share}, outside (0, 1)",
                fix="set attribution.share to 0.5",
            )
        for name in ("models", "queries"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", fix=f"set attribution.{name} to 1 or more"
                )
        for name in self.matrices:
            if not name.strip():
                raise ConfigError("a matrix has no name", fix="name it in attribution.matrices")
