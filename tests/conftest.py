"""Settings of all tests: each draws the same examples every time and finds no logging of others."""

import logging
from collections.abc import Generator

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

_LEVELS = {
    "": logging.WARNING,
    **dict.fromkeys(("curate", "jobs", "scorers", "mixers"), logging.NOTSET),
}


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Generator[None]:
    """Commands that run in this process set handlers and levels; the next test has its own.

    Levels are set before a test too: a command may have run in a fixture of a whole file, which
    comes before this one.
    """
    _set_levels()
    before = {name: logging.getLogger(name).handlers[:] for name in _LEVELS}
    yield
    _set_levels()
    for name, handlers in before.items():
        logging.getLogger(name).handlers[:] = handlers


def _set_levels() -> None:
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
