from typing import Any

import pytest

from curate.config import parse, plain
from curate.errors import ConfigError
from curate.plan.settings import Keep, Plan


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drop_first": 0.1}, "there is no score"),
        ({"score": "el2n", "drop_first": 0.1, "order": "middle"}, "the order is middle"),
        ({"score": "el2n", "drop_first": 1.0}, "outside"),
        ({"keep": 0}, "outside"),
        ({"keep": 1.5}, "outside"),
        ({"keep": {"share": 0.5, "examples": 3}}, "keep needs one"),
        ({"keep": {}}, "keep needs one"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"max_repeats": 0.5}, "max_repeats"),
        ({"max_repeats": 1e6}, "max_repeats"),
        ({"weights": {"score": "loss", "clip": [2, 10]}}, "does not hold the mean weight"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        parse(Plan, values, where="plan")


def test_a_bare_number_is_a_share_and_the_long_forms_survive():
    assert parse(Plan, {"keep": 0.3}).kept == Keep(share=0.3)
    plan = parse(Plan, {"keep": {"tokens": 2e9}, "score": "loss", "drop_first": 0.05})
    assert parse(Plan, plain(plan)) == plan
