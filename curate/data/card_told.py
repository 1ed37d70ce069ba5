"""What a card tells of the run behind the shards: what was done and why, what there was before and
after, under which licences, and how to do it again.

A function of settings and plan: no time, no host, no path.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from curate.errors import counted

TABLE_ROWS = 200
"""Of any table of the card."""

_NO_MEASURES = ("leakage_row", "leakage_set")
"""Columns of the plan that number something: their means say nothing."""

_SOURCES = 50
"""Whose settings are written out."""

_HUB_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    bsl-1.0
    c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
    lgpl-3.0 mit mpl-2.0 ms-pl ncsa odbl odc-by openrail other pddl postgresql unknown unlicense
    wtfpl zlib
"""
"""Names that the Hugging Face hub knows; any other is `other` there."""
_LICENSES = frozenset(_HUB_LICENSES.split())

REASON_TEXTS = {
    "kept": "kept",
    "held_out": "kept back for evaluation",
    "dropped": "the condition above leaves them out first",
    "leaked": "they hold examples of an evaluation set",
    "no_share": "the mixture gives their domain nothing",
    "unscored": "without a score, or without a vector where the draw needs one",
    "dropped_extreme": "at the end of the order that is left out",
    "score": "others came first by score",
    "draw": "others were drawn",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is known of a run."""

    version: str
    """Of curate."""
    settings: Mapping[str, Any]
    """Those that are not the defaults, paths cut to names; nested, as in YAML."""
    plan: Mapping[str, Any]
    """The settings of the plan, all of them."""
    summary: Mapping[str, Any]
    """`plan/summary.json`."""
    licenses: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    """Source -> its licence; None where it is not known."""


def license_front(licenses: Mapping[str, str | None]) -> dict[str, Any]:
    """The licence fields of the front matter, in the hub's words."""
    if not licenses:
        return {}
    named = sorted({(text or "unknown").strip() for text in licenses.values()})
    known = sorted({text.lower() if text.lower() in _LICENSES else "other" for text in named})
    front: dict[str, Any] = {"license": known[0] if len(known) == 1 else known}
    others = [text for text in named if text.lower() not in _LICENSES]
    if len(named) == 1 and others:
        front["license_name"] = re.sub(r"[^a-z0-9.]+", "-", others[0].lower()).strip("-") or "other"
    return front


def told_sections(told: Told) -> list[str]:
    """What was done; before and after; licences; how to reproduce. Some may be empty."""
    compared = "\n\n".join(text for text in (_domains(told.summary), _means(told.summary)) if text)
    return [_done(told), compared, _licences(told.licenses), _reproduce(told)]


# -- what was done --------------------------------------------------------------------------------


def _done(told: Told) -> str:
    summary, plan = told.summary, told.plan
    if not {"training", "kept", "reasons"} <= summary.keys():
        return ""
    training, kept = summary["training"], summary["kept"]
    unit = {None: "", "characters": "characters"}.get(summary["tokenizer"], "tokens")
    line = (
        f"Of {counted(training['rows'], 'training example')}, {kept['rows']:,} are kept"
        f" ({100 * kept['row_share']:.1f} %)"
    )
    if unit and kept["token_share"] is not None:
        line += (
            f", with {kept['tokens']:,} of {training['tokens']:,} {unit}"
            f" ({100 * kept['token_share']:.1f} %), copies counted"
        )
    lines = [f"## What was done\n\n{line}."]
    lines += [f"* {sentence}" for sentence in _steps(told, plan, summary)]
    notes = [f"* Note: {escape(note)}." for note in summary.get("notes", ())]
    rows = [
        [f"`{reason}`", REASON_TEXTS.get(reason, ""), f"{number:,}"]
        for reason, number in summary["reasons"].items()
        if number
    ]
    return "\n\n".join(
        [lines[0], "\n".join([*lines[1:], *notes]),
         table(["reason", "", "examples"], rows, left=2)]
    )  # fmt: skip


def _steps(told: Told, plan: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterable[str]:
    scorers = [_name(entry) for entry in told.settings.get("score", {}).get("scorers", ())]
    if scorers:
        yield f"Measured: {', '.join(f'`{escape_code(name)}`' for name in scorers)}."
    if plan.get("drop"):
        dropped = summary.get("dropped", {}).get("rows", 0)
        condition = escape_code(plan["drop"])
        yield f"Left out first: the {counted(dropped, 'example')} for which `{condition}`."
    if plan.get("drop_first"):
        share = 100 * plan["drop_first"]
        yield f"The first {share:g} % of each group in the order below are left out."
    yield _chosen(plan)
    if told.summary.get("mixer"):
        yield (
            f"Shares of the domains: by the mixer `{told.summary['mixer']}`; no domain is gone"
            f" through more than {plan.get('max_repeats', 1):g} times. Asked and realised shares"
            " are below."
        )
    repeats = summary.get("repeats", {})
    if repeats.get("rows"):
        yield (
            f"{counted(repeats['rows'], 'example')} are used more than once, at most"
            f" {repeats['most_copies']} times."
        )
    weights = summary.get("weights", {})
    if plan.get("weights") and weights.get("min") is not None:
        by = escape_code(str(plan["weights"].get("score")))
        yield (
            f"Examples weigh {weights['min']:.3g} to {weights['max']:.3g} in the loss, by `{by}`;"
            f" they are worth {weights['effective_size']:,.0f} examples of equal weight."
        )


def _chosen(plan: Mapping[str, Any]) -> str:
    """How examples were chosen, in one sentence."""
    group = {"all": "Among all examples", "domain": "Within each domain",
             "label": "Within each label", "source": "Within each source"}  # fmt: skip
    where = group.get(str(plan.get("within")), "Within each group")
    score = plan.get("score")
    by = f"`{escape_code(str(score))}`" if score else ""
    draw = plan.get("draw", "top")
    if draw == "k_centre":
        return f"{where} those are kept that lie far from each other{_among(by, plan)}."
    if draw == "facility_location":
        return f"{where} those are kept that stand for the others best{_among(by, plan)}."
    if not score:
        return f"{where} the kept ones are drawn at random, by the seed."
    ends = {"hardest": "the highest", "easiest": "the lowest", "middle": "the middle values of"}
    end = ends.get(str(plan.get("order")), "the best")
    if draw == "sample":
        return (
            f"{where} the kept ones are drawn without replacement, those with {end} {by} more"
            f" likely (temperature {plan.get('temperature', 1):g})."
        )
    return f"{where} those with {end} {by} are kept."


def _among(by: str, plan: Mapping[str, Any]) -> str:
    if not by:
        return ""
    return f", among {plan.get('candidates', 1):g} times as many that are first by {by}"


def _name(scorer: Any) -> str:
    return next(iter(scorer)) if isinstance(scorer, Mapping) and scorer else str(scorer)


# -- before and after -----------------------------------------------------------------------------


def _domains(summary: Mapping[str, Any]) -> str:
    domains: Mapping[str, Any] = summary.get("domains", {})
    if not domains:
        return ""
    total = max(1, summary["training"]["tokens"])
    unit = {None: "examples", "characters": "characters"}.get(summary["tokenizer"], "tokens")
    has_weights = any(entry["token_share_asked"] is not None for entry in domains.values())
    head = ["domain", "examples before", "kept", "share kept", "rows with copies",
            f"share of {unit} before", "after", *(["weight asked"] if has_weights else []),
            "epochs"]  # fmt: skip
    rows: list[list[str]] = []
    for domain, entry in list(domains.items())[:TABLE_ROWS]:
        asked = entry["token_share_asked"]
        epochs = entry["epochs"]
        rows.append(
            [
                escape(domain),
                f"{entry['rows']:,}",
                f"{entry['kept_rows']:,}",
                f"{100 * entry['kept_rows'] / max(1, entry['rows']):.1f} %",
                f"{entry['copies']:,}",
                f"{entry['tokens'] / total:.4f}",
                f"{entry['token_share'] or 0:.4f}",
                *([f"{asked or 0:.4f}"] if has_weights else []),
                "" if epochs is None else f"{epochs:.2f}",
            ]
        )
    text = (
        "## Before and after\n\nOf each domain what there was to train on, and what the plan takes"
        f" of it; epochs are how often its {unit} are gone through.\n\n{table(head, rows)}"
    )
    if len(domains) > TABLE_ROWS:
        text += f"\n\n{len(domains) - TABLE_ROWS:,} more domains are in the plan's summary."
    return text


def _means(summary: Mapping[str, Any]) -> str:
    found: Mapping[str, Any] = summary.get("means", {})
    means = {name: entry for name, entry in found.items() if name not in _NO_MEASURES}
    rows = [
        [f"`{escape_code(name)}`", *("" if (value := entry[side]) is None else f"{value:.4g}"
                                     for side in ("kept", "dropped"))]
        for name, entry in list(means.items())[:TABLE_ROWS]
        if entry["kept"] is not None or entry["dropped"] is not None
    ]  # fmt: skip
    if not rows:
        return ""
    return "Means over the examples, copies counted:\n\n" + table(
        ["measured", "kept", "left out"], rows
    )


# -- licences, and how to do it again -------------------------------------------------------------


def _licences(licenses: Mapping[str, str | None]) -> str:
    if not licenses:
        return ""
    rows = [
        [escape(source), "**unknown**" if text is None else escape(text)]
        for source, text in list(licenses.items())[:TABLE_ROWS]
    ]
    unknown = sum(text is None for text in licenses.values())
    lines = ["## Licences of the sources", table(["source", "licence"], rows, left=2)]
    if len(licenses) > TABLE_ROWS:
        lines.append(f"{len(licenses) - TABLE_ROWS:,} more sources are not listed.")
    if unknown:
        lines.append(
            f"The settings name no licence for {counted(unknown, 'source')} (`sources.*.license`):"
            " find out before you share these shards."
        )
    lines.append("As the settings state them; nobody has checked them. Where rows have the column"
                 " `curate_source`, it says where they come from.")  # fmt: skip
    return "\n\n".join(lines)


def _reproduce(told: Told) -> str:
    settings = dict(told.settings)
    sources = settings.get("sources", {})
    more = len(sources) - _SOURCES
    if more > 0:
        settings["sources"] = dict(list(sources.items())[:_SOURCES])
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=False, width=100)
    if more > 0:
        text += f"# and {more:,} more sources\n"
    return (
        f"## How to reproduce\n\nMade by curate {told.version}. `curate run config.yaml` with the"
        " `config.yaml` of the run folder repeats it: on the same data, versions and kind of"
        " device with the same bytes. These settings are not the defaults; of local paths, models"
        f" and data, only the names are shown.\n\n```yaml\n{text}```"
    )


# -- text -----------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first columns are aligned to the left, the others are numbers."""
    lines = [list(head), ["---" if i < left else "---:" for i in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    """Text from the data as one line of a Markdown table, without effect."""
    text = html.escape(json.dumps(text, ensure_ascii=False)[1:-1], quote=False)
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"&#{ord(sign)};")
    return text


def escape_code(text: str) -> str:
    """Text from the settings as it can stand between backticks, in a table too."""
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")
