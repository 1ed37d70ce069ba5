"""How `datasets` and other libraries load the shards: the configurations of the card, the types
of their columns, and lines of Python.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from curate.data.card_features import json_features
from curate.data.recipe import Written
from curate.data.shard_layout import Component, folder_name

MOST_CONFIGS = 1000
"""Components that have a configuration each: with 10,000, `datasets` needs a quarter of a minute
to open any of them."""


class Room(NamedTuple):
    """Where the files of a format lie that `datasets` reads by patterns."""

    format: str
    folder: str
    suffix: str

    def files(self, folder: str) -> str:
        """Pattern of the files below a folder of the room."""
        return "/".join(part for part in (self.folder, folder, f"train-*{self.suffix}") if part)


_ROOMS = (
    Room("parquet", "data", ".parquet"),
    Room("packed", "packed", ".parquet"),
    Room("jsonl", "jsonl", ".jsonl.zst"),
)
"""The first that was written is what the card's configurations are of."""


def room_of(written: Written) -> Room | None:
    """Where the files lie that the card's configurations are of; None where there is no such."""
    return next((room for room in _ROOMS if room.format in written.formats), None)


def is_one_table(written: Written) -> bool:
    """Whether everything loads together; sequences of tokens have the same columns always."""
    room = room_of(written)
    return written.is_uniform or (room is not None and room.format == "packed")


def has_domain_configs(written: Written) -> bool:
    """Whether each domain has a configuration of its own."""
    has_room = room_of(written) is not None and not written.is_stream
    return has_room and len(written.sums("rows")) <= MOST_CONFIGS


def configs(written: Written) -> dict[str, list[str]]:
    """Name of each configuration of the card -> patterns of its files, in the order to read."""
    found: dict[str, list[str]] = {}
    room = room_of(written)
    if room is None:
        return found
    phases = [phase for phase in written.phases if phase]
    if written.is_stream:
        return _stream_configs(written, room, phases)
    if is_one_table(written):
        found["default"] = [f"phase-{phase}/*" for phase in phases] or ["*"]
        found.update({f"phase-{phase}": [f"phase-{phase}/*"] for phase in phases})
    else:
        for source, domains in sorted(written.sources.items()):
            found[written.names[source]] = [
                folder_name(component, written.names[component.domain])
                for component in written.sums("rows")
                if component.domain in domains
            ]
    for component in written.sums("rows") if has_domain_configs(written) else ():
        slug = written.names[component.domain]
        path = folder_name(component, slug)
        if component.domain not in written.sources or is_one_table(written):
            found.setdefault(slug, []).append(path)
        if component.phase:
            found[f"phase-{component.phase}-{slug}"] = [path]
    return {name: [room.files(path) for path in paths] for name, paths in found.items()}


def _stream_configs(written: Written, room: Room, phases: Sequence[int]) -> dict[str, list[str]]:
    """Domains share their files: there is everything, and there are phases."""
    if written.order == "scheduled":
        shards = [s for s in (*written.shards, *written.others) if s["format"] == room.format]
        files = {n: [str(s["file"]) for s in shards if s["phase"] == n] for n in phases}
        return {"default": [room.files("")]} | {f"phase-{n}": files[n] for n in phases}
    each = {f"phase-{n}": [room.files(f"phase-{n}")] for n in phases}
    every = [path for paths in each.values() for path in paths]
    return {"default": every or [room.files("")]} | each


def load_lines(written: Written, where: str) -> list[str]:
    """Lines of Python that load the shards; `where` is a Python expression."""
    shards = written.sums("rows")
    largest = max(shards, key=lambda component: (shards[component], component))
    first = f'load_dataset({where}, split="train")'
    slug = written.names[largest.domain]
    room = room_of(written)
    if room is None:
        return _other_lines(written, largest, where)
    if written.is_stream:
        phase = f'one_phase = load_dataset({where}, "phase-{largest.phase}", split="train")'
        domain = json.dumps(largest.domain, ensure_ascii=False)
        filtered = f'one_domain = everything.filter(lambda row: row["curate_domain"] == {domain})'
        last = phase if largest.phase else filtered
        return ["from datasets import load_dataset", f"everything = {first}", last]
    one = json.dumps(slug)
    if not has_domain_configs(written):
        files = [room.files(folder_name(c, slug)) for c in shards if c.domain == largest.domain]
        one = f"data_files={json.dumps(files)}"
    return [
        "from datasets import load_dataset",
        f"everything = {first}" if is_one_table(written) else "# columns differ: load by domain",
        f'one_domain = load_dataset({where}, {one}, split="train")',
    ]


def _other_lines(written: Written, largest: Component, where: str) -> list[str]:
    """For shards that `datasets` does not read by patterns."""
    form = next(name for name in ("arrow", *written.formats) if name in written.formats)
    slug = "" if written.is_stream else written.names[largest.domain]
    folder = "/".join(part for part in (form, folder_name(largest, slug)) if part)
    place = f"Path({where}, {json.dumps(folder)})"
    part = "part" if written.is_stream else "one_domain"
    return ["from pathlib import Path", *(line.format(place, part) for line in _OTHERS[form])]


_OTHERS = {
    "arrow": (
        "from datasets import load_from_disk",
        "{1} = load_from_disk(str({0}))",
    ),
    "mds": (
        "from streaming import StreamingDataset",
        "{1} = StreamingDataset(local=str({0}), batch_size=8)",
    ),
    "webdataset": (
        "import webdataset as wds",
        'archives = sorted(str(file) for file in {0}.glob("train-*.tar"))',
        "{1} = wds.WebDataset(archives, shardshuffle=False).decode()",
    ),
    "megatron": (
        "from megatron.core.datasets.indexed_dataset import IndexedDataset",
        'prefixes = sorted(str(file.with_suffix("")) for file in {0}.glob("train-*.idx"))',
        "{1} = [IndexedDataset(prefix) for prefix in prefixes]",
    ),
}
"""Format -> lines with the place of the files and the name of what is loaded."""


def column_types(
    written: Written, names: Sequence[str], schemas: Mapping[str, pa.Schema]
) -> list[dict[str, Any]]:
    """`dataset_info`: the types of each configuration, where the files do not say them."""
    room = room_of(written)
    if room is None or room.format != "jsonl" or not schemas:
        return []
    if written.is_uniform:
        features = json_features(next(iter(schemas.values())))
        return [{"config_name": name, "features": features} for name in names]
    # A domain that several sources share has rows of different types: nothing fits all of them.
    owners: dict[str, list[str]] = {}
    for source, domains in written.sources.items():
        for name in {written.names[source], *(written.names[domain] for domain in domains)}:
            owners.setdefault(name, []).append(source)
    made = {source: json_features(schema) for source, schema in schemas.items()}
    return [
        {"config_name": name, "features": made[owners[name][0]]}
        for name in names
        if len(owners.get(name, ())) == 1
    ]
