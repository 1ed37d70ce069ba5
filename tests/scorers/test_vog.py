"""The formulas of VoG that need no model; tests/models and tests/jobs have those that do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scorers.vog import Statistics, VoG, combined, normalised, statistics

FLOATS = st.lists(st.floats(0, 1e3), min_size=1, max_size=30)


def test_scores_of_two_classes_are_normalised_each_by_itself():
    raw = np.array([0.1, 0.3, 0.5, 1.0, 1.4])
    groups = np.array([0, 0, 0, 1, 1])
    of = {group: statistics(raw[groups == group]) for group in (0, 1)}
    found = VoG().score(
        {
            "vog_raw": torch.from_numpy(raw),
            "group_mean": torch.tensor([of[group].mean for group in groups.tolist()]).double(),
            "group_std": torch.tensor([of[group].std for group in groups.tolist()]).double(),
        }
    )
    wanted = torch.tensor([-1.224745, 0, 1.224745, -1, 1], dtype=torch.float64)
    torch.testing.assert_close(found["vog"], wanted, atol=1e-6, rtol=0)
    assert found["vog_raw"].tolist() == raw.tolist()
    assert found.keys() == VoG.columns.keys()


def test_without_a_spread_the_score_is_0_and_what_is_missing_stays_missing():
    raw = torch.tensor([0.5, 0.7, torch.nan, torch.nan])
    found = normalised(raw, torch.full((4,), 0.5), torch.tensor([0.0, 0, 0, 1]))
    assert found[:2].tolist() == [0, 0]
    assert found[2:].isnan().all()


@pytest.mark.parametrize("raw", [[0.3], [0.1, 0.1, 0.1], [0.7, np.float64(np.float32(0.7))]])
def test_one_example_and_equal_ones_have_no_spread(raw: list[float]):
    assert statistics(np.array(raw)).std == 0


@given(FLOATS, FLOATS)
def test_parts_put_together_are_the_whole(first: list[float], second: list[float]):
    whole = np.array(first + second)
    found = combined(statistics(np.array(first)), statistics(np.array(second)))
    assert found.num == len(whole)
    assert found.mean == pytest.approx(whole.mean(), rel=1e-9, abs=1e-12)
    assert found.squares == pytest.approx(whole.var() * len(whole), rel=1e-7, abs=1e-7)


def test_the_deviation_is_that_of_the_population():
    assert statistics(np.array([1.0, 3.0])) == Statistics(2, 2.0, 2.0)
    assert statistics(np.array([1.0, 3.0])).std == 1.0
