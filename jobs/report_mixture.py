"""The mixture of a run and the path its weights took.

Shapes: S steps.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from curate.data.files import read_document
from curate.data.layout import RunFolder
from curate.data.tables import read_table
from curate.plan.mixture import Mixture as Asked
from curate.plan.mixture import load_mixture
from curate.report.document import Fact, Line, Mixture, MixtureDomain, MixturePath
from jobs.report_bins import rounded
from jobs.report_labels import rest_name
from jobs.show import Domain

MOST_DOMAINS = 30
"""That are told of one by one."""
_LINES = 12
"""Domains whose path is drawn."""
_STEPS = 200
_RUNS = 6


def mixture_of(
    run: RunFolder, mixer: str | None, realised: Sequence[Domain], *, unit: str = "tokens"
) -> Mixture | None:
    """What the mixer asks for and what the plan made of it; None where there is no mixture.

    Args:
        run: the run folder.
        mixer: of the settings.
        realised: the domains by `jobs.show`; without what is kept before there is a plan.
        unit: what the run counts where a mixture says tokens.

    Raises:
        InputError: the mixture is damaged.
    """
    if mixer is None or not (path := run.mixtures / mixer / "mixture.json").is_file():
        return None
    asked = load_mixture(path)
    value = read_document(path, sizes=dict) or {}
    mean = asked.mean()
    order = sorted(mean, key=lambda name: (-mean[name], name))
    shown = order[: MOST_DOMAINS + (len(order) == MOST_DOMAINS + 1)]
    known = {entry.domain: entry for entry in realised}
    total = sum(entry["num_tokens"] for entry in value["sizes"].values())
    domains = [_domain(asked, [name], mean, known, value["sizes"], total) for name in shown]
    if rest := order[len(shown) :]:
        domains.append(_domain(asked, rest, mean, known, value["sizes"], total))
    return Mixture(
        mixer=asked.mixer,
        phases=[phase.share for phase in asked.phases],
        domains=domains,
        paths=_paths(run.mixtures / mixer / "trajectory.parquet", shown[:_LINES]),
        notes=list(asked.notes),
        facts=_facts(mixer, asked, value, unit),
    )


def _domain(
    asked: Asked,
    names: Sequence[str],
    mean: Mapping[str, float],
    known: Mapping[str, Domain],
    sizes: Mapping[str, Any],
    total: int,
) -> MixtureDomain:
    """One domain, or the rest together."""
    found = [known[name] for name in names if name in known]
    epochs = found[0].epochs if len(names) == 1 and found else None
    tokens = sum(sizes[name]["num_tokens"] for name in names if name in sizes)
    return MixtureDomain(
        domain=names[0] if len(names) == 1 else rest_name(len(names)),
        natural=rounded(tokens / max(1, total)) or 0.0,
        asked=rounded(sum(mean[name] for name in names)) or 0.0,
        kept=_sum(entry.kept_share for entry in found),
        random=_sum(entry.random_share for entry in found),
        epochs=rounded(epochs),
        by_phase=[rounded(sum(phase.weights[n] for n in names)) or 0.0 for phase in asked.phases],
        why=asked.why.get(names[0], "") if len(names) == 1 else "",
        num_domains=len(names),
    )


def _sum(shares: Any) -> float | None:
    known = [share for share in shares if share is not None]
    return rounded(math.fsum(known)) if known else None


def _facts(mixer: str, asked: Asked, value: Mapping[str, Any], unit: str) -> list[Fact]:
    facts = [Fact(name="mixer", value=mixer), Fact(name="domains", value=f"{len(asked.why):,}")]
    if len(asked.phases) > 1:
        facts.append(Fact(name="phases", value=f"{len(asked.phases)}"))
    if "budget_tokens" in value:
        counted = unit if value["unit"] == "tokens" else value["unit"]
        facts.append(Fact(name="budget", value=f"{value['budget_tokens']:,.0f} {counted}"))
    return facts


def _paths(path: Any, domains: Sequence[str]) -> list[MixturePath]:
    """Weights and losses of the largest domains over the steps, of each run of the mixer."""
    if not path.is_file():
        return []
    table = read_table(path)
    wanted = table.filter(pl.col("domain").is_in(list(domains)))
    found: list[MixturePath] = []
    for (run,), own in wanted.group_by("run", maintain_order=True):
        if len(found) == _RUNS:
            break
        steps = own["step"].unique().sort().to_list()
        every = max(1, math.ceil(len(steps) / _STEPS))
        steps = sorted({*steps[::every], steps[-1]})
        rows = own.filter(pl.col("step").is_in(steps))
        losses = _lines(rows, steps, domains, "loss") if "loss" in rows.columns else []
        found.append(
            MixturePath(
                run=str(run),
                steps=steps,
                weights=_lines(rows, steps, domains, "weight"),
                losses=losses if any(v is not None for li in losses for v in li.values) else [],
            )
        )
    return found


def _lines(
    rows: pl.DataFrame, steps: Sequence[int], domains: Sequence[str], column: str
) -> list[Line]:
    lines: list[Line] = []
    for domain in domains:
        own = rows.filter(pl.col("domain") == domain)
        if own.height:
            values = dict(zip(own["step"].to_list(), own[column].to_list(), strict=True))
            lines.append(Line(name=domain, values=[rounded(values.get(step)) for step in steps]))
    return lines
