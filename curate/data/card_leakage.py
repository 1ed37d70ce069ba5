"""What a card says of the evaluation sets that were looked for in the data."""

import html
import json
from collections.abc import Mapping
from typing import Any


def leakage_section(facts: Mapping[str, Any]) -> str:
    """A section of the card, from what `plan/leakage.json` holds; "" where no set was looked for.

    Args:
        facts: `found_from`, and `sets`: name -> examples, and what is kept and was left out.
    """
    sets: Mapping[str, Any] = facts.get("sets", {})
    if not sets:
        return ""
    lines = [
        "## Evaluation sets",
        "",
        "These data sets were looked for in the training data word for word, capitals and"
        " punctuation aside. An example of one counts as found where at least"
        f" {100 * facts['found_from']:g} % of its words stand in one training example, in runs of"
        " words that follow each other. What was translated or said in other words is not found.",
        "",
        "| evaluation set | examples | found in these shards | of them equal | training examples"
        " with them, kept | left out |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in sets.items():
        kept, left_out = found["kept"], found["left_out"]
        lines.append(
            f"| {_escape(name)} | {found['examples']:,} | {kept['examples']:,}"
            f" ({100 * kept['share']:.1f} %) | {kept['exact_examples']:,} | {kept['rows']:,} |"
            f" {left_out['rows']:,} |"
        )
    short = {name: found["short"] for name, found in sets.items() if found["short"]}
    if short:
        told = ", ".join(f"{_escape(name)} {count:,}" for name, count in short.items())
        lines += ["", f"Too short to be looked for within other texts, only as a whole: {told}."]
    return "\n".join(lines)


def _escape(name: str) -> str:
    """A name without effect in a table."""
    text = html.escape(json.dumps(name, ensure_ascii=False)[1:-1], quote=False)
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"&#{ord(sign)};")
    return text
