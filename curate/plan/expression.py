"""Expressions over score columns: `0.5*rank(el2n) + 0.5*rank(loss)`.

Numbers, columns, + - * / and parentheses, and the functions

    log(x)  sqrt(x)  abs(x)  min(x, y, ...)  max(x, y, ...)  clip(x, low, high)
    rank(x)    place among the training rows of the same group, 0 lowest to 1 highest
    zscore(x)  distance from the group's mean in standard deviations

and comparisons < <= > >= == != with `and`, `or` and `not`, which are 1 where they hold and 0 where
they do not. A comparison with a missing value is missing; `and` and `or` need no more than what
decides them.

A column is `num_chars` or `num_tokens`, or what a scorer wrote; where two scorers have a column of
one name it is written `scorer.column`. Texts are parsed to a small tree and never executed.
A value that is missing or not finite makes the row unscored.

Shapes: N rows.
"""

import ast
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from curate.config import nearest
from curate.errors import ConfigError, InputError

Values = NDArray[np.float64]
"""(N,) NaN where a row has no value."""

TOKENS = "num_tokens"
INDEX_COLUMNS = ("num_chars", TOKENS)
"""Columns that every run has, without a scorer."""

_MOST_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Number:
    value: float


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    """An index column, or `scorer.column`."""


@dataclass(frozen=True, slots=True)
class Call:
    function: str
    arguments: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Statistic:
    """Needs all rows of a group before one row has a value."""

    kind: Literal["rank", "zscore"]
    argument: "Node"


Node = Number | Column | Call | Statistic

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
}

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}

_FUNCTIONS: dict[str, tuple[int, int | None, Callable[..., Values]]] = {
    "log": (1, 1, np.log),
    "sqrt": (1, 1, np.sqrt),
    "abs": (1, 1, np.abs),
    "min": (2, None, lambda *values: reduce(np.minimum, values)),
    "max": (2, None, lambda *values: reduce(np.maximum, values)),
    "clip": (3, 3, lambda value, low, high: np.minimum(np.maximum(value, low), high)),
}
"""Name -> fewest and most arguments, and what it does."""


def _truth(values: Values) -> Values:
    """(N,) 1 for any number but 0, NaN for none."""
    return np.where(np.isnan(values), np.nan, np.not_equal(values, 0))


def _compared(holds: Callable[[Values, Values], NDArray[np.bool_]]) -> Callable[..., Values]:
    def compare(left: Values, right: Values) -> Values:
        return np.where(np.isnan(left) | np.isnan(right), np.nan, holds(left, right))

    return compare


def _both(left: Values, right: Values) -> Values:
    """(N,) Kleene's `and`: 0 where either is 0, even beside a missing value."""
    left, right = _truth(left), _truth(right)
    return np.where((left == 0) | (right == 0), 0.0, left * right)


_ARITHMETIC: dict[str, Callable[..., Values]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "negative": np.negative,
    **{name: _compared(getattr(np, name)) for name in _COMPARISONS.values()},
    "and": _both,
    "or": lambda left, right: 1.0 - _both(1.0 - _truth(left), 1.0 - _truth(right)),
    "not": lambda value: 1.0 - _truth(value),
}
"""What operators do; what they make of a missing value is missing."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression."""

    text: str
    root: Node

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads, each once, in order of appearance."""
        found = (node.name for node in _walk(self.root) if isinstance(node, Column))
        return tuple(dict.fromkeys(found))

    @property
    def statistics(self) -> tuple[tuple[Statistic, ...], ...]:
        """Its ranks and z-scores by level: those of one level need only the levels before it."""
        found = [node for node in _walk(self.root) if isinstance(node, Statistic)]
        levels: dict[int, list[Statistic]] = {}
        for node in dict.fromkeys(found):
            levels.setdefault(_level(node), []).append(node)
        return tuple(tuple(levels[level]) for level in sorted(levels))


def parse_expression(
    text: str, scorers: Mapping[str, Sequence[str]], *, where: str = "plan.score"
) -> Expression:
    """The expression that a text means.

    Args:
        text: a column's name as it is, or an expression.
        scorers: scorer -> its columns.
        where: the setting, for messages.

    Raises:
        ConfigError: not an expression of this language, or a column that was not scored.
        InputError: nothing was scored yet.
    """
    names = _Names(scorers, where)
    whole = names.find(text.strip())  # names that are no identifiers work by themselves
    if whole is not None:
        return Expression(text, Column(whole))
    if len(text) > _MOST_CHARS:
        raise ConfigError(f"{where} is longer than {_MOST_CHARS} characters", fix="shorten it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's advice is for programs
            body = ast.parse(text.strip(), mode="eval").body
        root = _node(body, names)
    except ConfigError:
        raise
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{where} {text!r} is not an expression: {error}",
            fix="write a column, or an expression such as 0.5*rank(el2n) + 0.5*rank(loss)",
        ) from error
    expression = Expression(text, root)
    if not expression.columns:
        raise ConfigError(
            f"{where} {text!r} names no column", fix="use a score column, or remove it"
        )
    return expression


def evaluate(
    node: Node,
    columns: Callable[[str], Values],
    statistic: Callable[[Statistic, Values], Values],
) -> Values:
    """(N,) values of an expression; not finite where a row has none.

    Args:
        node: the root, or the argument of a statistic.
        columns: name -> (N,) values.
        statistic: turns the (N,) values of a statistic's argument into its own.
    """
    match node:
        case Number(value):
            return np.array(value)
        case Column(name):
            return columns(name)
        case Statistic(_, argument):
            return statistic(node, evaluate(argument, columns, statistic))
        case Call(function, arguments):
            values = [evaluate(each, columns, statistic) for each in arguments]
            with np.errstate(all="ignore"):
                if function in _ARITHMETIC:
                    return _ARITHMETIC[function](*values)
                return _FUNCTIONS[function][2](*values)


@dataclass(frozen=True, slots=True)
class _Names:
    """Which columns there are."""

    scorers: Mapping[str, Sequence[str]]
    where: str

    def find(self, name: str) -> str | None:
        """The full name of a column, or None where there is none of this name.

        Raises:
            ConfigError: two scorers have one.
        """
        if name in INDEX_COLUMNS:
            return name
        full = [f"{s}.{c}" for s, columns in self.scorers.items() for c in columns]
        if name in full:
            return name
        found = [entry for entry in full if entry.partition(".")[2] == name]
        if len(found) > 1:
            raise ConfigError(
                f"{self.where}: the column {name} was written by more than one scorer",
                fix=f"write {' or '.join(sorted(found))}",
            )
        return found[0] if found else None

    def resolve(self, name: str) -> Column:
        found = self.find(name)
        if found is not None:
            return Column(found)
        if not self.scorers:
            raise InputError(
                f"{self.where} names the column {name}, but nothing was scored yet",
                fix="run `curate score` first",
            )
        if name in self.scorers:
            raise ConfigError(
                f"{self.where}: {name} is a scorer without a column of that name",
                fix=f"use one of its columns: {', '.join(self.scorers[name])}",
            )
        short = [column for columns in self.scorers.values() for column in columns]
        full = [f"{s}.{c}" for s, columns in self.scorers.items() for c in columns]
        known = [*INDEX_COLUMNS, *short]
        raise ConfigError(
            f"{self.where}: there is no score column {name}",
            fix=nearest(name, [*known, *full])
            or f"use one of {', '.join(sorted(set(known)))}, or add its scorer to score.scorers",
        )


def _node(tree: ast.expr, names: _Names) -> Node:
    match tree:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"{value} is not finite")
            return Number(float(value))
        case ast.Name(id=name):
            return names.resolve(name)
        case ast.Attribute(value=ast.Name(id=scorer), attr=column):
            return names.resolve(f"{scorer}.{column}")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return Call("negative", (_node(operand, names),))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _node(operand, names)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            return Call(_OPERATORS[type(operator)], (_node(left, names), _node(right, names)))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return Call("not", (_node(operand, names),))
        case ast.BoolOp(op=operator, values=values):
            name = "and" if isinstance(operator, ast.And) else "or"
            return _joined(name, [_node(each, names) for each in values])
        case ast.Compare(left=left, ops=ops, comparators=others) if {
            type(op) for op in ops
        } <= _COMPARISONS.keys():
            nodes = [_node(each, names) for each in (left, *others)]
            pairs = zip(ops, nodes, nodes[1:], strict=False)
            return _joined("and", [Call(_COMPARISONS[type(op)], (a, b)) for op, a, b in pairs])
        case ast.Call(func=ast.Name(id=function), args=arguments, keywords=[]):
            return _call(function, tuple(_node(each, names) for each in arguments), names.where)
        case _:
            raise ValueError(f"{ast.unparse(tree)} is not allowed")


def _joined(operator: str, nodes: Sequence[Node]) -> Node:
    return reduce(lambda left, right: Call(operator, (left, right)), nodes)


def _call(function: str, arguments: tuple[Node, ...], where: str) -> Node:
    if function == "rank" or function == "zscore":
        if len(arguments) != 1:
            raise ValueError(f"{function} takes one value, not {len(arguments)}")
        if not any(isinstance(node, Column) for node in _walk(arguments[0])):
            raise ValueError(f"{function} needs a column")
        return Statistic(function, arguments[0])
    if function not in _FUNCTIONS:
        known = sorted([*_FUNCTIONS, "rank", "zscore"])
        raise ConfigError(
            f"{where}: there is no function {function}",
            fix=nearest(function, known) or f"use one of {', '.join(known)}",
        )
    fewest, most, _ = _FUNCTIONS[function]
    if len(arguments) < fewest or (most is not None and len(arguments) > most):
        expected = f"{fewest}" if fewest == most else f"{fewest} or more"
        raise ValueError(f"{function} takes {expected} values, not {len(arguments)}")
    return Call(function, arguments)


def _walk(node: Node) -> Iterator[Node]:
    yield node
    match node:
        case Statistic(_, argument):
            yield from _walk(argument)
        case Call(_, arguments):
            for argument in arguments:
                yield from _walk(argument)
        case _:
            pass


def _level(node: Node) -> int:
    """How many statistics are nested in it, itself included."""
    match node:
        case Statistic(_, argument):
            return 1 + _level(argument)
        case Call(_, arguments):
            return max(_level(argument) for argument in arguments)
        case _:
            return 0
