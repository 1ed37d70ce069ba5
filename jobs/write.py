"""`curate write`: the plan becomes shards that a trainer loads.

`shards/manifest.json` goes first and comes back last: a folder without it is not complete. The
marks of the shards lie outside, in `shards.done/`, so that the folder can be pushed as it is.
"""

import base64
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from curate.data.card import card
from curate.data.card_columns import lost_weights
from curate.data.card_configs import load_lines
from curate.data.files import digest_file, discard, remove
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, record_stage
from curate.data.mirror import shown_place
from curate.data.partitions import Output
from curate.data.recipe import Asked, Written, files_of, manifest, mixture
from curate.data.recipes import recipes
from curate.data.shard_curriculum import unpack_phasing
from curate.data.shard_folder import (
    is_shard,
    list_files,
    refuse_foreign_files,
    remove_empty_folders,
    text_digest,
    write_text,
)
from curate.data.shard_formats import open_format
from curate.data.shard_survey import forecast
from curate.data.shard_weights import unpack
from curate.data.shards import write_group
from curate.errors import CurateError, counted
from curate.plan.mixture import load_mixture
from jobs.cluster import Pool
from jobs.leakage_report import read_report
from jobs.run import Listener, Receipt, StageState, ignore, raise_failures, run_tasks
from jobs.settings import Settings
from jobs.write_card import told
from jobs.write_line import deal_work, prepare, remove_dealt, stretch_work
from jobs.write_parts import context_from, save_receipt
from jobs.write_tasks import (
    Work,
    find_work,
    group_from,
    is_planned,
    is_whole,
    require_plan,
    shards_of,
    stale_files,
)
from jobs.write_tokenizer import save_shard_tokenizer

log = logging.getLogger(__name__)


def write_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Write what the plan keeps.

    Args:
        settings: of the run.
        pool: where the tasks run.
        listener: told after each task.

    Returns:
        Number of shards, rows, tokens and bytes, the same per domain, the lines that load them,
        and how many groups of shards were `done` now or `skipped`.

    Raises:
        InputError: there is no plan, or an input file has gone or changed.
        RunFolderError: the shards folder holds files of somebody else.
        CurateError: the plan keeps nothing, or a shard could not be written; the others stay.
    """
    run = RunFolder(Path(settings.run))
    refuse_foreign_files(run.shards)
    require_plan(run)
    work = find_work(run, settings)
    due = [task for task in work.tasks if not is_whole(run, task)]
    had_stale = bool(stale_files(run, work))
    if due or had_stale:
        discard(run.shards / "manifest.json")
    for task in due:
        task.output.remove()
    if due and work.tokens is not None:
        save_shard_tokenizer(run, work.tokens)
    if due and work.deals:
        assert work.survey.line is not None
        prepare(run, work.survey.line, work.deals)
        dealt = run_tasks("shuffle", work.deals, deal_work, pool=pool, listener=listener)
        raise_failures("shuffle", dealt)
    worker = stretch_work if work.deals else write_work
    outcome = run_tasks("write", work.tasks, worker, pool=pool, listener=listener)
    raise_failures("write", outcome)
    remove_dealt(run)
    _remove(stale_files(run, work))
    written = _written(run, work)
    _warn_of_weights(written)
    _write_documents(run, settings, written, work)
    summary = _summary(run, written)
    if outcome.done or had_stale or "write" not in load_manifest(run)["stages"]:
        facts = {key: summary[key] for key in ("shards", "rows", "tokens", "bytes")}
        facts["digest"] = digest_file(run.shards / "manifest.json")
        outputs = [task.output for task in work.tasks]
        record_stage(run, "write", outputs=outputs, seconds=outcome.seconds, facts=facts)
    return {**summary, "done": len(outcome.done), "skipped": len(outcome.skipped)}


def plan_write(settings: Settings) -> StageState:
    """What `write_run` would do; writes nothing."""
    run = RunFolder(Path(settings.run))
    if not is_planned(run):
        return StageState("write", 0, 0, ("there is no complete plan yet",))
    try:
        work = find_work(run, settings)
    except CurateError as error:
        return StageState("write", 0, 0, (error.what,))
    due = [task for task in work.tasks if not is_whole(run, task)]
    # What was dealt is removed when all shards are there.
    dealing = [task for task in work.deals if due and not task.is_done()]
    new = sum(task.output.mark() is None for task in due)
    old = sum(task.output.mark() is not None and not task.is_done() for task in due)
    made, cut = "made from another plan, other inputs or other settings", "missing or cut short"
    counts = (
        (new, "group of shards is not written yet", "groups of shards are not written yet"),
        (old, f"group was {made}", f"groups were {made}"),
        (len(due) - new - old, f"group has shards that are {cut}",
         f"groups have shards that are {cut}"),
        (len(dealing), "part of the data is not shuffled yet",
         "parts of the data are not shuffled yet"),
        (len(stale_files(run, work)), "file is left from an older plan",
         "files are left from an older plan"),
    )  # fmt: skip
    why = tuple(counted(*entry) for entry in counts if entry[0])
    total = len(work.tasks) + len(work.deals)
    return StageState("write", total, total - len(due) - len(dealing), why)


def measure_write(settings: Settings) -> dict[str, float]:
    """Bytes and seconds of all that is due, from a sample of the rows; writes nothing.

    Without a plan, the share that the settings keep is taken of everything; where they ask for a
    number of tokens, nothing is known yet.
    """
    run = RunFolder(Path(settings.run))
    partitions = run.partitions()
    if not partitions or not all(run.examples(part).mark() for part in partitions):
        return {}
    if not is_planned(run):
        kept = settings.plan.kept
        share = kept.share or kept.token_share
        if share is None:
            return {}
        size, seconds = forecast(run, partitions, settings.shards)
        return {"size_bytes": size * share, "seconds": seconds * share}
    found = find_work(run, settings)
    rows = found.survey.rows
    due = sum(rows[task.name] for task in found.tasks if not is_whole(run, task))
    share = due / sum(rows.values())
    return {"size_bytes": found.survey.size_bytes * share, "seconds": found.survey.seconds * share}


def write_work(payload: dict[str, Any]) -> Receipt:
    """Write one group of shards, then its receipt."""
    run = RunFolder(Path(payload["run"]))
    group = group_from(payload["group"])
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(payload["schema"])))
    receipts = write_group(
        run,
        group,
        terms={name: unpack(terms) for name, terms in payload["terms"].items()},
        schema=schema,
        context=context_from(payload["context"]),
        tokenizer=payload["tokenizer"],
        phasing=unpack_phasing(payload.get("phasing")),
    )
    return save_receipt(run, group.name, receipts, payload["fingerprint"])


# -- the folder -----------------------------------------------------------------------------------


def _remove(stale: Sequence[Path]) -> None:
    for path in stale:
        if path.suffix == ".json":
            Output(path).remove()
            continue
        remove(path)


def _warn_of_weights(written: Written) -> None:
    if written.weights != "copies" and (lost := lost_weights(written)):
        log.warning(
            "%s of weight other than 1: formats of tokens have no weights, so theirs are lost"
            " there; use --weights copies",
            counted(lost, "row"),
        )


def _write_documents(run: RunFolder, settings: Settings, written: Written, work: Work) -> None:
    """The card, the mixture, the recipes and, last, the manifest; a file that would not change is
    left alone."""
    mixed = mixture(written)
    texts = {"mixture.json": _json(mixed)}
    texts |= recipes(written, mixed, {name: s.text for name, s in settings.sources.items()})
    for name in written.formats:
        mine = [s for s in (*written.shards, *written.others) if s["format"] == name]
        texts |= open_format(name).documents(mine)
    write_text(run.shards / "README.md", card(written, told(run, settings), work.survey.schemas))
    for file, text in texts.items():
        write_text(run.shards / file, text)
    shards = {file for s in (*written.shards, *written.others) for file, _ in files_of(s)}
    for file in list_files(run.shards):  # beside shards of formats that are written no more
        if file not in shards | texts.keys() and (is_shard(file) or file.startswith("recipes/")):
            remove(run.shards / file)
    remove_empty_folders(run.shards)
    files = {file: text_digest(text) for file, text in texts.items()}
    write_text(run.shards / "manifest.json", _json(manifest(written, files=files)))


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# -- what was done --------------------------------------------------------------------------------


def _written(run: RunFolder, work: Work) -> Written:
    receipts = [s for task in work.tasks for s in shards_of(task)]
    found = work.survey
    asked: list[Asked] = []
    if work.mixer is not None:
        chosen = load_mixture(run.mixtures / work.mixer / "mixture.json")
        asked = [Asked(phase.share, phase.weights) for phase in chosen.phases]
        if work.curriculum is not None:
            steps = work.curriculum["steps"]
            asked = [Asked(1 / steps, phase.weights) for phase in chosen.phases * steps]
    schemas = {"": next(iter(found.schemas.values()))} if found.is_uniform else found.schemas
    receipts.sort(key=lambda s: (s["phase"], s["domain"], s["file"]))
    first = work.formats[0]
    return Written(
        shards=[s for s in receipts if s["format"] == first],
        others=[s for s in receipts if s["format"] != first],
        formats=work.formats,
        examples=found.examples,
        names=found.names,
        sources=found.sources,
        columns={
            source: {field.name: str(field.type) for field in schema}
            for source, schema in schemas.items()
        },
        mixer=work.mixer,
        asked=asked,
        tokenizer=work.tokenizer,
        weights=work.weights,
        order=work.order,
        curriculum=work.curriculum or {},
        leakage=read_report(run) or {},
        repeats=found.repeats,
        parts=found.parts,
        worth={component: total.rows for component, total in found.worth.items()},
    )


def _summary(run: RunFolder, written: Written) -> dict[str, Any]:
    rows, tokens, sizes = (written.sums(key) for key in ("rows", "tokens", "bytes"))
    domains: dict[str, dict[str, Any]] = {}
    for component in rows:
        entry = domains.setdefault(
            component.domain,
            {
                "config": None if written.is_stream else written.names[component.domain],
                "rows": 0,
                "tokens": 0,
                "bytes": 0,
            },
        )
        for key, sums in (("rows", rows), ("tokens", tokens), ("bytes", sizes)):
            entry[key] += sums[component]
    return {
        "folder": shown_place(run.shards),
        "shards": len(written.shards),
        "rows": written.total("rows"),
        "tokens": written.total("tokens") if written.tokenizer is not None else None,
        "unit": written.unit,
        "bytes": written.size_bytes,
        "domains": domains,
        "load": load_lines(written, json.dumps(shown_place(run.shards), ensure_ascii=False)),
    }
