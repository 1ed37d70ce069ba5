"""What of a run is done, failed, remaining and running now, and what was set aside."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest
from curate.data.mirror import shown_place
from curate.data.tables import read_table
from curate.errors import CurateError
from jobs.all_stages import Stage, failures, stages_for, state_of
from jobs.cluster import ask_workers_devices
from jobs.live import Live, read_live
from jobs.locking import local_holder, read_owner
from jobs.opening import holder, load_settings
from jobs.settings import Settings
from jobs.store import at_hand, glance


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One line of `curate status`."""

    stage: str
    done: int
    failed: int
    remaining: int
    """Outputs still to make, those that failed left out."""
    finished: str | None
    """When the stage last ran to its end."""
    why: tuple[str, ...]
    """What is due and why, or how it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of a run."""

    run: str
    in_use_by: str | None
    """Process that works in the folder now."""
    now: list[Live]
    """What it is doing, the group of tasks that began last at the end; empty where nobody works."""
    stages: list[StageStatus]
    set_aside: dict[str, int]
    """Reason -> rows (whole files under `unreadable_file`)."""


def run_status(root: Path) -> Status:
    """Look at a run folder; nothing is written.

    Raises:
        RunFolderError: there is no run at `root`.
    """
    root = at_hand(root, data=False)
    settings = load_settings(root)
    ask_workers_devices(settings.cluster)
    owner, now = at_work(root)
    return Status(
        run=shown_place(settings.run),
        in_use_by=owner,
        now=now,
        stages=[_stage(stage, settings) for stage in _stages(settings)],
        set_aside=set_aside(RunFolder(root)),
    )


def at_work(root: Path) -> tuple[str | None, list[Live]]:
    """The process that holds the run folder, and what it says of itself; quick, so ask often.

    What a process that died has left behind is not told: nobody holds the folder then.
    """
    root = glance(root)
    owner = holder(root)
    if owner is None:
        return None, []
    found, who = read_live(root), read_owner(root)
    if who is not None and local_holder(root) is not None:
        found = [live for live in found if (live.process, live.host) == (who.pid, who.host)]
    return owner, found


def _stages(settings: Settings) -> list[Stage]:
    """Those of a whole run, and the comparison where one was begun."""
    found = stages_for(settings, "run")
    for folder, name in (("compare", "compare"), ("attribution", "evaluate-attribution")):
        if (Path(settings.run) / folder).is_dir():
            found += stages_for(settings, name)[-1:]
    return found


def set_aside(run: RunFolder) -> dict[str, int]:
    """Reason -> number of rows in quarantine, the most frequent first.

    Raises:
        InputError: a table is damaged.
    """
    counts = Counter[str]()
    for path in sorted(run.quarantine.glob("part-*.parquet")):
        counts.update(read_table(path, ["reason"])["reason"].to_list())
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _stage(stage: Stage, settings: Settings) -> StageStatus:
    root = Path(settings.run)
    entry = load_manifest(RunFolder(root))["stages"].get(stage.name, {})
    failure = failures(root).get(stage.name)
    why = [failure["what"], *failure.get("others", ())] if failure else []
    total = done = 0
    try:
        state = state_of(stage, settings)
    except CurateError as error:  # an input has gone, say: the other stages are still told
        why.append(error.what)
    else:
        total, done = state.total, state.done
        why += [] if failure else state.why
    failed = 0
    if failure and (failure["tasks"] or failure.get("is_over", True)):
        failed = min(len(failure["tasks"]) or 1, max(1, total - done))
    return StageStatus(
        stage=stage.name,
        done=done,
        failed=failed,
        remaining=max(0, total - done - failed),
        finished=entry.get("finished"),
        why=tuple(why),
    )
