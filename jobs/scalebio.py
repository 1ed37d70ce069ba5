"""ScaleBiO as tasks: sequences of the sources and of the target, then two models for each seed."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from curate.config import parse
from curate.errors import InputError
from curate.models.settings import CausalLM
from curate.plan.mixture import DomainSize, Phase
from jobs.mix_passes import Found, MixPasses
from jobs.own_passes import Phase as Work
from jobs.proxy_swallowed import SWALLOWED_WHY, swallowed_in, swallowed_notes
from jobs.proxy_work import Making, proxy_base, result_output, tiny_note, train_proxy
from jobs.sequences import open_target
from jobs.settings import Settings, task_settings
from mixers.rules import Rule
from mixers.scalebio import ScaleBiO, notes
from mixers.scalebio_rule import ScaleBiORule
from mixers.sizes import token_shares

_FEW_SEQUENCES = 4
"""Of a source in a step, below which its losses are mostly noise."""
_MANY_EPOCHS = 20
"""Of the target, beyond which it may be known by heart."""


def passes(settings: Settings, mixer: ScaleBiO) -> MixPasses:
    """Sequences, then the runs of two models.

    Raises:
        ConfigError: there is no model, or no target.
        InputError: the index has not been made.
    """
    base, phases = proxy_base(settings, "scalebio", mixer.proxy, with_target=True)
    options = {
        name: value for name, value in asdict(mixer).items() if name not in ("proxy", "seeds")
    }
    tasks = base.tasks(
        mixer.seeds,
        rule="jobs.scalebio:make_rule",
        proxy=mixer.proxy,
        options=options,
        target_parts=("target",),
    )
    folders = [Path(task.payload["folder"]) for task in tasks]
    key = str(base.payload["sequences"])
    return MixPasses(
        (*phases, Work("scalebio: models", tasks, train_proxy)),
        partial(_finish, settings, mixer, key, folders),
    )


def make_rule(making: Making) -> Rule:
    """ScaleBiO's rule for a proxy.

    Raises:
        InputError: the target has no tokens to learn from.
    """
    target = making.data.target
    if target is None or not target.domains:
        raise InputError(
            "no example of the target has a token to learn from", fix="check the files of target"
        )
    return ScaleBiORule(parse(ScaleBiO, making.options), len(making.data.sequences.domains))


def _finish(
    settings: Settings,
    mixer: ScaleBiO,
    key: str,
    folders: list[Path],
    sizes: Mapping[str, DomainSize],
) -> Found:
    """The mean over the seeds, as shares of tokens, and what else must be known."""
    results: list[dict[str, Any]] = [
        json.loads(result_output(folder).path.read_text(encoding="utf-8")) for folder in folders
    ]
    weights = {name: [result["mixture"].get(name, 0.0) for result in results] for name in sizes}
    mean = {name: fmean(own) for name, own in weights.items()}
    if not sum(mean.values()) > 0:
        raise InputError(
            "no source that has training tokens has a weight",
            fix="remove the folder proxies/scalebio of the run and try again",
        )
    # Windows have one length, so that shares of them are shares of tokens.
    is_packed = mixer.proxy.packed and isinstance(task_settings(settings), CausalLM)
    unit = "tokens" if is_packed else "examples"
    trajectories = {folder.name: folder / "trajectory.parquet" for folder in folders}
    seen = _differences(list(trajectories.values()))
    why: dict[str, str] = {}
    for name, own in weights.items():
        spread = f" ({min(own):.3g} to {max(own):.3g} over {len(own)} seeds)"
        moved = "" if name not in seen else f", loss from u to w {seen[name]:+.2g},"
        why[name] = (
            f"ScaleBiO's weight of {mean[name]:.3g}{spread if len(own) > 1 else ''} of the"
            f" {'windows' if is_packed else 'examples'}{moved}"
        )
    gone = swallowed_in(results)
    why |= dict.fromkeys((name for name in gone if name in why), SWALLOWED_WHY)
    said = [*swallowed_notes(gone), *_notes(mixer, results, weights)]
    drawn = mixer.proxy.steps * mixer.target_sequences
    size = int(open_target(settings, key, ("target",)).sizes.sum())
    if drawn > _MANY_EPOCHS * size:
        said.append(
            f"{size} sequences of the target were gone through {drawn / size:.3g} times: hold the"
            " result against examples of its kind that were not among them"
        )
    shares = token_shares(mean, sizes, unit)
    return Found((Phase(1.0, shares),), why, tuple(said), trajectories)


def _differences(trajectories: list[Path]) -> dict[str, float]:
    """Domain -> mean of the loss under w less that under u, over the last half of the steps."""
    tables = [
        pl.read_parquet(path, columns=["step", "domain", "difference"]) for path in trajectories
    ]
    late = [table.filter(2 * pl.col("step") > pl.col("step").max()) for table in tables]
    means = pl.concat(late).drop_nulls().group_by("domain").agg(pl.col("difference").mean())
    return dict(means.iter_rows())


def _notes(
    mixer: ScaleBiO, results: list[dict[str, Any]], weights: Mapping[str, list[float]]
) -> list[str]:
    first = results[0]
    found = [tiny_note(first["num_parameters"]), *notes(mixer, first["steps"])]
    each = mixer.proxy.sequences / len(first["mixture"])
    if each < _FEW_SEQUENCES:
        found.append(
            f"a step has {each:.2g} sequences of each source, of which weights move slowly and"
            f" mostly by noise; {_FEW_SEQUENCES} need mix.proxy.sequences"
            f" {_FEW_SEQUENCES * len(first['mixture'])}"
        )
    if len(results) > 1:
        widest = max(weights, key=lambda name: max(weights[name]) - min(weights[name]))
        spread = max(weights[widest]) - min(weights[widest])
        found.append(f"over {len(results)} seeds the weights differ by {spread:.3g} ({widest})")
    known = {*first["mixture"], *swallowed_in(results)}
    unseen = sorted(name for name in weights if name not in known)
    if unseen:
        found.append(f"no sequence to learn from, so no weight: {', '.join(unseen)}")
    found += sorted({note for result in results for note in result["notes"]})
    return [note for note in found if note]
