"""DMO as tasks: a proxy on equal amounts, four for each domain, and two that check the mixture."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from curate.config import parse, plain
from curate.data.files import digest_file, write_json
from curate.data.files import replace as replace_file
from curate.data.layout import RunFolder
from curate.data.tables import write_table
from curate.errors import InputError
from curate.plan.mixture import DomainSize, Phase
from jobs.mix import budget_tokens
from jobs.mix_passes import Found, MixPasses
from jobs.own_passes import Phase as Work
from jobs.proxy_checks import check_all_have_losses, check_num_runs, no_loss
from jobs.proxy_results import Results, read_results, target_of, train_run
from jobs.proxy_rules import plain as plain_rule
from jobs.proxy_work import Making, ProxyBase, proxy_base, tiny_note
from jobs.regmix import domains_with_tokens
from jobs.run import Task
from jobs.settings import Settings
from mixers.dmo import DMO, FACTORS, design
from mixers.dmo_proposal import proposal
from mixers.laws import Floats
from mixers.mixture_report import Proposal
from mixers.mixture_results import Amounts, amounts_table, check_target, read_amounts
from mixers.rules import Rule

Sizes = Mapping[str, DomainSize]
_TIMES = ("third", "half", "double", "triple")


def passes(settings: Settings, mixer: DMO) -> MixPasses:
    """Proxies with less and more of each domain; nothing where results are given.

    Raises:
        ConfigError: there is no model, or there are so many domains that no one would have as many
            runs.
        InputError: the index or the token counts have not been made, a file is missing, or a domain
            has nothing held out.
    """
    if mixer.results is not None:
        path = Path(mixer.results)
        if not path.is_file():
            raise InputError(f"there is no file of results {path}", fix="check mix.results")
        return MixPasses((), partial(_from_file, settings, mixer), inputs=(digest_file(path),))
    base, sequences = proxy_base(settings, "dmo", mixer.proxy)
    sizes = domains_with_tokens(settings)
    check_num_runs(len(FACTORS) * len(sizes) + 1, len(sizes), can_be_set=False)
    check_all_have_losses(settings, mixer.proxy, sizes)
    check_target(mixer.target, tuple(sizes))
    runs = [_run(base, mixer, name, sizes, row) for name, row in _design(len(sizes))]
    phases = [*sequences, Work("dmo: proxies", runs, train_run)]
    checked: list[Task] = []
    if mixer.check:
        checked = [_check(base, mixer, runs, sizes), _natural(base, mixer)]
        phases.append(Work("dmo: check", checked, train_run))
    return MixPasses(tuple(phases), partial(_from_runs, settings, mixer, runs, checked))


def proposed(making: Making) -> Rule:
    """Training on the mixture that is best for as many tokens as the run with equal amounts had."""
    options = making.options
    sizes = {name: DomainSize(**size) for name, size in options["sizes"].items()}
    folder = RunFolder(Path(making.settings.run)).proxies / "dmo"
    results = read_results([folder / name for name in options["runs"]])
    found = proposal(parse(DMO, options["mixer"]), _amounts(results), sizes, _first(results))
    return plain_rule(making._replace(options={"shares": found.weights}))


def _design(num_domains: int) -> list[tuple[str, Floats]]:
    """Name and amounts (m,) of each run, in units of the equal amount."""
    each = [f"domain-{n:03d}-{times}" for n in range(num_domains) for times in _TIMES]
    return list(zip(["equal", *each], design(num_domains, 1.0), strict=True))


def _run(base: ProxyBase, mixer: DMO, name: str, sizes: Sizes, amounts: Floats) -> Task:
    """A run with its part of the steps."""
    steps = max(1, round(mixer.proxy.steps * float(amounts.sum()) / len(amounts)))
    return base.task(
        name,
        rule="jobs.proxy_rules:plain",
        proxy=replace(mixer.proxy, steps=steps),
        options={"shares": dict(zip(sizes, (amounts / amounts.sum()).tolist(), strict=True))},
    )


def _check(base: ProxyBase, mixer: DMO, runs: Sequence[Task], sizes: Sizes) -> Task:
    decides = plain(mixer)
    for name in ("proxy", "check"):
        del decides[name]
    options = {
        "runs": [task.name for task in runs],
        "sizes": {name: plain(size) for name, size in sizes.items()},
        "mixer": decides,
    }
    after = [task.fingerprint for task in runs]
    return base.task(
        "check", rule="jobs.dmo:proposed", proxy=mixer.proxy, options=options, after=after
    )


def _natural(base: ProxyBase, mixer: DMO) -> Task:
    options = {"shares": "natural"}
    return base.task("natural", rule="jobs.proxy_rules:plain", proxy=mixer.proxy, options=options)


def _from_file(settings: Settings, mixer: DMO, sizes: Sizes) -> Found:
    assert mixer.results is not None
    runs = read_amounts(Path(mixer.results))
    found = proposal(mixer, runs, sizes, budget_tokens(settings.plan.kept, sizes))
    return _found(settings, runs, found, found.report, ())


def _from_runs(
    settings: Settings, mixer: DMO, tasks: Sequence[Task], checked: Sequence[Task], sizes: Sizes
) -> Found:
    """The mixture for the budget, with what the check has shown at the size of the proxies."""
    results = read_results([Path(task.payload["folder"]) for task in tasks])
    runs = _amounts(results)
    found = proposal(mixer, runs, sizes, budget_tokens(settings.plan.kept, sizes))
    report, notes = dict(found.report), list[str]()
    if checked:
        shares = np.array([found.report["target"][name] for name in runs.domains])
        own, natural = (
            target_of(Path(task.payload["folder"]), runs.domains, shares) for task in checked
        )
        equal = target_of(Path(tasks[0].payload["folder"]), runs.domains, shares)
        foretold = proposal(mixer, runs, sizes, _first(results)).report["foretold"]["mixture"]
        measured = {"mixture": own, "natural": natural, "uniform": equal, "foretold": foretold}
        report["measured"] = measured
        told = ", ".join(
            f"{name} {'diverged' if value is None else f'{value:.4f}'}"
            for name, value in measured.items()
        )
        notes.append(f"proxies of the first one's length, on the mixture best for it: {told}")
    tiny = tiny_note(results.num_parameters)
    return _found(settings, runs, found, report, (*notes, *([tiny] if tiny else [])))


def _found(
    settings: Settings,
    runs: Amounts,
    found: Proposal,
    report: dict[str, Any],
    notes: tuple[str, ...],
) -> Found:
    folder = RunFolder(Path(settings.run)).proxies / "dmo"
    replace_file(folder / "runs.parquet", lambda path: write_table(amounts_table(runs), path))
    write_json(folder / "fits.json", {"schema_version": 1, **report})
    return Found(
        (Phase(1.0, found.weights),),
        found.rules,
        (*notes, *found.notes),
        tables={name: folder / name for name in ("runs.parquet", "fits.json")},
    )


def _amounts(results: Results) -> Amounts:
    """Tokens and losses by domain.

    Raises:
        InputError: a domain has no held-out sequences, and so no loss to fit a law to.
    """
    silent = sorted(set(results.domains) - set(results.targets))
    if silent:
        raise no_loss(silent)
    return Amounts(results.names, results.domains, results.tokens, results.losses, results.notes)


def _first(results: Results) -> float:
    """Tokens of the run with equal amounts; of the shortest, where that one diverged."""
    totals = results.tokens.sum(1)
    return float(totals[results.names.index("equal")] if "equal" in results.names else totals.min())
