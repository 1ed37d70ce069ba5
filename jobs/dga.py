"""DGA as tasks: the sequences of the domains and of the target, then one model for each seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from curate.config import parse
from curate.data.files import read_json
from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError
from curate.plan.mixture import DomainSize, Phase
from curate.vectors.domains import place
from jobs.domains_work import centroids_output, names_output
from jobs.mix_passes import Found, MixPasses
from jobs.own_passes import Phase as Work
from jobs.proxy_refusals import indexed_domains
from jobs.proxy_swallowed import SWALLOWED_WHY, swallowed_in, swallowed_notes
from jobs.proxy_work import Making, proxy_base, result_output, tiny_note, train_proxy
from jobs.representations import open_vectors, representation
from jobs.settings import Settings
from jobs.target import target_folder
from mixers.basis import make_basis, read_basis
from mixers.dga import DGA
from mixers.dga_rule import DGARule
from mixers.dga_schedule import stretches
from mixers.rules import Rule

_MANY_EPOCHS = 4.0
"""Beyond so many, a domain is learned by heart."""


def passes(settings: Settings, mixer: DGA) -> MixPasses:
    """Sequences, then the models.

    Raises:
        ConfigError: there is no model or no target, or `start` or `basis` names an unknown domain.
        InputError: the index has not been made, or the basis cannot be read.
    """
    base, phases = proxy_base(settings, "dga", mixer.proxy, with_target=True)
    # Not read by the model's run: a change of them costs nothing.
    apart = ("proxy", "seeds", "phases")
    options = {name: value for name, value in asdict(mixer).items() if name not in apart}
    if mixer.start == "target":
        mixer = replace(mixer, start=nearest_clusters(settings))
        options["start"] = mixer.start
    if mixer.basis is not None:
        options["basis"] = read_basis(mixer.basis)
    if mixer.basis is not None or mixer.start is not None:
        mixer.start_weights(make_basis(indexed_domains(settings), options["basis"]).names)
    tasks = base.tasks(
        mixer.seeds,
        rule="jobs.dga:make_rule",
        proxy=mixer.proxy,
        options=options,
        target_parts=("target",),
    )
    folders = [Path(task.payload["folder"]) for task in tasks]
    return MixPasses(
        (*phases, Work("dga: models", tasks, train_proxy)), partial(_finish, mixer, folders)
    )


def nearest_clusters(settings: Settings) -> dict[str, float]:
    """Domain -> how many target examples lie nearest to its centroid.

    Raises:
        ConfigError: the pool is not cut into clusters.
        InputError: the target's vectors have not been made, or no target example has one.
    """
    if settings.domains is None:
        raise ConfigError(
            "mix.start is target, but the pool is not cut into clusters",
            fix="add domains, such as domains: {clusters: 20}, or give mix.start by domain",
        )
    run = RunFolder(Path(settings.run))
    name = representation(settings, settings.domains.vectors)
    vectors = open_vectors(target_folder(run), name)
    centroids = np.load(centroids_output(run).path, allow_pickle=False)
    placed = place(vectors, centroids, threads=settings.cluster.threads)
    if not any(placed.rows):
        raise InputError("no target example has a vector", fix="check the files of target")
    clusters = read_json(names_output(run).path)["clusters"]
    pairs = zip(clusters, placed.rows, strict=True)
    return {str(cluster["domain"]): float(count) for cluster, count in pairs}


def make_rule(making: Making) -> Rule:
    """DGA's rule for a model.

    Raises:
        ConfigError: `start` or `basis` gives nothing to any domain that has sequences.
        InputError: the target has no tokens to learn from.
    """
    sequences, target = making.data.sequences, making.data.target
    if target is None or not target.domains:
        raise InputError(
            "no example of the target has a token to learn from", fix="check the files of target"
        )
    options = dict(making.options)
    # Domains that are held out as a whole have a name in the settings, and no sequences.
    if options["basis"] is not None:
        rows = {name: _there(row, sequences.domains) for name, row in options["basis"].items()}
        options["basis"] = {name: row for name, row in rows.items() if row}
    elif options["start"] is not None:
        options["start"] = _there(options["start"], sequences.domains)
    settings = parse(DGA, options)
    return DGARule(settings, sequences.domains, torch.from_numpy(sequences.sizes))


def _there(shares: dict[str, float], domains: Sequence[str]) -> dict[str, float]:
    return {name: share for name, share in shares.items() if name in domains}


def _finish(mixer: DGA, folders: list[Path], sizes: Mapping[str, DomainSize]) -> Found:
    """Mean over the seeds: the schedule, or of the measurements."""
    results: list[dict[str, Any]] = [
        json.loads(result_output(folder).path.read_text(encoding="utf-8")) for folder in folders
    ]
    trajectories = {folder.name: folder / "trajectory.parquet" for folder in folders}
    tables = [pl.read_parquet(path) for path in trajectories.values()]
    names = list(sizes)
    seen = [name for name in names if name in results[0]["mixture"]]
    if not seen:
        raise InputError(
            "no domain that has training tokens has a weight",
            fix="remove the folder proxies/dga of the run and try again",
        )
    means = {name: fmean(result["mixture"][name] for result in results) for name in seen}
    if mixer.phases == 1:
        rows = [(1.0, torch.tensor(list(means.values()), dtype=torch.float64))]
    else:
        steps, shares = _schedule(tables, seen)
        rows = stretches(steps, shares, most=mixer.phases)
    lengths = _lengths(mixer, tables, seen)
    phases = tuple(
        _phase(share, row * lengths, seen, names) for share, row in _timed(rows, lengths)
    )
    lasts = [tables[0].filter(pl.col("step") == pl.col("step").max())]
    why = {
        name: _why(name, means, results, tables, lasts[0]) if name in means else "no sequence of it"
        for name in names
    }
    gone = swallowed_in(results)
    why |= dict.fromkeys((name for name in gone if name in why), SWALLOWED_WHY)
    notes = (*swallowed_notes(gone), *_notes(mixer, results, tables, names))
    return Found(phases, why, notes, trajectories)


def _schedule(tables: list[pl.DataFrame], names: list[str]) -> tuple[Tensor, Tensor]:
    """(R,) last step of each stretch, and (R, K) mean shares over the seeds."""
    table = pl.concat(tables).group_by("step", "domain").agg(pl.col("weight").mean())
    wide = table.pivot("domain", index="step", values="weight").sort("step")
    return torch.tensor(wide["step"].to_list()), wide.select(names).to_torch(dtype=pl.Float64)


def _lengths(mixer: DGA, tables: list[pl.DataFrame], names: list[str]) -> Tensor:
    """(K,) mean tokens of a domain's sequences as drawn, in any scale.

    Weights are shares of sequences, and phases those of tokens; packed sequences are all alike.
    """
    ones = torch.ones(len(names), dtype=torch.float64)
    if mixer.proxy.packed:
        return ones
    taken = (pl.col("step") - pl.col("step").shift(1, fill_value=0)).over("domain", order_by="step")
    rows = {
        domain: (tokens, drawn)
        for domain, tokens, drawn in pl.concat(
            [table.with_columns(steps=taken) for table in tables]
        )
        .group_by("domain")
        .agg(pl.col("num_tokens").sum(), (pl.col("weight") * pl.col("steps")).sum())
        .iter_rows()
    }
    rates = [rows[name][0] / rows[name][1] if rows[name][0] else float("nan") for name in names]
    found = torch.tensor(rates, dtype=torch.float64)
    return torch.where(found.isnan(), found.nanmean(), found)


def _timed(rows: list[tuple[float, Tensor]], lengths: Tensor) -> list[tuple[float, Tensor]]:
    """Shares of the steps as shares of the tokens."""
    parts = [share * float(row @ lengths) for share, row in rows]
    return [(part / sum(parts), row) for part, (_, row) in zip(parts, rows, strict=True)]


def _phase(share: float, row: Tensor, seen: list[str], names: list[str]) -> Phase:
    weights = dict(zip(seen, (row / row.sum()).tolist(), strict=True))
    return Phase(share, {name: weights.get(name, 0.0) for name in names})


def _why(
    name: str,
    means: Mapping[str, float],
    results: list[dict[str, Any]],
    tables: list[pl.DataFrame],
    last: pl.DataFrame,
) -> str:
    """What decided a domain's weight."""
    own = [result["mixture"][name] for result in results]
    spread = f" ({min(own):.3g} to {max(own):.3g} over {len(own)} seeds)" if len(own) > 1 else ""
    end = last.filter(pl.col("domain") == name)["weight"].item()
    values = pl.concat(tables).filter(pl.col("domain") == name)["alignment"].drop_nulls()
    mean = values.mean() if len(values) else None
    told = f"mean alignment {mean:.3g}" if isinstance(mean, float) else "by the basis"
    return f"mean {means[name]:.3g}{spread} over the measurements, at the end {end:.3g}; {told}"


def _notes(
    mixer: DGA, results: list[dict[str, Any]], tables: list[pl.DataFrame], names: list[str]
) -> list[str]:
    first = results[0]
    found = [tiny_note(first["num_parameters"])]
    if len(results) > 1:
        spans = {
            name: max(own) - min(own)
            for name in first["mixture"]
            for own in [[result["mixture"][name] for result in results]]
        }
        widest = max(spans, key=lambda name: spans[name])
        found.append(
            f"over {len(results)} seeds the means differ by {spans[widest]:.3g} ({widest})"
        )
    times = {name: max(result["epochs"][name] for result in results) for name in first["epochs"]}
    limit = _MANY_EPOCHS if mixer.max_epochs is None else 1.1 * mixer.max_epochs
    often = ", ".join(f"{name} {value:.1f} times" for name, value in times.items() if value > limit)
    if often and mixer.max_epochs is None:
        found.append(f"gone through {often}; mix.max_epochs limits it")
    elif often:
        found.append(
            f"gone through {often}, more than mix.max_epochs: the run is longer than so many passes"
            " over everything"
        )
    if mixer.basis is None and all(table["alignment"].is_null().all() for table in tables):
        found.append(
            "nothing was measured: mix.proxy.steps is too few for mix.every and mix.warm_share,"
            " or all gradients were 0"
        )
    bare = [name for name in first["mixture"] if not any(r["mixture"][name] for r in results)]
    if mixer.basis is not None and bare:
        found.append(f"no distribution of mix.basis has these domains: {', '.join(bare)}")
    known = {*first["mixture"], *swallowed_in(results)}
    unseen = [name for name in names if name not in known]
    if unseen:
        found.append(f"no sequence to learn from, so no weight: {', '.join(unseen)}")
    found += sorted({note for result in results for note in result["notes"]})
    return [note for note in found if note]
