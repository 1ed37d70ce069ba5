import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import ConfigError, InputError
from curate.plan.expression import Statistic, Values, evaluate, parse_expression

SCORERS = {"el2n": ("el2n",), "loss": ("loss", "perplexity"), "other": ("loss",), "x": ("q-1",)}


def value(text: str, columns: Mapping[str, float]) -> float:
    expression = parse_expression(text, SCORERS)

    def refuse(_: Statistic, __: Values) -> Values:
        raise AssertionError("no statistic was expected")

    found = evaluate(expression.root, lambda name: np.array([columns[name]]), refuse)
    return float(found[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("el2n", 2),
        ("2*el2n + 1", 5),
        ("-el2n - -num_tokens/4", 8),
        ("(el2n + 1) * 2 - 0.5", 5.5),
        ("el2n - 1 - 1", 0),
        ("log(num_tokens)", math.log(40)),
        ("sqrt(el2n)", math.sqrt(2)),
        ("abs(-el2n)", 2),
        ("min(el2n, num_tokens, 1.5)", 1.5),
        ("max(el2n, 3)", 3),
        ("clip(num_tokens, 0, 10)", 10),
        ("clip(el2n, 3, 10)", 3),
        ("loss.loss + other.loss", 7),
        ("perplexity", 9),
        ("x.q-1", 11),
        ("q-1", 11),
        ("2e1 + el2n", 22),
    ],
)
def test_expressions_mean_what_they_say(text: str, expected: float):
    columns = {
        "el2n.el2n": 2.0,
        "loss.loss": 3.0,
        "other.loss": 4.0,
        "loss.perplexity": 9.0,
        "x.q-1": 11.0,
        "num_tokens": 40.0,
    }
    assert value(text, columns) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("el2n < num_tokens", 1),
        ("el2n <= 2", 1),
        ("el2n > 2", 0),
        ("el2n >= 2 and num_tokens != 40", 0),
        ("el2n == 2 or num_chars > 0", 1),  # a missing value beside what decides
        ("el2n == 3 and num_chars > 0", 0),
        ("el2n == 3 or num_chars > 0", None),
        ("el2n == 2 and num_chars > 0", None),
        ("num_chars == num_chars", None),
        ("not el2n", 0),
        ("not num_chars", None),
        ("not el2n < 1", 1),
        ("1 < el2n < 3", 1),
        ("1 < el2n < 2", 0),
        ("1 + (el2n > 1) * 3", 4),
        ("el2n and num_tokens", 1),
    ],
)
def test_conditions_are_one_or_zero_or_missing(text: str, expected: float | None):
    found = value(text, {"el2n.el2n": 2.0, "num_tokens": 40.0, "num_chars": math.nan})
    assert math.isnan(found) if expected is None else found == expected


@given(st.floats(-100, 100), st.floats(0.1, 100), st.floats(-10, 10))
def test_arithmetic_is_that_of_python(a: float, b: float, c: float):
    columns = {"el2n.el2n": a, "num_tokens": b, "num_chars": c}
    expected = (a - b * c) / b + 3 * -a
    found = value("(el2n - num_tokens * num_chars) / num_tokens + 3 * -el2n", columns)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_a_missing_value_stays_missing_through_every_function():
    for text in ("el2n + 1", "min(el2n, 1)", "max(el2n, 1)", "clip(el2n, 0, 1)", "abs(el2n)"):
        assert math.isnan(value(text, {"el2n.el2n": math.nan}))


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("el2", "did you mean el2n?"),
        ("losss.loss", "did you mean loss.loss?"),
        ("num_token", "did you mean num_tokens?"),
        ("rnk(el2n)", "did you mean rank?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(text: str, fix: str):
    with pytest.raises(ConfigError) as caught:
        parse_expression(text, SCORERS)
    assert caught.value.fix == fix
    assert "plan.score" in caught.value.what


def test_a_column_of_two_scorers_needs_its_scorer():
    with pytest.raises(ConfigError, match="more than one scorer") as caught:
        parse_expression("2 * loss", SCORERS)
    assert caught.value.fix == "write loss.loss or other.loss"


def test_a_scorer_is_not_a_column():
    with pytest.raises(ConfigError, match="x is a scorer") as caught:
        parse_expression("rank(x)", SCORERS)
    assert caught.value.fix == "use one of its columns: q-1"


def test_without_any_scores_the_user_is_sent_to_score():
    with pytest.raises(InputError) as caught:
        parse_expression("el2n", {})
    assert caught.value.fix == "run `curate score` first"
    assert parse_expression("num_tokens", {}).columns == ("num_tokens",)


@pytest.mark.parametrize(
    "text",
    [
        "el2n +",
        "",
        "__import__('os').system('true')",
        "el2n.__class__.__name__",
        "[el2n]",
        "el2n if el2n else 1",
        "lambda: el2n",
        "el2n ** 2",
        "el2n is 1",
        "el2n in 1",
        "el2n > 'a'",
        "1 < 2",
        "'el2n'",
        "True + el2n",
        "1j * el2n",
        "1e999 * el2n",
        "9" * 400 + " * el2n",
        "log(el2n, 2)",
        "clip(el2n, 0)",
        "min(el2n)",
        "rank()",
        "rank(1) + el2n",
        "log(x=el2n)",
        "1 + 1",
        "(" * 300 + "el2n" + ")" * 300,
        "el2n + " * 200 + "el2n",
        r"el2n + '\d'",
    ],
)
def test_what_is_not_of_the_language_is_refused(text: str):
    with pytest.raises(ConfigError):
        parse_expression(text, SCORERS)


def test_statistics_come_in_levels_inner_ones_first():
    expression = parse_expression(
        "rank(zscore(el2n) + 1) + zscore(el2n) + rank(num_chars)", SCORERS
    )
    kinds = [[each.kind for each in level] for level in expression.statistics]
    assert kinds == [["zscore", "rank"], ["rank"]]
    assert expression.columns == ("el2n.el2n", "num_chars")
