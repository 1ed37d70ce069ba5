"""Settings of all tests: each draws the same examples every time and leaves no logging behind."""

import logging
from collections.abc import Generator

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Generator[None]:
    """Commands that run in this process set handlers and levels; the next test has its own."""
    loggers = [logging.getLogger(name) for name in ("", "curate", "jobs", "scorers", "mixers")]
    before = [(each, each.handlers[:], each.level) for each in loggers]
    yield
    for each, handlers, level in before:
        each.handlers[:] = handlers
        each.setLevel(level)
