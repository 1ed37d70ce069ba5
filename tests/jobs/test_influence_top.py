"""The lists of helpful and harmful rows, partition by partition."""

import numpy as np
import polars as pl

from jobs.influence_top import candidates, merged


def keys(first: int, count: int) -> pl.DataFrame:
    rows = range(first, first + count)
    return pl.DataFrame({"source": "s", "file": "f", "row": list(rows)})


def test_partitions_give_the_ends_of_the_whole_pool():
    draw = np.random.default_rng(0)
    scores = draw.integers(-9, 9, (30, 2)).astype(float)
    scores[[3, 17], 1] = np.nan
    listed = draw.random(30) < 0.8
    parts = [
        candidates(keys(first, 10), scores[first : first + 10], ["a", "b"],
                   listed=listed[first : first + 10], count=4)
        for first in (0, 10, 20)
    ]  # fmt: skip
    found = merged(parts, count=4)
    assert found.columns == ["task", "sign", "rank", "source", "file", "row", "score"]
    assert found.height == 2 * 2 * 4
    for query, name in enumerate("ab"):
        for sign in (1, -1):
            rows = [i for i in range(30) if listed[i] and np.isfinite(scores[i, query])]
            rows.sort(key=lambda i: (-sign * scores[i, query], i))
            own = found.filter(task=name, sign=sign)
            assert own["row"].to_list() == rows[:4]
            assert own["rank"].to_list() == [1, 2, 3, 4]
            assert own["score"].to_list() == scores[rows[:4], query].tolist()


def test_a_pool_without_training_rows_gives_an_empty_list():
    scores, nobody = np.ones((3, 1)), np.zeros(3, dtype=bool)
    part = candidates(keys(0, 3), scores, ["a"], listed=nobody, count=2)
    assert merged([part], count=2).is_empty()
