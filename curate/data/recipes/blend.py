"""What a recipe is made from."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_WAYS = {
    "column": (
        "The shards are one epoch of the mixture: selection and copies have realised the domains'"
        " shares. curate_weight of each row multiplies its loss."
    ),
    "copies": (
        "The shards are one epoch of the mixture: selection and copies have realised the domains'"
        " shares and the examples' weights. curate_weight is 1 everywhere."
    ),
    "domains": (
        "Every example is written once. A domain is drawn with its probability, `repeat` times an"
        " epoch of the mixture; curate_weight of each row, of mean 1 in its domain, multiplies its"
        " loss."
    ),
}


@dataclass(frozen=True, slots=True)
class Blend:
    """The shards, as recipes see them."""

    way: str
    """column, copies or domains."""
    mixture: Mapping[str, Any]
    """What stands in `mixture.json`."""
    shards: Sequence[Mapping[str, Any]]
    """Receipts of all formats."""
    columns: Sequence[str] | None
    """Columns that all sources have with one type; None where that is all of them."""
    texts: Mapping[str, str | None]
    """Source -> its column of the text; None where it has none."""
    sources: Mapping[str, Sequence[str]]
    """Source -> its domains."""

    @property
    def text(self) -> str | None:
        """Column of the text, where all sources call it the same."""
        named = {self.texts.get(source) for source in self.sources}
        return named.pop() if len(named) == 1 else None

    def texts_of(self, domain: str) -> list[str]:
        """Columns of the text of the sources of a domain, each once, in order of the sources."""
        mine = (source for source, domains in self.sources.items() if domain in domains)
        return list(dict.fromkeys(text for source in mine if (text := self.texts.get(source))))

    def of_format(self, name: str) -> list[Mapping[str, Any]]:
        """Receipts of one format, in order."""
        return [shard for shard in self.shards if shard["format"] == name]

    def domains(self, phase: int) -> dict[str, Any]:
        """Domain -> its entry in the mixture, where it has rows; phases count from 0."""
        found = self.mixture["phases"][phase]["domains"]
        return {name: entry for name, entry in found.items() if entry["rows"]}

    @property
    def num_phases(self) -> int:
        return len(self.mixture["phases"])


def chosen_columns(blend: Blend) -> str:
    """An argument of `load_dataset` for columns that all sources share; nothing where all do."""
    return "" if blend.columns is None else f", columns={json.dumps(list(blend.columns))}"


def paragraphs(*texts: str, width: int = 96) -> str:
    """Texts as lines of a comment's width, with an empty line between."""
    wrapped = (
        textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False) for text in texts
    )
    return "\n\n".join(wrapped)


def header(blend: Blend, title: str, *texts: str) -> str:
    """A module's docstring: what it is for, what the weights are, how they are honoured."""
    phases = (
        "The mixture has phases: train on phase 0 to the end, then on phase 1, and so on."
        if blend.num_phases > 1
        else ""
    )
    parts = [title, _WAYS[blend.way], *texts, phases]
    return f'"""{paragraphs(*(part for part in parts if part))}\n"""\n\n'


def comment(blend: Blend, title: str, *texts: str) -> str:
    """`header` for a file whose comments begin with #."""
    text = paragraphs(title, _WAYS[blend.way], *texts)
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())
