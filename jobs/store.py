"""Runs in an object store: opening them, looking at them, and the tasks that work in them."""

import re
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from curate.data.mirror import address_in, attach, copy_for, copy_of, shown_place
from curate.data.mirror_copy import Mirror, is_document
from curate.data.mirror_lock import fetch_live, holding, owner_of
from curate.data.storage import locate, run_errors
from curate.errors import CurateError, InputError, RunFolderError
from jobs.locking import local_holder
from jobs.settings import Settings

if TYPE_CHECKING:
    from jobs.run import Task

Work = Callable[[dict[str, Any]], dict[str, Any]]

_PARTITION = re.compile(r"part-[0-9a-f]{10}-\d{5}")
_OF_PARTITIONS = {
    "jobs.index.index_partition",
    "jobs.lengths.lengths_work",
    "jobs.measuring.measure_work",
    "jobs.score_columns.column_work",
    "jobs.write.write_work",
}
"""Work that reads tables of the partitions that its payload names, and of no others."""


# -- looking --------------------------------------------------------------------------------------


def at_hand(place: str | Path, *, data: bool = True, shards: bool = False) -> Path:
    """The folder of a run, or of shards, for a command that only reads.

    What lies in a store is brought into its working copy. Where a client works there on this
    machine, the copy is as that client keeps it.

    Args:
        place: a local path, as it is, or an address.
        data: bring tables too, and not only documents.
        shards: bring the shards too.

    Raises:
        InputError: there is nothing at the address, or it cannot be reached.
    """
    address = address_in(place)
    mirror = copy_of(Path(place)) if address is None else copy_for(address)
    if mirror is None:
        return Path(place)
    if local_holder(mirror.root) is None:
        if not mirror.refresh():
            raise InputError(f"there is nothing at {mirror.address}", fix="check the address")
        fetch_live(mirror)
    mirror.bring(is_document)
    if data:
        mirror.bring(lambda name: shards or not _is_of_shards(name))
    return mirror.root if address is not None else Path(place)


def glance(place: Path) -> Path:
    """The folder of a run whose tables are not wanted, only what it says of itself now."""
    address = address_in(place)
    root = place if address is None else copy_for(address).root
    mirror = _whole(root)
    if mirror is not None and local_holder(root) is None:
        fetch_live(mirror)
    return root


def is_run_at(address: str) -> bool:
    """Whether a run of curate lies at an address, as far as its settings tell.

    Raises:
        InputError: the store cannot be reached.
    """
    system, base = locate(address)
    with run_errors(address):
        return bool(system.exists(f"{base.rstrip('/')}/config.yaml"))


def store_owner(root: Path) -> str | None:
    """Which client works in a run that lies in a store, on any machine; None where nobody does."""
    mirror = _whole(root)
    return None if mirror is None else owner_of(mirror)


def here(settings: Settings) -> Settings:
    """The same settings, the working copy in place of an address; its documents are brought."""
    address = address_in(settings.run)
    if address is None:
        return settings
    mirror = copy_for(address)
    if local_holder(mirror.root) is None:
        mirror.refresh()
        mirror.bring(is_document)
    return replace(settings, run=str(mirror.root))


# -- working --------------------------------------------------------------------------------------


@contextmanager
def holding_store(root: Path) -> Generator[None]:
    """Inside, this client alone works in the run; nothing is done for a run on this machine.

    Raises:
        RunFolderError: another client works there, or something else lies there.
        InputError: the store may not be used.
        StoreLostError: it does not answer.
    """
    mirror = _whole(root)
    if mirror is None:
        yield
        return
    with holding(mirror):
        if mirror.refresh(owner=True) and mirror.journal.get("config.yaml") is None:
            raise RunFolderError(
                f"{mirror.address} is not empty and holds no run of curate"
                f" (it has {min(mirror.journal.entries())})",
                fix="choose another address with --out",
            )
        _bring_for_client(mirror)
        try:
            yield
        except Exception:
            with suppress(CurateError):  # what went wrong before is what counts
                mirror.sweep()
            raise
        mirror.sweep()


@dataclass(frozen=True, slots=True)
class OnCopy:
    """Work on a task, once what it reads has been brought to where it runs."""

    work: Work
    root: str
    address: str
    identity: str
    """Of the client's working copy."""
    token: str
    """Of this run over the tasks."""

    def __call__(self, payload: dict[str, Any]) -> dict[str, Any]:
        mirror = attach(Path(self.root), self.address)
        elsewhere = mirror.identity != self.identity
        if elsewhere and _refreshed.get(self.root) != self.token:
            mirror.refresh()
            _refreshed[self.root] = self.token
        is_narrow = _address_of(self.work) in _OF_PARTITIONS
        mirror.bring(_reads(payload) if is_narrow else _is_for_tasks)
        receipt = self.work(payload)
        if elsewhere and not is_narrow:
            mirror.sweep()
        return receipt


_refreshed: dict[str, str] = {}
"""Working copy -> token for which this process has compared it with the store."""


@contextmanager
def on_copies(work: Work, tasks: Sequence["Task"]) -> Generator[Work]:
    """The same work, wherever the tasks run; at the end, what other machines made is brought.

    Args:
        work: of a run on this machine it is as given.
        tasks: that are due.
    """
    mirror = copy_of(tasks[0].output.path) if tasks else None
    if mirror is None:
        yield work
        return
    marks = [mirror.name(task.output.mark_path) or "" for task in tasks]
    before = [mirror.journal.get(mark) for mark in marks]
    yield OnCopy(work, str(mirror.root), mirror.address, mirror.identity, uuid.uuid4().hex)
    if any(mirror.journal.get(mark) == old for mark, old in zip(marks, before, strict=True)):
        mirror.refresh()
        _bring_for_client(mirror)


def _bring_for_client(mirror: Mirror) -> None:
    """What the stages read in the client itself; tasks bring the rest to where they run."""
    mirror.bring(is_document)
    mirror.bring(lambda name: _is_for_tasks(name) and not name.startswith("quantities/"))


def _is_for_tasks(name: str) -> bool:
    """Inputs that were converted are brought when they are opened."""
    return not _is_of_shards(name) and not name.startswith("examples/data/")


def _is_of_shards(name: str) -> bool:
    return name.startswith("shards/") and not is_document(name)


def _reads(payload: Mapping[str, Any]) -> Callable[[str], bool]:
    """What a task reads that names its partitions: their tables, and all that is of none."""
    names = set(_PARTITION.findall(" ".join(_texts(payload))))

    def wanted(name: str) -> bool:
        own = _PARTITION.search(name)
        return _is_for_tasks(name) and (own is None or own[0] in names)

    return wanted


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in cast(Mapping[Any, Any], value).items():
            yield str(key)
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in cast(Sequence[Any], value):
            yield from _texts(entry)


def _address_of(work: Work) -> str:
    return f"{getattr(work, '__module__', '')}.{getattr(work, '__qualname__', '')}"


def _whole(root: Path) -> Mirror | None:
    """The working copy whose run folder this is; None for local runs, and for runs in runs."""
    mirror = copy_of(root)
    return mirror if mirror is not None and mirror.root == root.resolve() else None


__all__ = [
    "OnCopy",
    "at_hand",
    "glance",
    "here",
    "holding_store",
    "is_run_at",
    "on_copies",
    "shown_place",
    "store_owner",
]
