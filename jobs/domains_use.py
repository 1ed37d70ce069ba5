"""Whether clustered domains are in use, and what they were made from; light, as opening a run asks.

`domains/clusters.json` and its mark are written last. While they are there, all that reads a
run's domains reads the clustered ones: see `curate.data.tables`.
"""

import logging
from pathlib import Path

from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.errors import InputError
from jobs.settings import Settings

log = logging.getLogger(__name__)


def domain_digests(settings: Settings, part: Partition) -> list[str]:
    """Of the clustered domains of a partition, for the fingerprint of what reads its domains.

    Returns:
        One digest; none where the settings ask for no clustering.

    Raises:
        InputError: the domains have not been made.
    """
    if settings.domains is None:
        return []
    run = RunFolder(Path(settings.run))
    mark = run.domains(part).mark()
    if mark is None or run.clusters.mark() is None:
        raise InputError(
            f"{part.source}/{part.file} has no clustered domains yet",
            fix=f"run `curate domains {run.root}`",
        )
    return [mark["digest"]]


def follow(settings: Settings) -> None:
    """Put clustered domains out of use where the settings ask for none."""
    run = RunFolder(Path(settings.run))
    if settings.domains is None and run.clusters.mark() is not None:
        run.clusters.remove()
        log.info("domains: the clustered domains are in use no more; the tables are kept")
