"""From the most similar earlier rows to groups, and to the tables of each partition."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file

from curate.data.example import KEY
from curate.data.files import replace
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.tables import read_examples, write_table
from curate.errors import counted
from jobs.duplicates import (
    groups_output,
    num_rows,
    pairs_output,
    rows_output,
    texts_output,
)
from jobs.duplicates_pairs import has_ngrams
from jobs.duplicates_texts import Firsts, Opened, open_firsts, open_task, save_array
from scorers.duplicates import Positions, grouped

_ROW = np.dtype(
    [("group", "<i8"), ("size", "<i4"), ("similarity", "<f4"), ("held_out_similarity", "<f4")]
)


def groups_work(payload: dict[str, Any]) -> dict[str, Any]:
    """The group of every row, and how similar it is to what takes precedence."""
    work = open_task(payload)
    firsts = open_firsts(work.run)
    similarity, earlier, held_out = _similarities(work, firsts, int(payload["pairs"]))
    places = np.arange(len(earlier))
    gives_way = (earlier >= 0) & (similarity > work.options.limit)
    parents = np.where(gives_way, earlier, places)
    parents = np.where(firsts.is_first, parents, firsts.leaders)
    found = grouped(parents)
    rows = np.empty(len(places), dtype=_ROW)
    rows["group"], rows["size"] = found.groups, found.sizes
    rows["similarity"], rows["held_out_similarity"] = similarity, held_out
    facts = _facts(work, firsts, rows)
    rows_output(work.run).write(lambda path: save_array(path, rows), work.stamp, **facts)
    summary = json.dumps(facts, indent=1) + "\n"
    place = rows_output(work.run).path.parent / "summary.json"
    replace(place, lambda path: path.write_text(summary, encoding="utf-8"))
    return {"rows": len(rows)}


def _similarities(
    work: Opened, firsts: Firsts, num_pairs: int
) -> tuple[npt.NDArray[np.float32], Positions, npt.NDArray[np.float32]]:
    """(N,) the largest similarity to an earlier row, that row, and the largest to a held-out one.

    NaN where there is nothing to compare; of a row that is not the first of its content 1.
    """
    count = len(firsts.leaders)
    similarity = np.zeros(count, dtype=np.float32)
    earlier = np.full(count, -1, dtype=np.int64)
    held_out = np.zeros(count, dtype=np.float32)
    nothing = _without(work, count, num_pairs)
    similarity[nothing] = held_out[nothing] = np.nan
    for number in range(num_pairs):
        pairs = load_file(pairs_output(work.run, number).path)
        rows = pairs["rows"]
        better = pairs["similarity"] > similarity[rows]
        similarity[rows[better]] = pairs["similarity"][better]
        earlier[rows[better]] = pairs["earlier"][better]
        held_out[rows] = np.fmax(held_out[rows], pairs["held_out"])
    held_out[firsts.is_leaked] = 1
    held_out = held_out[firsts.leaders]
    held_out[~firsts.is_train] = np.nan
    similarity[~firsts.is_first] = 1
    return similarity, earlier, held_out


def _without(work: Opened, count: int, num_pairs: int) -> npt.NDArray[np.bool_]:
    """(N,) rows that have no vector, or no word."""
    if work.options.method == "near":
        parts = work.run.partitions()
        tables = (np.load(texts_output(work.run, p).path, mmap_mode="r") for p in parts)
        return ~np.concatenate([has_ngrams(table) for table in tables])
    found = np.zeros(count, dtype=np.bool_)
    if work.options.method == "semantic":
        found[:] = True
        firsts = open_firsts(work.run)
        for number in range(num_pairs):
            found[load_file(pairs_output(work.run, number).path)["rows"]] = False
        found &= firsts.is_first
    return found


def _facts(work: Opened, firsts: Firsts, rows: npt.NDArray[Any]) -> dict[str, Any]:
    """What the summary says, and notes on what a reader must not miss."""
    train = firsts.is_train
    stays = rows["group"] == np.arange(len(rows))
    removed = int((train & ~stays).sum())
    groups = train & stays & (rows["size"] > 1)
    leaked = int((train & (rows["held_out_similarity"] > work.options.limit)).sum())
    mixed = _mixed_labels(work.run, rows["group"])
    num_train = int(train.sum())
    facts: dict[str, Any] = {
        "method": work.options.method,
        "limit": work.options.limit,
        "training": num_train,
        "removed": removed,
        "equal": int((train & ~firsts.is_first).sum()),
        "groups": int(groups.sum()),
        "largest": int(rows["size"][train].max(initial=0)),
        "like_held_out": leaked,
        "held_out_repeats": int((~train & ~stays).sum()),
        "groups_of_several_labels": mixed,
        "not_compared": int(np.isnan(rows["similarity"]).sum()),
    }
    return facts | {"says": _sentence(facts)}


def _sentence(facts: dict[str, Any]) -> str:
    """What a reader must not miss."""
    num_train, limit = facts["training"], facts["limit"]
    found = [
        f"{facts['removed']:,} of {counted(num_train, 'training example')} repeat another one, in"
        f" {counted(facts['groups'], 'group')}; the largest has {facts['largest']:,}"
    ]
    if facts["like_held_out"]:
        found.append(
            f"{facts['like_held_out']:,} repeat a held-out one: plan.drop: duplicate_held_out >"
            f" {limit:g} leaves them out"
        )
    if facts["groups_of_several_labels"]:
        groups = counted(facts["groups_of_several_labels"], "group")
        found.append(f"{groups} of more than one label")
    if facts["not_compared"]:
        what = "word" if facts["method"] == "near" else "vector"
        found.append(f"{facts['not_compared']:,} without a {what} are compared by content alone")
    return f"duplicates ({facts['method']}): " + "; ".join(found)


def _mixed_labels(run: RunFolder, groups: Positions) -> int:
    """Groups whose rows have different labels."""
    labels = pl.concat([read_examples(run, part, ["label"]) for part in run.partitions()])
    if labels["label"].null_count() == labels.height:
        return 0
    table = labels.with_columns(group=pl.Series(groups)).drop_nulls()
    spread = table.group_by("group").agg(low=pl.col("label").min(), high=pl.col("label").max())
    return spread.filter(pl.col("low") != pl.col("high")).height


def table_work(payload: dict[str, Any]) -> dict[str, Any]:
    """The tables of one partition."""
    work = open_task(payload)
    part = Partition(**payload["partition"])
    start = int(payload["start"])
    places = np.arange(start, start + num_rows(work.run, part))
    rows = np.load(rows_output(work.run).path, mmap_mode="r")[places]
    keys = read_examples(work.run, part, KEY)
    keep = rows["group"] == places
    table = keys.with_columns(
        keep=pl.Series(keep).cast(pl.Float32),
        size=pl.Series(rows["size"]).cast(pl.Float32),
        similarity=_series(rows["similarity"]),
        held_out_similarity=_series(rows["held_out_similarity"]),
    )
    in_groups = keys.with_columns(
        group=pl.Series(rows["group"].copy()),
        keep=pl.Series(keep),
        similarity=_series(rows["similarity"]),
    ).filter(pl.Series(rows["size"] > 1))
    groups_output(work.run, part).write(
        lambda path: write_table(in_groups, path), work.stamp, rows=in_groups.height
    )
    removed = int((~keep).sum())
    work.run.quantities(part, "duplicates").write(
        lambda path: write_table(table, path), work.stamp, rows=table.height, removed=removed
    )
    return {"rows": table.height, "removed": removed}


def _series(values: npt.NDArray[np.float32]) -> pl.Series:
    return pl.Series(np.ascontiguousarray(values)).fill_nan(None)
