"""Errors keep what, fix and exit code on their way between processes."""

import pickle

import pytest

from curate import errors
from curate.errors import ConfigError, CurateError, Interrupted, counted


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("CurateError", 1),
        ("OutputError", 1),
        ("ConfigError", 2),
        ("InputError", 3),
        ("TooManyBadError", 4),
        ("RunFolderError", 5),
        ("MissingDependencyError", 6),
        ("TryAgainError", 75),
    ],
)
def test_each_kind_has_its_documented_exit_code_and_survives_pickling(kind: str, code: int):
    error = getattr(errors, kind)("row 3 of a.csv is bad", fix="remove it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (again.what, again.fix, again.exit_code) == ("row 3 of a.csv is bad", "remove it", code)
    assert str(again) == "row 3 of a.csv is bad\n  fix: remove it"


def test_an_interruption_is_no_exception_that_a_loop_could_swallow():
    assert not issubclass(Interrupted, Exception)
    assert Interrupted(143).exit_code == 143


def test_a_wrong_setting_is_a_value_error_so_that_pydantic_places_it():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, CurateError)


def test_a_counted_noun_is_singular_for_one_only():
    told = [counted(n, "seed") for n in (0, 1, 2, 12_000)]
    assert told == ["0 seeds", "1 seed", "2 seeds", "12,000 seeds"]
    assert counted(1, "copy is", "copies are") == "1 copy is"
    assert counted(3, "copy is", "copies are") == "3 copies are"
