"""DoReMi as tasks: references, their losses, proxies, round by round.

A chain is one reference model (a size and a seed) and the proxies compared with it. Chains do not
wait for each other within a phase. References learn from one half of the training examples, and
the excess is measured on the other, so that what a reference has by heart does not look hard.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.config import parse, plain
from curate.data.files import fingerprint
from curate.data.files import replace as replace_file
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.errors import ConfigError
from curate.models.checkpoints import weights_digest
from curate.models.epochs import random_seed
from curate.models.load import load_model
from curate.models.sequence_losses import Computed, SequenceLosses, compute_losses, write_losses
from curate.models.sequences import Sequences
from curate.models.settings import Model
from curate.models.tokens import load_tokenizer, tokenizer_digest
from curate.plan.mixture import DomainSize, Phase
from jobs.mix_passes import Found, MixPasses
from jobs.own_passes import Phase as Work
from jobs.proxy_work import (
    Making,
    ProxyBase,
    proxy_base,
    proxy_seed,
    result_output,
    tiny_note,
    train_proxy,
)
from jobs.run import Task
from jobs.sequences import open_sequences
from jobs.settings import Settings, task_settings
from jobs.tokenizer import run_tokenizer
from jobs.training_work import begin, open_workshop
from mixers.doremi import DoReMi, DoReMiRule
from mixers.orders import Order
from mixers.proxy_draws import stratified_counts
from mixers.proxy_settings import Proxy
from mixers.rules import Rule

VERSION = 1

_LOSS_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class _Chain:
    """One reference model and its proxies."""

    name: str
    proxy: Proxy


def passes(settings: Settings, mixer: DoReMi) -> MixPasses:
    """Sequences, then for each round references, their losses and proxies.

    Raises:
        ConfigError: there is no model, or the reference is of another tokenizer.
        InputError: the index has not been made.
    """
    base, sequences = proxy_base(settings, "doremi", mixer.proxy)
    if mixer.reference.path is not None:
        _check_reference(settings, mixer.reference.path)
    phases = [*sequences]
    chains = _chains(mixer)
    before: dict[str, Task] = {}
    for number in range(1, mixer.rounds + 1):
        references = {c.name: _reference(base, mixer, c, number, before) for c in chains}
        losses = {
            c.name: _losses(base, mixer, c, number, references[c.name], before) for c in chains
        }
        proxies = {c.name: _proxy(base, mixer, c, number, losses[c.name], before) for c in chains}
        label = f", round {number}" if mixer.rounds > 1 else ""
        trained = [task for task in references.values() if task is not None]
        if trained:
            phases.append(Work(f"doremi: references{label}", trained, train_reference))
        tasks = [task for own in losses.values() for task in own]
        phases.append(Work(f"doremi: losses of the references{label}", tasks, reference_losses))
        phases.append(Work(f"doremi: proxies{label}", list(proxies.values()), train_round))
        before = proxies
    last = {c.name: Path(before[c.name].payload["folder"]) for c in chains}
    return MixPasses(tuple(phases), lambda sizes: _finish(mixer, last, sizes))


def make_rule(making: Making) -> Rule:
    """DoReMi's rule for a proxy."""
    options = dict(making.options)
    settings = DoReMi(**{name: options[name] for name in ("eta", "smoothing", "warm_share")})
    return DoReMiRule(settings, len(making.data.sequences.domains))


def open_reference(payload: Mapping[str, Any]) -> SequenceLosses:
    """The cached losses that a proxy's task names."""
    return SequenceLosses([Path(path) for path in payload["options"]["losses"]])


def train_reference(payload: dict[str, Any]) -> dict[str, Any]:
    """Train a reference, unless the rounds have come to rest."""
    before = payload["options"].get("from")
    if before is not None and _result(Path(before).parent).get("at_rest"):
        return _at_rest(payload, Path(before).parent)
    return train_proxy(payload)


def reference_losses(payload: dict[str, Any]) -> dict[str, Any]:
    """Write the losses of a reference on those sequences of a file that its proxy will draw."""
    shop = open_workshop(payload)
    key, before = str(payload["sequences"]), payload["before"]
    sequences = open_sequences(shop.settings, key, ["proxy"])
    numbers = np.empty(0, dtype=np.int64)
    if before is None or not _result(Path(before)).get("at_rest"):
        proxy = parse(Proxy, payload["proxy"])
        drawn = drawn_numbers(sequences, proxy, proxy_seed(shop.settings, proxy))
        first, last = sequences.offsets[payload["file"] : payload["file"] + 2]
        numbers = drawn[(drawn >= first) & (drawn < last)]
    own = shop.settings.model
    source = Model(name=payload["model"], dtype=own.dtype, device=own.device)
    computed = Computed(np.zeros((3, 0), np.int64), np.zeros(0, np.float16))
    if len(numbers):
        model = load_model(source, task_settings(shop.settings)).model.eval()
        budget = _LOSS_TOKENS
        computed = compute_losses(model, shop.task, sequences, numbers, batch_tokens=budget)
    write_losses(Output(Path(payload["output"])), computed, str(payload["fingerprint"]))
    return {"rows": len(numbers)}


def train_round(payload: dict[str, Any]) -> dict[str, Any]:
    """Train a proxy, unless the rounds have come to rest; says whether they have now."""
    options = payload["options"]
    before = options["before"]
    if before is not None and _result(Path(before)).get("at_rest"):
        return _at_rest(payload, Path(before))
    train_proxy(payload)
    if before is None:
        return {"at_rest": False}
    folder = Path(payload["folder"])
    result, earlier = _result(folder), _result(Path(before))
    moved = max(
        abs(weight - earlier["mixture"].get(name, 0.0))
        for name, weight in result["mixture"].items()
    )
    facts = {**result, "moved": moved, "at_rest": moved < options["tolerance"]}
    _write(folder, facts, str(payload["fingerprint"]))
    return {"at_rest": facts["at_rest"]}


def drawn_numbers(sequences: Sequences, proxy: Proxy, seed: int) -> npt.NDArray[np.int64]:
    """Ascending numbers of the sequences that uniform batches draw in a whole run.

    Args:
        sequences: of the proxy.
        proxy: its steps and batches.
        seed: of its optimiser.
    """
    num = len(sequences.domains)
    counts = np.zeros(num, dtype=np.int64)
    for step in range(1, proxy.steps + 1):
        step_seed = random_seed(seed, "proxy", "counts", step)
        counts += stratified_counts(np.full(num, 1 / num), proxy.sequences, step_seed)
    found: list[npt.NDArray[np.int64]] = []
    for name, size, count in zip(sequences.domains, sequences.sizes, counts, strict=True):
        numbers = sequences.numbers_of(name)
        if count < size:
            key = random_seed(seed, "proxy", "batch", name, 0)
            numbers = numbers[Order(int(size), key).at(np.arange(count))]
        found.append(numbers)
    return np.sort(np.concatenate(found))


def _chains(mixer: DoReMi) -> list[_Chain]:
    models = mixer.reference.models or (mixer.proxy.model,)
    found: list[_Chain] = []
    for place, model in enumerate(models):
        for seed in mixer.reference.seeds:
            name = f"seed-{seed}" if len(models) == 1 else f"model-{place}-seed-{seed}"
            found.append(_Chain(name, replace(mixer.proxy, model=model, seed=seed)))
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
        options = {"from": str(result_output(Path(before[chain.name].payload["folder"])).path)}
        after = [before[chain.name].fingerprint]
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
    earlier = before[chain.name].payload["folder"] if before else None
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
            "proxy": plain(chain.proxy),
            "before": earlier,
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
        "eta": mixer.eta,
        "smoothing": mixer.smoothing,
        "warm_share": mixer.warm_share,
        "losses": [str(task.output.path) for task in losses],
        "before": before[chain.name].payload["folder"] if before else None,
        "tolerance": mixer.tolerance,
    }
    return base.task(
        f"{chain.name}/round-{number}/proxy",
        rule="jobs.doremi:make_rule",
        proxy=chain.proxy,
        options=options,
        parts=("proxy",),
        reference="jobs.doremi:open_reference",
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


def _finish(mixer: DoReMi, folders: Mapping[str, Path], sizes: Mapping[str, DomainSize]) -> Found:
    """The mean over the chains, their spread, and what else must be known."""
    results = [_result(folder) for folder in folders.values()]
    weights = {name: [result["mixture"].get(name, 0.0) for result in results] for name in sizes}
    mean = {name: fmean(own) for name, own in weights.items()}
    total = sum(mean.values())
    why: dict[str, str] = {}
    for name, own in weights.items():
        spread = f", {min(own):.3g} to {max(own):.3g} over {len(own)} references"
        why[name] = f"DoReMi's mean weight{spread if len(own) > 1 else ''}"
    return Found(
        (Phase(1.0, {name: weight / total for name, weight in mean.items()}),),
        why,
        _notes(mixer, results, weights),
        {chain: folder / "trajectory.parquet" for chain, folder in folders.items()},
    )


def _notes(
    mixer: DoReMi, results: list[dict[str, Any]], weights: Mapping[str, list[float]]
) -> tuple[str, ...]:
    found = [tiny_note(result["num_parameters"]) for result in results[:1]]
    if len(results) > 1:
        widest = max(weights, key=lambda name: max(weights[name]) - min(weights[name]))
        spread = max(weights[widest]) - min(weights[widest])
        found.append(
            f"over {len(results)} references the weights differ by {spread:.3g} at most ({widest})"
        )
    else:
        found.append("one reference: how much the weights depend on it is not known")
    if mixer.rounds > 1:
        rest = sum(bool(result.get("at_rest")) for result in results)
        found.append(f"{rest} of {len(results)} chains came to rest within {mixer.rounds} rounds")
    found += sorted({note for result in results for note in result["notes"]})
    return tuple(note for note in found if note)


def _result(folder: Path) -> dict[str, Any]:
    """What a run ended with."""
    return json.loads(result_output(folder).path.read_text(encoding="utf-8"))


def _at_rest(payload: Mapping[str, Any], before: Path) -> dict[str, Any]:
    """Take over what the round before has found."""
    folder = Path(payload["folder"])
    begin(folder, str(payload["fingerprint"]))
    for name in ("trajectory.parquet", "held_out.parquet"):
        replace_file(folder / name, partial(shutil.copyfile, before / name))
    _write(folder, {**_result(before), "at_rest": True}, str(payload["fingerprint"]))
    return {"at_rest": True}


def _write(folder: Path, facts: Mapping[str, Any], mark: str) -> None:
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    result_output(folder).write(lambda path: path.write_text(text, encoding="utf-8"), mark)
