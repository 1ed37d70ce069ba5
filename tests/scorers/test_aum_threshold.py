"""Threshold samples: who is one, and where the limit lies."""

import math

import pytest
import torch

from curate.errors import ConfigError
from scorers.aum_threshold import AUMThreshold, limit_of, threshold_runs
from scorers.catalog import build_scorer


def test_each_run_takes_its_own_share_of_the_examples():
    draws = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    for num_classes in (2, 10):
        runs = threshold_runs(draws, num_classes)
        expected = 30_000 / (num_classes + 1)
        for number in (0, 1):
            assert abs(int((runs == number).sum()) - expected) < 5 * expected**0.5
        assert set(runs.tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("num_samples", [1, 7, 99, 100, 101, 200, 350])
@pytest.mark.parametrize("percentile", [0.99, 0.9, 0.5])
def test_below_the_limit_more_than_the_allowed_share_of_samples_is_larger(
    num_samples: int, percentile: float
):
    generator = torch.Generator().manual_seed(num_samples)
    samples = torch.randn(num_samples, generator=generator, dtype=torch.float64)
    limit = limit_of(samples, percentile)
    areas = torch.cat([torch.randn(500, generator=generator, dtype=torch.float64), samples])
    # In hundredths, so that 1 % of 100 samples is one sample.
    allowed = round(100 * (1 - percentile)) * num_samples
    for area in areas.tolist():
        larger = sum(1 for sample in samples.tolist() if sample > area)
        assert (area < limit) == (100 * larger > allowed)


def test_samples_that_were_never_shown_do_not_count():
    samples = torch.tensor([1.0, math.nan, 3.0])
    assert limit_of(samples, 0.99) == 3
    assert limit_of(torch.tensor([math.nan]), 0.99) == -math.inf


def test_it_hands_on_what_was_measured():
    quantities = {"area": torch.tensor([0.5]), "flagged": torch.tensor([1.0])}
    found = AUMThreshold().score(quantities)
    assert found == {"aum_threshold": quantities["area"], "aum_flag": quantities["flagged"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 1.0}, "percentile is 1"),
        ({"skip_first": -1}, "skip_first is -1"),
        ({"epochs": 1, "skip_first": 1}, "no epoch is left"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        build_scorer("aum_threshold", options)
