"""axolotl: data sets of its configuration."""

from typing import Any

import yaml

from curate.data.recipes.blend import Blend, comment

_USE = """Use: copy these keys into your configuration and run axolotl in the shards folder, as
paths are relative to it; set `type` and `field` to what your rows are. Checked against its
documentation, not run."""

_UNIT = """Unit: rows. `weight` of axolotl is no probability but the part of a data set that is
taken, above 0 and at most 1: a random subset, the same one in every epoch."""

_HONOURED = {
    "column": """Weights: one epoch is every row once, which is the mixture. curate_weight is
ignored: write with `--weights copies` to have it honoured.""",
    "copies": """Weights: honoured by the copies; one epoch is every row once.""",
    "domains": """Weights: approximated. Each domain's part is its `repeat` over the largest one,
and so many epochs of that are one epoch of the mixture: `num_epochs` below. Rows left out of a
part are never seen, and curate_weight is ignored: prefer `--weights copies`.""",
}

_MIXED = """Domains with texts in several columns, as their sources name them: {domains}. axolotl
reads one column of a data set, here the first: bring the others into it."""

_PHASES = (
    "Phase 0 of the mixture; copy and adapt the paths for the others, and train on them in order."
)


def text(blend: Blend) -> str:
    """`axolotl.yaml`, of the first phase."""
    found = blend.domains(0)
    largest = max(entry["repeat"] for entry in found.values())
    lines: list[dict[str, Any]] = []
    mixed: list[str] = []
    for domain, entry in found.items():
        fields = blend.texts_of(domain)
        if len(fields) > 1:
            mixed.append(f"{entry['folder']} ({', '.join(fields)})")
        part = {"path": f"data/{entry['folder']}", "ds_type": "parquet", "split": "train"}
        kind: dict[str, Any] = {"type": "completion", "field": fields[0] if fields else "text"}
        if blend.way == "domains" and entry["repeat"] > 0:
            kind["weight"] = float(f"{entry['repeat'] / largest:.6g}")
        if entry["repeat"] > 0:
            lines.append(part | kind)
    values: dict[str, Any] = {"datasets": lines}
    if blend.way == "domains":
        values["num_epochs"] = float(f"{largest:.6g}")
    notes = [_PHASES] if blend.num_phases > 1 else []
    if mixed:
        notes.append(_MIXED.format(domains=", ".join(mixed)))
    return comment(
        blend, "The mixture for axolotl.", _USE, _UNIT, _HONOURED[blend.way], *notes
    ) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
