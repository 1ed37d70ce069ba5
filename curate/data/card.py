"""`README.md` of the shards: configurations for `datasets`, and what a person wants to know.

A function of the shards and the plan alone: no time, no host, no path.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import yaml

from curate.data.card_columns import columns_section, weights_line
from curate.data.card_configs import (
    MOST_CONFIGS,
    column_types,
    configs,
    has_domain_configs,
    is_one_table,
    load_lines,
    room_of,
)
from curate.data.card_leakage import leakage_section
from curate.data.card_told import TABLE_ROWS, Told, escape, license_front, told_sections
from curate.data.recipe import Written, phase_entry
from curate.data.shard_layout import Component
from curate.errors import counted


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
        if infos := column_types(written, list(found), schemas or {}):
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
    if written.curriculum:
        score, first = written.curriculum["score"], written.curriculum["first"]
        lines.append(
            f"The phases are a curriculum: each domain's examples by `{score}`,"
            f" {'lowest' if first == 'easiest' else 'highest'} first, in equal parts."
        )
    if not is_one_table(written):
        lines.append(
            "**There is no default configuration**: some column has different types in different"
            " sources, so the shards of all sources do not form one table. Load them one by one."
        )
    return "\n\n".join(lines)


def _loading(written: Written) -> str:
    # `datasets` refuses ".": it makes the name of the data set from the folder's.
    folder_line = 'folder = "shards"  # path of this folder, or its name on the hub'
    lines = load_lines(written, "folder")
    imports = [line for line in lines if line.startswith(("from ", "import "))]
    code = [line for line in lines if line not in imports]
    blocks = ["## Loading", _code([*imports, folder_line, *code])]
    if room_of(written) and not written.is_stream and not has_domain_configs(written):
        blocks.append(
            f"Of so many domains none has a configuration: with more than {MOST_CONFIGS:,} of"
            " them `datasets` takes long to open a folder. `data_files` reads one of them."
        )
    if written.is_stream and "parquet" in written.formats:
        blocks.append("`recipes/stream.py` reads it in order, in parts for several processes.")
    elif room_of(written) and is_one_table(written):
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
    room = room_of(written)
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
