import pytest

from curate.plan.mixture import DomainSize
from mixers.natural import Natural, Uniform

SIZES = {"short": DomainSize(100, 1000), "long": DomainSize(100, 3000)}


def test_natural_is_the_share_of_the_tokens():
    assert Natural().mixture(SIZES, budget_tokens=1).mean() == {"short": 0.25, "long": 0.75}


def test_uniform_is_equal_in_tokens_or_in_examples():
    assert Uniform().mixture(SIZES, budget_tokens=1).mean() == {"short": 0.5, "long": 0.5}
    by_examples = Uniform(unit="examples").mixture(SIZES, budget_tokens=1).mean()
    assert by_examples == pytest.approx({"short": 0.25, "long": 0.75})


def test_why_has_the_size_the_share_and_the_epochs():
    why = Natural().mixture(SIZES, budget_tokens=2000).why["short"]
    assert why == ("1,000 tokens, 25 % of the pool: its size gives 25 % of the budget, 0.5 epochs")
