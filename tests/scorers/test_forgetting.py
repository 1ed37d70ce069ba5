"""Forgetting events: the page's sequence, never learned, gaps, and ties."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from curate.errors import ConfigError
from scorers.catalog import build_scorer
from scorers.forgetting import Forgetting, forgetting_events

GAP = math.nan


def column(*shown: float) -> Tensor:
    """One example, (E, 1)."""
    return torch.tensor(shown, dtype=torch.float64)[:, None]


def counted(*shown: float) -> float:
    return forgetting_events(column(*shown)).item()


def test_the_published_sequence_is_forgotten_twice():
    """Logits (2,1), (0,1), (1,0), (0,2), (3,0) with y = 0: right, wrong, right, wrong, right."""
    logits = torch.tensor([[2.0, 1], [0, 1], [1, 0], [0, 2], [3, 0]])
    correct = (logits.argmax(1) == 0).double()
    assert counted(*correct.tolist()) == 2


def test_always_right_and_learned_late_are_never_forgotten():
    assert counted(1, 1, 1, 1) == 0
    assert counted(0, 0, 1, 1) == 0


def test_never_right_counts_as_every_epoch():
    assert counted(0, 0, 0, 0, 0) == 5
    assert counted(0) == 1


def test_a_gap_joins_the_presentations_around_it():
    assert counted(1, GAP, 0, 1) == 1
    assert counted(1, GAP, GAP, 1) == 0
    assert counted(GAP, 1, 0, GAP) == 1
    assert counted(1, GAP) == 0


def test_never_right_where_it_was_shown_counts_as_the_epochs_of_the_run():
    """So that all that was never learned stands above all that was, whoever missed a batch."""
    assert counted(0, GAP, 0) == 3


def test_an_example_that_was_never_shown_has_no_count():
    assert math.isnan(counted(GAP, GAP))


def test_every_short_sequence_agrees_with_a_plain_loop():
    sequences = [s for n in range(1, 6) for s in itertools.product((0.0, 1.0, GAP), repeat=n)]
    for sequence in sequences:
        shown = [value for value in sequence if not math.isnan(value)]
        falls = sum(1 for one, two in itertools.pairwise(shown) if one > two)
        wanted = falls if 1.0 in shown else len(sequence)
        found = counted(*sequence)
        assert math.isnan(found) if not shown else found == wanted, sequence


def test_a_sequence_of_tokens_is_right_from_half_of_them():
    assert counted(0.5, 0.49, 0.9) == 1


def test_examples_do_not_touch_each_other():
    generator = torch.Generator().manual_seed(0)
    correct = torch.randint(2, (9, 40), generator=generator).double()
    correct[torch.rand(9, 40, generator=generator) < 0.2] = GAP
    whole = forgetting_events(correct)
    for index in range(40):
        alone = forgetting_events(correct[:, index : index + 1])
        torch.testing.assert_close(whole[index : index + 1], alone, equal_nan=True)


def test_ties_are_broken_by_the_mean_loss_and_by_less_than_a_tenth():
    correct = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 1, 0]])
    losses = torch.tensor([[0.1, 0.2, 5e3], [2.0, 2, 5e3], [0.1, 0.3, 5e3]])
    found = Forgetting().score({"correct_by_epoch": correct, "loss_by_epoch": losses})
    assert found["forgetting"].tolist() == [1, 1, 1]
    first, second, third = found["forgetting_ordered"].tolist()
    assert 1 < first < second < third <= 1.1


def test_it_counts_up_to_the_epoch_that_is_asked_for():
    quantities = {"correct_by_epoch": column(0, 1, 0, 1, 0), "loss_by_epoch": column(1, 1, 1, 1, 1)}
    counts = [Forgetting(epochs=n).score(quantities)["forgetting"].item() for n in range(1, 7)]
    assert counts == [1, 0, 1, 1, 2, 2]


def test_an_epoch_limit_of_none_at_all_is_refused():
    with pytest.raises(ConfigError, match="epochs is 0"):
        build_scorer("forgetting", {"epochs": 0})
