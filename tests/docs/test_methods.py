"""The page of each method says all that a reader has to know before trusting it."""

import re
from pathlib import Path

import pytest

from mixers.catalog import MIXERS
from scorers.catalog import SCORERS

ROOT = Path(__file__).parents[2]
PAGES = [f"scorers/{name}" for name in SCORERS] + [f"mixers/{name}" for name in MIXERS]

SAYS = {
    "what it measures": r"\A# \w+\n\n[A-Z][^|]{40,}",
    "its cost": r"^## Cost|\bCost[:.,]|^Cost in ",
    "its options with their defaults": r"^\| (?:option|setting) \||No options",
    "when to use it": r"^## When to use it|\*\*Use it\*\*",
    "when not to trust it": r"^## When not to trust it|\*\*Do not trust it\*\*",
    "results here, or what was checked": (
        r"^(?:No options\. )?Checked|^## .*[Mm]easured|noisy_labels\.md|reproductions\.md"
        r"|[Ii]n our|on our|handwritten digits"
    ),
}
FORMULA = r"^    \S.*[=~(]|^    \S"
NO_FORMULA = {"scorers/length", "scorers/random", "scorers/external"}
"""Counted, drawn or read, not computed."""


def text(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_the_page_of_a_method_says_what_it_has_to(page: str):
    missing = [what for what, found in SAYS.items() if not re.search(found, text(page), re.M)]
    if page not in NO_FORMULA and not re.search(FORMULA, text(page), re.M):
        missing.append("its formula")
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_what_is_said_against_a_method_is_more_than_a_sentence(page: str):
    parts = re.split(r"^## When not to trust it|^\*\*Do not trust it\*\*", text(page), flags=re.M)
    assert len(parts[1].split()) > 20
