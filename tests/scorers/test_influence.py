"""Options of `influence`: what has no meaning is refused, by name."""

from typing import Any

import pytest
import torch

from curate.errors import ConfigError
from scorers.catalog import build_scorer
from scorers.influence import Influence


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"damping": 0.0}, "influence.damping is 0.0"),
        ({"damping": float("nan")}, "influence.damping (nan)"),
        ({"damping": float("inf")}, "influence.damping (inf)"),
        ({"dim": 0}, "influence.dim is 0"),
        ({"top": -1}, "influence.top is -1"),
        ({"rank": 0}, "influence.rank is 0"),
        ({"layers": "("}, "no regular expression"),
        ({"layers": "all", "head": True}, "influence.layers is 'all'"),
        ({"metric": "cosine", "whiten": True}, "influence.whiten is for the metric influence"),
        ({"adam": "exact"}, "influence.adam is for the metrics dot and cosine"),
        ({"metric": "fisher"}, "metric"),
        ({"aggregate": "sum"}, "aggregate"),
        ({"curvature": "diagonal"}, "curvature"),
        ({"dampening": 0.1}, "dampening"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], what: str):
    with pytest.raises(ConfigError) as error:
        build_scorer("influence", options)
    assert what in str(error.value)


@pytest.mark.parametrize("metric", ["dot", "cosine", "influence", "trak", "ekfac"])
def test_the_columns_are_those_of_the_metric(metric: Any):
    scorer = Influence(metric=metric)
    found = scorer.score({name: torch.ones(3) for name in scorer.needs})
    assert found.keys() == scorer.columns.keys()
    assert ("influence_self" in found) == (metric == "influence")
    assert scorer.uses_index == (metric != "ekfac")
    assert scorer.has_curvature == (metric in ("influence", "trak"))
