"""Dask's own report of a command: what ran where and when, as one page."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from curate.errors import ConfigError, MissingDependencyError
from jobs.cluster_settings import Cluster

log = logging.getLogger(__name__)


def check_profile(settings: Cluster, path: Path) -> None:
    """Whether there will be a report, told before anything is started.

    Raises:
        ConfigError: nothing runs on Dask, or there is no such folder.
        MissingDependencyError: bokeh, which draws it, is not installed.
    """
    if settings.kind == "inline":
        raise ConfigError(
            "--profile saves a report of Dask, but cluster.kind is inline",
            fix="add --workers 2, or leave --profile out",
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"--profile {path}: there is no folder {path.absolute().parent}", fix="make it first"
        )
    if find_spec("bokeh") is None:
        raise MissingDependencyError(
            "--profile needs bokeh, which draws the report and is not installed",
            fix="pip install 'curate-data[profile]'",
        )


@contextmanager
def profiling(client: Any, path: Path | None) -> Generator[None]:
    """Save the report at the end, also of a run that fails; without a path do nothing."""
    if path is None:
        yield
        return
    from distributed import performance_report

    report = performance_report(filename=str(path))
    with client.as_current():
        report.__enter__()
    try:
        yield
    finally:
        # The run's own end counts, whatever becomes of its report.
        try:
            with client.as_current():
                report.__exit__(None, None, None)
            log.info("Dask's report is in %s", path)
        except Exception as error:
            log.warning("Dask's report could not be saved: %s", error)
