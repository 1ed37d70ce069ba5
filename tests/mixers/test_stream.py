"""The stream of a mixture: what every process sees, and where it goes on."""

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from curate.errors import ConfigError, CurateError, InputError
from curate.plan.mixture import DomainSize, Mixture, Phase
from mixers.changes import Change, Changes
from mixers.cooldown import Cooldown
from mixers.orders import Order, uniform_points
from mixers.phases import example_probabilities, phase_probabilities
from mixers.stream import MixtureStream

DOMAINS = {
    "web": [f"web {i}" for i in range(50)],
    "code": [f"code {i}" for i in range(7)],
    "one": ["one 0"],
}
MIX = {"web": 0.6, "code": 0.3, "one": 0.1}

MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def stream(**options: Any) -> MixtureStream:
    given: dict[str, Any] = {"seed": 3, **options}
    return MixtureStream(DOMAINS, MIX, **given)


def first(source: MixtureStream, number: int) -> list[str]:
    return list(itertools.islice(source, number))


def batches(source: MixtureStream, workers: int, number: int, size: int) -> list[list[str]]:
    """The first batches of a real DataLoader."""
    loader = DataLoader(source, batch_size=size, num_workers=workers)
    return [list(batch) for batch in itertools.islice(loader, number)]


def test_every_epoch_of_a_domain_is_all_of_it_in_a_new_order():
    seen = [name for name in first(stream(), 400) if name.startswith("code")]
    epochs = [seen[start : start + 7] for start in range(0, 70, 7)]
    assert all(sorted(epoch) == sorted(DOMAINS["code"]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5


def test_domains_come_as_often_as_their_probabilities_say():
    """Within four standard deviations of the multinomial, which has 20,000 draws."""
    counts = Counter(name.split()[0] for name in first(stream(), 20_000))
    for name, share in MIX.items():
        assert abs(counts[name] - 20_000 * share) < 4 * math.sqrt(20_000 * share * (1 - share))


def test_even_draws_keep_every_64_positions_within_one_of_their_share():
    found = [name.split()[0] for name in first(stream(draw="even"), 64 * 30)]
    for start in range(0, len(found), 64):
        counts = Counter(found[start : start + 64])
        # Edges of a domain's part of [0, 1) cut one of the 64ths each.
        assert all(abs(counts[name] - 64 * share) < 2 for name, share in MIX.items())
    total = Counter(found)
    assert total["one"] == pytest.approx(192, abs=10)
    assert found[:64] != sorted(found[:64])


def test_seeds_differ_and_repeat():
    assert first(stream(), 40) == first(stream(), 40)
    assert first(stream(), 40) != first(stream(seed=4), 40)


@pytest.mark.parametrize(("ranks", "size"), [(1, 4), (2, 2), (2, 6), (4, 1), (3, 4)])
def test_ranks_deal_out_what_one_process_sees_in_the_same_order(ranks: int, size: int):
    alone = first(stream(), 240)
    parts = [
        first(stream(rank=rank, num_ranks=ranks, batch_size=size), 240 // ranks)
        for rank in range(ranks)
    ]
    dealt: list[str] = []
    for start in range(0, 240 // ranks, size):
        for part in parts:
            dealt += part[start : start + size]
    assert dealt == alone


@MANY_WORKERS
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_of_a_loader_give_the_batches_of_one_process(workers: int):
    alone = first(stream(), 36)
    found = batches(stream(batch_size=4), workers, 9, 4)
    assert list(itertools.chain(*found)) == alone


def test_a_state_goes_on_with_other_ranks_workers_and_batches():
    whole = first(stream(), 400)
    beginning = stream()
    assert first(beginning, 123) == whole[:123]
    state = json.loads(json.dumps(beginning.state_dict()))
    assert state["position"] == 123
    for ranks, size in ((1, 1), (2, 5), (4, 3)):
        parts: list[Iterator[str]] = []
        for rank in range(ranks):
            part = stream(rank=rank, num_ranks=ranks, batch_size=size)
            part.load_state_dict(state)
            parts.append(iter(part))
        dealt: list[str] = []
        while len(dealt) < 120:
            for part in parts:
                dealt += itertools.islice(part, size)
        assert dealt == whole[123 : 123 + len(dealt)]
    resumed = stream(batch_size=4)
    resumed.load_state_dict(state)
    assert list(itertools.chain(*batches(resumed, 2, 5, 4))) == whole[123:143]


def test_a_state_in_the_middle_of_a_batch_and_behind_whole_rounds_of_ranks():
    one = stream(batch_size=8)
    first(one, 11)
    assert one.state_dict()["position"] == 11
    two = stream(rank=0, num_ranks=2, batch_size=4)
    first(two, 8)
    assert two.state_dict()["position"] == 16
    last = stream(rank=1, num_ranks=2, batch_size=4)
    first(last, 8)
    assert last.state_dict()["position"] == 16
    first(two, 6)
    with pytest.raises(ConfigError, match="several ranks is under way"):
        two.state_dict()


def test_where_workers_read_the_caller_says_the_position():
    source = stream(batch_size=4)
    batches(source, 2, 3, 4)
    with pytest.raises(ConfigError, match="others read it"):
        source.state_dict()
    state = source.state_dict(12)
    again = stream()
    again.load_state_dict(state)
    assert first(again, 30) == first(stream(), 42)[12:]


def test_a_change_holds_from_its_position_on_for_ranks_and_workers():
    def changed(**options: Any) -> MixtureStream:
        source = stream(**options)
        source.set_probabilities({"one": 1}, from_position=20)
        source.set_probabilities({"code": 2, "web": 0}, from_position=31)
        return source

    found = first(changed(), 60)
    assert found[:20] == first(stream(), 20)
    assert found[20:31] == ["one 0"] * 11
    assert all(name.startswith("code") for name in found[31:])
    assert list(itertools.chain(*batches(changed(batch_size=4), 2, 15, 4))) == found
    halves = [iter(changed(rank=rank, num_ranks=2, batch_size=2)) for rank in (0, 1)]
    dealt: list[str] = []
    while len(dealt) < 60:
        for half in halves:
            dealt += itertools.islice(half, 2)
    assert dealt == found
    # A state between the changes keeps the one that holds and the one to come.
    source = changed()
    first(source, 25)
    resumed = stream()
    resumed.load_state_dict(source.state_dict())
    assert first(resumed, 35) == found[25:]


def test_of_two_changes_from_one_position_the_later_holds():
    source = stream()
    source.set_probabilities({"code": 1}, from_position=4)
    source.set_probabilities({"one": 1}, from_position=4)
    resumed = stream()
    resumed.load_state_dict(source.state_dict(2))
    assert first(source, 9)[4:] == ["one 0"] * 5
    assert first(resumed, 7)[2:] == ["one 0"] * 5
    assert source.probabilities(4)["one"] == 1


def test_a_domain_keeps_its_place_over_a_change():
    """As a cooldown must: the second phase goes on with the epoch of the first."""
    source = stream()
    source.set_probabilities({"code": 1}, from_position=10)
    found = [name for name in first(source, 17) if name.startswith("code")]
    assert sorted(found[:7]) == sorted(DOMAINS["code"])


@MANY_WORKERS
def test_a_live_change_alone_holds_at_once_and_with_workers_from_a_later_position():
    source = stream()
    running = iter(source)
    next(running)
    source.set_probabilities({"one": 1})
    assert list(itertools.islice(running, 5)) == ["one 0"] * 5
    assert source.probabilities() == {"web": 0, "code": 0, "one": 1}
    assert source.probabilities(0) == pytest.approx(MIX)

    def run(workers: int) -> list[str]:
        source = stream(batch_size=4)
        found: list[str] = []
        loader = DataLoader(source, batch_size=4, num_workers=workers, prefetch_factor=2)
        for step, batch in enumerate(itertools.islice(loader, 30)):
            found += batch
            if step % 5 == 0:  # decided from what was seen so far, as a live mixer does
                ones = sum(name.startswith("one") for name in found)
                source.set_probabilities({"one": 1, "web": 1 + ones}, from_position=4 * (step + 10))
        return found

    assert run(1) == run(2) == run(3)
    assert not any(name.startswith("code") for name in run(2)[40:])


def test_a_change_that_comes_too_late_is_refused_and_not_half_followed():
    source = stream(batch_size=4)
    loader = iter(DataLoader(source, batch_size=4, num_workers=2, prefetch_factor=4))
    found = [*next(loader), *next(loader)]
    with pytest.raises(ConfigError, match="say from_position"):
        source.set_probabilities({"one": 1})
    with pytest.raises(CurateError, match="comes too late"):
        source.set_probabilities({"one": 1}, from_position=8)
    for _ in range(20):
        found += next(loader)
    assert found == first(stream(), len(found))
    other = stream()
    other.set_probabilities({"one": 1}, from_position=8)
    with pytest.raises(ConfigError, match="in their order"):
        other.set_probabilities({"one": 1}, from_position=7)


def test_a_stream_that_stops_ends_for_everyone_before_the_first_missing_example():
    whole = list(stream(exhausted="stop"))
    ones = [number for number, name in enumerate(first(stream(), 200)) if name == "one 0"]
    codes = [number for number, name in enumerate(first(stream(), 200)) if name.startswith("code")]
    assert len(whole) == min(ones[1], codes[7])
    assert whole == first(stream(), len(whole))
    parts = [
        list(stream(exhausted="stop", rank=rank, num_ranks=2, batch_size=1)) for rank in (0, 1)
    ]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    loader = DataLoader(stream(exhausted="stop", batch_size=2), batch_size=2, num_workers=2)
    assert sorted(itertools.chain(*loader)) == sorted(whole)
    later = stream(exhausted="stop")
    later.load_state_dict(stream().state_dict(len(whole) - 1))
    assert list(later) == whole[-1:]


def test_a_new_epoch_is_told(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="mixers.stream"):
        first(stream(), 40)
    assert "domain code: all examples seen 1 times" in caplog.text
    assert stream().epochs(0) == {"web": 0, "code": 0, "one": 0}
    ones = first(stream(), 40).count("one 0")
    source = stream()
    assert source.epochs(40)["one"] == ones
    assert source.epochs(10)["one"] == first(stream(), 10).count("one 0")


def test_examples_carry_their_domain_where_asked_for():
    source = MixtureStream(
        {"a": [{"x": 1}], "b": [{"x": 2}]}, {"a": 1, "b": 1}, domain_column="curate_domain"
    )
    for example in itertools.islice(source, 20):
        assert example == {"x": 1 if example["curate_domain"] == "a" else 2} | {
            "curate_domain": example["curate_domain"]
        }


def test_a_domain_without_a_probability_is_never_drawn():
    source = MixtureStream(DOMAINS, {"code": 1e-9, "one": 0}, seed=1)
    assert all(name.startswith("code") for name in first(source, 3000))


def test_what_cannot_be_a_stream_is_refused_by_name():
    with pytest.raises(InputError, match="domain b has no examples"):
        MixtureStream({"a": [1], "b": []}, {"a": 1})
    unsized: Any = iter([1])
    with pytest.raises(InputError, match="domain a has no length"):
        MixtureStream({"a": unsized}, {"a": 1})
    with pytest.raises(ConfigError, match="no domain 'wbe'") as error:
        MixtureStream(DOMAINS, {"wbe": 1})
    assert "did you mean web" in error.value.fix
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="the probability of web"):
            MixtureStream(DOMAINS, {"web": bad})
    with pytest.raises(ConfigError, match="no probability is above 0"):
        MixtureStream(DOMAINS, {"web": 0})
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        stream(rank=2, num_ranks=2)
    wrong: Any = "first"
    with pytest.raises(ConfigError, match="exhausted 'first'"):
        stream(exhausted=wrong)


def test_the_state_of_other_domains_or_draws_is_refused():
    state = stream().state_dict(10)
    grown = MixtureStream({**DOMAINS, "web": DOMAINS["web"] * 2}, MIX, seed=3)
    with pytest.raises(InputError, match="sizes"):
        grown.load_state_dict(state)
    for other in (stream(seed=4), stream(draw="even")):
        with pytest.raises(InputError, match="was saved with"):
            other.load_state_dict(state)
    resumed = stream()
    resumed.load_state_dict(state)
    with pytest.raises(ConfigError, match="is before 10"):
        resumed.state_dict(9)


def test_points_do_not_depend_on_the_stretch_that_is_asked_for():
    for even in (False, True):
        whole = uniform_points(1, 0, 5000, even=even)
        cut = [uniform_points(1, a, b, even=even) for a, b in ((0, 1), (1, 1030), (1030, 5000))]
        assert np.array_equal(np.concatenate(cut), whole)
        assert 0 <= whole.min() < whole.max() < 1
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand times.
        assert np.abs(np.sort(whole) - np.arange(5000) / 5000).max() < 1.95 / math.sqrt(5000)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 65_536, 65_537, 200_003])
def test_an_order_has_every_example_once_at_any_size(size: int):
    found = Order(size, 5).at(np.arange(size))
    assert np.array_equal(np.sort(found), np.arange(size))
    if size > 1000:
        assert abs(np.corrcoef(found, np.arange(size))[0, 1]) < 4 / math.sqrt(size)
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 4 / math.sqrt(size)
        assert not np.array_equal(found, Order(size, 6).at(np.arange(size)))


def test_more_changes_than_are_remembered_are_told():
    changes = Changes([Change(0, np.array([1.0]))], 0)
    for position in range(1, 1100):
        changes.add(Change(position, np.array([1.0])))
    assert changes.since(1099)[0].position == 1099
    with pytest.raises(CurateError, match="is forgotten"):
        changes.since(10)


def test_shares_of_tokens_become_probabilities_of_examples():
    """Of long (30 tokens) and short (10): half of the tokens are a quarter of the examples."""
    sizes = {"long": DomainSize(10, 300), "short": DomainSize(20, 200)}
    found = example_probabilities({"long": 0.5, "short": 0.5}, sizes)
    assert found == pytest.approx({"long": 0.25, "short": 0.75})
    mixture = Mixture(
        "fixed",
        (Phase(0.5, {"long": 1.0, "short": 0.0}), Phase(0.5, {"long": 0.0, "short": 1.0})),
        {},
    )
    # 100 examples, as many tokens in each phase: 25 of 30 tokens, then 75 of 10.
    assert [start for start, _ in phase_probabilities(mixture, 100, sizes=sizes)] == [0, 25]
    assert [start for start, _ in phase_probabilities(mixture, 100)] == [0, 50]
    with pytest.raises(ConfigError, match="the domain short"):
        phase_probabilities(mixture, 100, sizes={"long": sizes["long"]})


def test_a_cooldown_is_two_phases_of_the_stream():
    """Figures of the method's page: temperature 5, then 1."""
    sizes = {
        name: DomainSize(n, n) for name, n in (("large", 10**6), ("middle", 10**4), ("small", 100))
    }
    mixture = Cooldown().mixture(sizes, budget_tokens=2e6)
    (start, hot), (switch, cold) = phase_probabilities(mixture, 20_000, sizes=sizes)
    assert (start, switch) == (0, 10_000)
    assert list(hot.values()) == pytest.approx([0.642427, 0.255755, 0.101818], abs=1e-6)
    domains = {name: range(size.num_examples) for name, size in sizes.items()}
    source = MixtureStream(domains, hot, seed=1)
    source.set_probabilities(cold, from_position=switch)
    drawn = [
        {
            name: times * size.num_examples
            for (name, times), size in zip(
                source.epochs(position).items(), sizes.values(), strict=True
            )
        }
        for position in (10_000, 20_000)
    ]
    assert drawn[0]["small"] == pytest.approx(1018, abs=4 * 30)
    assert drawn[1]["small"] - drawn[0]["small"] < 6
    assert drawn[1]["middle"] - drawn[0]["middle"] == pytest.approx(99, abs=40)
