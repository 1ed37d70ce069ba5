"""EK-FAC in phases: what is fitted on a sample of the training rows, and where it lies.

    run/ekfac/<checkpoint>/factors-<part>-<group>.safetensors      sums over tokens, float64
    run/ekfac/<checkpoint>/bases-<group>.safetensors               eigenvectors
    run/ekfac/<checkpoint>/eigenvalues-<part>-<group>.safetensors  sums over examples, float64
    run/ekfac/<checkpoint>/curvature-<group>.safetensors           what scores are made with

A part is some partitions of the pool, a group some layers of the model. Every file is made whole or
not at all, so that a run that was killed goes on with what is missing. All but `curvature` may be
removed once that is there; data that is new or changed then costs the fit again. Scorers that ask
for the same fit share it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from curate.config import STRICT, plain
from curate.data.files import fingerprint
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.models.example_losses import Labels, Reduction
from curate.models.load import pick_device
from curate.models.tasks import build_task
from jobs.fields import reference_facts
from jobs.lengths import content_of, content_settings
from jobs.measurers import Measurer, measurer_tokenizer
from jobs.measuring import batch_tokens
from jobs.own_passes import Phase
from jobs.run import Task
from jobs.settings import Settings, task_settings

VERSION = 2
"""Of what is fitted: raised when the same settings and data would give other numbers."""


class Asked(Protocol):
    """What a scorer's options say of the fit."""

    @property
    def reduction(self) -> Reduction: ...
    @property
    def labels(self) -> Labels: ...
    @property
    def damping(self) -> float: ...
    @property
    def fit_examples(self) -> int: ...
    @property
    def fit_tasks(self) -> int: ...
    @property
    def groups(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """What is fitted; each field as in `scorers.self_influence`."""

    __pydantic_config__: ClassVar = STRICT

    scorer: str
    """Whose options they are, for messages."""
    parameters: str
    reduction: Reduction
    labels: Labels
    damping: float
    fit_examples: int
    fit_tasks: int
    groups: int

    @classmethod
    def of(cls, scorer: str, asked: Asked, *, parameters: str) -> "FitOptions":
        """The options of a scorer that concern the fit.

        Args:
            scorer: its name.
            asked: its options.
            parameters: all, or a regular expression for the weights' names.
        """
        return cls(
            scorer=scorer,
            parameters=parameters,
            reduction=asked.reduction,
            labels=asked.labels,
            damping=asked.damping,
            fit_examples=asked.fit_examples,
            fit_tasks=asked.fit_tasks,
            groups=asked.groups,
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """The phases of one checkpoint's fit, and what they end with."""

    phases: tuple[Phase, ...]
    curvature: tuple[Task, ...]
    """One for each group of layers."""


def fit_folder(run: RunFolder, measurer: Measurer) -> Path:
    """Where the fit of a checkpoint lies."""
    return run.root / "ekfac" / measurer.slug


def identity_of(settings: Settings, measurer: Measurer) -> str:
    """Digest of what every measurement depends on, beside the checkpoint and the data."""
    kind = task_settings(settings)
    device = pick_device(settings.model.device).type
    return fingerprint(
        version=VERSION,
        task=plain(kind),
        facts=build_task(kind, measurer_tokenizer(settings, measurer.folder)).facts(),
        batch_tokens=batch_tokens(settings.score, device),
        threads=settings.cluster.threads,
        dtype=settings.model.dtype,
        device=device,
        reference=reference_facts(settings),
    )


def fit_phases(
    settings: Settings, options: FitOptions, measurer: Measurer, *, identity: str
) -> Fit:
    """What is to be fitted with one checkpoint; writes nothing.

    Args:
        settings: of the run.
        options: of the fit.
        measurer: the checkpoint.
        identity: from `identity_of`.
    """
    from jobs.ekfac_work import bases_work, curvature_work, eigenvalues_work, factors_work

    run = RunFolder(Path(settings.run))
    folder = fit_folder(run, measurer)
    parts = _parts(settings, options)
    common: dict[str, Any] = {
        "settings": plain(settings),
        "fit": plain(options),
        "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
        "folder": str(folder),
    }
    names = ("reduction", "parameters", "labels", "groups")
    stamp = {
        "stage": "ekfac",
        "version": VERSION,
        "identity": identity,
        "model": measurer.digest,
        "seed": settings.seed,
        "options": {name: plain(options)[name] for name in names},
        "share": sample_share(run, options),
    }
    marks = [fingerprint(**stamp, contents=_contents(settings, part)) for part in parts]
    whole = fingerprint(parts=marks)
    found: dict[str, list[Task]] = {"factors": [], "bases": [], "eigenvalues": [], "curvature": []}
    for group in range(options.groups):
        for kind, one in (("factors", "sums"), ("eigenvalues", "squares")):
            for number, part in enumerate(parts):
                base = whole if kind == "eigenvalues" else ""
                mark = fingerprint(kind=one, part=marks[number], base=base, group=group)
                more = {"group": group, "part": number, "partitions": [asdict(p) for p in part]}
                output = Output(folder / f"{kind}-{number:03d}-{group:03d}.safetensors")
                label = f"{measurer.name}, part {number}, layers {group}"
                payload = {**common, **more, "fingerprint": mark}
                found[kind].append(Task(label, payload, output, mark))
        for kind, damping in (("bases", None), ("curvature", options.damping)):
            mark = fingerprint(kind=kind, whole=whole, group=group, damping=damping)
            output = Output(folder / f"{kind}-{group:03d}.safetensors")
            payload = {**common, "group": group, "num_parts": len(parts), "fingerprint": mark}
            label = f"{measurer.name}, layers {group}"
            found[kind].append(Task(label, payload, output, mark))
    work = {
        "factors": factors_work,
        "bases": bases_work,
        "eigenvalues": eigenvalues_work,
        "curvature": curvature_work,
    }
    phases = tuple(
        Phase(f"{options.scorer}: {name} of {measurer.name}", tasks, work[name])
        for name, tasks in found.items()
    )
    if all(task.is_done() for task in found["curvature"]):
        phases = phases[-1:]  # nothing reads the rest, which may have been removed
    return Fit(phases, tuple(found["curvature"]))


def sample_share(run: RunFolder, options: FitOptions) -> float:
    """Which share of the rows the fit is on, so that about `fit_examples` are taken."""
    rows = sum(part.num_rows for part in run.partitions())
    return min(1.0, options.fit_examples / max(1, rows))


def _parts(settings: Settings, options: FitOptions) -> list[list[Partition]]:
    """The pool's partitions in turn, so that all parts are alike."""
    partitions = RunFolder(Path(settings.run)).partitions()
    count = max(1, min(options.fit_tasks, len(partitions)))
    return [partitions[number::count] for number in range(count)]


def _contents(settings: Settings, part: list[Partition]) -> list[Any]:
    run = RunFolder(Path(settings.run))
    return [
        [
            content_of(run, one),
            content_settings(settings.sources[one.source]),
            (run.examples(one).mark() or {}).get("digest"),  # the split too
        ]
        for one in part
    ]
