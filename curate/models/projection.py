"""Two-sided projections of gradients: which parameters, and the sides P_o and P_i of each.

    phi = P_o^T G P_i = (g P_o)^T (x P_i)        E <phi_a, phi_b> = <G_a, G_b>

Entries of a side are random signs, or Gaussian, of variance 1/p. Entry (i, j) follows from (seed,
parameter, side, i, j) alone, by a counter-based generator whose bits are the same everywhere and
for ever: it does not depend on device, threads, other layers, or the size of either axis. A side no
longer than p is the identity, which loses nothing.

Or, `principal`: the top eigenvectors of E[g g^T] and E[x x^T] over the positions of a sample.

Source: Choe et al., "What is your data worth to GPT?", 2024, arXiv:2405.13954 (two sides, principal
axes); Johnson and Lindenstrauss, 1984; Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011 (the generator).
Departures: signs by default: bits need no arithmetic that could differ between machines, and the
squared norm of a sketch varies less than with Gaussian entries.
Cost: 2 T (P p + Q q) and 2 T p q products for each example; drawing, once, P p + Q q random bits.

Shapes: P rows and Q columns of a parameter, p and q of its projection, N examples, k numbers of a
projected gradient.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor, nn

from curate.config import STRICT
from curate.errors import ConfigError
from curate.models.gradients import Sides
from curate.models.gradients.groups import ALL, HEAD, selected
from curate.models.gradients.rules import convolution, embedding, experts, linear, rule_of
from curate.models.index_rows import Block
from curate.models.sharded import is_whole, main_device

Entries = Literal["signs", "gaussian"]

MATRICES = "matrices"
"""All weights of Linear layers, convolutions and experts, but for head and embeddings."""

_GENERATION = 1
"""Of the generator: raised if the same seed would give other sides."""
_NOTED_ENTRIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Which gradients are projected, and on what."""

    __pydantic_config__: ClassVar = STRICT

    parameters: str = MATRICES
    """`matrices`, `all`, or a regular expression for names."""
    head: bool = False
    """With `matrices`: the output layer of a language model too."""
    embedding: bool = False
    """With `matrices`: embeddings too."""
    dim: int = 16
    """p: at most p times p numbers of each parameter."""
    seed: int = 0
    entries: Entries = "signs"
    init: Literal["random", "pca"] = "random"
    """pca: principal axes of a sample, which an extra pass over it finds."""
    sample: int = 10_000
    """Examples of that pass."""

    def __post_init__(self) -> None:
        if self.dim < 1 or self.sample < 1:
            raise ConfigError("dim and sample start at 1", fix="raise them")


def choose_parameters(model: nn.Module, projection: Projection) -> list[str]:
    """Names of the parameters whose gradients are projected, in the model's order.

    A classifier's last layer is a matrix like any other; the head is what gives out tokens. A
    weight that is head and embedding counts as both.

    Raises:
        ConfigError: there is none.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if projection.parameters not in (MATRICES, HEAD):
        return selected(projection.parameters, trainable, ())
    kinds = _kinds(model)
    wanted = {HEAD} if projection.parameters == HEAD else {MATRICES}
    wanted |= {HEAD} if projection.head else set()
    wanted |= {"embedding"} if projection.embedding else set()
    known = dict(model.named_parameters())
    found = [name for name in trainable if kinds.get(known[name], set()) & wanted]
    if not found:
        raise ConfigError(
            "the model has no weight that can be trained among those to be projected",
            fix=f"set head or embedding, or parameters: {ALL}",
        )
    return found


def side_lengths(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Parameter -> (P, Q) as its gradient is projected; Q is 1 for a vector."""
    patches = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d)
        for parameter in module.parameters(recurse=False)
    }
    found: dict[str, tuple[int, int]] = {}
    known = dict(model.named_parameters())
    for name in names:
        shape = known[name].shape
        is_fused = len(shape) > 1 and known[name] not in patches
        rows = math.prod(shape[:-1] if is_fused else shape[:1])
        found[name] = rows, math.prod(shape) // max(rows, 1)
    return found


def draw_sides(
    model: nn.Module,
    *,
    dim: int = 16,
    seed: int = 0,
    layers: Sequence[str] | None = None,
    entries: Entries = "signs",
) -> dict[str, Sides]:
    """Random sides, where the parameters are.

    Args:
        model: whose parameters are projected.
        dim: p and q, at most.
        seed: of the entries.
        layers: names of the parameters; None for those of a default `Projection`.
        entries: random signs, or Gaussian.
    """
    names = choose_parameters(model, Projection()) if layers is None else list(layers)
    known = dict(model.named_parameters())
    found: dict[str, Sides] = {}
    for name, lengths in side_lengths(model, names).items():
        parameter = known[name]
        device = parameter.device if is_whole(parameter) else main_device(model)
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        found[name] = Sides(
            *(
                torch.from_numpy(
                    draw_side(name, side, length, dim=dim, seed=seed, entries=entries)
                ).to(device, dtype)
                for side, length in zip(("left", "right"), lengths, strict=True)
            )
        )
    return found


def draw_side(
    name: str, side: str, length: int, *, dim: int, seed: int, entries: Entries = "signs"
) -> npt.NDArray[np.float64]:
    """(length, min(dim, length)) entries of one side.

    Args:
        name: of the parameter.
        side: `left` or `right`.
        length: P or Q.
        dim: columns, each with random numbers of its own.
        seed: of the run.
        entries: random signs, or Gaussian.
    """
    if length <= dim:
        return np.eye(length)
    key = xxhash.xxh3_128_intdigest(f"{_GENERATION}/{seed}/{name}/{side}".encode())
    draw = _signs if entries == "signs" else _gaussian
    # The column is in the generator's counter, so that no column depends on how many there are.
    columns = [draw(np.random.Philox(key=key, counter=j << 64), length) for j in range(dim)]
    return np.stack(columns, 1) / math.sqrt(dim)


def describe(projection: Projection, sides: Mapping[str, Sides]) -> dict[str, Any]:
    """What a header says of a projection; equal for equal sides of the same parameters."""
    facts: dict[str, Any] = {"seed": projection.seed, "dim": projection.dim}
    facts |= {"entries": projection.entries, "init": projection.init}
    if projection.init == "pca":
        facts["sample"] = projection.sample
    return {**facts, "digest": sides_digest(sides)}


def sides_digest(sides: Mapping[str, Sides]) -> str:
    """Of the shapes and a few entries of all sides, to six digits."""
    state = hashlib.blake2b(digest_size=8)
    for name, pair in sides.items():
        for side in pair:
            few = side[:_NOTED_ENTRIES, :_NOTED_ENTRIES].flatten().tolist()
            noted = ",".join(f"{value:.5e}" for value in few)
            state.update(f"{name}/{tuple(side.shape)}/{noted};".encode())
    return state.hexdigest()


def check_sides(described: Mapping[str, Any], sides: Mapping[str, Sides]) -> None:
    """Refuse sides that are not those of an index.

    Args:
        described: `projection` of its header.
        sides: to project more gradients on.

    Raises:
        ConfigError: their digest differs.
    """
    found = sides_digest(sides)
    if described.get("digest") != found:
        raise ConfigError(
            f"the projection of this index (digest {described.get('digest')}) is not the one of"
            f" seed {described.get('seed')} here ({found}): its vectors cannot be compared with"
            " new ones",
            fix="build the index again",
        )


def blocks_of(sides: Mapping[str, Sides]) -> tuple[Block, ...]:
    """The blocks of a row, in the order of the sides."""
    return tuple(
        Block(name, left.shape[1], right.shape[1]) for name, (left, right) in sides.items()
    )


def flat_rows(projections: Mapping[str, Tensor], sides: Mapping[str, Sides]) -> Tensor:
    """(N, k) what the engine's projections (N, p, q) are as rows of an index."""
    return torch.cat([projections[name].flatten(1) for name in sides], 1)


def _kinds(model: nn.Module) -> dict[nn.Parameter, set[str]]:
    """What the matrices of a model are: `matrices`, `head`, `embedding`, or the last two."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    matrices = (linear.forms, convolution.forms, experts.forms)
    found: dict[nn.Parameter, set[str]] = {}
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if not own:
            continue
        rule = rule_of(module)
        if module is head or rule is embedding.forms or isinstance(module, nn.Embedding):
            for parameter in own:
                found.setdefault(parameter, set()).add(HEAD if module is head else "embedding")
        elif rule in matrices:
            for parameter in own:
                found.setdefault(parameter, set()).add(MATRICES)
    # A matrix that is tied to the embedding is chosen as such, not by the way.
    return {p: kinds - {MATRICES} if len(kinds) > 1 else kinds for p, kinds in found.items()}


def _signs(source: np.random.Philox, length: int) -> npt.NDArray[np.float64]:
    words = np.asarray(source.random_raw(-(-length // 64)), dtype="<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:length]
    return 1 - 2 * bits.astype(np.float64)


def _gaussian(source: np.random.Philox, length: int) -> npt.NDArray[np.float64]:
    """Box and Muller's transform; numpy's own may give other numbers in other versions."""
    words = np.asarray(source.random_raw(length), dtype=np.uint64)
    first = ((words >> np.uint64(32)) + np.uint64(1)).astype(np.float64) / 2**32  # in (0, 1]
    second = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
    return (-2 * np.log(first)) ** 0.5 * np.cos(2 * np.pi * second)
