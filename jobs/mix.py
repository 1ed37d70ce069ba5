"""`curate mix`: how much of each domain, from sizes and budget, or from what a proxy has shown."""

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from curate.config import plain
from curate.data.counts import counts_output, read_counts
from curate.data.example import KEY, TRAIN
from curate.data.files import fingerprint, read_json
from curate.data.files import replace as replace_file
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, record_stage
from curate.data.partitions import Output, Partition
from curate.data.tables import meet, read_examples, read_table, write_table
from curate.errors import InputError, on_one_line
from curate.plan.mixture import DomainSize, Mixture, mixture_values
from curate.plan.settings import Keep
from jobs.cluster import Pool
from jobs.domains_use import domain_digests
from jobs.lengths import lengths_digest, lengths_run
from jobs.mix_passes import PASSES, Found, MixPasses, mix_passes, run_mix_passes
from jobs.run import Listener, StageState, ignore, require
from jobs.settings import Settings, mixer_settings
from mixers.protocol import ClosedMixer
from mixers.sizes import epochs, reasons

log = logging.getLogger(__name__)

_MANY_EPOCHS = 4

VERSION = 1
"""Of what is written: raised when the same sizes would give another mixture."""


def mix_run(settings: Settings, *, pool: Pool, listener: Listener = ignore) -> dict[str, Any]:
    """Find the mixture that `mix` asks for.

    Args:
        settings: of the run.
        pool: where tokens are counted, if that was not done yet.
        listener: told after each task.

    Returns:
        `mixer`, `budget_tokens`, `notes`, and `domains`: for each its examples, tokens, weight,
        epochs by phase and why. Only `mixer: None` where the settings ask for no mixture.

    Raises:
        InputError: the index is missing, or no domain has training tokens.
        ConfigError: the mixer or one of its options is unknown, or names an unknown domain.
    """
    if not settings.mix:
        return {"mixer": None}
    started = time.monotonic()
    name, mixer = mixer_for(settings)
    run = RunFolder(Path(settings.run))
    require(run.partitions(), stage="the index", command=f"curate index {run.root}")
    digest = lengths_run(settings, pool=pool, listener=listener)["digest"]
    passes = _passes(settings, name, mixer)
    output, made_from = mixture_output(run, name), mix_fingerprint(settings, digest, passes)
    if not output.is_done(made_from):
        if passes is not None:
            run_mix_passes(passes, pool=pool, listener=listener)
        values = _mixture(settings, name, mixer, run, digest, passes)
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        output.write(lambda path: path.write_text(text, encoding="utf-8"), made_from)
        seconds = time.monotonic() - started
        record_stage(run, "mix", outputs=[output], seconds=seconds, facts={"mixer": name})
    elif "mix" not in load_manifest(run)["stages"]:
        record_stage(run, "mix", outputs=[output], seconds=0.0, facts={"mixer": name})
    summary = _summary(read_json(output.path))
    for note in summary["notes"]:
        log.warning("mix: %s", on_one_line(note))
    return summary


def plan_mix(settings: Settings) -> StageState:
    """What `mix_run` would do; writes nothing."""
    if not settings.mix:
        return StageState("mix", 0, 0)
    name, mixer = mixer_for(settings)
    run = RunFolder(Path(settings.run))
    if not run.partitions():
        return StageState("mix", 1, 0, ("the index has not been made yet",))
    try:
        passes = _passes(settings, name, mixer)
        made_from = mix_fingerprint(settings, lengths_digest(settings), passes)
    except InputError as error:
        return StageState("mix", 1, 0, (error.what,))
    tasks = passes.tasks if passes is not None else []
    due = [task for task in tasks if not task.is_done()]
    output = mixture_output(run, name)
    if output.is_done(made_from):
        return StageState("mix", 1 + len(tasks), 1 + len(tasks))
    changed = output.mark() is not None
    why = [
        "the mixer, the budget or the data have changed" if changed else "there is no mixture yet"
    ]
    if due:
        words = "task of its own is" if len(due) == 1 else "tasks of its own are"
        why.append(f"{len(due)} {words} due for {name}")
    return StageState("mix", 1 + len(tasks), len(tasks) - len(due), tuple(why))


def mixer_for(settings: Settings) -> tuple[str, Any]:
    """Name and mixer of the settings.

    Raises:
        ConfigError: `mix.mixer` is missing or unknown, or an option is wrong.
    """
    return str(settings.mix.get("mixer")), mixer_settings(settings)


def mixture_output(run: RunFolder, mixer: str) -> Output:
    """The file of a mixture."""
    return Output(run.mixtures / mixer / "mixture.json")


def mix_fingerprint(settings: Settings, lengths: str, passes: MixPasses | None = None) -> str:
    """Of all that a mixture depends on.

    Args:
        settings: of the run.
        lengths: digest of the tokenizer whose tokens are counted.
        passes: of a mixer that trains, where the caller has them already.

    Raises:
        InputError: a partition has not been indexed, or its tokens were not counted.
    """
    name, mixer = mixer_for(settings)
    run = RunFolder(Path(settings.run))
    inputs: list[list[str]] = []
    for part in run.partitions():
        marks = [run.examples(part).mark(), counts_output(run, part, lengths).mark()]
        if any(mark is None for mark in marks):
            raise InputError(
                f"{part.source}/{part.file} has no index or no token counts yet",
                fix=f"run `curate index {run.root}` and try again",
            )
        digests = [mark["digest"] for mark in marks if mark]
        inputs.append(digests + domain_digests(settings, part))
    passes = passes or _passes(settings, name, mixer)
    return fingerprint(
        stage="mix",
        version=VERSION,
        mixer=name,
        settings=plain(mixer),
        keep=plain(settings.plan.kept),
        inputs=inputs,
        **({} if passes is None else {"passes": passes.fingerprints}),
    )


def _passes(settings: Settings, name: str, mixer: Any) -> MixPasses | None:
    """What a mixer does before its mixture is known; None where sizes are all that it reads."""
    if name not in PASSES:
        return None
    run = RunFolder(Path(settings.run))
    require(run.partitions(), stage="the index", command=f"curate index {run.root}")
    return mix_passes(settings, name, mixer)


def domain_sizes(run: RunFolder, lengths: str, *, split: str = TRAIN) -> dict[str, DomainSize]:
    """What the rows of a split come to, by domain in order of name; partition by partition.

    Raises:
        CurateError: index and token counts are not of the same examples.
    """
    sums: dict[str, list[int]] = {}
    for part in run.partitions():
        table = _sizes_of(run, part, lengths, split)
        for domain, examples, tokens in table.iter_rows():
            total = sums.setdefault(domain, [0, 0])
            total[0] += examples
            total[1] += tokens
    return {domain: DomainSize(*sums[domain]) for domain in sorted(sums)}


def budget_tokens(keep: Keep, sizes: Mapping[str, DomainSize]) -> float:
    """Tokens that training will see, copies counted; rows count as of mean length."""
    examples = sum(size.num_examples for size in sizes.values())
    tokens = sum(size.num_tokens for size in sizes.values())
    if keep.tokens is not None:
        return float(keep.tokens)
    if keep.examples is not None:
        return keep.examples * tokens / examples
    share = keep.share if keep.share is not None else keep.token_share
    assert share is not None
    return share * tokens


def _sizes_of(run: RunFolder, part: Partition, lengths: str, split: str) -> pl.DataFrame:
    """domain, examples, tokens of the rows of a split in a partition."""
    examples = read_examples(run, part, [*KEY, "domain", "split"])
    counted = read_counts(run, part, lengths)
    meet(examples, counted)
    rows = examples.with_columns(counted["num_tokens"]).filter(pl.col("split") == split)
    return rows.group_by("domain", maintain_order=True).agg(
        pl.len().alias("examples"), pl.col("num_tokens").sum().alias("tokens")
    )


def _mixture(
    settings: Settings,
    name: str,
    mixer: Any,
    run: RunFolder,
    lengths: str,
    passes: MixPasses | None,
) -> dict[str, Any]:
    """What `mixture.json` holds; tables of a mixer that trains are put beside it."""
    found = domain_sizes(run, lengths)
    sizes = {domain: size for domain, size in found.items() if size.num_tokens > 0}
    if not sizes:
        raise InputError(
            "no domain has training tokens", fix="check the sources, or lower index.held_out"
        )
    budget = budget_tokens(settings.plan.kept, sizes)
    if passes is None:
        closed: ClosedMixer = mixer
        mixture: Mixture = replace(closed.mixture(sizes, budget_tokens=budget), mixer=name)
    else:
        mixture = _learned(name, passes.finish(sizes), run, sizes, budget)
    empty = sorted(found.keys() - sizes.keys())
    if empty:
        note = f"without training tokens, so left out: {', '.join(empty)}"
        mixture = replace(mixture, notes=(*mixture.notes, note))
    often = [epochs(phase, sizes, budget) for phase in mixture.phases]
    return {**mixture_values(mixture, sizes), "budget_tokens": budget, "epochs": often}


def _learned(
    name: str, found: Found, run: RunFolder, sizes: Mapping[str, DomainSize], budget: float
) -> Mixture:
    """The mixture of a mixer that trains; its tables are copied to it."""
    folder = run.mixtures / name
    for table, source in found.tables.items():
        replace_file(folder / table, partial(shutil.copyfile, source))
    if found.trajectories:
        joined = pl.concat(
            read_table(path).select(pl.lit(which).alias("run"), pl.all())
            for which, path in found.trajectories.items()
        )
        replace_file(folder / "trajectory.parquet", partial(write_table, joined))
    why = reasons(found.phases, sizes, budget, found.why)
    notes = found.notes
    often = {
        domain: times
        for phase in found.phases
        for domain, times in epochs(phase, sizes, budget).items()
        if times > _MANY_EPOCHS
    }
    if often:
        named = ", ".join(f"{domain} ({often[domain]:.3g})" for domain in sorted(often)[:5])
        notes += (
            f"more than {_MANY_EPOCHS} epochs of {named}: a smaller budget, or the mixer unimax,"
            " repeats less",
        )
    return Mixture(name, found.phases, why, notes)


def _summary(values: dict[str, Any]) -> dict[str, Any]:
    """The mixture for people and `--json`."""
    return {
        "mixer": values["mixer"],
        "budget_tokens": round(values["budget_tokens"]),
        "phases": [phase["share"] for phase in values["phases"]],
        "notes": values["notes"],
        "domains": [
            {
                "domain": domain,
                "examples": size["num_examples"],
                "tokens": size["num_tokens"],
                "weight": values["mean"][domain],
                "epochs": [each[domain] for each in values["epochs"]],
                "why": values["why"][domain],
            }
            for domain, size in values["sizes"].items()
        ],
    }
