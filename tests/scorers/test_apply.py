import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
from torch import Tensor

from scorers.apply import columns_of, plain_columns


class Double:
    needs: ClassVar[frozenset[str]] = frozenset({"loss"})
    columns: ClassVar[Mapping[str, str]] = {"double": "twice the loss"}

    def score(self, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"double": 2 * quantities["loss"]}


def test_a_seed_counts_once_however_many_checkpoints_it_has():
    losses = [{"loss": np.array([value])} for value in (1.0, 2.0, 6.0, 10.0)]
    found = columns_of(Double(), losses, [0, 0, 0, 1])
    assert found["double"].to_list() == [2 * (3 + 10) / 2]
    assert found["double_std"][0] == pytest.approx(2 * math.sqrt(((3 - 6.5) ** 2) * 2))


def test_one_seed_has_no_spread():
    losses = [{"loss": np.array([1.0, 2.0])}, {"loss": np.array([3.0, 2.0])}]
    found = columns_of(Double(), losses, [7, 7])
    assert found["double"].to_list() == [4.0, 4.0]
    assert found["double_std"].to_list() == [None, None]


def test_what_one_checkpoint_could_not_score_is_null_throughout():
    losses = [{"loss": np.array([1.0, math.nan])}, {"loss": np.array([1.0, 1.0])}]
    found = columns_of(Double(), losses, [0, 1])
    assert found["double"].to_list() == [2.0, None]
    assert found["double_std"].to_list() == [0.0, None]


def test_the_mean_is_taken_in_float64():
    losses = [{"loss": np.array([value], dtype=np.float32)} for value in (1e8, 1.0, -1e8)]
    assert columns_of(Double(), losses, [0, 1, 2])["double"][0] == pytest.approx(2 / 3)


def test_a_scorer_without_a_model_has_its_columns_and_no_more():
    assert plain_columns(Double(), {"loss": np.array([1.5])}).to_dict(as_series=False) == {
        "double": [3.0]
    }
