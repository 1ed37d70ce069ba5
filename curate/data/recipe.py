"""`mixture.json` and `manifest.json` of the shards, as values.

Both are functions of the shards and the plan alone: no time, no host, no path.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from curate.data.shard_layout import Component, folder_name

SCHEMA_VERSION = 2

CHARACTERS = "characters"
"""In place of a tokenizer's digest: characters stand for tokens, in all counts."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the mixture wanted of one phase."""

    share: float
    """Share of the phase in all of training."""
    weights: Mapping[str, float]
    """Domain -> share of the phase's tokens."""


@dataclass(frozen=True, slots=True)
class Written:
    """All that the documents of the folder are made from."""

    shards: Sequence[Mapping[str, Any]]
    """Receipts of `curate.data.shards.write_group` in the first format, in canonical order."""
    others: Sequence[Mapping[str, Any]]
    """The same shards in the other formats."""
    formats: Sequence[str]
    """All of them, the first one first."""
    examples: Mapping[Component, int]
    """Different examples of each component; its rows count copies too."""
    names: Mapping[str, str]
    """Domain or source -> slug."""
    sources: Mapping[str, Sequence[str]]
    """Source -> its domains."""
    columns: Mapping[str, Mapping[str, str]]
    """Column -> type, of all shards, under the key ""; or for each source its own."""
    mixer: str | None
    asked: Sequence[Asked]
    """One entry for each phase; none where no mixture was asked for."""
    tokenizer: str | None
    """Digest of the tokenizer that counted, or `characters`; None where there are no tokens."""
    weights: str = "column"
    """How the plan's weights reach the trainer: column, copies or domains."""
    worth: Mapping[Component, float] = field(default_factory=dict[Component, float])
    """Copies times weight of each component, in rows of weight 1; needed for `domains`."""
    order: str = "input"
    """Of the rows, as in the settings."""
    curriculum: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The settings of one, as JSON values; empty without."""
    leakage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What `plan/leakage.json` says of evaluation sets; empty where none was looked for."""
    repeats: Mapping[Component, Sequence[int]] = field(
        default_factory=dict[Component, Sequence[int]]
    )
    """How many examples of each component are written once, how many twice, and so on."""
    parts: Mapping[Component, tuple[int, int]] = field(
        default_factory=dict[Component, tuple[int, int]]
    )
    """Rows and tokens of each component, where domains share their files; else empty."""

    @property
    def is_stream(self) -> bool:
        """Whether domains share their files."""
        return bool(self.parts)

    @property
    def unit(self) -> str:
        """What shares are shares of: tokens, characters where no tokenizer was set, or rows."""
        named = {None: "rows", CHARACTERS: "characters"}
        return named.get(self.tokenizer, "tokens")

    @property
    def is_uniform(self) -> bool:
        """Whether all shards have the same columns."""
        return "" in self.columns

    @property
    def phases(self) -> list[int]:
        return sorted({int(shard["phase"]) for shard in self.shards})

    def sums(self, key: str) -> dict[Component, int]:
        """Component -> sum over its shards of `rows`, `tokens` or `bytes`.

        Bytes of domains that share their files are in proportion to their tokens, or rows.
        """
        if self.is_stream:
            return self._shared(key)
        found: dict[Component, int] = {}
        for shard in self.shards:
            component = Component(shard["phase"], shard["domain"])
            found[component] = found.get(component, 0) + int(shard[key])
        return dict(sorted(found.items()))

    def _shared(self, key: str) -> dict[Component, int]:
        if key != "bytes":
            return {component: part[key == "tokens"] for component, part in self.parts.items()}
        nth = int(self.tokenizer is not None)
        sizes, totals = dict[int, int](), dict[int, int]()
        for shard in self.shards:
            sizes[shard["phase"]] = sizes.get(shard["phase"], 0) + int(shard["bytes"])
        for component, part in self.parts.items():
            totals[component.phase] = totals.get(component.phase, 0) + part[nth]
        return {
            component: sizes[component.phase] * part[nth] // max(1, totals[component.phase])
            for component, part in self.parts.items()
        }

    @property
    def size_bytes(self) -> int:
        """Of the shards in all formats."""
        return sum(size for shard in (*self.shards, *self.others) for _, size in files_of(shard))

    def total(self, key: str) -> int:
        return sum(int(shard[key]) for shard in self.shards)


def files_of(receipt: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Every file of a shard in one format, with its size in bytes."""
    entries = [receipt, *receipt.get("companions", [])]
    return [(str(entry["file"]), int(entry["bytes"])) for entry in entries]


def mixture(written: Written) -> dict[str, Any]:
    """`mixture.json`: asked and realised shares of each domain in each phase.

    Shares are shares of tokens (see `Written.unit` for where there are none). Loaders that draw
    rows need `row_probability`: realised share / mean tokens of a row, normalised; with the shares
    themselves a domain of long rows would get too much. `draw` has the same probabilities for
    loaders that draw rows, tokens or bytes, and `repeat` says how often a domain is gone through in
    an epoch of the mixture, which has `epoch_rows` draws.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "unit": written.unit,
        "tokenizer": written.tokenizer,
        "mixer": written.mixer,
        "weights": written.weights,
        "rows": written.total("rows"),
        "tokens": written.total("tokens") if written.tokenizer is not None else None,
        "phases": [phase_entry(written, phase) for phase in written.phases],
    }


def manifest(written: Written, *, files: Mapping[str, str]) -> dict[str, Any]:
    """`manifest.json`: every shard with what can be checked of it.

    `copies` says of each domain how many examples are written once, how many twice, and so on: the
    content of the shards can be held against it without the run.

    Args:
        written: the shards.
        files: other files of the folder -> digest.
    """
    domains = sorted({component.domain for component in written.sums("rows")})
    return {
        "schema_version": SCHEMA_VERSION,
        "formats": list(written.formats),
        "order": written.order,
        "weights": written.weights,
        **({"curriculum": dict(written.curriculum)} if written.curriculum else {}),
        "unit": written.unit,
        "rows": written.total("rows"),
        "tokens": written.total("tokens") if written.tokenizer is not None else None,
        "bytes": written.size_bytes,
        "domains": {domain: written.names[domain] for domain in domains},
        "columns": written.columns,
        "copies": [
            {"phase": component.phase, "domain": component.domain, "examples": list(numbers)}
            for component, numbers in sorted(written.repeats.items())
        ],
        "files": dict(files),
        "shards": [dict(shard) for shard in (*written.shards, *written.others)],
    }


def phase_entry(written: Written, phase: int) -> dict[str, Any]:
    """One phase of `mixture.json`."""
    rows, tokens, sizes = (written.sums(key) for key in ("rows", "tokens", "bytes"))
    counted = rows if written.tokenizer is None else tokens
    mine = [component for component in rows if component.phase == phase]
    amounts = _amounts(written, counted)
    total = sum(amounts[component] for component in mine)
    everything = sum(amounts.values())
    asked = written.asked[max(0, phase - 1)] if written.asked else None
    domains: dict[str, Any] = {}
    for component in mine:
        domain = component.domain
        share = amounts[component] / total if total else 0.0
        domains[domain] = {
            "config": None if written.is_stream else _config(component, written.names[domain]),
            "folder": None if written.is_stream else folder_name(component, written.names[domain]),
            "asked": asked.weights.get(domain, 0.0) if asked else None,
            "realised": share,
            "examples": written.examples[component],
            "rows": rows[component],
            "tokens": None if written.tokenizer is None else tokens[component],
            "bytes": sizes[component],
        }
    if written.weights == "domains":
        worth = {component.domain: written.worth[component] for component in mine}
        epoch_rows = round(sum(worth.values()))
        _set_row_probabilities(domains, worth)
    else:
        # What was written is the mixture as far as its limits allow, and one epoch of it.
        epoch_rows = sum(rows[component] for component in mine)
        _set_row_probabilities(domains, {component.domain: rows[component] for component in mine})
    _add_draws(domains, epoch_rows)
    for domain, weight in (asked.weights if asked else {}).items():
        if domain not in domains:  # asked for, but nothing of it was kept
            domains[domain] = {
                "config": None,
                "folder": None,
                "asked": weight,
                "realised": 0.0,
                "examples": 0,
                "rows": 0,
                "tokens": None if written.tokenizer is None else 0,
                "bytes": 0,
                "row_probability": 0.0,
                "draw": dict.fromkeys(_units(written.tokenizer is not None), 0.0),
                "repeat": 0.0,
            }
    return {
        "phase": phase,
        "config": f"phase-{phase}" if phase else "default",
        "asked": asked.share if asked else None,
        "realised": total / everything if everything else 0.0,
        "rows": sum(rows[component] for component in mine),
        "tokens": None if written.tokenizer is None else sum(tokens[c] for c in mine),
        "epoch_rows": epoch_rows,
        "domains": dict(sorted(domains.items())),
    }


def _config(component: Component, slug: str) -> str:
    return f"phase-{component.phase}-{slug}" if component.phase else slug


def _set_row_probabilities(domains: dict[str, Any], raw: Mapping[str, float]) -> None:
    total = sum(raw.values())
    for domain, entry in domains.items():
        entry["row_probability"] = raw[domain] / total if total else 1 / len(raw)


def _amounts(written: Written, counted: Mapping[Component, int]) -> dict[Component, float]:
    """Tokens (or rows) of each component in an epoch: as written, or as often as they are drawn."""
    if written.weights != "domains":
        return {component: float(amount) for component, amount in counted.items()}
    rows = written.sums("rows")
    return {c: written.worth[c] * amount / rows[c] for c, amount in counted.items()}


def _units(has_tokens: bool) -> tuple[str, ...]:
    return ("rows", "tokens", "bytes") if has_tokens else ("rows", "bytes")


def _add_draws(domains: dict[str, Any], epoch_rows: int) -> None:
    """`draw` and `repeat` of each domain, from its probability of a row."""
    for unit in _units(all(entry["tokens"] is not None for entry in domains.values())):
        raw = [e["row_probability"] * e[unit] / e["rows"] for e in domains.values()]
        total = sum(raw)
        for entry, share in zip(domains.values(), raw, strict=True):
            entry.setdefault("draw", {})[unit] = share / total if total else 0.0
    for entry in domains.values():
        entry["repeat"] = entry["row_probability"] * epoch_rows / entry["rows"]
