"""One proxy run as a task: the model, its data and a rule, to the end, from where it stopped."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from curate.config import parse, plain
from curate.data.files import fingerprint, remove_folder, replace_folder
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.errors import ConfigError
from curate.models.epochs import random_seed
from curate.models.load import build_model, load_model, max_positions, pick_device
from curate.models.optimiser import Optimiser
from curate.models.packing import check_packing
from curate.models.sequences import Sequences
from curate.models.settings import CausalLM, Model
from jobs.all_stages import load
from jobs.own_passes import Phase
from jobs.proxy_refusals import check_proxy_model, model_named
from jobs.proxy_swallowed import swallowed_domains
from jobs.run import Task
from jobs.sequences import left_out, open_sequences, open_target, sequence_tasks
from jobs.sequences_work import make_sequences, make_target
from jobs.settings import Settings, task_settings
from jobs.train import model_facts
from jobs.training_work import Workshop, begin, open_workshop, write_model
from mixers.proxy import Files, run_proxy
from mixers.proxy_settings import Proxy
from mixers.proxy_step import Data, Reference
from mixers.ranks import from_first, num_ranks, own_rank
from mixers.rules import Rule

VERSION = 1

TINY_PARAMETERS = 15_000_000
"""Below so many parameters, embeddings left out, proxies are known to rank mixtures badly."""


class Making(NamedTuple):
    """What a rule may be made of."""

    settings: Settings
    proxy: Proxy
    data: Data
    options: dict[str, Any]
    """JSON values of the task."""


MakeRule = Callable[[Making], Rule]
"""Makes a fresh rule: the `module:function` that a task names."""


@dataclass(frozen=True, slots=True)
class ProxyBase:
    """What the proxy runs of one mixer have in common."""

    settings: Settings
    mixer: str
    payload: dict[str, Any]
    """Settings, identity of the tokenizer, key of the sequences."""
    made_from: str
    """Fingerprint of model, sequences, seeds and threads."""

    def folder(self, name: str) -> Path:
        """Of one run."""
        return RunFolder(Path(self.settings.run)).proxies / self.mixer / name

    def task(
        self,
        name: str,
        *,
        rule: str,
        proxy: Proxy,
        options: Mapping[str, Any],
        parts: Sequence[str] = ("reference", "proxy"),
        target_parts: Sequence[str] = (),
        reference: str | None = None,
        facts: str | None = None,
        after: Sequence[str] = (),
    ) -> Task:
        """One run.

        Args:
            name: of its folder, within that of the mixer.
            rule: `module:function` that makes it (`MakeRule`).
            proxy: how it is trained.
            options: JSON values for the rule.
            parts: of the training sequences.
            target_parts: of the target's, where the rule reads a target.
            reference: `module:function(payload) -> Reference`, cached losses for the rule.
            facts: `module:function(payload, facts) -> facts`, what the result says besides: it is
                written once, with its mark, so that no kill leaves half of it.
            after: fingerprints of the tasks that it reads from.
        """
        mark = fingerprint(
            stage="proxy",
            version=VERSION,
            base=self.made_from,
            mixer=self.mixer,
            rule=rule,
            # How often a state is written says nothing of the result.
            proxy=plain(replace(proxy, resume_every_seconds=0)),
            options=dict(options),
            parts=[list(parts), list(target_parts)],
            after=list(after),
        )
        payload = self.payload | {
            "name": name,
            "folder": str(self.folder(name)),
            "rule": rule,
            "proxy": plain(proxy),
            "options": dict(options),
            "parts": list(parts),
            "target_parts": list(target_parts),
            "reference": reference,
            "facts": facts,
            "fingerprint": mark,
            "progress": str(Files(folder=self.folder(name), fingerprint=mark).progress),
        }
        return Task(name, payload, result_output(self.folder(name)), mark)

    def tasks(
        self,
        seeds: Sequence[int],
        *,
        rule: str,
        proxy: Proxy,
        options: Mapping[str, Any],
        parts: Sequence[str] = ("reference", "proxy"),
        target_parts: Sequence[str] = (),
    ) -> list[Task]:
        """One run for each seed, which is added to the proxy's own; else as `task`."""
        return [
            self.task(
                f"seed-{seed}",
                rule=rule,
                proxy=replace(proxy, seed=proxy.seed + seed),
                options=options,
                parts=parts,
                target_parts=target_parts,
            )
            for seed in seeds
        ]


def proxy_base(
    settings: Settings, mixer: str, proxy: Proxy, *, with_target: bool = False
) -> tuple[ProxyBase, list[Phase]]:
    """What the proxy runs of a mixer have in common, and the phases that make their sequences.

    Args:
        settings: of the run.
        mixer: its name.
        proxy: decides how examples become sequences.
        with_target: the mixer reads a target; what stands in it is then no training example.

    Raises:
        ConfigError: there is no model to train or none can be made of `proxy.model`, there is no
            target, or the task has no sequences.
        InputError: the index or the tokenizer is missing.
    """
    if proxy.model is None and settings.model.name is None and settings.model.config is None:
        raise ConfigError(
            f"the mixer {mixer} trains a proxy, but there is no model to train",
            fix="set mix.proxy.model to the fields of a configuration, or model.name",
        )
    check_proxy_model(proxy.model)
    made = sequence_tasks(
        settings,
        packed=proxy.packed,
        length=proxy.length,
        with_target=with_target,
        exclude_target=with_target,
    )
    made_from = fingerprint(
        pool=[task.fingerprint for task in made.pool],
        target=[task.fingerprint for task in made.target],
        model=model_facts(settings) if proxy.model is None else settings.model.dtype,
        seed=settings.seed,
        threads=settings.cluster.threads,
    )
    payload = {
        "settings": plain(settings),
        "identity": made.identity,
        "sequences": made.key,
    }
    phases = [Phase(f"{mixer}: sequences", made.pool, make_sequences)]
    if made.target:
        phases.insert(0, Phase(f"{mixer}: sequences of the target", made.target, make_target))
    return ProxyBase(settings, mixer, payload, made_from), phases


def proxy_seed(settings: Settings, proxy: Proxy) -> int:
    """Of all draws of a proxy run."""
    return random_seed(settings.seed, "proxy", proxy.seed)


def result_output(folder: Path) -> Output:
    """What a run ends with."""
    return Output(folder / "result.json")


def write_result(folder: Path, facts: Mapping[str, Any], mark: str) -> None:
    """What a run ended with, and its mark."""
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    result_output(folder).write(lambda path: path.write_text(text, encoding="utf-8"), mark)


def train_proxy(payload: dict[str, Any]) -> dict[str, Any]:
    """Train one proxy to the end, from where an earlier attempt stopped.

    In the first of several ranks: the others, which wait in `jobs.proxy_ranks.serve`, go along.

    Raises:
        ConfigError: the sequences are longer than the model reads, or there are not as many ranks
            as the settings say.
        DivergedError: a loss is not finite.
        OutputError: the disk refuses a write.
    """
    return train_together(from_first(payload))


def train_together(payload: dict[str, Any]) -> dict[str, Any]:
    """What every rank does; the first one writes."""
    shop = open_workshop(payload)
    proxy = parse(Proxy, payload["proxy"])
    if proxy.ranks != num_ranks():
        raise ConfigError(
            f"mix.proxy.ranks is {proxy.ranks}, but the proxy is trained by {num_ranks()}",
            fix=f"set mix.proxy.ranks to {num_ranks()}",
        )
    folder, mark = Path(payload["folder"]), str(payload["fingerprint"])
    if not own_rank():
        begin(folder, mark)
    from_first(None)  # the others look for a state only when what is not of this run has gone
    data = open_data(shop, payload)
    optimiser = open_proxy(shop, proxy)
    make = cast(MakeRule, load(payload["rule"]))
    rule = make(Making(shop.settings, proxy, data, dict(payload["options"])))
    files = Files(folder=folder, fingerprint=mark)
    result = run_proxy(optimiser, shop.task, data, rule, proxy, files)
    if own_rank():
        return {"steps": proxy.steps}
    if proxy.keep_model:
        replace_folder(
            folder / "model", lambda target: write_model(optimiser.model, shop.tokenizer, target)
        )
    gone = left_out(shop.settings, str(payload["sequences"])) if payload["target_parts"] else {}
    facts = {
        "schema_version": 1,
        **result._asdict(),
        "steps": proxy.steps,
        "num_parameters": body_parameters(optimiser.model),
        "swallowed": swallowed_domains(gone, data.sequences.domains),
        "notes": [*data.sequences.notes, *_left_out(gone)],
    }
    if payload["facts"] is not None:
        facts = load(payload["facts"])(payload, facts)
    write_result(folder, facts, mark)
    remove_folder(files.state.parent)
    files.progress.unlink(missing_ok=True)
    return {"steps": proxy.steps}


def _left_out(counts: Mapping[str, int]) -> list[str]:
    """What is to be said of examples that stand in the target too."""
    if not counts:
        return []
    named = ", ".join(f"{domain} ({count:,})" for domain, count in counts.items())
    return [f"examples that stand in the target too are not trained on: {named}"]


def open_data(shop: Workshop, payload: Mapping[str, Any]) -> Data:
    """Sequences of the parts that a task names."""
    key = str(payload["sequences"])
    sequences = open_sequences(shop.settings, key, payload["parts"])
    held_out = open_sequences(shop.settings, key, ["held_out"], domains=sequences.domains)
    target: Sequences | None = None
    if payload["target_parts"]:
        target = open_target(shop.settings, key, payload["target_parts"])
    reference: Reference | None = None
    if payload["reference"]:
        opened = cast(Callable[[Mapping[str, Any]], Reference], load(payload["reference"]))
        reference = opened(payload)
    return Data(sequences, held_out, target, reference)


def open_proxy(shop: Workshop, proxy: Proxy) -> Optimiser:
    """A fresh model, from scratch or loaded, ready to train.

    Raises:
        ConfigError: there is no model, its sequences are too long for it, or it does not keep the
            texts of a packed one apart.
    """
    settings, task = shop.settings, task_settings(shop.settings)
    draws = proxy_seed(settings, proxy)
    model_seed = random_seed(draws, "weights") % 2**63
    chosen = proxy_model(settings, proxy)
    if chosen.config is not None:
        # How long the sequences are is compared below: the proxy's length may be another.
        short = replace(task, max_tokens=1) if hasattr(task, "max_tokens") else task
        with model_named("model.config" if proxy.model is None else "mix.proxy.model"):
            model: nn.Module = build_model(chosen, short, shop.tokenizer, model_seed)
    else:
        model = load_model(chosen, task, head_seed=model_seed, dtype="float32").model
    limit = max_positions(model)
    length = proxy.length or getattr(shop.task, "max_tokens", None)
    if limit is not None and length is not None and length > limit:
        raise ConfigError(
            f"sequences have {length} tokens, but the proxy reads {limit}",
            fix=f"set mix.proxy.length to {limit} or less",
        )
    if proxy.packed and isinstance(task, CausalLM):
        check_packing(model)
    return Optimiser(
        model,
        proxy.train,
        seed=draws,
        total_steps=proxy.steps,
        device=pick_device(chosen.device),
        dtype=chosen.dtype,
    )


def proxy_model(settings: Settings, proxy: Proxy) -> Model:
    """The model of a proxy: its own, or that of the run."""
    if proxy.model is None:
        return settings.model
    own = settings.model
    return Model(config=proxy.model, tokenizer=own.tokenizer, dtype=own.dtype, device=own.device)


def body_parameters(model: nn.Module) -> int:
    """Parameters without those of embeddings and an output head."""
    outside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    head = getattr(model, "lm_head", None)
    if isinstance(head, nn.Module):
        outside |= {id(parameter) for parameter in head.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def tiny_note(num_parameters: int) -> str | None:
    """What is to be said of a small proxy."""
    if num_parameters >= TINY_PARAMETERS:
        return None
    return (
        f"the proxy has {num_parameters / 1e6:.3g} million parameters without embeddings; below"
        f" {TINY_PARAMETERS / 1e6:g} million, proxies are known to rank mixtures badly"
    )
