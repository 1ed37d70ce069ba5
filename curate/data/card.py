"""`README.md` of the shards: configurations for `datasets`, and what a person wants to know.

A function of the shards and the plan alone: no time, no host, no path.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

from curate.data.card_columns import columns_section, weights_line
from curate.data.card_features import json_features
from curate.data.card_leakage import leakage_section
from curate.data.card_told import TABLE_ROWS, Told, escape, license_front, told_sections
from curate.data.recipe import Written, phase_entry
from curate.data.shard_layout import Component, folder_name
from curate.errors import counted

_MOST_CONFIGS = 1000
"""Components that have a configuration each: with 10,000, `datasets` needs a quarter of a minute
to open any of them."""


class _Room(NamedTuple):
    """Where the files of a format lie that `datasets` reads by patterns."""

    format: str
    folder: str
    suffix: str

    def files(self, folder: str) -> str:
        """Pattern of the files below a folder of the room."""
        return "/".join(part for part in (self.folder, folder, f"train-*{self.suffix}") if part)


_ROOMS = (
    _Room("parquet", "data", ".parquet"),
    _Room("packed", "packed", ".parquet"),
    _Room("jsonl", "jsonl", ".jsonl.zst"),
)
"""The first that was written is what the card's configurations are of."""


def _room(written: Written) -> _Room | None:
    return next((room for room in _ROOMS if room.format in written.formats), None)


def has_domain_configs(written: Written) -> bool:
    """Whether each domain has a configuration of its own."""
    has_room = _room(written) is not None and not written.is_stream
    return has_room and len(written.sums("rows")) <= _MOST_CONFIGS


def configs(written: Written) -> dict[str, list[str]]:
    """Name of each configuration of the card -> patterns of its files, in the order to read."""
    found: dict[str, list[str]] = {}
    room = _room(written)
    if room is None:
        return found
    phases = [phase for phase in written.phases if phase]
    if written.is_stream:
        return _stream_configs(written, room, phases)
    if written.is_uniform:
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
        if component.domain not in written.sources or written.is_uniform:
            found.setdefault(slug, []).append(path)
        if component.phase:
            found[f"phase-{component.phase}-{slug}"] = [path]
    return {name: [room.files(path) for path in paths] for name, paths in found.items()}


def _stream_configs(written: Written, room: _Room, phases: Sequence[int]) -> dict[str, list[str]]:
    """Domains share their files: there is everything, and there are phases."""
    if written.order == "scheduled":
        shards = [s for s in (*written.shards, *written.others) if s["format"] == room.format]
        files = {n: [str(s["file"]) for s in shards if s["phase"] == n] for n in phases}
        return {"default": [room.files("")]} | {f"phase-{n}": files[n] for n in phases}
    each = {f"phase-{n}": [room.files(f"phase-{n}")] for n in phases}
    every = [path for paths in each.values() for path in paths]
    return {"default": every or [room.files("")]} | each


def load_lines(written: Written, where: str) -> list[str]:
    """Three lines of Python that load the shards; `where` is a Python expression."""
    shards = written.sums("rows")
    largest = max(shards, key=lambda component: (shards[component], component))
    first = f'load_dataset({where}, split="train")'
    slug = written.names[largest.domain]
    room = _room(written)
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
        f"everything = {first}" if written.is_uniform else "# columns differ: load by domain",
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


def card(
    written: Written, told: Told | None = None, schemas: Mapping[str, pa.Schema] | None = None
) -> str:
    """`README.md`: front matter for `datasets` and the hub, then what a person wants to know.

    Args:
        written: the shards.
        told: what is known of the run.
        schemas: source -> columns of its shards.
    """
    front: dict[str, Any] = license_front(told.licenses) if told else {}
    if found := configs(written):
        if infos := _infos(written, list(found), schemas or {}):
            front["dataset_info"] = infos
        front["configs"] = [
            {"config_name": name, "data_files": [{"split": "train", "path": paths}]}
            for name, paths in found.items()
        ]
    front["tags"] = ["curate"]
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    done, before_and_after, *more = told_sections(told) if told else ("", "")
    sections = [
        f"---\n{header}---",
        _summary(written),
        done,
        _loading(written),
        *(_table(written, phase) for phase in written.phases),
        before_and_after,
        leakage_section(written.leakage),
        columns_section(written),
        *more,
        _ending(written),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _infos(
    written: Written, names: Sequence[str], schemas: Mapping[str, pa.Schema]
) -> list[dict[str, Any]]:
    """`dataset_info`: the types of each configuration, where the files do not say them."""
    room = _room(written)
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


def _summary(written: Written) -> str:
    counts = f"{written.total('rows'):,} rows in {len(written.shards):,} files"
    if written.tokenizer is not None:
        counts += f", {written.total('tokens'):,} {written.unit}"
    lines = [f"# Training shards\n\n{counts}, chosen and written by `curate`."]
    formats = ", ".join(f"`{name}`" for name in written.formats)
    lines.append(
        f"Format{'s' if len(written.formats) > 1 else ''}: {formats}. {weights_line(written)}"
    )
    if written.mixer is not None:
        lines.append(f"Mixture: `{written.mixer}`; asked and realised shares are below.")
    phases = [phase for phase in written.phases if phase]
    if phases:
        order = ", then ".join(f"`phase-{phase}`" for phase in phases)
        lines.append(
            f"**The phases are ordered: train on {order}.** The default configuration reads them"
            " in this order; a shuffle over all of it loses the method"
            + ("." if written.is_stream else ", so shuffle within a phase.")
        )
    if not written.is_uniform:
        lines.append(
            "**There is no default configuration**: some column has different types in different"
            " sources, so the shards of all sources do not form one table. Load them one by one."
        )
    return "\n\n".join(lines)


def _loading(written: Written) -> str:
    # `datasets` refuses ".": it makes the name of the data set from the folder's.
    folder_line = 'folder = "shards"  # path of this folder, or its name on the hub'
    first, *others = load_lines(written, "folder")
    blocks = ["## Loading", _code([first, folder_line, *others])]
    if _room(written) and not written.is_stream and not has_domain_configs(written):
        blocks.append(
            f"Of so many domains none has a configuration: with more than {_MOST_CONFIGS:,} of"
            " them `datasets` takes long to open a folder. `data_files` reads one of them."
        )
    if written.is_stream and "parquet" in written.formats:
        blocks.append("`recipes/stream.py` reads it in order, in parts for several processes.")
    elif _room(written) and written.is_uniform:
        blocks += [
            "Streaming, one part for each of several processes:",
            _code(
                [
                    "from datasets import load_dataset",
                    "from datasets.distributed import split_dataset_by_node",
                    'streamed = load_dataset(folder, split="train", streaming=True)',
                    "part = split_dataset_by_node(streamed, rank=0, world_size=2)",
                ]
            ),
        ]
    room = _room(written)
    if room is not None and room.format == "packed" and not written.is_stream:
        blocks.append(
            "The mixture: `recipes/packed_interleave.py` draws sequences by the tokens of the"
            " domains. `row_probability` of `mixture.json` is of examples, not of sequences."
        )
    elif written.is_uniform and has_domain_configs(written):
        blocks += [
            "The mixture drawn row by row, its length stated (`row_probability` turns shares of"
            " tokens into shares of rows), here of the first phase:",
            _code(
                [
                    "import json",
                    "from pathlib import Path",
                    "from datasets import interleave_datasets, load_dataset",
                    'mixture = json.loads(Path(folder, "mixture.json").read_text())',
                    'phase = mixture["phases"][0]',
                    'domains = [d for d in phase["domains"].values() if d["rows"]]',
                    "mixed = interleave_datasets(",
                    '    [load_dataset(folder, d["config"], split="train", streaming=True)'
                    " for d in domains],",
                    '    probabilities=[d["row_probability"] for d in domains],',
                    "    seed=0,",
                    '    stopping_strategy="all_exhausted",',
                    ').take(phase["epoch_rows"])',
                ]
            ),
        ]
    if set(written.formats) - {"arrow", "jsonl"} and not written.is_stream:
        blocks.append("`recipes/` has a file for each trainer that reads these formats.")
    return "\n\n".join([*blocks, _workers(written)])


def _workers(written: Written) -> str:
    files: dict[Component, int] = {}
    for shard in written.shards:
        component = Component(shard["phase"], shard["domain"])
        files[component] = files.get(component, 0) + 1
    least, most = min(files.values()), max(files.values())
    span = counted(most, "file") if least == most else f"{least:,} to {most:,} files"
    what = "A domain"
    if written.is_stream:
        what = "A phase" if any(written.phases) else "The stream"
    return (
        f"{_ORDERS[written.order]} {what} has {span}, and a streaming loader hands out whole"
        " files: workers beyond the number of files get no rows. `shards.min_files` or a smaller"
        " `shards.size_mb` gives more files."
    )


def _table(written: Written, phase: int) -> str:
    entry = phase_entry(written, phase)
    unit = written.unit
    measure = "tokens" if unit == "rows" else unit
    lines = [
        f"## Phase {phase}" if phase else "## Mixture",
        "",
        f"| domain | configuration | examples | rows | {measure} | share of {unit} | asked |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    domains: dict[str, Any] = entry["domains"]
    for domain, values in list(domains.items())[:TABLE_ROWS]:
        tokens = "" if values["tokens"] is None else f"{values['tokens']:,}"
        asked = "" if values["asked"] is None else f"{values['asked']:.4f}"
        config = f"`{values['config']}`" if values["config"] else "none"
        config = config if values["rows"] else "nothing kept"
        lines.append(
            f"| {escape(domain)} | {config} | {values['examples']:,} | {values['rows']:,} |"
            f" {tokens} | {values['realised']:.4f} | {asked} |"
        )
    if len(domains) > TABLE_ROWS:
        lines.append(f"\n{len(domains) - TABLE_ROWS:,} more domains are in `mixture.json`.")
    return "\n".join(lines)


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


_ORDERS = {
    "input": "Rows lie in the order of the input: shuffle while loading.",
    "shuffled": "Rows of a domain lie in a random order.",
    "domain-interleaved": "All domains stand in one stream, each in a random order: the first rows,"
    " however many, follow the mixture to within two rows of each domain. Read the files in order.",
    "scheduled": "The phases follow one another in one stream, and within a phase the first rows,"
    " however many, follow its mixture to within two rows of each domain. Read the files in order,"
    " and do not shuffle.",
}

_FILES = {
    "parquet": "`data/<domain>/train-00000-of-00024.parquet`: the shards.",
    "arrow": "`arrow/<domain>/`: the same, for `datasets.load_from_disk`.",
    "jsonl": "`jsonl/<domain>/train-00000-of-00024.jsonl.zst`: the same as JSON lines.",
    "mds": "`mds/<domain>/shard.00000.mds`, `index.json`: the same for Mosaic Streaming.",
    "webdataset": "`webdataset/<domain>/train-00000-of-00024.tar`: the same for WebDataset.",
    "packed": "`packed/<domain>/train-00000-of-00024.parquet`: token ids in sequences of one"
    " length.",
    "megatron": "`megatron/<domain>/train-00000-of-00024.bin`, `.idx`: token ids for Megatron.",
}

_DOCUMENTS = (
    "`mixture.json`: asked and realised shares, rows, tokens and row probabilities of each domain.",
    "`recipes/`: how each trainer draws them.",
    "`manifest.json`: rows, tokens, size and xxh3-128 digest of each shard; written last, so a"
    " folder without it is incomplete. `curate verify FOLDER` checks it.",
)


def _ending(written: Written) -> str:
    files = [_FILES[name] for name in written.formats]
    if written.is_stream:
        files = [text.replace("<domain>/", "") for text in files]
    return "\n".join(["## Files", "", *(f"- {text}" for text in (*files, *_DOCUMENTS))])
