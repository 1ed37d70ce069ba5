"""The scorers that can be named in the settings; each is imported when it is chosen."""

from collections.abc import Mapping
from typing import Any

from curate.config import parse, resolve
from scorers.protocol import Scorer

EXTERNAL = "external"
"""Tables made elsewhere; each of its tables is one more score."""

SCORERS = {
    "el2n": "scorers.el2n:EL2N",
    "grand": "scorers.grand:GraNd",
    "loss": "scorers.loss:Loss",
    "margin": "scorers.margin:Margin",
    "entropy": "scorers.entropy:Entropy",
    "forgetting": "scorers.forgetting:Forgetting",
    "confidence": "scorers.confidence:Confidence",
    "variability": "scorers.variability:Variability",
    "aum": "scorers.aum:AUM",
    "aum_threshold": "scorers.aum_threshold:AUMThreshold",
    "label_issues": "scorers.label_issues:LabelIssues",
    "dvgs": "scorers.dvgs:DVGS",
    "vog": "scorers.vog:VoG",
    "pvi": "scorers.pvi:PVI",
    "self_influence": "scorers.self_influence:SelfInfluence",
    "influence": "scorers.influence:Influence",
    "duplicates": "scorers.duplicates:Duplicates",
    "leakage": "scorers.leakage:Leakage",
    "spread": "scorers.spread:Spread",
    "dsir": "scorers.dsir:DSIR",
    "bm25": "scorers.bm25:BM25",
    "density_ratio": "scorers.density_ratio:DensityRatio",
    "rds": "scorers.rds:RDS",
    "gio": "scorers.gio:GIO",
    "length": "scorers.length:Length",
    "random": "scorers.random:Random",
    EXTERNAL: "scorers.external:External",
}
"""Name -> `module:Class`. All but `external` follow `scorers.protocol.Scorer`."""


def build_scorer(name: str, options: Mapping[str, Any]) -> Scorer:
    """A scorer of the pass kind, its options checked.

    Args:
        name: a key of `SCORERS`, or the user's own `package.module:Class`.
        options: fields of the class.

    Raises:
        ConfigError: no such scorer, or an option that it does not have.
    """
    kind = resolve(SCORERS, name, what="scorer")
    return parse(kind, dict(options), where=f"score.scorers.{name}")
