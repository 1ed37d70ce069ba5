"""Curvature of the pool's projected gradients: sums by piece of the pool, factors, whitened rows.

run/influence/<checkpoint>/sums/part-….safetensors   Phi^T Phi of a piece, named by its first part
run/influence/<checkpoint>/curvature.safetensors     Cholesky factors; with trak curvature-odds
run/influence/<checkpoint>/whitened/part-….vectors   L^-1 phi, where it is asked for

Training rows alone make the curvature. Sums are added up in the order of the pool, so that the
factors do not depend on who has made them. What lies in `sums` may be removed once these are there.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from curate.config import STRICT, parse, plain
from curate.data.example import KEY, TRAIN
from curate.data.files import discard, fingerprint, misshapen
from curate.data.files import replace as replace_file
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples, write_table
from curate.models.checkpoints import native_errors
from curate.models.curvature import Curvature, Structure, Sums, curvature_of
from curate.models.index_rows import RowsWriter, encode_rows
from jobs.influence_rows import Known, check_bytes, known_rows, scales_output, whitened_output
from jobs.influence_sides import FOLDER
from jobs.measurers import Measurer
from jobs.measuring import measurer_of
from jobs.own_passes import Phase
from jobs.run import Receipt, Task
from jobs.settings import Settings, parse_settings

VERSION = 1
"""Raised when the same rows would give other factors."""

Features = Literal["loss", "odds"]

PIECES = 32
"""At most, of a pool: each leaves its sums on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvatureOptions:
    """Of what, and how much is added to it."""

    __pydantic_config__: ClassVar = STRICT

    structure: Structure = "blocks"
    share: float = 0.1
    features: Features = "loss"
    """Gradients of losses, or of log odds."""
    whiten: bool = False


def curvature_output(run: RunFolder, slug: str, features: Features = "loss") -> Output:
    """Factors of one checkpoint."""
    name = "curvature" if features == "loss" else f"curvature-{features}"
    return Output(run.root / FOLDER / slug / f"{name}.safetensors")


def sums_output(run: RunFolder, part: Partition, slug: str) -> Output:
    """Sums over the piece of the pool that begins with `part`."""
    return Output(run.root / FOLDER / slug / "sums" / f"{part.name}.safetensors")


def load_curvature(run: RunFolder, slug: str, features: Features = "loss") -> Curvature:
    """What `factor_work` wrote.

    Raises:
        InputError: it is missing or damaged.
    """
    return Curvature.of_arrays(_arrays(curvature_output(run, slug, features)))


class Planned(NamedTuple):
    """What makes a curvature."""

    phases: list[Phase]
    """From rows to factors, and to whitened rows where they are asked for."""
    stamps: dict[str, str]
    """Checkpoint -> fingerprint of its factors."""


def curvature_plan(
    settings: Settings,
    chosen: Sequence[Measurer],
    options: CurvatureOptions,
    rows: dict[str, list[Task]],
    *,
    training: Sequence[str],
    scorer: str,
) -> Planned:
    """What is to be done; writes nothing.

    Args:
        settings: of the run.
        chosen: checkpoints.
        options: of the curvature.
        rows: checkpoint -> tasks that make its rows, in the order of the pool's partitions.
        training: of `training_digests`.
        scorer: for the names of the phases.
    """
    run = RunFolder(Path(settings.run))
    summing: list[Task] = []
    factoring: list[Task] = []
    whitening: list[Task] = []
    stamps: dict[str, str] = {}
    for measurer in chosen:
        own = rows[measurer.name]
        common = {
            "settings": plain(settings),
            "curvature": plain(options),
            "measurer": {**asdict(measurer), "folder": str(measurer.folder)},
        }
        sums = _summing(settings, measurer, common, own, training)
        stamp = fingerprint(
            stage="influence curvature",
            version=VERSION,
            sums=[task.fingerprint for task in sums],
            share=options.share,
        )
        firsts = [task.payload["partitions"][0] for task in sums]
        payload = common | {"partitions": firsts, "fingerprint": stamp}
        output = curvature_output(run, measurer.slug, options.features)
        factoring.append(Task(measurer.name, payload, output, stamp))
        stamps[measurer.name] = stamp
        summing += sums
        if options.whiten:
            whitening += _whitening(run, measurer, common, own, stamp)
    phases = [
        Phase(f"{scorer}: sums for the curvature", summing, sums_work),
        Phase(f"{scorer}: factors of the curvature", factoring, factor_work),
    ]
    if all(task.is_done() for task in factoring):
        phases = phases[1:]  # the sums may have been removed
    if whitening:
        phases.append(Phase(f"{scorer}: whitening", whitening, whiten_work))
    return Planned(phases, stamps)


def _summing(
    settings: Settings,
    measurer: Measurer,
    common: dict[str, Any],
    rows: Sequence[Task],
    training: Sequence[str],
) -> list[Task]:
    run = RunFolder(Path(settings.run))
    parts = run.partitions()
    options = common["curvature"]
    found: list[Task] = []
    for piece in _pieces(len(parts)):
        stamp = fingerprint(
            stage="influence sums",
            version=VERSION,
            structure=options["structure"],
            features=options["features"],
            rows=[rows[place].fingerprint for place in piece],
            training=[training[place] for place in piece],
            threads=settings.cluster.threads,
        )
        members = [parts[place] for place in piece]
        places = [asdict(part) for part in members]
        payload = common | {"partitions": places, "fingerprint": stamp}
        output = sums_output(run, members[0], measurer.slug)
        found.append(Task(f"{measurer.name}, {members[0].name}", payload, output, stamp))
    return found


def _pieces(count: int) -> list[list[int]]:
    """Partitions that are summed together, side by side."""
    cut = np.array_split(np.arange(count), min(count, PIECES)) if count else []
    return [piece.tolist() for piece in cut]


def _whitening(
    run: RunFolder, measurer: Measurer, common: dict[str, Any], rows: list[Task], stamp: str
) -> list[Task]:
    found: list[Task] = []
    for part, task in zip(run.partitions(), rows, strict=True):
        mark = fingerprint(stage="influence whitened", curvature=stamp, rows=task.fingerprint)
        payload = common | {"partitions": [asdict(part)], "fingerprint": mark}
        output = whitened_output(run, part, measurer.slug)
        table = scales_output(run, part, measurer.slug)
        if output.is_done(mark) and not table.is_done(mark):  # someone has removed it
            output = table
        found.append(Task(f"{measurer.name}, {part.name}", payload, output, mark))
    return found


def sums_work(payload: dict[str, Any]) -> Receipt:
    """Phi^T Phi over the training rows of some partitions."""
    run, slug, options = _open(payload)
    sums: Sums | None = None
    for part in _parts(payload):
        known = known_rows(run, part, slug)
        if sums is None:
            sums = Sums.empty(known.header.spans(), options.structure)
        training = (read_examples(run, part, ["split"])["split"] == TRAIN).to_numpy()
        for rows, values in known.blocks():
            held = torch.from_numpy(known.usable[rows][training[rows]])
            features = features_of(known, rows, values, options.features)
            sums = sums.add(features[torch.from_numpy(training[rows])], held)
    assert sums is not None
    arrays = sums.arrays()
    facts = {"rows": sums.num_rows, "left_out": sums.num_left_out}
    _save(sums_output(run, _parts(payload)[0], slug), arrays, payload["fingerprint"], facts)
    return facts


def features_of(known: Known, rows: slice, values: Tensor, features: Features) -> Tensor:
    """(n, k) float64 what the curvature is made of, given decoded rows (n, k)."""
    factors = known.factors_of(rows, values, "trak" if features == "odds" else "influence")
    return values.double() if factors is None else values.double() * factors[:, None]


def factor_work(payload: dict[str, Any]) -> Receipt:
    """Add the sums up, damp and factor them."""
    run, slug, options = _open(payload)
    total: Sums | None = None
    for part in _parts(payload):
        own = Sums.of_arrays(_arrays(sums_output(run, part, slug)))
        total = own if total is None else total.plus(own)
    assert total is not None
    found = curvature_of(total, share=options.share)
    facts: dict[str, Any] = {"rows": found.num_rows, "damping": dict(found.damping)}
    facts |= {"structure": options.structure, "share": options.share}
    facts["effective_dimension"] = found.effective_dimension
    output = curvature_output(run, slug, options.features)
    _save(output, found.arrays(), payload["fingerprint"], facts)
    return facts


def whiten_work(payload: dict[str, Any]) -> Receipt:
    """z = L^-1 phi of one partition, in the type of its rows."""
    run, slug, options = _open(payload)
    (part,) = _parts(payload)
    known = known_rows(run, part, slug)
    curvature = load_curvature(run, slug, options.features)
    header = replace(known.header, projection={**known.header.projection, "whitened": True})
    scales = np.ones((header.num_rows, header.num_scales), dtype=np.float32)

    def write(path: Path) -> None:
        with RowsWriter(path, header) as writer:
            for rows, values in known.blocks():
                found = encode_rows(curvature.whiten(values), header.blocks, header.dtype)
                writer.write(range(len(known.usable))[rows], found.stored)
                if found.scales is not None:
                    scales[rows] = found.scales
        table = read_examples(run, part, KEY)
        if header.num_scales:
            given = pl.Series("scales", scales, dtype=pl.Array(pl.Float32, header.num_scales))
            table = table.with_columns(given)
        scales_output(run, part, slug).write(
            lambda place: write_table(table, place), payload["fingerprint"], rows=table.height
        )

    output = whitened_output(run, part, slug)
    discard(output.mark_path)
    replace_file(output.path, write)
    output.adopt(payload["fingerprint"], rows=header.num_rows)
    return {"rows": header.num_rows}


def _open(payload: dict[str, Any]) -> tuple[RunFolder, str, CurvatureOptions]:
    settings = parse_settings(payload["settings"])
    torch.set_num_threads(settings.cluster.threads)
    slug = measurer_of(payload["measurer"]).slug
    return RunFolder(Path(settings.run)), slug, parse(CurvatureOptions, payload["curvature"])


def _parts(payload: dict[str, Any]) -> list[Partition]:
    return [Partition(**each) for each in payload["partitions"]]


def _save(output: Output, arrays: dict[str, Any], fingerprint: str, facts: dict[str, Any]) -> None:
    def write(path: Path) -> None:
        with native_errors():
            save_file(arrays, path)

    output.write(write, fingerprint, **facts)


def _arrays(output: Output) -> dict[str, Any]:
    try:
        check_bytes(output)
        return load_file(output.path)
    except (OSError, SafetensorError) as error:
        raise misshapen(output.path, str(error)) from error
