"""The scorer of label issues hands on what its passes found, and refuses senseless options."""

import pytest
import torch

from curate.errors import ConfigError
from scorers.catalog import build_scorer
from scorers.label_issues import LabelIssues


def test_it_hands_on_what_was_measured():
    quantities = {name: torch.tensor([0.25, torch.nan]) for name in LabelIssues.needs}
    found = LabelIssues().score(quantities)
    assert found.keys() == LabelIssues.columns.keys() == LabelIssues.needs
    assert all(found[name] is quantities[name] for name in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds is 1"),
        ({"folds": 101}, "folds is 101"),
        ({"fit_rows": 0}, "fit_rows is 0"),
        ({"penalty": 0.0}, "penalty is 0"),
        ({"words": "letters"}, "words"),
        ({"fold": 5}, "fold"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        build_scorer("label_issues", options)
