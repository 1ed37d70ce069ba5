import pytest

from curate.config import parse
from curate.errors import ConfigError
from curate.plan.mixture import DomainSize
from mixers.fixed import Fixed

SIZES = {"news": DomainSize(10, 100), "forums": DomainSize(20, 100), "code": DomainSize(5, 800)}


def test_weights_are_scaled_to_one_and_missing_domains_get_nothing_and_are_listed():
    found = Fixed(weights={"news": 3, "forums": 1}).mixture(SIZES, budget_tokens=200)
    assert found.mean() == {"news": 0.75, "forums": 0.25, "code": 0}
    assert found.notes == ("without a weight, so left out: code",)
    assert "1.5 epochs" in found.why["news"]


def test_an_unknown_domain_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError) as caught:
        Fixed(weights={"forum": 1}).mixture(SIZES, budget_tokens=200)
    assert "forum" in caught.value.what
    assert caught.value.fix == "did you mean forums?"


@pytest.mark.parametrize("weights", [{"news": -1}, {"news": float("nan")}, {"news": 0}, {}])
def test_weights_that_are_no_weights_are_refused(weights: dict[str, float]):
    with pytest.raises(ConfigError):
        Fixed(weights=weights)


def test_reads_from_plain_values():
    assert parse(Fixed, {"weights": {"news": 1}}) == Fixed(weights={"news": 1})
    with pytest.raises(ConfigError, match="weights is missing"):
        parse(Fixed, {}, where="mix")
