"""Queries of `influence` with EK-FAC: the target's gradients, preconditioned, of low rank.

Shapes: Q queries, O outputs and I inputs of a layer.
"""

import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from curate.config import parse
from curate.data.files import misshapen
from curate.errors import InputError, counted
from curate.models.checkpoints import native_errors
from curate.models.gradients import LowRank
from curate.models.gradients.request import Direction
from curate.models.kfac_queries import query_directions
from curate.models.kfac_targets import Total, nothing, total_gradient
from curate.models.tasks import Encoded
from jobs.ekfac_queries import queries_output
from jobs.ekfac_work import Shop, load_curvature
from jobs.fields import example_fields
from jobs.influence_target import read_groups, sayings_of
from jobs.measuring import measurer_of
from jobs.run import Receipt
from jobs.target import target_folder, target_settings
from scorers.influence import Influence

log = logging.getLogger(__name__)

FEW_KEPT = 0.5
"""Share of a query's squared length below which its low-rank form is warned of."""
_WHOLE = "whole"


def queries_work(payload: dict[str, Any]) -> Receipt:
    """H^-1 of the target's mean gradients, or of each target example's, of one group of layers."""
    shop, options = Shop(payload), parse(Influence, payload["scorer"])
    curvatures = load_curvature(Path(payload["folder"]), payload["group"])
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    shares: list[float] = []
    target = _target(shop)
    of_means = payload["kind"] == "queries"
    dtype = torch.float64 if shop.is_double else torch.float32
    for name, gradient in _means(shop, options, target) if of_means else _each(shop, target):
        (direction,), kept = query_directions(gradient, curvatures, shop.layers, rank=options.rank)
        for parameter, value in direction.items():
            sides = value._asdict() if isinstance(value, LowRank) else {_WHOLE: value}
            for side, numbers in sides.items():
                tensors[f"{len(names)}/{parameter}/{side}"] = numbers.to("cpu", dtype).contiguous()
        names.append(name)
        shares.append(kept)
    kept = float(np.mean(shares)) if shares else 1.0
    facts: dict[str, Any] = {"queries": len(names), "kept": round(kept, 4)}
    said = _sayings(options, target, kept) if of_means else []
    if said:
        facts["says"] = f"influence, {measurer_of(payload['measurer']).name}: {'; '.join(said)}"
        log.warning("%s", facts["says"])
    parameters = [parameter for layer in shop.layers for parameter in layer.parameters]
    noted = {"names": names, "parameters": parameters, "model": payload["measurer"]["digest"]}
    slug = measurer_of(payload["measurer"]).slug
    output = queries_output(shop.run, options, payload["kind"], slug, payload["group"])

    def write(path: Path) -> None:
        with native_errors():
            save_file(tensors, path, metadata={"facts": json.dumps(noted)})

    output.write(write, payload["fingerprint"], **facts)
    return facts


def query_names(shop: Shop, options: Influence, kind: str, slug: str) -> list[str]:
    """Sub-tasks (`queries`), or numbers of target examples (`targets`), in order."""
    with _opened(shop, options, kind, slug, 0) as (_, facts):
        return list(facts["names"])


def load_queries(
    shop: Shop, options: Influence, kind: str, slug: str, some: slice
) -> list[Direction]:
    """What `queries_work` left, all layers of it, on the model's device.

    Args:
        shop: of the checkpoint.
        options: of the scorer.
        kind: `queries` or `targets`.
        slug: of the checkpoint.
        some: which of them.

    Raises:
        InputError: a file is missing or damaged.
    """
    found: dict[int, dict[str, Tensor | LowRank]] = {}
    for group in range(len(shop.groups)):
        with _opened(shop, options, kind, slug, group) as (file, facts):
            known = set(file.keys())
            for number in range(len(facts["names"]))[some]:
                own = found.setdefault(number, {})
                for parameter in facts["parameters"]:
                    key = f"{number}/{parameter}"
                    own[parameter] = (
                        file.get_tensor(f"{key}/{_WHOLE}")
                        if f"{key}/{_WHOLE}" in known
                        else LowRank(
                            *(file.get_tensor(f"{key}/{side}") for side in LowRank._fields)
                        )
                    )
    return list(found.values())


@contextmanager
def _opened(
    shop: Shop, options: Influence, kind: str, slug: str, group: int
) -> Generator[tuple[Any, dict[str, Any]]]:
    path = queries_output(shop.run, options, kind, slug, group).path
    try:
        with safe_open(path, "pt", device=str(shop.loaded.device)) as file:
            yield file, json.loads(file.metadata()["facts"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise misshapen(path, f"{type(error).__name__}: {error}") from error


def _sayings(options: Influence, target: Sequence[Encoded], kept: float) -> list[str]:
    """What the user should know of the queries."""
    counts = {
        "truncated": int(sum(encoded.truncated.sum() for encoded in target)),
        "unscored": int(sum((encoded.num_scored == 0).sum() for encoded in target)),
    }
    found = sayings_of(counts)
    if kept < FEW_KEPT:
        found.append(
            f"a rank of {options.rank} keeps {100 * kept:.0f} % of the squared length of the"
            " queries; raise influence.rank"
        )
    return found


Gradients = Iterator[tuple[str, Mapping[str, Tensor]]]
"""Name of a query; layer -> (1, O, I)."""


def _means(shop: Shop, options: Influence, target: Sequence[Encoded]) -> Gradients:
    """The mean gradient of each sub-task, one after the other.

    Raises:
        InputError: no example of a sub-task has a gradient.
    """
    groups = read_groups(shop.settings, options.tasks)
    left_out = 0
    for number, name in enumerate(groups.names):
        total = nothing(shop.layers)
        start = 0
        for encoded in target:
            own = groups.of_rows[start : start + len(encoded)] == number
            start += len(encoded)
            total = total.plus(
                _total(shop, encoded, np.flatnonzero(own & (encoded.num_scored > 0)))
            )
        left_out += total.num_left_out
        if not total.num:
            raise InputError(
                f"no target example of {name!r} has a gradient",
                fix="look at the reasons for which the target's examples were set aside",
            )
        yield name, total.mean()
    if left_out:
        log.warning("influence: %s a gradient that is not finite, and no part in the queries",
                    counted(left_out, "target example has", "target examples have"))  # fmt: skip


def _each(shop: Shop, target: Sequence[Encoded]) -> Gradients:
    """The gradient of each target example that has one, by its number in the target."""
    start = 0
    for encoded in target:
        for place in np.flatnonzero(encoded.num_scored > 0):
            total = _total(shop, encoded, np.array([place]))
            if total.num:
                yield str(start + int(place)), total.mean()
        start += len(encoded)


def _target(shop: Shop) -> list[Encoded]:
    """The target's partitions as numbers."""
    own = target_settings(shop.settings)
    folder = target_folder(shop.run)
    return [shop.task.encode(example_fields(own, folder, part)) for part in folder.partitions()]


def _total(shop: Shop, encoded: Encoded, chosen: np.ndarray) -> Total:
    return total_gradient(
        shop.loaded.model,
        shop.task,
        encoded,
        chosen,
        layers=shop.layers,
        batch_tokens=shop.budget,
        device=shop.loaded.device,
        reduction=shop.options.reduction,
    )
