"""Plans against plain sorting, and what must hold for each of them."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from curate.errors import ConfigError, CurateError, InputError
from curate.plan.mixture import Mixture, Phase
from curate.plan.plan import REASONS, Arm, apply_plan, make_plan, make_plans
from curate.plan.rules import Thresholds
from curate.plan.settings import Keep, Plan, Weights
from curate.plan.stored import from_values, to_values
from curate.plan.summary import summarise
from curate.plan.yardsticks import yardstick_arms
from tests.plan.pool import pool, tables_of


def applied(frame: pl.DataFrame, plan: Thresholds) -> pl.DataFrame:
    """The pool with the plan's columns beside it."""
    return pl.concat(
        [frame, apply_plan(frame, plan).table.drop("source", "file", "row")], how="horizontal"
    )


def planned(frame: pl.DataFrame, plan: Plan, *, size: int = 1000, **more: Any) -> pl.DataFrame:
    return applied(frame, make_plan(tables_of(frame, size), plan, seed=0, **more))


def mixture(*phases: tuple[float, dict[str, float]]) -> Mixture:
    return Mixture("by hand", tuple(Phase(share, given) for share, given in phases), {})


rows = st.lists(
    st.fixed_dictionaries(
        {
            "el2n.el2n": st.none() | st.floats(0, 2, width=32) | st.sampled_from([0.5, 1.0]),
            "domain": st.sampled_from(["a", "b", "c"]),
            "label": st.none() | st.integers(0, 2),
            "split": st.sampled_from(["train", "train", "train", "held_out"]),
            "num_tokens": st.integers(0, 30),
        }
    ),
    min_size=1,
    max_size=40,
).filter(lambda rows: any(row["split"] == "train" for row in rows))

plans = st.builds(
    Plan,
    drop=st.sampled_from(
        [None, None, "num_tokens < 3", "el2n > 1 or num_tokens == 5", "rank(num_tokens) < 0.3"]
    ),
    score=st.sampled_from(["el2n", "el2n", "num_tokens", "2*rank(el2n) - zscore(num_tokens)"]),
    keep=st.floats(0.05, 1)
    | st.builds(Keep, examples=st.integers(1, 60))
    | st.builds(Keep, tokens=st.integers(1, 900).map(float))
    | st.builds(Keep, token_share=st.floats(0.05, 1)),
    order=st.sampled_from(["hardest", "easiest"]),
    drop_first=st.sampled_from([0.0, 0.0, 0.2]),
    draw=st.sampled_from(["top", "sample"]),
    within=st.sampled_from(["domain", "label", "source", "all"]),
    max_repeats=st.sampled_from([1.0, 1.5, 4.0]),
    force=st.just(True),
)

mixtures = st.none() | st.lists(
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=1, max_size=3
).map(
    lambda phases: mixture(
        *(
            (1 / len(phases), {name: w / sum(each) for name, w in zip("abc", each, strict=True)})
            for each in phases
        )
    )
)


@settings(max_examples=80, deadline=None)
@given(rows, plans, mixtures)
def test_what_holds_for_every_plan(
    given_rows: list[dict[str, Any]], plan: Plan, mixed: Mixture | None
):
    frame = pool(given_rows)
    try:
        made = make_plan(tables_of(frame, 7), plan, seed=3, mixture=mixed)
    except InputError:  # nothing is left
        reject()
    table = applied(frame, made)
    assert (table["keep"] == (table["copies"] > 0)).all()
    assert (table["keep"] == (table["reason"] == "kept")).all()
    assert set(table["reason"]) <= set(REASONS)
    assert ((table["split"] == "held_out") == (table["reason"] == "held_out")).all()
    assert (
        table.filter(pl.col("el2n.el2n").is_null() & (plan.score != "num_tokens"))["copies"].sum()
        == 0
    )
    assert (table["weight"] == table["keep"].cast(pl.Float32)).all()
    most = math.ceil(plan.max_repeats) if mixed else 1
    assert table["copies"].max() <= most  # pyright: ignore[reportOperatorIssue]
    # What the rules count is what the table holds.
    assert made.kept_copies == table["copies"].sum()
    assert made.kept_rows == table["keep"].sum()
    assert made.kept_tokens == (table["copies"] * table["num_tokens"]).sum()
    counts = table["copies"].cast(pl.Float64)
    assert made.effective_size == pytest.approx(
        counts.sum() ** 2 / (counts**2).sum() if counts.sum() else 0  # pyright: ignore[reportOperatorIssue]
    )
    # Exactly the rows that were asked for, or all that may be used; never above a token budget.
    assert made.placed <= made.asked
    if made.unit == "rows":
        assert made.kept_copies == made.placed
        eligible = sum(
            int(rule.eligible_rows * (plan.max_repeats if mixed else 1)) for rule in made.rules
        )
        assert made.placed == min(made.asked, eligible)
    else:
        assert made.kept_tokens <= made.placed
    if mixed is not None and len(mixed.phases) > 1:
        assert (table["phases"].list.sum() == table["copies"]).all()


@settings(max_examples=40, deadline=None)
@given(rows, plans, mixtures, st.integers(1, 50), st.randoms(use_true_random=False))
def test_neither_partitions_nor_the_order_of_rows_matter(
    given_rows: list[dict[str, Any]], plan: Plan, mixed: Mixture | None, size: int, order: Any
):
    # Sums of z-scores depend on the order in their last digit, so they are left out here.
    plan = replace(plan, draw="top", score="el2n + 0.1 * rank(num_tokens)")
    frame = pool(given_rows)
    shuffled = frame.sample(fraction=1, shuffle=True, seed=order.randrange(1000))
    try:
        one = planned(frame, plan, mixture=mixed)
    except InputError:  # nothing is left
        reject()
    two = planned(shuffled, plan, size=size, mixture=mixed).sort("row")
    assert one.equals(two)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=40, unique=True),
    st.floats(0.01, 1),
    st.sampled_from(["hardest", "easiest"]),
    st.sampled_from([0.0, 0.1, 0.34]),
)
def test_the_top_of_one_group_is_a_slice_of_its_sorted_scores(
    scores: list[float], keep: float, order: Any, drop: float
):
    frame = pool([{"el2n.el2n": score} for score in scores])
    plan = Plan(score="el2n", keep=keep, order=order, drop_first=drop)
    table = planned(frame, plan, size=9)
    ordered = sorted(scores, reverse=order == "hardest")
    first, number = round(drop * len(scores)), round(keep * len(scores))
    expected = set(np.array(ordered[first : first + number], np.float32).tolist())
    assert set(table.filter("keep")["el2n.el2n"].to_list()) == expected
    extreme = set(np.array(ordered[:first], np.float32).tolist())
    found = table.filter(pl.col("reason") == "dropped_extreme")["el2n.el2n"].to_list()
    assert set(found) == extreme


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-5, 5, width=32), st.integers(0, 20)),
        min_size=1,
        max_size=40,
        unique_by=lambda pair: pair[0],
    ).filter(lambda pairs: sum(n for _, n in pairs) > 0),
    st.integers(1, 300),
)
def test_a_token_budget_takes_the_longest_run_that_fits(
    pairs: list[tuple[float, int]], budget: int
):
    frame = pool([{"el2n.el2n": score, "num_tokens": n} for score, n in pairs])
    table = planned(frame, Plan(score="el2n", keep=Keep(tokens=budget)), size=9)
    expected: set[float] = set()
    left = min(budget, sum(n for _, n in pairs))
    whole = left == sum(n for _, n in pairs)
    for score, num_tokens in sorted(pairs, reverse=True):
        left -= num_tokens
        if left < 0:
            break
        expected.add(float(np.float32(score)))
    kept = set(table.filter("keep")["el2n.el2n"].to_list())
    assert kept == expected if not whole else kept == {float(np.float32(s)) for s, _ in pairs}


def test_groups_keep_the_same_share_each_by_its_own_scores():
    frame = pool(
        [{"el2n.el2n": float(i), "domain": "a"} for i in range(10)]
        + [{"el2n.el2n": 100.0 + i, "domain": "b"} for i in range(20)]
    )
    kept = planned(frame, Plan(score="el2n", keep=0.3)).filter("keep")
    assert kept.filter(pl.col("domain") == "a")["el2n.el2n"].to_list() == [7, 8, 9]
    assert kept.filter(pl.col("domain") == "b")["el2n.el2n"].to_list() == [
        114 + i for i in range(6)
    ]
    everywhere = planned(frame, Plan(score="el2n", keep=0.3, within="all")).filter("keep")
    assert everywhere["el2n.el2n"].to_list() == [111 + i for i in range(9)]


def test_labels_and_rows_without_one_are_groups():
    frame = pool(
        [{"el2n.el2n": float(i), "label": i % 2} for i in range(10)]
        + [{"el2n.el2n": 50.0 + i} for i in range(10)]
    )
    kept = planned(frame, Plan(score="el2n", keep=0.4, within="label")).filter("keep")
    assert kept["el2n.el2n"].to_list() == [6, 7, 8, 9, 56, 57, 58, 59]


def test_ties_are_broken_by_the_key_and_the_seed_and_nothing_else():
    frame = pool([{"el2n.el2n": 1.0} for _ in range(1000)])
    first, again = (planned(frame, Plan(score="el2n", keep=0.5), size=n) for n in (1000, 13))
    assert first["keep"].sum() == 500
    assert first.equals(again)
    other = applied(frame, make_plan(tables_of(frame), Plan(score="el2n", keep=0.5), seed=1))
    assert 150 < (first["keep"] & other["keep"]).sum() < 350  # independent: 250 on average


def test_the_middle_is_a_window_around_the_centre():
    frame = pool([{"el2n.el2n": float(i)} for i in range(11)])
    kept = planned(frame, Plan(score="el2n", keep=Keep(examples=5), order="middle")).filter("keep")
    assert kept["el2n.el2n"].to_list() == [3, 4, 5, 6, 7]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(1, 400))
def test_the_middle_by_tokens_stays_within_the_budget_and_leaves_as_much_on_both_sides(
    lengths: list[int], budget: int
):
    frame = pool([{"el2n.el2n": float(i), "num_tokens": n} for i, n in enumerate(lengths)])
    table = planned(frame, Plan(score="el2n", keep=Keep(tokens=budget), order="middle"), size=7)
    total, kept = sum(lengths), table.filter("keep")
    tokens = kept["num_tokens"].sum()
    assert tokens <= min(budget, total)
    if budget < total and kept.height:
        low, high = kept["row"].min(), kept["row"].max()
        assert kept.height == high - low + 1  # pyright: ignore[reportOperatorIssue]
        before, behind = sum(lengths[:low]), sum(lengths[high + 1 :])  # pyright: ignore
        side = (total - budget) / 2
        assert side <= before <= side + max(lengths) + 1
        assert side - 1 <= behind <= side + max(lengths) + 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_a_draw_follows_the_softmax_of_the_standardised_score(temperature: float):
    scores = np.array([0.0, 1.0, 3.0])
    z = (scores - scores.mean()) / scores.std()
    expected = np.exp(z / temperature) / np.exp(z / temperature).sum()
    draws = 3000  # groups of three, of which one is drawn
    frame = pool(
        [{"el2n.el2n": s, "domain": f"d{i}"} for i in range(draws) for s in scores.tolist()]
    )
    plan = Plan(score="el2n", keep=Keep(examples=draws), draw="sample", temperature=temperature)
    drawn = planned(frame, plan, size=10_000)["keep"].to_numpy().reshape(draws, 3)
    assert (drawn.sum(axis=1) == 1).all()
    counts = drawn.sum(axis=0)
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) < 4.5 * error).all()


def test_a_cold_draw_is_the_top_and_a_hot_one_is_random():
    frame = pool([{"el2n.el2n": float(i)} for i in range(1000)])
    top = planned(frame, Plan(score="el2n", keep=0.1))
    cold = planned(frame, Plan(score="el2n", keep=0.1, draw="sample", temperature=1e-6))
    assert (top["keep"] == cold["keep"]).all()
    hot = planned(frame, Plan(score="el2n", keep=0.1, draw="sample", temperature=1e6))
    assert 400 < hot.filter("keep")["row"].mean() < 600  # pyright: ignore[reportOperatorIssue]
    assert set(hot["reason"]) == {"kept", "draw"}


def test_a_draw_leaves_out_the_extreme_before_it_standardises():
    """With the outlier inside, all other z-scores would be alike and the draw random."""
    frame = pool([{"el2n.el2n": float(i)} for i in range(199)] + [{"el2n.el2n": 1e9}])
    plan = Plan(score="el2n", keep=0.1, drop_first=0.005, draw="sample", temperature=0.01)
    table = planned(frame, plan)
    assert table["reason"][-1] == "dropped_extreme"
    assert table.filter("keep")["row"].min() > 170  # pyright: ignore[reportOperatorIssue]


def test_without_a_score_the_choice_is_random_and_exact():
    frame = pool([{} for _ in range(2000)])
    table = planned(frame, Plan(keep=0.25))
    assert table["keep"].sum() == 500
    assert set(table["reason"]) == {"kept", "draw"}
    assert 800 < table.filter("keep")["row"].mean() < 1200  # pyright: ignore[reportOperatorIssue]


def test_ranks_are_mid_ranks_within_the_group():
    """In domain a: 1, 2, 2, 4 have the shares 0, 1/2, 1/2, 1; weights show them."""
    frame = pool(
        [{"el2n.el2n": v, "domain": "a"} for v in (1.0, 2.0, 2.0, 4.0)]
        + [{"el2n.el2n": v, "domain": "b"} for v in (30.0, 10.0, None, 20.0)]
        + [{"el2n.el2n": 7.0, "domain": "c"}]
    )
    made = make_plan(tables_of(frame, 2), Plan(score="rank(el2n)"), seed=0)
    from curate.plan.groups import Cells, batch_of

    assert made.scoring is not None
    found = made.scoring.values(batch_of(frame, Cells(with_labels=False), seed=0))
    expected = [0, 0.5, 0.5, 1, 1, 0, math.nan, 0.5, 0.5]
    np.testing.assert_allclose(found, expected)


def test_z_scores_are_those_of_numpy_whatever_the_partitions():
    random = np.random.default_rng(0)
    values = (1e4 + random.normal(size=500)).astype(np.float32)
    domains = random.integers(0, 3, 500)
    frame = pool(
        [{"el2n.el2n": float(v), "domain": f"d{d}"} for v, d in zip(values, domains, strict=True)]
    )
    from curate.plan.groups import Cells, batch_of

    made = make_plan(tables_of(frame, 33), Plan(score="zscore(el2n)"), seed=0)
    assert made.scoring is not None
    found = made.scoring.values(batch_of(frame, Cells(with_labels=False), seed=0))
    for domain in range(3):
        own = values[domains == domain].astype(np.float64)
        np.testing.assert_allclose(
            found[domains == domain], (own - own.mean()) / own.std(), atol=1e-9
        )


def test_equal_scores_have_no_spread():
    frame = pool([{"el2n.el2n": 0.1} for _ in range(30)])
    made = make_plan(tables_of(frame, 7), Plan(score="zscore(el2n)", keep=0.5), seed=0)
    assert made.kept_rows == 15
    assert made.rules[0].windows[0].high >> 64 == 1 << 63  # the position of the number 0


def test_a_value_that_is_not_finite_is_unscored():
    frame = pool([{"el2n.el2n": v} for v in (0.0, -1.0, 1.0, math.nan, None, math.inf)])
    table = planned(frame, Plan(score="log(el2n)"))
    assert table["reason"].to_list() == ["unscored", "unscored", "kept"] + ["unscored"] * 3


def two_domains() -> pl.DataFrame:
    """100 examples of 10 tokens in `large`, 10 of 10 in `small`; scores fall."""
    return pool(
        [{"domain": "large", "el2n.el2n": 1 - i / 100} for i in range(100)]
        + [{"domain": "small", "el2n.el2n": 1 - i / 100} for i in range(10)]
    )


def test_a_mixture_is_met_in_tokens_with_copies_in_order_of_score():
    mixed = mixture((1.0, {"large": 0.5, "small": 0.5}))
    plan = Plan(score="el2n", keep=Keep(tokens=500.0))
    table = planned(two_domains(), plan, mixture=mixed)
    assert table.filter(pl.col("domain") == "large")["copies"].to_list() == [1] * 25 + [0] * 75
    # 250 of 100 tokens: everything twice, and the five hardest a third time.
    assert table.filter(pl.col("domain") == "small")["copies"].to_list() == [3] * 5 + [2] * 5


def test_phases_go_on_where_the_last_one_stopped():
    mixed = mixture((0.5, {"large": 0.2, "small": 0.8}), (0.5, {"large": 0.8, "small": 0.2}))
    plan = Plan(score="el2n", keep=Keep(tokens=200.0))
    table = planned(two_domains(), plan, mixture=mixed)
    large = table.filter(pl.col("domain") == "large")["phases"].to_list()
    assert large == [[1, 0]] * 2 + [[0, 1]] * 8 + [[0, 0]] * 90
    small = table.filter(pl.col("domain") == "small")["phases"].to_list()
    assert small == [[1, 0]] * 8 + [[0, 1]] * 2
    # Twice the budget: the second phase finishes the first epoch of `small` and starts another.
    table = planned(two_domains(), replace(plan, keep=Keep(tokens=300.0)), mixture=mixed)
    small = table.filter(pl.col("domain") == "small")["phases"].to_list()
    assert small == [[2, 0]] * 2 + [[1, 1]] * 3 + [[1, 0]] * 5


def test_repeats_stop_at_the_limit_and_the_rest_goes_elsewhere():
    mixed = mixture((1.0, {"large": 0.5, "small": 0.5}))
    plan = Plan(score="el2n", keep=Keep(tokens=500.0), max_repeats=2)
    table = planned(two_domains(), plan, mixture=mixed)
    tokens = table.group_by("domain").agg((pl.col("copies") * pl.col("num_tokens")).sum())
    assert dict(tokens.iter_rows()) == {"large": 300, "small": 200}
    everything = make_plan(
        tables_of(two_domains()), replace(plan, keep=Keep(tokens=1e4)), seed=0, mixture=mixed
    )
    assert (everything.asked, everything.placed) == (10_000, 2200)


def test_a_domain_without_a_share_says_so():
    mixed = mixture((1.0, {"large": 1.0, "small": 0.0}))
    table = planned(two_domains(), Plan(score="el2n", keep=0.1), mixture=mixed)
    assert set(table.filter(pl.col("domain") == "small")["reason"]) == {"no_share"}
    assert table["copies"].sum() == round(0.1 * 110)


def test_copies_without_a_mixture_only_where_they_are_allowed():
    frame = pool([{} for _ in range(10)])
    plan = Plan(keep=Keep(examples=25))
    assert planned(frame, plan)["copies"].to_list() == [1] * 10
    assert sorted(planned(frame, plan, repeat=True)["copies"]) == [2] * 5 + [3] * 5


def test_weights_have_mean_one_over_the_kept_copies_and_are_clipped_first():
    frame = pool([{"el2n.el2n": v, "loss.loss": v} for v in (0.0, 1.0, 1.0, 2.0, 96.0, None)])
    plan = Plan(keep=1.0, weights=Weights(score="el2n", clip=(0.1, 2.0)), within="all")
    made = make_plan(tables_of(frame, 2), plan, seed=0)
    found = applied(frame, made)["weight"].to_numpy()
    # The mean of the five values is 20; without one the weight is 1.
    clipped = np.array([0.1, 0.1, 0.1, 0.1, 2.0, 1.0])
    np.testing.assert_allclose(found, clipped / clipped.mean(), rtol=1e-6)
    weights = clipped / clipped.mean()
    assert made.effective_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())


def test_weights_count_copies_and_dropped_rows_have_none():
    mixed = mixture((1.0, {"large": 0.5, "small": 0.5}))
    plan = Plan(score="el2n", keep=Keep(tokens=500.0), weights=Weights(score="1.5 - el2n"))
    table = planned(two_domains(), plan, mixture=mixed)
    assert (table.filter(~pl.col("keep"))["weight"] == 0).all()
    copies = table["copies"].to_numpy()
    assert np.average(table["weight"].to_numpy(), weights=copies) == pytest.approx(1, rel=1e-6)


def test_a_plan_that_hangs_on_a_few_examples_is_refused_unless_forced():
    frame = pool([{"el2n.el2n": 1e-3} for _ in range(999)] + [{"el2n.el2n": 1e3}])
    weights = Weights(score="el2n", clip=(0.0, 1e6))
    with pytest.raises(CurateError, match="effective examples of 1,000 kept") as caught:
        make_plan(tables_of(frame), Plan(weights=weights), seed=0)
    assert "plan.force" in caught.value.fix
    forced = make_plan(tables_of(frame), Plan(weights=weights, force=True), seed=0)
    assert forced.effective_size < 1.01
    clipped = Weights(score="el2n")
    assert make_plan(tables_of(frame), Plan(weights=clipped), seed=0).effective_size > 100


def test_weights_without_a_positive_value_are_refused():
    frame = pool([{"el2n.el2n": 0.0} for _ in range(5)])
    with pytest.raises(CurateError, match="not above 0 for any kept row"):
        make_plan(tables_of(frame), Plan(weights=Weights(score="el2n")), seed=0)


def test_an_unknown_column_is_refused_before_any_pass():
    def frames(_: Any) -> Any:
        raise AssertionError("no pass was expected")

    tables = replace(tables_of(pool([{}])), frames=frames)
    with pytest.raises(ConfigError, match="no score column el3n"):
        make_plan(tables, Plan(score="el3n"), seed=0)
    with pytest.raises(ConfigError, match=r"plan\.weights\.score"):
        make_plan(tables, Plan(weights=Weights(score="el3n")), seed=0)


def test_no_training_examples_is_an_error():
    with pytest.raises(InputError, match="no training examples"):
        make_plan(tables_of(pool([{"split": "held_out"}])), Plan(), seed=0)


def test_more_examples_than_there_are_scores_leaves_a_shortfall_and_no_repeats():
    frame = pool([{"el2n.el2n": 1.0 if i < 30 else None} for i in range(100)])
    made = make_plan(tables_of(frame), Plan(score="el2n", keep=0.5), seed=0)
    assert (made.asked, made.placed, made.kept_copies) == (50, 30, 30)


@settings(max_examples=25, deadline=None)
@given(rows, plans, mixtures)
def test_a_stored_plan_decides_as_the_one_that_was_made(
    given_rows: list[dict[str, Any]], plan: Plan, mixed: Mixture | None
):
    import json

    frame = pool(given_rows)
    weighed = replace(plan, weights=Weights(score="rank(num_tokens) + 1"))
    arms = {"plan": Arm(weighed, mixed), "other": Arm(replace(plan, order="middle", drop_first=0))}
    made = make_plans(tables_of(frame, 7), arms, seed=5)
    values, ranks = to_values(made)
    back = from_values(json.loads(json.dumps(values)), ranks)
    for name in arms:
        assert apply_plan(frame, back[name]).table.equals(apply_plan(frame, made[name]).table)
        assert back[name].rules == made[name].rules


def test_plans_made_together_are_those_made_alone():
    frame = two_domains()
    arms = {
        "one": Arm(Plan(score="el2n", keep=0.3)),
        "two": Arm(Plan(keep=0.5, within="all")),
        "three": Arm(Plan(score="rank(el2n)", draw="sample", keep=0.2, drop_first=0.1)),
    }
    together = make_plans(tables_of(frame, 9), arms, seed=0)
    for name, arm in arms.items():
        alone = make_plan(tables_of(frame, 50), arm.settings, seed=0, label=name)
        assert apply_plan(frame, alone).table.equals(apply_plan(frame, together[name]).table)
    assert list(together) == list(arms)


DROPPING = [
    {"el2n.el2n": 0.1, "num_tokens": 7, "domain": "a"},
    {"el2n.el2n": 0.2, "num_tokens": 1, "domain": "a"},
    {"el2n.el2n": 0.3, "num_tokens": 7, "domain": "a"},
    {"el2n.el2n": 0.4, "num_tokens": 1, "domain": "b"},
    {"el2n.el2n": 0.5, "num_tokens": 1, "domain": "b"},
    {"el2n.el2n": 0.6, "num_tokens": 7, "domain": "c"},
    {"el2n.el2n": None, "num_tokens": 7, "domain": "c", "split": "held_out"},
]


def test_dropped_rows_are_as_if_they_were_not_there():
    rules = Plan(score="rank(el2n)", keep=0.5, within="all", order="easiest")
    whole = planned(pool(DROPPING), replace(rules, drop="num_tokens == 1"), size=2)
    without = planned(pool([row for row in DROPPING if row["num_tokens"] != 1]), rules)
    assert whole["reason"].to_list() == [
        "kept", "dropped", "kept", "dropped", "dropped", "score", "held_out",
    ]  # fmt: skip
    rest = whole.filter(pl.col("reason") != "dropped")
    assert rest["reason"].to_list() == without["reason"].to_list()
    assert rest["weight"].to_list() == without["weight"].to_list()


def test_a_missing_value_drops_nothing_and_a_flag_stands_for_itself():
    frame = pool([{"el2n.el2n": None}, {"el2n.el2n": 1.0}, {"el2n.el2n": 0.0}])
    table = planned(frame, Plan(drop="el2n"))
    assert table["reason"].to_list() == ["kept", "dropped", "kept"]
    table = planned(frame, Plan(drop="not el2n"))
    assert table["reason"].to_list() == ["kept", "kept", "dropped"]


def test_dropping_everything_is_refused():
    with pytest.raises(InputError, match=r"plan\.drop 'num_tokens > 0' leaves out every"):
        planned(pool(DROPPING), Plan(drop="num_tokens > 0"))


def test_a_budget_that_whole_examples_cannot_fill_is_told():
    """Three examples of ten tokens in each of 50 domains: of 15 tokens each, 10 can be kept."""
    frame = pool([{"domain": f"d{n // 3}", "el2n.el2n": float(n)} for n in range(150)])
    tables = tables_of(frame)
    half = Plan(score="el2n", keep=Keep(token_share=0.5))
    for rules, is_told in ((half, True), (replace(half, within="all"), False)):
        plan = make_plan(tables, rules, seed=0)
        notes = summarise(tables, plan, make_plans(tables, yardstick_arms(plan), seed=0))["notes"]
        assert (
            any("500 of 750 tokens are kept: in each of 50 groups" in n for n in notes) is is_told
        )


def test_the_summary_counts_what_was_dropped():
    rules = Plan(score="zscore(el2n)", keep=1.0, drop="num_tokens == 1", within="domain")
    tables = tables_of(pool(DROPPING), 2)
    plan = make_plan(tables, rules, seed=0)
    beside = make_plans(tables, yardstick_arms(plan), seed=0)
    summary = summarise(tables, plan, beside)
    assert summary["training"] == {"rows": 6, "tokens": 24}
    assert summary["dropped"] == {"rows": 3, "tokens": 3}
    assert summary["reasons"]["dropped"] == 3
    assert summary["kept"]["rows"] == summary["asked"] == 3
    assert summary["domains"]["b"]["rows"] == 2
    assert summary["domains"]["b"]["epochs"] is None
    assert summary["domains"]["a"]["epochs"] == 1
    assert summary["notes"] == ["plan.drop leaves nothing of the domain b"]
    # The yardstick knows nothing of the rule: it draws from everything.
    assert beside["random"].domains["b"] == (2, 2)


def test_a_mixture_drops_the_same_rows():
    rules = Plan(keep=1.0, drop="rank(num_tokens) < 0.5", within="all", force=True)
    frame = pool(DROPPING)
    mixed = mixture((1.0, {"a": 0.2, "b": 0.7, "c": 0.1}))
    with_mixture = planned(frame, rules, mixture=mixed)
    plain = planned(frame, rules)
    names = [table.filter(pl.col("reason") == "dropped")["row"] for table in (plain, with_mixture)]
    assert names[0].to_list() == names[1].to_list() == [1, 3, 4]


def test_a_stored_plan_still_drops():
    frame = pool(DROPPING)
    plan = make_plan(tables_of(frame), Plan(drop="rank(num_tokens) < 0.5", within="all"), seed=0)
    values, ranks = to_values({"p": plan})
    again = from_values(json.loads(json.dumps(values)), ranks)["p"]
    assert apply_plan(frame, again).table.equals(apply_plan(frame, plan).table)
    assert (applied(frame, again)["reason"] == "dropped").sum() == 3
