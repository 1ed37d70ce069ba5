"""Label issues: confident learning, the baseline for wrong labels.

    self_confidence(x) = p_y(x)          margin(x) = p_y(x) - max_{k != y} p_k(x)

with probabilities p of a model that did not see x. Which margins are low enough for a flag follows
from the confident joint of given and likely labels: see `curate.evaluate.confident`.

Source: Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels",
JAIR 70, 2021, arXiv:1911.00068.

Departures: those of `curate.evaluate.confident`; the model is a logistic regression on word counts,
given numbers or pixels, unless probabilities are given. Held-out rows are judged by the
cut-offs of the others.
Cost: `folds` logistic regressions on about `fit_rows` examples, and one pass over the data.
Shapes: N examples, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelIssues:
    """Out-of-fold probabilities of the given labels, and what confident learning makes of them."""

    __pydantic_config__: ClassVar = STRICT

    folds: int = 5
    """Parts of the data; each is judged by a model that was fitted on the others."""
    fit_rows: int = 50_000
    """About how many examples models are fitted on, drawn class by class; all are judged."""
    penalty: float | None = None
    """Weight of half the squared coefficients against the summed loss; by default 1 for texts and
    10 for numbers and pixels."""
    words: Literal["words", "characters"] = "words"
    """What is counted of texts: words and pairs of them, or runs of two to four characters, for
    languages without spaces."""
    probabilities: str | None = None
    """Parquet or CSV with out-of-sample probabilities in place of fits: the key or an id, and one
    number column for each class, in their order."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"self_confidence", "label_issue_margin", "label_issue", "off_diagonal", "likely_label"}
    )
    columns: ClassVar[Mapping[str, str]] = {
        "self_confidence": "probability of the label by a model that did not see it, 0 to 1; low is"
        " suspicious",
        "label_issue_margin": "that less the best other class's, -1 to 1; below 0 another is"
        " likelier",
        "label_issue": "1 where confident learning flags the label (pruning by noise rate), else 0",
        "off_diagonal": "1 where the example is confidently of another class, else 0",
        "likely_label": "the most probable class",
    }

    def __post_init__(self) -> None:
        if not 2 <= self.folds <= 100:
            raise ConfigError(f"folds is {self.folds}, not 2 to 100", fix="set it to 5")
        if self.fit_rows < 1:
            raise ConfigError(f"fit_rows is {self.fit_rows}", fix="set it to 50_000")
        if self.penalty is not None and self.penalty <= 0:
            raise ConfigError(f"penalty is {self.penalty}", fix="set it above 0, such as 1")

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: quantities[name] for name in self.columns}
