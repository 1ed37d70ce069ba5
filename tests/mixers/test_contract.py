"""What every mixer of the catalog must do; those that train have tests of their own beside it."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.config import parse, plain, resolve
from curate.errors import ConfigError
from curate.plan.mixture import DomainSize, load_mixture, save_mixture
from jobs.mix_passes import PASSES
from mixers.catalog import MIXERS

CLOSED = [name for name in MIXERS if name not in PASSES]
"""Those that know from sizes alone."""

OPTIONS: dict[str, dict[str, Any]] = {"fixed": {"weights": {"domain-0": 1.0}}}

domain_sizes = st.lists(
    st.tuples(st.integers(1, 10**7), st.integers(1, 2000)), min_size=1, max_size=9
).map(lambda pairs: {f"domain-{i}": DomainSize(n, n * mean) for i, (n, mean) in enumerate(pairs)})


def build(name: str) -> Any:
    return parse(resolve(MIXERS, name, what="mixer"), OPTIONS.get(name, {}), where="mix")


@pytest.mark.parametrize("name", CLOSED)
@given(sizes=domain_sizes, epochs=st.floats(1e-3, 50))
def test_weights_are_a_simplex_in_every_phase_and_each_has_a_reason(
    name: str, sizes: dict[str, DomainSize], epochs: float
):
    budget = epochs * sum(size.num_tokens for size in sizes.values())
    found = build(name).mixture(sizes, budget_tokens=budget)
    assert math.fsum(phase.share for phase in found.phases) == pytest.approx(1)
    for phase in found.phases:
        assert list(phase.weights) == list(sizes)
        assert math.fsum(phase.weights.values()) == pytest.approx(1)
        assert all(0 <= weight <= 1 + 1e-12 for weight in phase.weights.values())
    assert list(found.why) == list(sizes)
    assert math.fsum(found.mean().values()) == pytest.approx(1)


@pytest.mark.parametrize("name", CLOSED)
@given(sizes=domain_sizes, order=st.randoms(use_true_random=False))
def test_the_order_of_the_domains_does_not_matter(
    name: str, sizes: dict[str, DomainSize], order: Any
):
    budget = 0.5 * sum(size.num_tokens for size in sizes.values())
    names = list(sizes)
    order.shuffle(names)
    shuffled = {domain: sizes[domain] for domain in names}
    first = build(name).mixture(sizes, budget_tokens=budget).mean()
    second = build(name).mixture(shuffled, budget_tokens=budget).mean()
    assert second == pytest.approx(first)


@pytest.mark.parametrize("name", MIXERS)
def test_is_its_own_settings(name: str):
    mixer = build(name)
    assert parse(type(mixer), plain(mixer)) == mixer


@pytest.mark.parametrize("name", CLOSED)
def test_names_itself(name: str):
    sizes = {"domain-0": DomainSize(3, 30), "domain-1": DomainSize(1, 7)}
    assert build(name).mixture(sizes, budget_tokens=20).mixer == name


@pytest.mark.parametrize("name", CLOSED)
def test_survives_the_file(name: str, tmp_path: Any):
    sizes = {"domain-0": DomainSize(3, 30), "domain-1": DomainSize(1, 7)}
    found = build(name).mixture(sizes, budget_tokens=2000)
    save_mixture(tmp_path / "mixture.json", found, sizes)
    assert load_mixture(tmp_path / "mixture.json") == found


@pytest.mark.parametrize("name", MIXERS)
def test_an_unknown_option_is_refused(name: str):
    kind = resolve(MIXERS, name, what="mixer")
    with pytest.raises(ConfigError, match=r"unknown key mix\.temprature"):
        parse(kind, {**OPTIONS.get(name, {}), "temprature": 5}, where="mix")
