"""`curate verify`: are the shards still what was written?"""

from pathlib import Path
from typing import Any

from curate.data.shard_folder import check_shards


def verify_shards(folder: Path) -> dict[str, Any]:
    """Recompute digests and counts of a shards folder, wherever it lies.

    Args:
        folder: with the shards' `manifest.json`; the run is not needed. A run folder stands for
            its own shards.

    Returns:
        Number of shards, rows, tokens and bytes.

    Raises:
        InputError: there is no such folder.
        CurateError: it is incomplete, or files are missing, changed or too many; all are named.
    """
    is_run = (folder / "shards").is_dir() and not (folder / "data").is_dir()
    return check_shards(folder / "shards" if is_run else folder)
