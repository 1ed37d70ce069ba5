"""`curate verify`: are the shards, or all files of a run, still what was written?"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from curate.config import parse
from curate.data.files import digest_file, read_document
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest
from curate.data.mirror import shown_place
from curate.data.partitions import Output
from curate.data.shard_checks import Planned
from curate.data.shard_curriculum import Phasing, find_phasing, read_phased
from curate.data.shard_folder import DamageError, check_shards
from curate.data.shard_settings import Curriculum
from curate.data.shard_weights import Tally, Way, weigh
from curate.errors import ConfigError, InputError
from jobs.all_stages import failures, stages_for
from jobs.opening import load_settings, saved_values
from jobs.store import at_hand
from jobs.write_curriculum import find_ordering
from jobs.write_tasks import is_planned


def verify_shards(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Recompute digests and counts of a shards folder, wherever it lies, or of a whole run, and
    look at the rows of the shards.

    Args:
        folder: with the shards' `manifest.json`; the run is not needed. Of a run folder every
            file that a stage has finished is held against its mark, the shards with them, and the
            weights of every checkpoint against the digest that was kept of them; the rows of the
            shards are held against the plan, where there is one.
        quick: look at files alone, not at the rows of shards.

    Returns:
        Number of shards, rows, tokens and bytes; of a run, of `files` and `checkpoints` that were
        checked too, and under `unfinished` the stages that its settings ask for and that have
        never come to their end, or that failed when they last ran.

    Raises:
        InputError: there is no such folder.
        DamageError: files are missing, changed or too many; all are named.
        CurateError: the shards are incomplete.
    """
    folder = at_hand(folder, shards=True)
    is_run = folder.is_dir() and saved_values(folder) is not None
    if not is_run:
        inside = (folder / "shards").is_dir() and not (folder / "data").is_dir()
        found = check_shards(folder / "shards" if inside else folder, quick=quick)
        return {**found, "folder": shown_place(found["folder"])}
    outputs = finished(folder)
    problems = [
        f"{output.path.relative_to(folder).as_posix()}: {problem}"
        for output in outputs
        if (problem := _problem(output)) is not None
    ]
    found: dict[str, Any] = {"folder": shown_place(folder), "files": len(outputs)}
    if digests := _checkpoints(folder):
        found["checkpoints"] = len(digests)
        problems += _changed_weights(folder, digests)
    if (folder / "shards" / "manifest.json").exists():
        try:
            # Of damaged tables the rows tell nothing new.
            quick = quick or bool(problems)
            plan = None if quick else planned(folder)
            found = {**check_shards(folder / "shards", plan=plan, quick=quick), **found}
        except DamageError as error:
            if error.of_rows:
                raise
            problems += [f"shards/{problem}" for problem in error.problems]
    if problems:
        raise DamageError(
            f"{folder} has damage",
            problems,
            fix=f"remove these files and run `curate run {folder}` again: only what they were part"
            " of is redone",
        )
    return {**found, "unfinished": _unfinished(folder)}


def _unfinished(folder: Path) -> list[str]:
    """Stages of a run, by name, that the manifest does not know as finished, or that failed."""
    ended, failed = load_manifest(RunFolder(folder))["stages"], failures(folder)
    try:
        names = [stage.name for stage in stages_for(load_settings(folder), "run")]
    except ConfigError:  # settings of another version: its files can be looked at all the same
        names = list(failed)
    return [name for name in names if name not in ended or name in failed]


def planned(root: Path) -> Iterator[Planned] | None:
    """What a run's plan wants of its shards; None without a complete plan.

    Weights reach the shards in the way that the manifest states, and so do phases of a curriculum.
    """
    run = RunFolder(root)
    if not is_planned(run):
        return None
    manifest = read_document(run.shards / "manifest.json") or {}
    seed = int((saved_values(root) or {}).get("seed", 0))
    phasing = None
    if curriculum := manifest.get("curriculum"):
        tokenizer = (read_document(run.plan / "summary.json") or {}).get("tokenizer")
        wanted = parse(Curriculum, curriculum)
        ordering = find_ordering(run, wanted, seed=seed, tokenizer=tokenizer)
        phasing = find_phasing(run, run.partitions(), ordering)
    return _planned(run, manifest.get("weights", "column"), phasing, seed)


def _planned(run: RunFolder, way: Way, phasing: Phasing | None, seed: int) -> Iterator[Planned]:
    tally = Tally(way, seed)
    for part in run.partitions():
        tally.take(read_phased(run, part, phasing, tokenizer=None))
    for number, part in enumerate(run.partitions()):
        taken = read_phased(run, part, phasing, tokenizer=None)
        choice = weigh(taken, way, tally.terms(number))
        for phase, copies in choice.copies.items():
            if copies.any():
                weights = choice.in_phase(phase).weights
                yield Planned(
                    part.source, part.file, phase, choice.rows,
                    choice.domains, choice.names, copies, weights,
                )  # fmt: skip


def finished(root: Path) -> list[Output]:
    """Every file of a run that has a mark, sorted by path."""
    marks = sorted(root.rglob(".done/*.json"))
    return [Output(mark.parent.parent / mark.name.removesuffix(".json")) for mark in marks]


def _checkpoints(root: Path) -> dict[Path, str | None]:
    """Folder -> digest of its weights; None where `checkpoint.json` cannot be read."""
    found: dict[Path, str | None] = {}
    for path in sorted(root.rglob("seed-*/step-*/checkpoint.json")):
        try:
            facts = read_document(path, digest=str)
        except InputError:
            facts = None
        found[path.parent] = None if facts is None else facts["digest"]
    for path in sorted((root / "checkpoints").glob("seed-*/done.json")):
        with suppress(InputError):  # its own mark tells of its damage
            for entry in (read_document(path, checkpoints=list) or {}).get("checkpoints", ()):
                found[root / "checkpoints" / entry["name"]] = entry["digest"]
    return found


def _changed_weights(root: Path, digests: dict[Path, str | None]) -> Iterator[str]:
    from curate.models.checkpoints import weights_digest  # brings torch

    for folder, digest in digests.items():
        name = folder.relative_to(root).as_posix()
        again = f"; remove {folder.parent.relative_to(root).as_posix()}/ to train it again"
        if not folder.is_dir():
            yield f"{name}: missing{again}"
        elif digest is None:
            yield f"{name}/checkpoint.json: damaged{again}"
        elif weights_digest(folder) != digest:
            yield f"{name}: changed: the digest of its weights is another{again}"


def _problem(output: Output) -> str | None:
    """What is wrong with a file that was finished once."""
    if not output.path.is_file():
        return "missing"
    mark = output.mark()
    if mark is None:
        return "its mark is damaged"
    size = output.path.stat().st_size
    if size != mark["size_bytes"]:
        return f"changed: {size} bytes, not {mark['size_bytes']}"
    return None if digest_file(output.path) == mark["digest"] else "changed: its digest is another"
