"""Megatron-LM: the list of weights and prefixes that blends the domains."""

import json
from typing import Any

from curate.data.recipes.blend import Blend, header

_USE = """Use: `python megatron.py > blend.txt` and `--data-args-path blend.txt`, or `--json`
into a file for `--per-split-data-args-path`; `--phase 1` is the second phase. Paths are those of
this folder as it lies now. Needs nothing but Python."""

_UNIT = """Unit: sequences of equal length, hence tokens. A file's weight is its own number of
tokens times the `repeat` of its domain, as shares of the phase; these are Megatron's own token
counts, with its tokenizer and end-of-document tokens."""

_LOST = """Weights: Megatron weighs no single document. The domains' shares are honoured;
curate_weight is lost, and every example of a domain counts alike: write with `--weights copies`
to have the weights of examples honoured too."""

_KEPT = """Weights: honoured by the copies, domains and examples alike."""

_CODE = '''import argparse
import json
from pathlib import Path

SHARDS = Path(__file__).resolve().parents[1]

# Phase by phase: share of the tokens, prefix of the .bin and .idx files.
BLENDS = {blends}


def blend(phase=0):
    """Weights and prefixes in turn, as --data-path takes them."""
    pairs = ((f"{{share:.9g}}", str(SHARDS / file)) for share, file in BLENDS[phase])
    return [item for pair in pairs for item in pair]


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--phase", type=int, default=0)
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    items = blend(given.phase)
    if given.json:
        print(json.dumps({{"train": items, "valid": None, "test": None}}, indent=1))
    else:
        print(" ".join(items))


if __name__ == "__main__":
    main()
'''


def text(blend: Blend) -> str:
    """`megatron.py`."""
    blends: list[list[tuple[float, str]]] = []
    for phase in range(blend.num_phases):
        number = blend.mixture["phases"][phase]["phase"]
        repeats = {name: entry["repeat"] for name, entry in blend.domains(phase).items()}
        # Where domains share their files, these are an epoch of the mixture as they are.
        mine = [
            (repeats.get(shard["domain"], 1.0) * shard["facts"]["tokens"], shard["file"])
            for shard in blend.of_format("megatron")
            if shard["phase"] == number
        ]
        total = sum(amount for amount, _ in mine)
        blends.append(
            [(amount / total, file.removesuffix(".bin")) for amount, file in mine if amount]
        )
    kept = _KEPT if blend.way == "copies" else _LOST
    title = "The mixture for Megatron-LM and Megatron-core: its blend."
    return header(blend, title, _USE, _UNIT, kept) + _CODE.format(blends=_listed(blends))


def _listed(blends: list[list[tuple[float, str]]]) -> str:
    lines = ["["]
    for phase in blends:
        lines.append("    [")
        lines += [f"        ({share:.12g}, {_quoted(file)})," for share, file in phase]
        lines.append("    ],")
    return "\n".join([*lines, "]"])


def _quoted(value: Any) -> str:
    return json.dumps(value)
