"""DoGE as tasks: the sequences of the domains and of the target, then one proxy for each seed."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from curate.config import parse
from curate.errors import ConfigError, InputError
from curate.plan.mixture import DomainSize, Phase
from jobs.mix_passes import Found, MixPasses
from jobs.own_passes import Phase as Work
from jobs.proxy_swallowed import SWALLOWED_WHY, swallowed_in, swallowed_notes
from jobs.proxy_work import Making, proxy_base, result_output, tiny_note, train_proxy
from jobs.settings import Settings
from mixers.doge import DoGE, DoGERule
from mixers.rules import Rule

MOST_DOMAINS = 128
"""Beyond so many, a gradient of each in every step is more than anybody can want."""

_FEW_SEQUENCES = 4
"""Of a domain in a step, below which the products are mostly noise."""


def passes(settings: Settings, mixer: DoGE) -> MixPasses:
    """Sequences, then the proxies.

    Raises:
        ConfigError: there is no model, or no target in the mode that has one.
        InputError: the index has not been made.
    """
    has_target = mixer.mode == "target"
    base, phases = proxy_base(settings, "doge", mixer.proxy, with_target=has_target)
    options = {
        name: value for name, value in asdict(mixer).items() if name not in ("proxy", "seeds")
    }
    tasks = base.tasks(
        mixer.seeds,
        rule="jobs.doge:make_rule",
        proxy=mixer.proxy,
        options=options,
        target_parts=("target",) if has_target else (),
    )
    folders = [Path(task.payload["folder"]) for task in tasks]
    return MixPasses(
        (*phases, Work("doge: proxies", tasks, train_proxy)), partial(_finish, mixer, folders)
    )


def make_rule(making: Making) -> Rule:
    """DoGE's rule for a proxy.

    Raises:
        ConfigError: there are too many domains.
        InputError: the target has no tokens to learn from.
    """
    settings = parse(DoGE, making.options)
    domains = making.data.sequences.domains
    if len(domains) > MOST_DOMAINS:
        raise ConfigError(
            f"doge takes the gradient of each of {len(domains)} domains in every step;"
            f" {MOST_DOMAINS} are the most",
            fix="use the mixer dga, whose option basis learns weights of a few distributions over"
            " the domains, or join domains",
        )
    target = making.data.target
    if settings.mode == "target" and (target is None or not target.domains):
        raise InputError(
            "no example of the target has a token to learn from",
            fix="check the files of target, or set mix.mode to universal",
        )
    return DoGERule(settings, len(domains), peak_lr=making.proxy.lr)


def _finish(mixer: DoGE, folders: list[Path], sizes: Mapping[str, DomainSize]) -> Found:
    """The mean over the seeds, and what else must be known."""
    results: list[dict[str, Any]] = [
        json.loads(result_output(folder).path.read_text(encoding="utf-8")) for folder in folders
    ]
    weights = {name: [result["mixture"].get(name, 0.0) for result in results] for name in sizes}
    mean = {name: fmean(own) for name, own in weights.items()}
    total = sum(mean.values())
    if not total > 0:
        raise InputError(
            "no domain that has training tokens has a weight",
            fix="remove the folder proxies/doge of the run and try again",
        )
    trajectories = {folder.name: folder / "trajectory.parquet" for folder in folders}
    shown = _shown(list(trajectories.values()))
    why: dict[str, str] = {}
    for name, own in weights.items():
        spread = f", {min(own):.3g} to {max(own):.3g} over {len(own)} seeds"
        product = shown.get(name)
        seen = "no alignment measured" if product is None else f"mean alignment {product:.3g}"
        why[name] = f"DoGE's mean weight{spread if len(own) > 1 else ''}; {seen}"
    gone = swallowed_in(results)
    why |= dict.fromkeys((name for name in gone if name in why), SWALLOWED_WHY)
    return Found(
        (Phase(1.0, {name: weight / total for name, weight in mean.items()}),),
        why,
        (*swallowed_notes(gone), *_few(mixer, len(shown)), *_notes(results, weights, shown)),
        trajectories,
    )


def _shown(trajectories: list[Path]) -> dict[str, float | None]:
    """Domain -> mean of what its gradient was worth; None where it never had one."""
    tables = [pl.read_parquet(path, columns=["domain", "alignment"]) for path in trajectories]
    means = (
        pl.concat(tables)
        .group_by("domain")
        .agg(pl.col("alignment").fill_nan(None).cast(float).mean())
    )
    return dict(means.iter_rows())


def _few(mixer: DoGE, num_domains: int) -> list[str]:
    """Whether a step shows too little of a domain."""
    each = mixer.proxy.sequences / num_domains
    if each >= _FEW_SEQUENCES:
        return []
    return [
        f"a step has {each:.2g} sequences of each domain, which makes alignments mostly noise;"
        f" raise mix.proxy.sequences to {_FEW_SEQUENCES * num_domains} or more"
    ]


def _notes(
    results: list[dict[str, Any]],
    weights: Mapping[str, list[float]],
    shown: Mapping[str, float | None],
) -> list[str]:
    first = results[0]
    found = [tiny_note(first["num_parameters"])]
    if len(results) > 1:
        widest = max(weights, key=lambda name: max(weights[name]) - min(weights[name]))
        spread = max(weights[widest]) - min(weights[widest])
        found.append(f"over {len(results)} seeds the weights differ by {spread:.3g} ({widest})")
    silent = sorted(name for name, mean in shown.items() if mean == 0.0)
    if silent:
        found.append(
            f"the product with the target's gradient was 0 throughout: {', '.join(silent)}"
        )
    known = {*first["mixture"], *swallowed_in(results)}
    unseen = sorted(name for name in weights if name not in known)
    if unseen:
        found.append(f"no sequence to learn from, so no weight: {', '.join(unseen)}")
    found += sorted({note for result in results for note in result["notes"]})
    return [note for note in found if note]
