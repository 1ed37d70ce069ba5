"""What a worker does for the scorer `dvgs`.

Shapes: N examples of a partition, S evaluated steps.
"""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import xxhash
from torch import Tensor

from curate.config import parse
from curate.data.example import KEY
from curate.data.files import read_json, remove_folder, replace_folder
from curate.data.layout import RunFolder
from curate.data.partitions import Partition
from curate.data.tables import read_examples, write_table
from curate.errors import InputError
from curate.models.epochs import random_seed
from curate.models.gradient_similarity import SimilarityPass
from curate.models.load import LoadedModel, load_model
from curate.models.quantities import measure
from curate.models.recorded_steps import load_step, put
from curate.models.settings import TabularClassification
from curate.models.target_gradients import (
    Recording,
    evaluated_steps,
    record,
    target_lengths,
    target_schedule,
)
from curate.models.tasks import Encoded
from jobs.dvgs import (
    done_output,
    seed_folder,
    slug_of,
    values_output,
)
from jobs.dvgs_target import check_width, target_contents, target_examples
from jobs.measuring import as_columns, batch_tokens
from jobs.run import Receipt
from jobs.settings import task_settings
from jobs.target import write_facts
from jobs.training_work import (
    Workshop,
    begin,
    encode_partition,
    open_optimiser,
    open_workshop,
    training,
    write_model,
)
from scorers.dvgs import DVGS, SIMILARITIES, Running, similarities, takes_turn, turns

log = logging.getLogger(__name__)


def record_work(payload: dict[str, Any]) -> Receipt:
    """Train on the target with one seed, from where an earlier attempt stopped."""
    shop, scorer = open_workshop(payload), parse(DVGS, payload["scorer"])
    seed, mark = int(payload["seed"]), str(payload["fingerprint"])
    folder = seed_folder(shop.run, seed)
    draws = random_seed(shop.settings.seed, "dvgs", seed)
    encoded = target_examples(shop)
    lengths, budget = target_lengths(
        encoded, batch_size=scorer.batch_size, batch_tokens=scorer.batch_tokens
    )
    schedule = target_schedule(lengths, seed=draws, budget=budget, epochs=scorer.epochs)
    every, _ = evaluated_steps(schedule.total_steps, scorer.every)
    begin(folder, mark)
    optimiser = open_optimiser(shop, draws, schedule.total_steps)
    check_width(encoded, optimiser.model)
    recording = Recording(
        folder=folder,
        fingerprint=mark,
        every=every,
        measures=scorer.measures,
        runs=int(payload["runs"]),
        resume_every_seconds=training(shop.settings).resume_every_seconds,
    )
    points = record(
        optimiser,
        shop.task,
        encoded,
        lengths=lengths,
        budget=budget,
        schedule=schedule,
        recording=recording,
    )
    replace_folder(
        folder / "model", lambda path: write_model(optimiser.model, shop.tokenizer, path)
    )
    facts = {"steps": schedule.total_steps, "evaluated": len(points)}
    done_output(shop.run, seed).write(
        lambda path: write_facts(path, {"schema_version": 1, **facts, "points": points}),
        mark,
        **facts,
    )
    remove_folder(recording.state.parent)
    return facts


def measure_work(payload: dict[str, Any]) -> Receipt:
    """Measure one partition at all evaluated steps of one training."""
    shop, scorer = open_workshop(payload), parse(DVGS, payload["scorer"])
    seed, part = int(payload["seed"]), Partition(**payload["partition"])
    examples = read_examples(shop.run, part, [*KEY, "content"])
    encoded = encode_partition(shop, part)
    is_copy = examples["content"].is_in(target_contents(shop).to_list()).to_numpy()
    counts = _counted(encoded, is_copy, scorer, part)
    if scorer.copies == "drop":
        encoded = replace(encoded, num_scored=np.where(is_copy, 0, encoded.num_scored))
    points = read_points(shop.run, seed)
    loaded = load_model(
        shop.settings.model,
        task_settings(shop.settings),
        checkpoint=seed_folder(shop.run, seed) / "model",
    )
    budget = batch_tokens(shop.settings.score, loaded.device.type)
    found, passed = measure(
        loaded.model, shop.task, encoded, batch_tokens=budget, device=loaded.device
    )
    keys = examples.select(KEY)
    draws = _draws(keys, shop.settings.seed, seed)
    ways = _Ways(shop, scorer, seed, max(1, budget // 4))
    means, steps = _over_steps(ways, encoded, loaded, points=points, draws=draws)
    columns = {**means, "target_loss": found["loss"]}
    if not isinstance(task_settings(shop.settings), TabularClassification):
        columns["num_scored"] = found["num_scored"]
    table = keys.hstack(as_columns({name: value.float() for name, value in columns.items()}))
    not_finite = table["cosine"].null_count() - int((encoded.num_scored == 0).sum())
    if not_finite:
        log.warning("%d examples have a gradient that is not finite; they count as not scored",
                    not_finite)  # fmt: skip
    counts |= {"not_finite": not_finite, "halved": passed.halved + ways.halved}
    output = shop.run.quantities(part, slug_of(seed))
    if scorer.aggregate == "rank":
        output = values_output(shop.run, seed, part)
        table = table.hstack(as_columns(steps))
    output.write(
        lambda path: write_table(table, path), payload["fingerprint"], rows=table.height, **counts
    )
    return {"rows": table.height, **counts}


def read_points(run: RunFolder, seed: int) -> list[dict[str, Any]]:
    """The evaluated steps of a training.

    Raises:
        InputError: it is not there.
    """
    done = read_json(done_output(run, seed).path)
    if done is None:
        raise InputError(
            f"{done_output(run, seed).path} is missing", fix="run the same command again"
        )
    return done["points"]


class _Ways:
    """How the steps are measured, and how often memory did not suffice."""

    def __init__(self, shop: Workshop, scorer: DVGS, seed: int, budget: int) -> None:
        self.shop, self.scorer, self.seed, self.budget = shop, scorer, seed, budget
        self.halved = 0


def _over_steps(
    ways: _Ways,
    encoded: Encoded,
    loaded: LoadedModel,
    *,
    points: list[dict[str, Any]],
    draws: npt.NDArray[np.uint64],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean similarities (N,), NaN where nothing is scored; for ranks also those of each step."""
    scorer, folder = ways.scorer, seed_folder(ways.shop.run, ways.seed)
    engine = SimilarityPass(
        loaded.model,
        ways.shop.task,
        batch_tokens=ways.budget,
        device=loaded.device,
        only=scorer.measures,
    )
    scored = np.flatnonzero(encoded.num_scored > 0)
    running = Running(SIMILARITIES, len(encoded))
    steps: dict[str, Tensor] = {}
    for point, turn in zip(points, turns(len(points), scorer.subsample), strict=True):
        recorded = load_step(folder, point["step"])
        put(loaded.model, recorded)
        chosen = scored if scorer.subsample == 1 else scored[takes_turn(draws[scored], turn)]
        dot, square, passed = engine.measure(encoded, chosen, recorded.gradient)
        ways.halved += passed.halved
        values = similarities(dot, square, point["square"])
        rows = torch.from_numpy(chosen)
        running.add(rows, values, weight=step_weight(scorer, point), stands_for=turn.size)
        if scorer.aggregate == "rank":
            column = torch.full((len(encoded),), torch.nan, dtype=torch.float32)
            column[rows] = values[scorer.similarity].float()
            steps[step_column(point)] = column
    means = running.means()
    nothing = torch.from_numpy(encoded.num_scored == 0)
    return {name: value.masked_fill(nothing, torch.nan) for name, value in means.items()}, steps


def step_weight(scorer: DVGS, point: dict[str, Any]) -> float:
    """How much an evaluated step counts in the mean."""
    return float(point["square"]) ** 0.5 if scorer.weight_by_norm else 1.0


def step_column(point: dict[str, Any]) -> str:
    return f"step-{point['step']:06d}"


def _counted(
    encoded: Encoded, is_copy: npt.NDArray[np.bool_], scorer: DVGS, part: Partition
) -> dict[str, int]:
    """What a reader of the scores should know."""
    if encoded.problems:
        first = min(encoded.problems)
        log.warning("%d examples of %s are not scored; the first, number %d: %s",
                    len(encoded.problems), part.name, first, encoded.problems[first])  # fmt: skip
    copies = int(is_copy.sum())
    if copies:
        how = "are not scored" if scorer.copies == "drop" else "score high for that reason alone"
        log.warning("%d examples of %s stand in the target too and %s", copies, part.name, how)
    return {
        "unscored": int((encoded.num_scored == 0).sum()),
        "truncated": int(encoded.truncated.sum()),
        "copies": copies,
    }


def _draws(keys: pl.DataFrame, seed: int, training_seed: int) -> npt.NDArray[np.uint64]:
    """(N,) 64 random bits of each example and training."""
    return np.array(
        [
            xxhash.xxh3_64_intdigest(
                f"{seed}\0dvgs\0{training_seed}\0{source}\0{file}\0{row}".encode()
            )
            for source, file, row in keys.rows()
        ],
        dtype=np.uint64,
    )
