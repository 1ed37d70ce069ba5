"""DoReMi as tasks: references, their losses, proxies, round by round.

A chain is one reference model (a size and a seed) and the proxies compared with it. Chains do not
wait for each other within a phase. References learn from one half of the training examples, and
the excess is measured on the other, so that what a reference has by heart does not look hard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from curate.config import plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.errors import ConfigError, counted
from curate.models.checkpoints import weights_digest
from curate.models.tokens import load_tokenizer, tokenizer_digest
from curate.plan.mixture import DomainSize, Phase
from jobs.doremi_work import (
    WEIGHT_OPTIONS,
    read_result,
    reference_losses,
    train_reference,
    train_round,
)
from jobs.mix_passes import Found, MixPasses
from jobs.own_passes import Phase as Work
from jobs.proxy_refusals import check_proxy_model, check_shares
from jobs.proxy_work import ProxyBase, proxy_base, result_output, tiny_note
from jobs.run import Task
from jobs.settings import Settings
from jobs.tokenizer import run_tokenizer
from mixers.doremi import DoReMi
from mixers.proxy_settings import Proxy

VERSION = 1
"""Raised when the same reference would give other losses."""

_MANY_EPOCHS = 4
"""Of a domain, beyond which a model begins to know it by heart."""


@dataclass(frozen=True, slots=True)
class _Chain:
    """One reference model and its proxies."""

    name: str
    proxy: Proxy


def passes(settings: Settings, mixer: DoReMi) -> MixPasses:
    """Sequences, then for each round references, their losses and proxies.

    Raises:
        ConfigError: there is no model, `reference.shares` name an unknown domain, or the reference
            is of another tokenizer.
        InputError: the index has not been made, or there is no reference.
    """
    base, sequences = proxy_base(settings, "doremi", mixer.proxy)
    for place, model in enumerate(mixer.reference.models):
        check_proxy_model(model, f"mix.reference.models[{place}]")
    check_shares(settings, mixer.reference.shares, "mix.reference.shares")
    if mixer.reference.path is not None:
        _check_reference(settings, mixer.reference.path)
    phases = [*sequences]
    chains = _chains(mixer)
    references: list[Task] = []
    before: dict[str, Task] = {}
    for number in range(1, mixer.rounds + 1):
        label = f", round {number}" if mixer.rounds > 1 else ""
        losses: dict[str, list[Task]] = {}
        references = []
        for chain in chains:
            reference = _reference(base, mixer, chain, number, before)
            references += [] if reference is None else [reference]
            losses[chain.name] = _losses(base, mixer, chain, number, reference, before)
        proxies = {c.name: _proxy(base, mixer, c, number, losses[c.name], before) for c in chains}
        if references:
            phases.append(Work(f"doremi: references{label}", references, train_reference))
        tasks = [task for own in losses.values() for task in own]
        phases.append(Work(f"doremi: losses of the references{label}", tasks, reference_losses))
        phases.append(Work(f"doremi: proxies{label}", list(proxies.values()), train_round))
        before = proxies
    last = {name: Path(task.payload["folder"]) for name, task in before.items()}
    beside = [Path(task.payload["folder"]) for task in references]
    return MixPasses(tuple(phases), lambda sizes: _finish(mixer, last, beside, sizes))


def _chains(mixer: DoReMi) -> list[_Chain]:
    models = mixer.reference.models or (mixer.proxy.model,)
    found: list[_Chain] = []
    for place, model in enumerate(models):
        for seed in mixer.reference.seeds:
            name = f"seed-{seed}" if len(models) == 1 else f"model-{place}-seed-{seed}"
            found.append(
                _Chain(name, replace(mixer.proxy, model=model, seed=mixer.proxy.seed + seed))
            )
    return found


def _reference(
    base: ProxyBase, mixer: DoReMi, chain: _Chain, number: int, before: Mapping[str, Task]
) -> Task | None:
    """The training of a chain's reference; None where it exists already."""
    if mixer.reference.path is not None:
        return None
    shares: Any = mixer.reference.shares
    options: dict[str, Any] = {"shares": shares}
    after: list[str] = []
    if before:
        earlier = before[chain.name]
        options = {"from": _within(base, result_output(Path(earlier.payload["folder"])).path)}
        after = [earlier.fingerprint]
    return base.task(
        f"{chain.name}/round-{number}/reference",
        rule="jobs.proxy_rules:plain",
        proxy=replace(chain.proxy, keep_model=True),
        options=options,
        parts=("reference",),
        after=after,
    )


def _losses(
    base: ProxyBase,
    mixer: DoReMi,
    chain: _Chain,
    number: int,
    reference: Task | None,
    before: Mapping[str, Task],
) -> list[Task]:
    folder = base.folder(f"{chain.name}/round-{number}/losses")
    if reference is None:
        assert mixer.reference.path is not None
        path = Path(mixer.reference.path)
        model, made_from = str(path.resolve()), weights_digest(path)
    else:
        model, made_from = f"{reference.payload['folder']}/model", reference.fingerprint
    steps = {"steps": chain.proxy.steps, "sequences": chain.proxy.sequences}
    tasks: list[Task] = []
    run = RunFolder(Path(base.settings.run))
    for place, part in enumerate(run.partitions()):
        output = Output(folder / f"{part.name}.npy")
        mark = fingerprint(
            stage="doremi losses",
            version=VERSION,
            base=base.made_from,
            reference=made_from,
            drawn=[steps, chain.proxy.seed],
            file=place,
        )
        payload = base.payload | {
            "file": place,
            "model": model,
            "trained": made_from,
            "proxy": plain(chain.proxy),
            "before": before[chain.name].payload["folder"] if before else None,
            "output": str(output.path),
            "fingerprint": mark,
        }
        tasks.append(Task(f"{chain.name} {part.name}", payload, output, mark))
    return tasks


def _proxy(
    base: ProxyBase,
    mixer: DoReMi,
    chain: _Chain,
    number: int,
    losses: list[Task],
    before: Mapping[str, Task],
) -> Task:
    options = {
        **{name: getattr(mixer, name) for name in WEIGHT_OPTIONS},
        "losses": [_within(base, task.output.path) for task in losses],
        "before": _within(base, Path(before[chain.name].payload["folder"])) if before else None,
        "tolerance": mixer.tolerance,
    }
    return base.task(
        f"{chain.name}/round-{number}/proxy",
        rule="jobs.doremi_work:make_rule",
        proxy=chain.proxy,
        options=options,
        parts=("proxy",),
        reference="jobs.doremi_work:open_reference",
        facts="jobs.doremi_work:round_facts",
        after=[task.fingerprint for task in losses],
    )


def _check_reference(settings: Settings, path: str) -> None:
    """A reference must read the very tokens that the proxy reads.

    Raises:
        ConfigError: its tokenizer is another one.
        InputError: there is no model, or none with a tokenizer.
    """
    own, its = run_tokenizer(settings), load_tokenizer(path)
    if own is not None and tokenizer_digest(own) != tokenizer_digest(its):
        raise ConfigError(
            f"the reference {path} has another tokenizer than the run: losses of different tokens"
            " cannot be compared",
            fix="give one of the run's tokenizer, or remove mix.reference.path to train one",
        )


def _within(base: ProxyBase, path: Path) -> str:
    """A path as seen from the run, so that a run that is moved stays done."""
    return path.relative_to(base.settings.run).as_posix()


def _finish(
    mixer: DoReMi,
    proxies: Mapping[str, Path],
    references: Sequence[Path],
    sizes: Mapping[str, DomainSize],
) -> Found:
    """The mean over the chains, their spread, and what else must be known."""
    results = [read_result(folder) for folder in proxies.values()]
    weights = {name: [result["mixture"].get(name, 0.0) for result in results] for name in sizes}
    mean = {name: fmean(own) for name, own in weights.items()}
    total = sum(mean.values())
    why: dict[str, str] = {}
    for name, own in weights.items():
        spread = f", {min(own):.3g} to {max(own):.3g} over {len(own)} references"
        why[name] = f"DoReMi's mean weight{spread if len(own) > 1 else ''}"
    notes = [
        tiny_note(min(result["num_parameters"] for result in results)),
        _warm_note(mixer),
        _spread_note(weights),
        _rounds_note(mixer, results),
        _repeated_note([*results, *(read_result(folder) for folder in references)]),
        *sorted({note for result in results for note in result["notes"]}),
    ]
    return Found(
        (Phase(1.0, {name: weight / total for name, weight in mean.items()}),),
        why,
        tuple(note for note in notes if note),
        {chain: folder / "trajectory.parquet" for chain, folder in proxies.items()},
    )


def _warm_note(mixer: DoReMi) -> str | None:
    """Whether the weights could move at all."""
    steps = mixer.proxy.steps
    if steps - 1 >= mixer.warm_share * steps:
        return None
    return (
        f"{counted(steps, 'step')} with mix.warm_share {mixer.warm_share:g}: the weights stayed"
        " uniform in all of them; raise mix.proxy.steps or lower mix.warm_share"
    )


def _spread_note(weights: Mapping[str, list[float]]) -> str:
    """How far the chains are apart."""
    num = len(next(iter(weights.values())))
    if num == 1:
        return "one reference: how much the weights depend on it is not known"
    widest = max(weights, key=lambda name: max(weights[name]) - min(weights[name]))
    spread = max(weights[widest]) - min(weights[widest])
    return f"over {num} references the weights differ by {spread:.3g} at most ({widest})"


def _rounds_note(mixer: DoReMi, results: list[dict[str, Any]]) -> str | None:
    """Whether the rounds have come to rest."""
    if mixer.rounds == 1:
        return None
    rest = sum(bool(result["at_rest"]) for result in results)
    moved = max(result["moved"] for result in results)
    return (
        f"{rest} of {len(results)} chains came to rest within {mixer.rounds} rounds;"
        f" in the last that was trained a weight moved by {moved:.3g} at most"
    )


def _repeated_note(results: list[dict[str, Any]]) -> str | None:
    """Domains that references or proxies went through again and again."""
    often: dict[str, float] = {}
    for result in results:
        for name, epochs in result["epochs"].items():
            if epochs > _MANY_EPOCHS:
                often[name] = max(epochs, often.get(name, 0.0))
    if not often:
        return None
    named = ", ".join(f"{name} ({often[name]:.3g})" for name in sorted(often)[:5])
    more = f" and {len(often) - 5} more" if len(often) > 5 else ""
    return (
        f"references or proxies went more than {_MANY_EPOCHS} times through {named}{more}: what"
        " they know by heart says little of how hard it is; fewer mix.proxy.steps repeat less"
    )
