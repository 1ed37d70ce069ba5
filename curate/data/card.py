"""`README.md` of the shards: configurations for `datasets`, and what a person wants to know.

A function of the shards and the plan alone: no time, no host, no path.
"""

import html
import json
from collections.abc import Sequence
from typing import Any

import yaml

from curate.data.card_leakage import leakage_section
from curate.data.recipe import Written, phase_entry
from curate.data.shard_layout import Component, folder_name

_TABLE_ROWS = 200


def configs(written: Written) -> dict[str, list[str]]:
    """Name of each configuration of the card -> patterns of its files, in the order to read."""
    found: dict[str, list[str]] = {}
    if "parquet" not in written.formats:
        return found
    phases = [phase for phase in written.phases if phase]
    if written.is_stream:
        return _stream_configs(written, phases)
    if written.is_uniform:
        every = [f"data/phase-{phase}/*" for phase in phases] or ["data/*"]
        found["default"] = every
        found.update({f"phase-{phase}": [f"data/phase-{phase}/*"] for phase in phases})
    else:
        for source, domains in sorted(written.sources.items()):
            found[written.names[source]] = [
                f"data/{folder_name(component, written.names[component.domain])}"
                for component in written.sums("rows")
                if component.domain in domains
            ]
    for component in written.sums("rows"):
        slug = written.names[component.domain]
        path = f"data/{folder_name(component, slug)}"
        if component.domain not in written.sources or written.is_uniform:
            found.setdefault(slug, []).append(path)
        if component.phase:
            found[f"phase-{component.phase}-{slug}"] = [path]
    return {name: [f"{p}/train-*.parquet" for p in paths] for name, paths in found.items()}


def _stream_configs(written: Written, phases: Sequence[int]) -> dict[str, list[str]]:
    """Domains share their files: there is everything, and there are phases."""
    if written.order == "scheduled":
        shards = [s for s in (*written.shards, *written.others) if s["format"] == "parquet"]
        files = {n: [str(s["file"]) for s in shards if s["phase"] == n] for n in phases}
        return {"default": ["data/train-*.parquet"]} | {f"phase-{n}": files[n] for n in phases}
    each = {f"phase-{n}": [f"data/phase-{n}/train-*.parquet"] for n in phases}
    every = [path for paths in each.values() for path in paths]
    return {"default": every or ["data/train-*.parquet"]} | each


def load_lines(written: Written, where: str) -> list[str]:
    """Three lines of Python that load the shards; `where` is a Python expression."""
    shards = written.sums("rows")
    largest = max(shards, key=lambda component: (shards[component], component))
    first = f'load_dataset({where}, split="train")'
    slug = written.names[largest.domain]
    if written.is_stream:
        phase = f'one_phase = load_dataset({where}, "phase-{largest.phase}", split="train")'
        domain = json.dumps(largest.domain, ensure_ascii=False)
        filtered = f'one_domain = everything.filter(lambda row: row["curate_domain"] == {domain})'
        last = phase if largest.phase else filtered
        return ["from datasets import load_dataset", f"everything = {first}", last]
    return [
        "from datasets import load_dataset",
        f"everything = {first}" if written.is_uniform else "# columns differ: load by domain",
        f'one_domain = load_dataset({where}, {json.dumps(slug)}, split="train")',
    ]


def card(written: Written) -> str:
    """`README.md`: front matter for `datasets`, then what a person wants to know."""
    front = {
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": paths}]}
            for name, paths in configs(written).items()
        ],
        "tags": ["curate"],
    }
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    sections = [
        f"---\n{header}---",
        _summary(written),
        _loading(written),
        *(_table(written, phase) for phase in written.phases),
        leakage_section(written.leakage),
        _columns(written),
        _ENDING,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(written: Written) -> str:
    counts = f"{written.total('rows'):,} rows in {len(written.shards):,} Parquet files"
    if written.tokenizer is not None:
        counts += f", {written.total('tokens'):,} {written.unit}"
    lines = [f"# Training shards\n\n{counts}, chosen and written by `curate`."]
    if written.mixer is not None:
        lines.append(f"Mixture: `{written.mixer}`; asked and realised shares are below.")
    phases = [phase for phase in written.phases if phase]
    if phases:
        order = ", then ".join(f"`phase-{phase}`" for phase in phases)
        lines.append(
            f"**The phases are ordered: train on {order}.** The default configuration reads them"
            " in this order; a shuffle over all of it loses the method, so shuffle within a phase."
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
    if written.is_uniform:
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
    if written.is_uniform and not written.is_stream:
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
                    ').take(phase["rows"])',
                ]
            ),
        ]
    return "\n\n".join([*blocks, _workers(written)])


def _workers(written: Written) -> str:
    files: dict[Component, int] = {}
    for shard in written.shards:
        component = Component(shard["phase"], shard["domain"])
        files[component] = files.get(component, 0) + 1
    least, most = min(files.values()), max(files.values())
    span = str(least) if least == most else f"{least} to {most}"
    what = (
        ("A phase has" if any(written.phases) else "There are")
        if written.is_stream
        else ("A domain has")
    )
    return (
        f"{_ORDERS[written.order]} {what} {span} files, and a streaming loader hands out whole"
        " files: workers beyond the number of files get no rows. `shards.min_files` or a smaller"
        " `shards.size_mb` gives more files."
    )


def _table(written: Written, phase: int) -> str:
    entry = phase_entry(written, phase)
    unit = written.unit
    counted = "tokens" if unit == "rows" else unit
    lines = [
        f"## Phase {phase}" if phase else "## Mixture",
        "",
        f"| domain | configuration | examples | rows | {counted} | share of {unit} | asked |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    domains: dict[str, Any] = entry["domains"]
    for domain, values in list(domains.items())[:_TABLE_ROWS]:
        tokens = "" if values["tokens"] is None else f"{values['tokens']:,}"
        asked = "" if values["asked"] is None else f"{values['asked']:.4f}"
        config = f"`{values['config']}`" if values["config"] else "nothing kept"
        lines.append(
            f"| {_escape(domain)} | {config} | {values['examples']:,} | {values['rows']:,} |"
            f" {tokens} | {values['realised']:.4f} | {asked} |"
        )
    if len(domains) > _TABLE_ROWS:
        lines.append(f"\n{len(domains) - _TABLE_ROWS:,} more domains are in `mixture.json`.")
    return "\n".join(lines)


def _columns(written: Written) -> str:
    lines = ["## Columns", "", "The columns of the input in their types, and:", ""]
    lines += [f"- `{name}`: {text}" for name, text in _MEANINGS.items()]
    return "\n".join(lines)


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _escape(text: str) -> str:
    """Text from the data as one line of a Markdown table, without effect."""
    text = html.escape(json.dumps(text, ensure_ascii=False)[1:-1], quote=False)
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"&#{ord(sign)};")
    return text


_ORDERS = {
    "input": "Rows lie in the order of the input: shuffle while loading.",
    "shuffled": "Rows of a domain lie in a random order.",
    "domain-interleaved": "All domains stand in one stream, each in a random order: the first rows,"
    " however many, follow the mixture to within two rows of each domain. Read the files in order.",
    "scheduled": "The phases follow one another in one stream, and within a phase the first rows,"
    " however many, follow its mixture to within two rows of each domain. Read the files in order,"
    " and do not shuffle.",
}

_MEANINGS = {
    "curate_source": "name of the input data set in the settings of the run.",
    "curate_file": "file of that data set, relative to it.",
    "curate_row": "position of the row in that file. Source, file and row identify an example;"
    " an example with several copies has them all.",
    "curate_weight": "weight of the example in the loss; the mean over the examples kept is 1. It"
    " says nothing about domains: their shares are realised by selection and copies. The"
    " `Trainer` of transformers drops this column unless the loss uses it.",
    "curate_domain": "domain of the example in the mixture.",
}

_ENDING = """## Files

- `data/<domain>/train-00000-of-00024.parquet`: the shards.
- `mixture.json`: asked and realised shares, rows, tokens and row probabilities of each domain.
- `manifest.json`: rows, tokens, size and xxh3-128 digest of each shard; written last, so a folder
  without it is incomplete. `curate verify FOLDER` checks it."""
