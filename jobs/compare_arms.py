"""The arms of a comparison as sets of examples: plans by the planner, one for all or one a seed.

A set has a folder that looks like a run: its own `plan/`, and links to the index and the token
counts of the run, so that whatever reads a plan (the shard writer too) can work there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from curate.config import plain
from curate.data.counts import EXAMPLES, counts_output
from curate.data.files import fingerprint, read_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.errors import ConfigError, InputError
from curate.evaluate.paired import Stratum, shared_luck
from curate.plan.plan import columns_read
from curate.plan.rules import Thresholds
from curate.plan.stored import from_values
from jobs.compare_settings import ARMS, ArmSettings, Compare
from jobs.domains_use import domain_digests
from jobs.plan_tables import score_columns, score_digests
from jobs.settings import Settings

VERSION = 1

PLAN, RANDOM = "plan", "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One arm that trains on examples of this run."""

    name: str
    what: str
    """One line on what it trains on."""
    redrawn: bool = False
    """Whether each seed gets a set of its own."""
    share: float | None = None
    """Token share, for the points of a curve."""
    draw: int = 1
    """Of random: the how manieth set of each seed."""
    own: ArmSettings | None = None
    """Of the user."""

    def sets(self, seeds: Sequence[int]) -> list[str]:
        """Names of its sets; also their folders below `compare/arms`."""
        return [f"{self.name}/seed-{seed}" for seed in seeds] if self.redrawn else [self.name]

    def set_of(self, seed: int) -> str:
        """The set that a seed trains on."""
        return f"{self.name}/seed-{seed}" if self.redrawn else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class SetFacts:
    """What there is in a set."""

    digest: str
    """Of copies and weights: sets of one digest train alike."""
    rows: int
    copies: int
    tokens: int
    """Copies counted; examples, for tables."""
    weighted: bool
    """Whether weights differ."""


def folder_of(run: RunFolder, name: str) -> RunFolder:
    """The folder of a set, which looks like a run."""
    return RunFolder(run.root / "compare" / "arms" / name)


def specs(compare: Compare) -> list[Spec]:
    """The arms that are made from this run's tables, random among them."""
    found: list[Spec] = []
    for arm in compare.arms:
        if isinstance(arm, ArmSettings):
            if arm.run is None and arm.rules is None and "{shards}" not in (arm.command or ""):
                continue
            what = f"the plan of {arm.run}" if arm.run else "rules of its own"
            if arm.run is None and arm.rules is None:
                what = ARMS[PLAN]
            found.append(Spec(name=arm.name, what=what, redrawn=arm.redraw, own=arm))
            continue
        redrawn = compare.redraw if arm == PLAN else arm not in ("longest", "everything")
        found.append(Spec(name=arm, what=ARMS[arm], redrawn=redrawn))
    if all(spec.name != RANDOM for spec in found):
        found.append(Spec(name=RANDOM, what=ARMS[RANDOM], redrawn=True))
    found += [
        Spec(name=f"{RANDOM}-{draw}", what=f"{ARMS[RANDOM]}, once more", redrawn=True, draw=draw)
        for draw in range(2, compare.random_draws + 1)
    ]
    for share in compare.shares:
        found += [
            Spec(
                name=f"{arm}@{share:g}",
                what=f"{ARMS[arm]}, at {share:.4g} of the tokens",
                redrawn=arm == RANDOM or compare.redraw,
                share=share,
            )
            for arm in (PLAN, RANDOM)
        ]
    return found


def draw_seed(settings: Settings, seed: int) -> int:
    """Seed of the draws that one seed of the comparison makes; never that of the run's own plan."""
    return xxhash.xxh3_64_intdigest(f"compare/{settings.seed}/{seed}".encode()) >> 1


@dataclass(frozen=True, slots=True)
class Making:
    """What the sets are made from."""

    settings: Settings
    run: RunFolder
    compare: Compare
    specs: list[Spec]
    lengths: str
    """Digest of the tokenizer whose tokens are counted."""
    plan: Thresholds
    """The run's own plan."""
    fingerprint: str
    notes: tuple[str, ...] = ()
    """What a reader should know about the arms."""

    @classmethod
    def of(cls, settings: Settings, lengths: str) -> "Making":
        """Look at the run; nothing is written.

        Raises:
            InputError: there is no plan yet, or another run is not of these data.
        """
        run = RunFolder(Path(settings.run))
        compare = settings.compare
        plan, digest = read_plan(run)
        arms, notes = specs(compare), tuple[str, ...]()
        if lengths == EXAMPLES and any(spec.name == "longest" for spec in arms):
            arms = [spec for spec in arms if spec.name != "longest"]
            notes = ("longest is left out: rows of numbers all have the same length",)
        made_from = fingerprint(
            stage="compare arms",
            version=VERSION,
            plan=digest,
            planned=[_digest(run.planned(part)) for part in run.partitions()],
            seeds=[settings.seed, *compare.seeds],
            arms=[plain(spec) for spec in arms],
            others=[
                _digest(_own_run(spec).planned(part))
                for spec in arms
                if spec.own is not None and spec.own.run is not None
                for part in run.partitions()
            ],
            inputs=[
                [
                    _digest(run.examples(part)),
                    _digest(counts_output(run, part, lengths)),
                    *domain_digests(settings, part),
                ]
                for part in run.partitions()
            ],
            scores={
                name: score_digests(run, part, sorted({name.partition(".")[0]}))
                for spec in arms
                for name in columns_of(spec, settings, run)
                for part in run.partitions()
            },
        )
        return cls(settings, run, compare, arms, lengths, plan, made_from, notes)

    @property
    def sets(self) -> list[str]:
        return [name for spec in self.specs for name in spec.sets(self.compare.seeds)]


def set_facts(making: Making) -> dict[str, SetFacts]:
    """Set -> what is in it, from the descriptions of all partitions."""
    found: dict[str, SetFacts] = {}
    described = [read_json(described_output(making.run, p).path) for p in making.run.partitions()]
    for name in making.sets:
        entries = [value["sets"][name] for value in described]
        found[name] = SetFacts(
            digest=fingerprint(parts=[entry["digest"] for entry in entries]),
            rows=sum(entry["rows"] for entry in entries),
            copies=sum(entry["copies"] for entry in entries),
            tokens=sum(entry["tokens"] for entry in entries),
            weighted=any(entry["weighted"] for entry in entries),
        )
    return found


def set_domains(making: Making, name: str) -> dict[str, int]:
    """Domain -> tokens of a set, copies counted."""
    found: dict[str, int] = {}
    for part in making.run.partitions():
        entry = read_json(described_output(making.run, part).path)["sets"][name]
        for domain, tokens in entry["domains"].items():
            found[domain] = found.get(domain, 0) + tokens
    return dict(sorted(found.items()))


def luck(making: Making) -> dict[str, float]:
    """Arm -> how far the sets of its seeds share their luck, in [0, 1]."""
    described = [read_json(described_output(making.run, p).path) for p in making.run.partitions()]
    sizes: dict[str, int] = {}
    for value in described:
        for domain, rows in value["domains"].items():
            sizes[domain] = sizes.get(domain, 0) + rows
    found: dict[str, float] = {}
    for spec in making.specs:
        num_sets = len(spec.sets(making.compare.seeds))
        strata: list[Stratum] = []
        for domain, size in sizes.items():
            pairs = [value["arms"][spec.name].get(domain, (0, 0)) for value in described]
            kept = sum(pair[0] for pair in pairs) / num_sets
            common = sum(pair[1] for pair in pairs) / max(1, num_sets * (num_sets - 1))
            strata.append(Stratum(kept, kept if num_sets == 1 else common, size))
        found[spec.name] = shared_luck(strata)
    return found


def described_output(run: RunFolder, part: Partition) -> Output:
    return Output(run.root / "compare" / "arms" / "described" / f"{part.name}.json")


def result_output(run: RunFolder, key: str) -> Output:
    """What came of one training run; `key` names set and seed."""
    return Output(run.root / "compare" / "trained" / key / "result.json")


def read_plan(run: RunFolder) -> tuple[Thresholds, str]:
    """The cuts of a run's own plan, and the digest of their file.

    Raises:
        InputError: there is no complete plan.
    """
    output = Output(run.plan / "thresholds.json")
    mark = output.mark()
    partitions = run.partitions()
    if mark is None or not partitions or any(run.planned(p).mark() is None for p in partitions):
        raise InputError(
            f"there is no complete plan in {run.root}", fix=f"run `curate plan {run.root}` first"
        )
    ranks = run.plan / "ranks.npy"
    array = np.load(ranks) if mark["ranks"] else np.zeros(0, np.float32)
    return from_values(read_json(output.path), array)[PLAN], mark["digest"]


def is_given(spec: Spec) -> bool:
    """Whether its plan lies somewhere already."""
    if spec.own is not None:
        return spec.own.rules is None
    return spec.name == PLAN and not spec.redrawn


def _own_run(spec: Spec) -> RunFolder:
    assert spec.own is not None
    assert spec.own.run is not None
    return RunFolder(Path(spec.own.run))


def _digest(output: Output) -> str:
    mark = output.mark()
    if mark is None:
        raise InputError(
            f"{output.path} is missing or unfinished",
            fix="finish that run first; an arm's run has to be over the same data",
        )
    return mark["digest"]


def columns_of(spec: Spec, settings: Settings, run: RunFolder) -> tuple[str, ...]:
    """Score columns that decide an arm."""
    if spec.own is not None:
        rules = spec.own.rules
        if rules is not None and rules.is_diverse:
            raise ConfigError(
                f"the arm {spec.name} draws by {rules.draw}, which takes a run of its own",
                fix="make that plan with `curate plan` in another run, and name the run here",
            )
        return () if rules is None else columns_read(rules, score_columns(run))
    name = spec.name.partition("@")[0]
    if is_given(spec) or name not in (PLAN, "natural", "unimax", "shuffled"):
        return ()
    rules = settings.plan
    if name == "shuffled":  # drops the same rows, but has no score
        rules = replace(rules, score=None, drop_first=0.0, weights=None)
    return columns_read(rules, score_columns(run))
