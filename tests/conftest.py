"""Settings of all tests: hypothesis draws the same examples each time, so that a run repeats."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
