"""What the tasks of `curate write` are made from, whatever the order of the rows."""

import json
from collections.abc import Sequence
from typing import Any

from curate.config import parse, plain
from curate.data.counts import are_tokens
from curate.data.example import Source
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Component, Shard
from curate.data.shard_settings import TOKEN_FORMATS, Shards
from jobs.domains_use import domain_digests
from jobs.plan_tables import score_digests
from jobs.run import Receipt
from jobs.settings import Settings
from jobs.write_tokenizer import ShardTokenizer

_TEXT_FORMATS = (*TOKEN_FORMATS, "webdataset", "mds")
"""Formats that set the text or the image of an example apart."""

_MEANING = ("text", "prompt", "response", "messages", "chosen", "rejected", "image", "label")

VERSION = 3
"""Of what is written: raised when the same plan would give other bytes."""


def inputs_of(
    run: RunFolder,
    settings: Settings,
    partitions: Sequence[Partition],
    *,
    tokenizer: str | None,
    scorers: Sequence[str],
) -> list[Any]:
    """Digests of all that is read of some partitions, the tables of some scorers among it."""
    found: list[Any] = []
    for part in partitions:
        tables = [run.planned(part), run.examples(part)]
        if tokenizer is not None and are_tokens(tokenizer):
            tables.append(run.lengths(part, tokenizer))
        marks = [table.mark() or {} for table in tables]
        digests = [mark.get("digest") for mark in marks]
        digests += score_digests(run, part, scorers)
        found.append([part.stamp, *digests, *domain_digests(settings, part)])
    return found


def portable(values: dict[str, Any]) -> dict[str, Any]:
    """A task without its addresses: where the files lie is no part of what the shards are."""
    for part in values["partitions"]:
        del part["address"]
    return values


def deciding(settings: Settings, tokens: ShardTokenizer | None) -> dict[str, Any]:
    """What of the settings the bytes of the shards depend on."""
    shards = plain(settings.shards)
    if shards["curriculum"] is None:
        del shards["curriculum"]
    if tokens is None:
        del shards["packing"]
    else:
        shards["packing"]["tokenizer"] = tokens.digest
    if not set(_TEXT_FORMATS) & set(settings.shards.formats):
        return shards
    meaning = {
        name: {field: getattr(source, field) for field in _MEANING}
        for name, source in settings.sources.items()
    }
    return {"shards": shards, "sources": meaning}


def context_of(settings: Settings, tokens: ShardTokenizer | None) -> dict[str, Any]:
    """What sinks need to know, for a task's payload."""
    return {
        "settings": plain(settings.shards),
        "sources": {name: plain(source) for name, source in settings.sources.items()},
        "tokenizer": None if tokens is None else str(tokens.folder),
    }


def context_from(values: dict[str, Any]) -> Context:
    """The context of a task's payload."""
    return Context(
        settings=parse(Shards, values["settings"]),
        sources={name: parse(Source, source) for name, source in values["sources"].items()},
        tokenizer=values["tokenizer"],
    )


def shard_from(values: dict[str, Any]) -> Shard:
    """The shard that `asdict` took apart."""
    return Shard(
        Component(**values["component"]),
        values["folder"],
        values["number"],
        values["total"],
        tuple(values["row_groups"]),
    )


def receipt(run: RunFolder, name: str) -> Output:
    """What is known of the shards of a group, once they are all there."""
    return Output(run.root / "shards.done" / f"{name}.json")


def save_receipt(
    run: RunFolder, name: str, receipts: list[dict[str, Any]], fingerprint: str
) -> Receipt:
    """Keep what is known of the shards of a group; returns the task's receipt."""
    text = json.dumps({"shards": receipts}, indent=1, ensure_ascii=False)
    facts = {"shards": len(receipts), "rows": sum(shard["rows"] for shard in receipts)}
    receipt(run, name).write(
        lambda path: path.write_text(text, encoding="utf-8"), fingerprint, **facts
    )
    return {**facts, "num_tokens": sum(shard.get("tokens") or 0 for shard in receipts)}
