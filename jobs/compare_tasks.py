"""The tasks of a comparison: one training run for each different set of examples and seed."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from curate.config import plain
from curate.data.files import fingerprint, read_json, write_json
from curate.data.layout import RunFolder
from curate.errors import ConfigError
from jobs.cluster import Pool
from jobs.compare_arms import PLAN, Making, SetFacts, Spec, folder_of, specs
from jobs.compare_settings import ArmSettings
from jobs.lengths import content_settings, tokenizer_for
from jobs.run import Task, raise_failures, run_tasks
from jobs.settings import Settings, task_settings

VERSION = 1
"""Of the training runs: raised when the same sets and settings would give other models."""


@dataclass(slots=True)
class Work:
    """What has been found out so far."""

    settings: Settings
    run: RunFolder
    making: Making | None = None
    facts: dict[str, SetFacts] = field(default_factory=dict[str, SetFacts])
    luck: dict[str, float] = field(default_factory=dict[str, float])
    tasks: list[Task] = field(default_factory=list[Task])
    keys: dict[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    """(arm, seed) -> the training run that stands for it."""
    budget: dict[str, int] = field(default_factory=dict[str, int])
    notes: list[str] = field(default_factory=list[str])


def prepare_training(work: Work, pool: Pool) -> None:
    """Tokenizer, target, evaluation, token counts and budget."""
    from jobs.compare_examples import choose_examples
    from jobs.compare_training import measure_partition
    from jobs.references import references_run
    from jobs.target import index_target, target_settings
    from jobs.tokenizer import tokenizer_run

    settings = _trainable(work.settings)
    tokenizer_run(settings)
    references_run(settings, pool=pool)
    if settings.target is not None:
        index_target(target_settings(settings), pool=pool)
        references_run(target_settings(settings), pool=pool)
    _, notes = choose_examples(settings)
    work.notes += notes
    tasks = _length_tasks(settings, work.run)
    outcome = run_tasks("lengths for the arms", tasks, measure_partition, pool=pool)
    raise_failures("lengths for the arms", outcome)


def write_shards(work: Work, spec: Spec, pool: Pool) -> None:
    """Shards of an arm's sets, for the command that trains on them."""
    from jobs.write import write_run

    lengths = tokenizer_for(work.settings)[1]
    summary = read_json(work.run.plan / "summary.json") or {}
    for name in spec.sets(work.settings.compare.seeds):
        folder = folder_of(work.run, name)
        facts = {"tokenizer": summary.get("tokenizer", lengths), "mixer": None}
        write_json(folder.plan / "summary.json", facts)
        write_run(replace(work.settings, run=str(folder.root), mix={}), pool=pool)


def training_tasks(work: Work) -> list[Task]:
    """One training run for each different set and seed; arms that are the same share theirs."""
    from jobs.compare_arms import result_output

    making, settings = work.making, work.settings
    assert making is not None
    common, made_from = _common(work)
    tasks: dict[str, Task] = {}
    for spec in making.specs:
        command = command_of(settings, spec)
        for seed in settings.compare.seeds:
            name = spec.set_of(seed)
            facts = work.facts[name]
            own = spec.name if "{arm}" in (command or "") else None
            identity = fingerprint(set=facts.digest, command=command, arm=own)[:16]
            key = f"{identity}-seed-{seed}"
            work.keys[spec.name, seed] = key
            if key in tasks:
                continue
            mark = fingerprint(**made_from[command is None], set=facts.digest, command=command,
                               seed=seed)  # fmt: skip
            payload = {"set": name, "seed": seed, "key": key, "fingerprint": mark}
            if command is None:
                payload |= common | {"budget": work.budget, "weighted": facts.weighted}
            else:
                payload |= _command_payload(work, spec, command, seed)
            output = result_output(work.run, key)
            tasks[key] = Task(f"{spec.name}, seed {seed}", payload, output, mark)
    for arm, seed in commands_alone(settings):
        own = {"arm": arm.name} if "{arm}" in str(arm.command) else {}
        key = f"{fingerprint(command=arm.command, **own)[:16]}-seed-{seed}"
        work.keys[arm.name, seed] = key
        mark = fingerprint(**made_from[False], command=arm.command, seed=seed, **own)
        payload = {"seed": seed, "key": key, "fingerprint": mark}
        payload |= _command_payload(work, None, str(arm.command), seed, arm=arm.name)
        tasks[key] = Task(f"{arm.name}, seed {seed}", payload, result_output(work.run, key), mark)
    return list(tasks.values())


def train_or_run(payload: dict[str, Any]) -> dict[str, Any]:
    """One training run: ours, or a command of the user's."""
    if "command" in payload:
        from jobs.compare_outside import run_command

        return run_command(payload)
    from jobs.compare_training import train_arm

    return train_arm(payload)


def command_of(settings: Settings, spec: Spec) -> str | None:
    """The command that trains an arm; None where we do."""
    return (spec.own.command if spec.own else None) or settings.compare.command


def commands_alone(settings: Settings) -> list[tuple[ArmSettings, int]]:
    """Arms whose command needs no shards of ours, with every seed."""
    made = {spec.name for spec in specs(settings.compare)}
    return [
        (arm, seed)
        for arm in settings.compare.arms
        if isinstance(arm, ArmSettings) and arm.command is not None and arm.name not in made
        for seed in settings.compare.seeds
    ]


def _trainable(settings: Settings) -> Settings:
    from jobs.compare_budget import comparison_settings

    if settings.model.name is None and settings.model.config is None:
        raise ConfigError(
            "there is no model to train on the arms",
            fix="set model.name or model.config, or compare.command to train by yourself",
        )
    task_settings(settings)
    return comparison_settings(settings)


def _length_tasks(settings: Settings, run: RunFolder) -> list[Task]:
    from jobs.compare_budget import measured_output

    common = _training_payload(settings)
    tasks: list[Task] = []
    for part in run.partitions():
        mark = fingerprint(
            stage="compare lengths",
            version=VERSION,
            identity=common["identity"],
            source=content_settings(settings.sources[part.source]),
            examples=(run.examples(part).mark() or {}).get("digest"),
        )
        payload = common | {"partition": asdict(part), "fingerprint": mark}
        tasks.append(Task(part.name, payload, measured_output(run, part), mark))
    return tasks


def _training_payload(settings: Settings) -> dict[str, Any]:
    """What every task of ours carries; a worker opens its tokenizer anew with the identity."""
    from curate.models.tokens import tokenizer_digest
    from jobs.fields import reference_facts
    from jobs.training_work import make_workshop

    shop = make_workshop(settings)
    identity = fingerprint(
        **reference_facts(settings),
        task=plain(task_settings(settings)),
        facts=shop.task.facts(),
        tokenizer=None if shop.tokenizer is None else tokenizer_digest(shop.tokenizer),
    )
    return {"settings": plain(settings), "identity": identity}


def _common(work: Work) -> tuple[dict[str, Any], dict[bool, dict[str, Any]]]:
    """Payload of our own runs, and the fingerprints' common parts, of ours and of commands."""
    settings = work.settings
    assert work.making is not None
    basis: dict[str, Any] = {"stage": "compare", "version": VERSION, "run_seed": settings.seed}
    if all(command_of(settings, spec) is not None for spec in work.making.specs):
        work.budget = _outside_budget(work)
        return {}, {False: {**basis, "budget": work.budget}}
    from jobs.compare_budget import budget_of, rows_of
    from jobs.compare_examples import evaluation_output
    from jobs.train import model_facts

    trainable = _trainable(settings)
    work.budget = asdict(budget_of(trainable, rows_of(work.run, _plan_set(work))))
    common = _training_payload(trainable)
    chosen = plain(trainable.checkpoints.train)
    for key in ("seeds", "resume_every_seconds", "save_every_epochs", "epochs", "max_steps"):
        del chosen[key]  # they say which runs there are, or have become the budget
    evaluation = evaluation_output(work.run).mark()
    ours = {
        **basis,
        "budget": work.budget,
        "points": settings.compare.points,
        "train": chosen,
        "model": model_facts(trainable),
        "identity": common["identity"],
        "evaluation": None if evaluation is None else evaluation["digest"],
        "sources": {n: content_settings(s) for n, s in settings.sources.items()},
        "target": settings.target and content_settings(settings.target),
        "batch_tokens": settings.score.batch_tokens,
        "inputs": [
            [(work.run.examples(p).mark() or {}).get("digest"), p.stamp]
            for p in work.run.partitions()
        ],
        "threads": settings.cluster.threads,
    }
    return common, {True: ours, False: {**basis, "budget": work.budget}}


def _plan_set(work: Work) -> str:
    """The set that decides on the budget: the plan, or what comes first."""
    assert work.making is not None
    spec = next((s for s in work.making.specs if s.name == PLAN), work.making.specs[0])
    return spec.set_of(work.settings.compare.seeds[0])


def _outside_budget(work: Work) -> dict[str, int]:
    compare = work.settings.compare
    tokens = compare.tokens or work.facts[_plan_set(work)].tokens
    return {"steps": compare.steps or 0, "tokens": round(tokens)}


def _command_payload(
    work: Work, spec: Spec | None, command: str, seed: int, *, arm: str = ""
) -> dict[str, Any]:
    shards = "" if spec is None else str(folder_of(work.run, spec.set_of(seed)).shards)
    values = {
        "shards": shards,
        "seed": str(seed),
        "tokens": str(work.budget.get("tokens", 0)),
        "steps": str(work.budget.get("steps", 0)),
        "arm": arm or (spec.name if spec else ""),
    }
    return {"run": str(work.run.root), "command": command, "values": values}
