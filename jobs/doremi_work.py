"""What a worker does for `jobs.doremi`: a reference, its losses, a proxy.

Shapes: S sequences, K domains.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from curate.config import parse
from curate.data.files import replace
from curate.data.partitions import Output
from curate.errors import ConfigError
from curate.models.epochs import random_seed
from curate.models.load import load_model, max_positions
from curate.models.packing import check_packing
from curate.models.sequence_losses import Computed, SequenceLosses, compute_losses, write_losses
from curate.models.sequences import Sequences
from curate.models.settings import CausalLM, Model
from jobs.proxy_work import Making, proxy_seed, result_output, train_proxy, write_result
from jobs.run import Receipt
from jobs.sequences import open_sequences
from jobs.settings import task_settings
from jobs.training_work import Workshop, begin, open_workshop
from mixers.doremi import DoReMi, DoReMiRule
from mixers.proxy_draws import Draw, stratified_counts
from mixers.proxy_settings import Proxy
from mixers.rules import Rule

WEIGHT_OPTIONS = ("eta", "eta_schedule", "smoothing", "warm_share")
"""Settings of DoReMi that its rule reads."""

_BATCH_TOKENS = 16_384
_OF_A_FILE = ("file", "output", "fingerprint")


def make_rule(making: Making) -> Rule:
    """DoReMi's rule for a proxy."""
    options = {name: making.options[name] for name in WEIGHT_OPTIONS}
    return DoReMiRule(DoReMi(**options), len(making.data.sequences.domains))


def open_reference(payload: Mapping[str, Any]) -> SequenceLosses:
    """The cached losses that a proxy's task names."""
    return SequenceLosses([_at(payload, path) for path in payload["options"]["losses"]])


def train_reference(payload: dict[str, Any]) -> Receipt:
    """Train a reference, unless the rounds have come to rest."""
    _open_losses.cache_clear()
    options = payload["options"]
    before = _at(payload, options["from"]).parent if "from" in options else None
    if before is not None and is_at_rest(before):
        return _take_over(payload, before)
    return train_proxy(payload)


def train_round(payload: dict[str, Any]) -> Receipt:
    """Train a proxy, unless the rounds have come to rest."""
    _open_losses.cache_clear()  # a reference would stay beside the proxy in memory
    options = payload["options"]
    before = None if options["before"] is None else _at(payload, options["before"])
    if before is not None and is_at_rest(before):
        return _take_over(payload, before)
    return train_proxy(payload)


def round_facts(payload: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a round, with how far the weights have moved since the one before."""
    options = payload["options"]
    if options["before"] is None:
        return dict(facts)
    earlier = read_result(_at(payload, options["before"]))["mixture"]
    moved = max(abs(weight - earlier[name]) for name, weight in facts["mixture"].items())
    return {**facts, "moved": moved, "at_rest": moved < options["tolerance"]}


def reference_losses(payload: dict[str, Any]) -> Receipt:
    """Write the losses of a reference on those sequences of a file that its proxy will draw.

    Raises:
        ConfigError: the reference does not read sequences of that length, or packed ones.
        InputError: it is missing or damaged.
    """
    shop, proxy = open_workshop(payload), parse(Proxy, payload["proxy"])
    numbers = np.empty(0, dtype=np.int64)
    computed = Computed(np.zeros((3, 0), np.int64), np.zeros(0, np.float16))
    if payload["before"] is None or not is_at_rest(Path(payload["before"])):
        shared = {key: value for key, value in payload.items() if key not in _OF_A_FILE}
        reference = _open_losses(json.dumps(shared, sort_keys=True))
        first, last = reference.sequences.offsets[payload["file"] : payload["file"] + 2]
        drawn = reference.drawn
        numbers = drawn[(drawn >= first) & (drawn < last)]
        if len(numbers):
            computed = _losses_of(reference, shop, proxy, numbers)
    write_losses(Output(Path(payload["output"])), computed, str(payload["fingerprint"]))
    return {"rows": len(numbers)}


def drawn_numbers(sequences: Sequences, proxy: Proxy, seed: int) -> npt.NDArray[np.int64]:
    """(S,) ascending numbers of the sequences that uniform batches draw in a whole run.

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
    draw = Draw(sequences.domains, sequences.sizes, seed=seed, purpose="batch")
    domains, places = draw.take(np.minimum(counts, sequences.sizes))
    found = [sequences.numbers_of(n)[places[domains == k]] for k, n in enumerate(sequences.domains)]
    return np.sort(np.concatenate(found))


def read_result(folder: Path) -> dict[str, Any]:
    """What a run ended with."""
    return json.loads(result_output(folder).path.read_text(encoding="utf-8"))


def is_at_rest(folder: Path) -> bool:
    """Whether the rounds of a chain had come to rest when the proxy of this folder was done."""
    return bool(read_result(folder).get("at_rest"))


def _at(payload: Mapping[str, Any], path: str) -> Path:
    """Of a path within the run."""
    return Path(payload["settings"]["run"], path)


class _Losses(NamedTuple):
    """What a reference's files share: a worker does one after the other."""

    path: str
    model: nn.Module
    sequences: Sequences
    drawn: npt.NDArray[np.int64]


@lru_cache(maxsize=1)
def _open_losses(shared_json: str) -> _Losses:
    """`trained` in it says what the model at that path was made from."""
    payload = json.loads(shared_json)
    shop, proxy = open_workshop(payload), parse(Proxy, payload["proxy"])
    sequences = open_sequences(shop.settings, str(payload["sequences"]), ["proxy"])
    given = Model(name=str(payload["model"]), device=shop.settings.model.device)
    model = load_model(given, task_settings(shop.settings), dtype="float32").model.eval()
    drawn = drawn_numbers(sequences, proxy, proxy_seed(shop.settings, proxy))
    return _Losses(str(payload["model"]), model, sequences, drawn)


def _losses_of(
    reference: _Losses, shop: Workshop, proxy: Proxy, numbers: npt.NDArray[np.int64]
) -> Computed:
    """By a model that computes in the precision in which the proxy is trained."""
    path, model, sequences, _ = reference
    own, kind = shop.settings.model, task_settings(shop.settings)
    limit = max_positions(model)
    longest = int(sequences.lengths(numbers).max())
    if limit is not None and longest > limit:
        raise ConfigError(
            f"sequences have {longest} tokens, but the reference {path} reads {limit}",
            fix=f"set mix.proxy.length to {limit} or less",
        )
    if proxy.packed and isinstance(kind, CausalLM):
        check_packing(model)
    half: AbstractContextManager[Any] = nullcontext()
    if own.dtype != "float32":
        device = next(model.parameters()).device.type
        half = torch.autocast(device, dtype=getattr(torch, own.dtype))
    with half:
        return compute_losses(model, shop.task, sequences, numbers, batch_tokens=_BATCH_TOKENS)


def _take_over(payload: Mapping[str, Any], before: Path) -> Receipt:
    """What the round before has found stands for this one too."""
    folder, mark = Path(payload["folder"]), str(payload["fingerprint"])
    begin(folder, mark)
    for name in ("trajectory.parquet", "held_out.parquet"):
        replace(folder / name, partial(shutil.copyfile, before / name))
    write_result(folder, read_result(before), mark)
    return {"steps": 0}
