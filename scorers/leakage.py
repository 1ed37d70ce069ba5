"""Leakage: how much of an evaluation example stands word for word in a training example.

    share(d, e) = words of e that lie in runs of n words which d has too
                  / words of e that lie in any run of n words of its own
    leakage(d)  = max over evaluation examples e of share(d, e); 1 where d equals e

Source: runs of n = 13 words and the shortest of 8 are those of Brown et al., "Language Models are
Few-Shot Learners", NeurIPS 2020, arXiv:2005.14165, appendix C. The share of the evaluation
example's words, in place of any shared run, follows Touvron et al., "Llama 2", 2023,
arXiv:2307.09288, appendix A.6, and Lambert et al., "Tülu 3", 2024, arXiv:2411.15124, who remove
what holds more than half of an evaluation example.

Departures: an evaluation text of fewer than n words is one run. Runs that stand in more than 1 % of
an evaluation set (and in more than 10 of its examples) are its template and count nowhere. No word
within a run may differ (Llama 2 lets 4 do so). Letters of scripts without spaces count as half a
word each.
Cost: one reading of the texts, no model; about 35 bytes for each word of the evaluation
sets, in memory.
What is done to the texts is in `curate.models`: `text_runs`, `sought`, `overlap`.
Shapes: N examples of a partition.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curate.config import STRICT
from curate.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Leakage:
    """Overlap with the evaluation sets under `evaluation`."""

    __pydantic_config__: ClassVar = STRICT

    ngrams: int = 13
    """Words of a run."""
    shortest: int = 8
    """An evaluation text of fewer words is only looked for as a whole example, not within one."""
    template: float = 0.01
    """Runs that stand in a larger share of an evaluation set's examples, and in more than 10 of
    them, are its template; 1 counts all."""
    found_from: float = 0.5
    """Share from which an evaluation example counts as found, in the report."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"leakage", "leakage_exact", "leakage_set", "leakage_row"}
    )
    columns: ClassVar[Mapping[str, str]] = {
        "leakage": "largest share of an evaluation example's words that stand here in runs, 0 to 1;"
        " 1 is all of it",
        "leakage_exact": "1 where a text of the example equals one of an evaluation example, else"
        " 0",
        "leakage_set": "which evaluation set it is from, in the order of the settings, from 0; null"
        " where nothing was found",
        "leakage_row": "place of that evaluation example in its set, from 0",
    }

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.ngrams <= 100:
            raise ConfigError(
                f"ngrams is {self.ngrams} and shortest {self.shortest}",
                fix="set ngrams from shortest to 100, such as 13, and shortest to 1 or more",
            )
        if not (0 < self.template <= 1 and 0 < self.found_from <= 1):
            raise ConfigError(
                f"template is {self.template} and found_from {self.found_from}",
                fix="set both to shares above 0, up to 1",
            )

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: quantities[name] for name in self.columns}
