"""Options of `spread`, and what it takes over from the scorer inside."""

import pytest
import torch

from curate.config import parse
from curate.errors import ConfigError
from scorers.catalog import build_scorer
from scorers.spread import Spread


def test_the_columns_are_those_of_the_scorer_inside_and_one_more():
    spread = Spread(scorer={"dvgs": {"epochs": 2}})
    inner = build_scorer("dvgs", {"epochs": 2})
    assert spread.inner == inner
    assert spread.needs == {*inner.columns, "spread_measured"}
    values = {name: torch.rand(3) for name in spread.needs}
    found = spread.score(values)
    assert list(found) == [*inner.columns, "spread_measured"]
    assert all(found[name] is values[name] for name in found)


@pytest.mark.parametrize(
    ("core", "num", "size"),
    [(0.01, 5000, 50), (1.0, 300, 300), (0.5, 3, 2), (200, 10, 200), (2000.0, 10, 2000), (1, 9, 1)],
)
def test_the_core_set_is_a_share_or_a_number(core: float, num: int, size: int):
    assert parse(Spread, {"core": core}).size(num) == size


@pytest.mark.parametrize(
    "options",
    [
        {"core": -5},
        {"core": 10.5},
        {"clusters": 0},
        {"neighbours": -1},
        {"temperature": 0},
        {"method": "mlp"},
        {"choose": "loss"},
        {"scorer": {}},
        {"scorer": {"spread": {}}},
        {"min_rank_correlation": -1.5},
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object]):
    with pytest.raises(ConfigError):
        parse(Spread, options)
