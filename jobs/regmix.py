"""RegMix as tasks: one proxy for each mixture of a swarm, then one on the mixture that was found.

Runs do not wait for each other. One that diverges is set aside and named; the rest is fitted.
Losses are those of the last step on held-out sequences of each domain.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from curate.config import parse, plain
from curate.data.files import digest_file, replace, write_json
from curate.data.layout import RunFolder
from curate.data.tables import write_table
from curate.errors import ConfigError, InputError
from curate.plan.mixture import DomainSize, Phase
from jobs.lengths import lengths_digest
from jobs.mix import budget_tokens, domain_sizes
from jobs.mix_passes import Found, MixPasses
from jobs.own_passes import Phase as Work
from jobs.proxy_checks import check_num_runs, domains_with_losses
from jobs.proxy_results import Results, read_results, target_of, train_run
from jobs.proxy_rules import plain as plain_rule
from jobs.proxy_work import Making, ProxyBase, proxy_base, tiny_note
from jobs.run import Task
from jobs.settings import Settings
from mixers.laws import Floats
from mixers.mixture_draws import USAGE, swarm
from mixers.mixture_fits import SPARE_RUNS
from mixers.mixture_report import Proposal
from mixers.mixture_results import Runs, check_target, chosen_losses, read_runs, runs_table
from mixers.regmix import RegMix, proposal
from mixers.rules import Rule

Sizes = Mapping[str, DomainSize]


def passes(settings: Settings, mixer: RegMix) -> MixPasses:
    """Proxies on a swarm of mixtures and on the one found; nothing where results are given.

    Raises:
        ConfigError: there is no model, the domains ask for too many runs or have not so many
            different mixtures, or the target is no loss.
        InputError: the index or the token counts have not been made, a file is missing, or
            nothing is held out.
    """
    if mixer.results:
        files = [Path(path) for path in mixer.results]
        for path in files:
            if not path.is_file():
                raise InputError(f"there is no file of results {path}", fix="check mix.results")
        digests = tuple(digest_file(path) for path in files)
        return MixPasses((), partial(_from_files, settings, mixer), inputs=digests)
    base, sequences = proxy_base(settings, "regmix", mixer.proxy)
    sizes = domains_with_tokens(settings)
    _check(mixer, len(sizes))
    check_target(mixer.target, domains_with_losses(settings, mixer.proxy, sizes))
    budget = budget_tokens(settings.plan.kept, sizes)
    runs = [
        base.task(
            name,
            rule="jobs.proxy_rules:plain",
            proxy=mixer.proxy,
            options={"shares": dict(zip(sizes, row.tolist(), strict=True))},
        )
        for name, row in _swarm(mixer, sizes, budget, settings.seed)
    ]
    phases = [*sequences, Work("regmix: proxies", runs, train_run)]
    checked = _check_task(base, mixer, runs, sizes, budget) if mixer.check else None
    if checked is not None:
        phases.append(Work("regmix: check", [checked], train_run))
    return MixPasses(tuple(phases), partial(_from_runs, settings, mixer, runs, checked))


def _check(mixer: RegMix, num_domains: int) -> None:
    """Before anything is trained: are there enough runs to fit and to test, and not too many?"""
    if num_domains < 2:
        raise ConfigError(
            "there is one domain with training tokens, and nothing to mix",
            fix="set the domain of sources, or domains: clusters",
        )
    if mixer.runs is None:
        check_num_runs(mixer.num_runs(num_domains), num_domains, can_be_set=True)
    num, least = mixer.num_runs(num_domains), num_domains + SPARE_RUNS
    if num < least:
        raise ConfigError(
            f"mix.runs is {num}, too few for {num_domains} domains",
            fix=f"set mix.runs to {3 * (num_domains + 1)}; {least} is the least",
        )


def proposed(making: Making) -> Rule:
    """Training on the mixture that the runs named in the options say is best."""
    options = making.options
    sizes = {name: DomainSize(**size) for name, size in options["sizes"].items()}
    folder = RunFolder(Path(making.settings.run)).proxies / "regmix"
    runs, _ = _read([folder / name for name in options["runs"]])
    found = proposal(parse(RegMix, options["mixer"]), runs, sizes, options["budget"])
    return plain_rule(making._replace(options={"shares": found.weights}))


def _swarm(mixer: RegMix, sizes: Sizes, budget: float, seed: int) -> list[tuple[str, Floats]]:
    """Name and shares (m,) of each run."""
    tokens = np.array([float(size.num_tokens) for size in sizes.values()])
    # What the mixture may have, the runs must be able to show.
    caps = np.minimum(
        np.maximum(USAGE * tokens / tokens.sum(), mixer.max_epochs * tokens / budget), 1
    )
    mixtures = swarm(tokens, mixer.num_runs(len(sizes)), caps=caps, seed=seed)
    names = ["natural", "uniform", *(f"draw-{n:03d}" for n in range(1, len(mixtures) - 1))]
    return list(zip(names, mixtures, strict=True))


def _check_task(
    base: ProxyBase, mixer: RegMix, runs: Sequence[Task], sizes: Sizes, budget: float
) -> Task:
    decides = plain(mixer)
    for name in ("proxy", "runs", "check"):
        del decides[name]
    options = {
        "runs": [task.name for task in runs],
        "sizes": {name: plain(size) for name, size in sizes.items()},
        "budget": budget,
        "mixer": decides,
    }
    after = [task.fingerprint for task in runs]
    return base.task(
        "check", rule="jobs.regmix:proposed", proxy=mixer.proxy, options=options, after=after
    )


def domains_with_tokens(settings: Settings) -> dict[str, DomainSize]:
    """What there is of the domains that have training tokens.

    Raises:
        InputError: tokens were not counted yet.
    """
    run = RunFolder(Path(settings.run))
    found = domain_sizes(run, lengths_digest(settings))
    return {domain: size for domain, size in found.items() if size.num_tokens > 0}


def _from_files(settings: Settings, mixer: RegMix, sizes: Sizes) -> Found:
    runs = read_runs([Path(path) for path in mixer.results])
    found = proposal(mixer, runs, sizes, budget_tokens(settings.plan.kept, sizes))
    return _found(settings, runs, found, found.report, ())


def _from_runs(
    settings: Settings, mixer: RegMix, tasks: Sequence[Task], checked: Task | None, sizes: Sizes
) -> Found:
    """The mixture, with what the check has shown."""
    runs, results = _read([Path(task.payload["folder"]) for task in tasks])
    found = proposal(mixer, runs, sizes, budget_tokens(settings.plan.kept, sizes))
    used, shares = chosen_losses(runs, mixer.target)
    report, notes = dict(found.report), list[str]()
    measured = dict(zip(used.names, (used.losses @ shares).tolist(), strict=True))
    report["measured"] = {name: measured.get(name) for name in ("natural", "uniform")}
    if checked is not None:
        report["measured"]["mixture"] = target_of(
            Path(checked.payload["folder"]), used.targets, shares
        )
        notes.append(_verdict(report))
    tiny = tiny_note(results.num_parameters)
    return _found(settings, runs, found, report, (*notes, *([tiny] if tiny else [])))


def _found(
    settings: Settings, runs: Runs, found: Proposal, report: dict[str, Any], notes: tuple[str, ...]
) -> Found:
    folder = RunFolder(Path(settings.run)).proxies / "regmix"
    replace(folder / "runs.parquet", lambda path: write_table(runs_table(runs), path))
    write_json(folder / "fits.json", {"schema_version": 1, **report})
    return Found(
        (Phase(1.0, found.weights),),
        found.rules,
        (*notes, *found.notes),
        tables={name: folder / name for name in ("runs.parquet", "fits.json")},
    )


def _read(folders: Sequence[Path]) -> tuple[Runs, Results]:
    """The runs that came to their end."""
    found = read_results(folders)
    mixtures = found.tokens / found.tokens.sum(1, keepdims=True)
    runs = Runs(found.names, found.domains, mixtures, found.targets, found.losses, found.notes)
    return runs, found


def _verdict(report: Mapping[str, Any]) -> str:
    """What the check has shown, against what was foretold and against the plain mixtures."""
    measured, best = report["measured"], report["best_run"]
    own = measured["mixture"]
    if own is None:
        return "the proxy on this mixture diverged: do not trust it"
    others = {name: measured[name] for name in ("natural", "uniform") if measured[name] is not None}
    told = ", ".join(f"{name} {value:.4f}" for name, value in others.items())
    beaten = [name for name, value in others.items() if value < own]
    end = f"; it is no better than {' and '.join(beaten)}" if beaten else ""
    foretold = report["foretold"]["mixture"]
    return (
        f"a proxy on this mixture measured {own:.4f} (foretold {foretold:.4f});"
        f" {told}, best run {best['target']:.4f}{end}"
    )
