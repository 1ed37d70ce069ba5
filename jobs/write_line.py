"""The tasks of `curate write` for other orders than the input's: rows are dealt, then written.

What is dealt lies in `shards.work/` until all shards are there.
"""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from curate.data.files import fingerprint, misshapen, read_document, remove_folder, write_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.shard_curriculum import unpack_phasing
from curate.data.shard_layout import Component
from curate.data.shard_line import Deal, Line, Places, Stretch
from curate.data.shard_shuffle import deal_rows, write_stretch
from curate.data.shard_survey import Survey
from curate.data.shard_weights import pack, unpack
from jobs.run import Receipt, Task
from jobs.settings import Settings
from jobs.write_curriculum import phasing_of
from jobs.write_parts import (
    VERSION,
    context_from,
    context_of,
    deciding,
    inputs_of,
    portable,
    receipt,
    save_receipt,
    shard_from,
)
from jobs.write_tokenizer import ShardTokenizer


def line_tasks(
    run: RunFolder,
    settings: Settings,
    found: Survey,
    line: Line,
    *,
    tokenizer: str | None,
    tokens: ShardTokenizer | None,
) -> tuple[list[Task], list[Task]]:
    """The tasks of both passes; all of the first must be done before any of the second starts."""
    content = next(iter(found.schemas.values())).serialize().to_pybytes()
    common = {
        "run": str(run.root),
        "schema": base64.b64encode(content).decode(),
        "tokenizer": tokenizer,
    }
    made_from = {
        "version": VERSION,
        "schema": xxhash.xxh3_128_hexdigest(content),
        "tokenizer": tokenizer,
        "places": _digest(line.places),
    }
    deals = [_deal(run, settings, found, deal, common, made_from) for deal in line.deals]
    everything = fingerprint(deals=[task.fingerprint for task in deals])
    tasks: list[Task] = []
    first = 0
    for stretch in line.stretches:
        whole = fingerprint(
            stage="write",
            settings=deciding(settings, tokens),
            stretch=asdict(stretch),
            dealt=everything,
            **made_from,
        )
        payload = {
            **common,
            "context": context_of(settings, tokens),
            "stretch": asdict(stretch),
            "first_bucket": first,
            "dealt": [task.output.path.name for task in deals],
            "fingerprint": whole,
        }
        tasks.append(Task(stretch.name, payload, receipt(run, stretch.name), whole))
        first += len(stretch.cuts) - 1
    return deals, tasks


def _deal(
    run: RunFolder,
    settings: Settings,
    found: Survey,
    deal: Deal,
    common: dict[str, Any],
    made_from: dict[str, Any],
) -> Task:
    terms = {part.name: pack(found.terms[part.name]) for part in deal.partitions}
    phasing, scorers = phasing_of(found)
    whole = fingerprint(
        stage="shuffle",
        weights=settings.shards.weights,
        deal=portable(asdict(deal)),
        terms=terms,
        inputs=inputs_of(
            run, settings, deal.partitions, tokenizer=common["tokenizer"], scorers=scorers
        ),
        **phasing,
        **made_from,
    )
    payload = {
        **common,
        "weights": settings.shards.weights,
        "places": made_from["places"],
        "deal": asdict(deal),
        "terms": terms,
        **phasing,
        "fingerprint": whole,
    }
    return Task(deal.name, payload, Output(_work(run) / f"{deal.name}.rows"), whole)


def prepare(run: RunFolder, line: Line, deals: Sequence[Task]) -> None:
    """Before the first pass: what all of its tasks read; what others have dealt goes."""
    folder, places = _work(run), _places_file(run, _digest(line.places))
    wanted = {task.output.path.name for task in deals if task.is_done()}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in wanted:
                Output(path).remove()
    write_json(places, asdict(line.places))


def remove_dealt(run: RunFolder) -> None:
    """After the second pass: its shards are there."""
    remove_folder(_work(run))


def deal_work(payload: dict[str, Any]) -> Receipt:
    """The first pass over some partitions."""
    run = RunFolder(Path(payload["run"]))
    places = _read_places(_places_file(run, payload["places"]))
    deal = _deal_from(payload["deal"])
    rows = 0

    def write(path: Path) -> None:
        nonlocal rows
        rows = deal_rows(
            run,
            deal,
            places,
            path,
            way=payload["weights"],
            terms={name: unpack(terms) for name, terms in payload["terms"].items()},
            schema=_schema(payload),
            tokenizer=payload["tokenizer"],
            phasing=unpack_phasing(payload.get("phasing")),
        )

    Output(_work(run) / f"{deal.name}.rows").write(write, payload["fingerprint"])
    return {"rows": rows}


def stretch_work(payload: dict[str, Any]) -> Receipt:
    """The second pass: some shards, then their receipt."""
    run = RunFolder(Path(payload["run"]))
    values = payload["stretch"]
    shards = tuple(shard_from(shard) for shard in values["shards"])
    stretch = Stretch(values["name"], shards, tuple(values["cuts"]))
    receipts = write_stretch(
        run,
        stretch,
        [_work(run) / name for name in payload["dealt"]],
        first_bucket=payload["first_bucket"],
        schema=_schema(payload),
        context=context_from(payload["context"]),
        tokenizer=payload["tokenizer"],
    )
    return save_receipt(run, stretch.name, receipts, payload["fingerprint"])


def _work(run: RunFolder) -> Path:
    return run.root / "shards.work"


def _places_file(run: RunFolder, digest: str) -> Path:
    return _work(run) / f"places-{digest}.json"


def _digest(places: Places) -> str:
    return fingerprint(**asdict(places))


def _read_places(path: Path) -> Places:
    values = read_document(path, components=list, rows=list, cuts=list)
    if values is None:
        raise misshapen(path, "it is gone")
    components = tuple(Component(**component) for component in values["components"])
    rows, cuts = tuple(values["rows"]), tuple(values["cuts"])
    return Places(values["order"], values["seed"], components, rows, cuts)


def _deal_from(values: dict[str, Any]) -> Deal:
    partitions = tuple(Partition(**part) for part in values["partitions"])
    return Deal(values["name"], partitions, tuple(values["piece_rows"]), tuple(values["starts"]))


def _schema(payload: dict[str, Any]) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(payload["schema"])))
