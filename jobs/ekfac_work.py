"""What a worker does to fit EK-FAC: sums of a part, eigenvectors, eigenvalues, the curvature."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from curate.config import parse
from curate.data.example import KEY, TRAIN
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples
from curate.errors import ConfigError, CurateError, InputError
from curate.models.example_losses import draw_keys
from curate.models.kfac import Basis, Curvature, Sums, basis_of, damped
from curate.models.kfac_layers import Layer, in_groups, layers_of
from curate.models.kfac_pass import KFACPass
from curate.models.tasks import Encoded
from jobs.ekfac import FitOptions, sample_share
from jobs.fields import example_fields
from jobs.measuring import batch_tokens, measurer_of, ready
from jobs.run import Receipt
from jobs.settings import Settings, parse_settings

log = logging.getLogger(__name__)

_FITTING = 0.9
"""Share of the machine's memory that factors may take."""


def factors_work(payload: dict[str, Any]) -> Receipt:
    """Sums of x x^T and g g^T over a part of the sample."""
    shop = Shop(payload)
    shop.check_memory()
    total: dict[str, Sums] = {}
    count = 0
    for encoded, chosen, draws in shop.sample():
        found = shop.engine.factors(encoded, chosen, draws, labels=shop.options.labels)
        total = {name: total[name].plus(own) if name in total else own
                 for name, own in found.items()}  # fmt: skip
        count += len(chosen)
    tensors = {f"{name}.{key}": value for name, one in total.items()
               for key, value in one._asdict().items()}  # fmt: skip
    return _write(payload, "factors", tensors, examples=count)


def bases_work(payload: dict[str, Any]) -> Receipt:
    """Eigenvectors of one group of layers from the sums of all parts."""
    torch.set_num_threads(parse_settings(payload["settings"]).cluster.threads)
    total: dict[str, Sums] = {}
    for tensors in _parts(payload, "factors"):
        for name in _names(tensors):
            own = Sums(*(tensors[f"{name}.{key}"] for key in Sums._fields))
            total[name] = total[name].plus(own) if name in total else own
    if not total:
        raise CurateError(
            "the sample for EK-FAC has no training example that can be scored",
            fix=f"raise {payload['fit']['scorer']}.fit_examples",
        )
    tensors = {f"{name}.{key}": value for name, own in total.items()
               for key, value in basis_of(own)._asdict().items()}  # fmt: skip
    return _write(payload, "bases", tensors)


def eigenvalues_work(payload: dict[str, Any]) -> Receipt:
    """Sums of squares in the eigenvectors' axes over a part of the sample.

    Their labels are drawn anew: of labels that the axes were fitted to the largest squares would
    be too large, and those of all other axes too small.
    """
    shop = Shop(payload)
    tensors = _load(Path(payload["folder"]), "bases", payload["group"])
    bases = {name: Basis(*(tensors[f"{name}.{key}"] for key in Basis._fields))
             for name in _names(tensors)}  # fmt: skip
    total: dict[str, Tensor] = {}
    count = 0
    for encoded, chosen, draws in shop.sample(again=True):
        found = shop.engine.eigenvalues(encoded, chosen, bases, draws, labels=shop.options.labels)
        total = {name: total[name] + own if name in total else own for name, own in found.items()}
        count += len(chosen)
    squares = {f"{name}.squares": value for name, value in total.items()}
    squares["count"] = torch.tensor(float(count), dtype=torch.float64)
    return _write(payload, "eigenvalues", squares, examples=count)


def curvature_work(payload: dict[str, Any]) -> Receipt:
    """The damped curvature of one group of layers, in float32."""
    options = parse(FitOptions, payload["fit"])
    tensors = _load(Path(payload["folder"]), "bases", payload["group"])
    total: dict[str, Tensor] = {}
    count = 0.0
    for part in _parts(payload, "eigenvalues"):
        count += float(part.pop("count"))
        for name in _names(part):
            own = part[f"{name}.squares"]
            total[name] = total[name] + own if name in total else own
    found: dict[str, Tensor] = {}
    for name, squares in total.items():
        basis = Basis(*(tensors[f"{name}.{key}"] for key in Basis._fields))
        own = damped(basis, squares / count, share=options.damping)
        found |= {f"{name}.{key}": value.float() for key, value in own._asdict().items()}
    return _write(payload, "curvature", found, examples=int(count))


def load_curvature(folder: Path, group: int) -> dict[str, Curvature]:
    """Layer -> curvature of one group of layers."""
    tensors = _load(folder, "curvature", group)
    return {
        name: Curvature(*(tensors[f"{name}.{key}"] for key in Curvature._fields))
        for name in _names(tensors)
    }


class Shop:
    """Model, task and layers of a task of this process."""

    def __init__(self, payload: Mapping[str, Any], *, group: int | None = None) -> None:
        self.settings: Settings = parse_settings(payload["settings"])
        self.options = parse(FitOptions, payload["fit"])
        self.run = RunFolder(Path(self.settings.run))
        self.task, loaded = ready(self.settings, measurer_of(payload["measurer"]))
        self.groups = groups_of(loaded.model, self.options)
        number = int(payload["group"]) if group is None else group
        if number >= len(self.groups):
            raise ConfigError(
                f"{self.options.scorer}.groups is {self.options.groups}, and the model has"
                f" {len(self.groups)} layers to divide",
                fix=f"set it to {len(self.groups)} or fewer",
            )
        self.layers = self.groups[number]
        self._partitions = [Partition(**one) for one in payload.get("partitions", [])]
        self.loaded = loaded
        self.budget = max(1, batch_tokens(self.settings.score, loaded.device.type) // 4)
        """Tokens of a batch: a quarter of other passes', as all activations are kept."""
        self.is_double = next(loaded.model.parameters()).dtype == torch.float64
        self.engine = self.engine_of(self.layers)

    def engine_of(self, layers: Sequence[Layer]) -> KFACPass:
        """The passes over some layers."""
        return KFACPass(
            self.loaded.model,
            self.task,
            layers,
            batch_tokens=self.budget,
            device=self.loaded.device,
            reduction=self.options.reduction,
        )

    def check_memory(self) -> None:
        """Say what the factors take; refuse what the machine cannot hold."""
        need = sum(layer.num_bytes for layer in self.layers) * 3 / 2  # a batch's, in float32
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        log.info("EK-FAC: the factors of %d layers take %.2f GB", len(self.layers), need / 1e9)
        if need > _FITTING * have:
            raise CurateError(
                f"the factors of {len(self.layers)} layers take {need / 1e9:.1f} GB, and this"
                f" machine has {have / 1e9:.1f} GB",
                fix=f"set {self.options.scorer}.groups to"
                f" {self.options.groups * int(need / (_FITTING * have) + 1)}, or name fewer"
                " layers",
            )

    def sample(self, *, again: bool = False) -> Iterator[tuple[Encoded, np.ndarray, np.ndarray]]:
        """Partition by partition: encoded, the chosen examples, keys of their labels.

        Args:
            again: other labels of the same examples.
        """
        share = sample_share(self.run, self.options)
        for part in self._partitions:
            examples = read_examples(self.run, part, [*KEY, "split"])
            names = example_names(examples)
            taken = sampled(names, share, seed=self.settings.seed)
            taken &= (examples["split"] == TRAIN).to_numpy()
            if not taken.any():
                continue
            encoded = self.task.encode(example_fields(self.settings, self.run, part))
            chosen = np.flatnonzero(taken & (encoded.num_scored > 0))
            if len(chosen):
                words = [f"again\0{name}" for name in names] if again else names
                yield encoded, chosen, draw_keys(words, seed=self.settings.seed)


def groups_of(model: nn.Module, options: FitOptions) -> list[list[Layer]]:
    """The layers that count, in groups that are worked on one at a time."""
    only = None if options.parameters == "all" else re.compile(options.parameters).search
    layers = layers_of(model, only=None if only is None else lambda name: only(name) is not None)
    return in_groups(layers, options.groups)


def example_names(keys: pl.DataFrame) -> list[str]:
    """The key of each example as one word."""
    return [f"{source}\0{file}\0{row}" for source, file, row in keys.select(KEY).rows()]


def sampled(names: Sequence[str], share: float, *, seed: int) -> np.ndarray:
    """(N,) bool: each example by its own draw, whatever partition it is in."""
    draws = [xxhash.xxh3_64_intdigest(f"ekfac\0{seed}\0{name}".encode()) for name in names]
    return np.array(draws, dtype=np.float64) / 2.0**64 < share


def _write(payload: dict[str, Any], kind: str, tensors: dict[str, Tensor], **facts: int) -> Receipt:
    folder, group = Path(payload["folder"]), int(payload["group"])
    part = f"{payload['part']:03d}-" if "part" in payload else ""
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    Output(folder / f"{kind}-{part}{group:03d}.safetensors").write(
        lambda path: save_file(tensors, path), payload["fingerprint"], **facts
    )
    return dict(facts)


def _parts(payload: Mapping[str, Any], kind: str) -> Iterator[dict[str, Tensor]]:
    for part in range(int(payload["num_parts"])):
        yield _load(Path(payload["folder"]), f"{kind}-{part:03d}", payload["group"])


def _load(folder: Path, kind: str, group: int) -> dict[str, Tensor]:
    path = folder / f"{kind}-{group:03d}.safetensors"
    try:
        return load_file(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {error}", fix="run the same command again"
        ) from error


def _names(tensors: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
