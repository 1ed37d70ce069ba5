"""Groups of duplicates against dictionaries and plain loops."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import ConfigError
from scorers.duplicates import Duplicates, grouped, leaders, ranks_by

rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), max_size=30)


@settings(max_examples=60, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_the_leader_is_the_first_by_precedence_of_equal_rows(
    given_rows: list[tuple[int, int, bool]], order: Any
):
    rank = list(range(len(given_rows)))
    order.shuffle(rank)
    first: dict[tuple[int, int, bool], int] = {}
    for row in sorted(range(len(rank)), key=lambda r: rank[r]):
        first.setdefault(given_rows[row], row)
    keys = np.array([row[:2] for row in given_rows], np.uint64).reshape(-1, 2)
    kinds = np.array([row[2] for row in given_rows], np.bool_)
    found = leaders(keys, kinds, np.array(rank, np.int64))
    assert found.tolist() == [first[row] for row in given_rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.integers(-3, 3), max_size=20))
def test_the_highest_value_takes_precedence_then_the_first_row(values: list[int | None]):
    numbers = np.array([np.nan if value is None else value for value in values], np.float64)
    expected = sorted(range(len(values)), key=lambda r: (values[r] is None, -(values[r] or 0), r))
    assert np.argsort(ranks_by(numbers, len(values))).tolist() == expected
    assert ranks_by(None, 3).tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_rows_that_lead_to_the_same_one_are_a_group(draws: list[float], order: Any):
    # Row 0 stays; any other gives way to itself or to an earlier one; then all are renamed.
    earlier = [int(draw * (row + 1)) if row else 0 for row, draw in enumerate(draws)]
    earlier = [min(before, row) for row, before in enumerate(earlier)]
    names = list(range(len(earlier)))
    order.shuffle(names)
    renamed = np.empty(len(earlier), np.int64)
    for row, before in enumerate(earlier):
        renamed[names[row]] = names[before]
    found = grouped(renamed)
    for row in range(len(earlier)):
        root = row
        while earlier[root] != root:
            root = earlier[root]
        assert found.groups[names[row]] == names[root]
    assert found.sizes.tolist() == [found.groups.tolist().count(g) for g in found.groups.tolist()]


def test_the_weight_shares_one_example_among_its_group():
    quantities = {
        "keep": torch.tensor([1.0, 0.0, 1.0]),
        "size": torch.tensor([2.0, 2.0, 1.0]),
        "similarity": torch.tensor([0.0, 1.0, torch.nan]),
        "held_out_similarity": torch.tensor([0.0, 0.5, 1.0]),
    }
    scorer = Duplicates()
    assert scorer.needs == quantities.keys()
    found = scorer.score(quantities)
    assert found.keys() == scorer.columns.keys()
    assert found["duplicate_weight"].tolist() == [0.5, 0.5, 1.0]
    assert found["duplicate_keep"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("options", "limit", "order"),
    [
        ({}, 0.5, "first"),
        ({"method": "near"}, 0.7, "first"),
        ({"method": "semantic"}, 0.95, "far"),
        ({"method": "semantic", "threshold": 0.9, "keep_by": "quality"}, 0.9, "quality"),
    ],
)
def test_defaults_are_those_of_the_method(options: dict[str, Any], limit: float, order: str):
    scorer = Duplicates(**options)
    assert (scorer.limit, scorer.order) == (limit, order)
    assert scorer.reads_scores == (order == "quality")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.9}, "exact knows no degrees"),
        ({"method": "near", "threshold": 1.0}, r"outside \[0, 1\)"),
        ({"keep_by": "far"}, "is about cells"),
        ({"method": "near", "normalize": True}, "knows no case anyway"),
        ({"ngrams": 0}, "start at 1"),
        ({"method": "semantic", "cells": 0}, "start at 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        Duplicates(**options)
    assert caught.value.fix
