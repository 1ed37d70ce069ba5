"""Texts one behind the other in windows of one length, so that no batch holds padding.

Each text starts at position 0 again. transformers builds the mask of a batch that has positions
and no attention mask from them: a token sees its own text alone. Not every model does, which
`check_packing` finds out. A text that is longer than what is left of a window goes on in the next
one. Its last token there is read again, at position 0, and not counted again: so that every token
which counts is predicted once, though what is behind a cut does not see what stands before it.

Shapes: N texts of a partition, S their tokens, W windows, T tokens of a window.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from curate.errors import ConfigError
from curate.models.tasks.protocol import Encoded

Groups = npt.NDArray[np.int64]

_SCALE = 1e-6
"""Of the largest logit: what another text in the same row may change; masked terms are 0."""
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Of the largest logit: what may lie between a text alone and one in a row; other kernels run."""
_ROUNDING_HALF = 5e-2


class Packed(NamedTuple):
    """Windows, and what stands in each."""

    encoded: Encoded
    """(W,) with `tokens`, `starts`, `counted` and `positions`; none of them without a token that
    counts."""
    groups: Groups
    """(W,) ascending."""


class _Piece(NamedTuple):
    """Tokens that stand one behind the other in a window."""

    start: int
    """Where they begin in the flat array."""
    place: int
    """Where they go: window times `length` and place within."""
    size: int


def pack(encoded: Encoded, groups: Groups, *, length: int, padding: int) -> Packed:
    """Windows of exactly `length` tokens, each made of the texts of one group, in table order.

    What is left of a group's last window is filled up with a text of padding that never counts.

    Args:
        encoded: texts as `CausalLMTask` encodes them, not cut.
        groups: (N,) which texts may share a window; those below 0 are left out, as are texts in
            which nothing counts.
        length: T, at least 2.
        padding: a token.

    Raises:
        ConfigError: a window of that length holds nothing to predict.
    """
    if length < 2:
        raise ConfigError(
            f"a window of {length} tokens holds nothing to predict",
            fix="set the length of the sequences to 2 or more, such as 512",
        )
    starts = encoded.arrays["starts"]
    chosen = np.flatnonzero((groups >= 0) & (encoded.num_scored > 0))
    pieces: list[_Piece] = []
    owners: list[int] = []
    for group in np.unique(groups[chosen]).tolist():
        members = chosen[groups[chosen] == group]
        bounds = np.stack([starts[members], starts[members + 1]], axis=1)
        own = list(_cut(bounds.tolist(), length, first=len(owners) * length))
        pieces += own
        owners += [group] * (own[-1].place // length + 1 - len(owners))
    return _kept(
        _windows(encoded, pieces, len(owners), length, padding), np.array(owners, np.int64)
    )


def _cut(bounds: list[list[int]], length: int, *, first: int) -> Iterator[_Piece]:
    """Where the texts go, from place `first` on, which begins a window."""
    place = first
    for start, stop in bounds:
        begin = start
        while True:
            room = length - (place - first) % length
            if room < 2:  # a token alone has nothing to be predicted from
                place += room
                room = length
            size = min(room, stop - begin)
            yield _Piece(begin, place, size)
            place += size
            if begin + size == stop:
                break
            begin += size - 1


def _windows(
    encoded: Encoded, pieces: list[_Piece], count: int, length: int, padding: int
) -> Encoded:
    tokens = np.full(count * length, padding, dtype=np.int32)
    counted = np.zeros(count * length, dtype=np.bool_)
    filled = np.zeros(count * length, dtype=np.bool_)
    begins = np.arange(count, dtype=np.int64) * length
    for start, place, size in pieces:
        tokens[place : place + size] = encoded.arrays["tokens"][start : start + size]
        counted[place : place + size] = encoded.arrays["counted"][start : start + size]
        filled[place : place + size] = True
        counted[place] = False  # nothing stands before it, or it was counted where it is read first
    # A text begins where a window does, where a piece does, and where padding does.
    is_begin = np.zeros(count * length, dtype=np.bool_)
    is_begin[begins] = True
    is_begin[[piece.place for piece in pieces]] = True
    is_begin[1:] |= filled[:-1] & ~filled[1:]
    places = np.arange(count * length)
    positions = places - np.maximum.accumulate(np.where(is_begin, places, 0))
    return Encoded(
        lengths=np.full(count, length, dtype=np.int64),
        num_scored=counted.reshape(count, length).sum(axis=1).astype(np.int64),
        truncated=np.zeros(count, dtype=np.bool_),
        arrays={
            "tokens": tokens,
            "starts": np.arange(count + 1, dtype=np.int64) * length,
            "counted": counted,
            "positions": positions.astype(np.int32),
        },
        problems={},
    )


def _kept(encoded: Encoded, groups: Groups) -> Packed:
    """Without windows in which nothing counts, as those inside a long prompt."""
    keep = encoded.num_scored > 0
    if keep.all():
        return Packed(encoded, groups)
    count = int(keep.sum())
    length = int(encoded.lengths[0])
    arrays = {
        name: values.reshape(-1, length)[keep].reshape(-1)
        for name, values in encoded.arrays.items()
        if name != "starts"
    }
    arrays["starts"] = np.arange(count + 1, dtype=np.int64) * length
    kept = Encoded(
        lengths=encoded.lengths[keep],
        num_scored=encoded.num_scored[keep],
        truncated=encoded.truncated[keep],
        arrays=arrays,
        problems={},
    )
    return Packed(kept, groups[keep])


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Refuse a model in which a token of a packed row sees other texts than its own.

    Two rows of two texts each are read twice, with other first texts the second time: nothing may
    change for the second texts, and they must be what they are alone.

    Args:
        model: a causal language model, on its device.

    Raises:
        ConfigError: it does not keep them apart.
    """
    was_training = model.training
    try:
        model.eval()
        is_apart = _keeps_apart(model)
    finally:
        model.train(was_training)
    if not is_apart:
        raise ConfigError(
            f"{type(model).__name__} does not keep the texts of a packed row apart",
            fix="set packed: false, or take a model of another kind, such as llama or gpt2",
        )


def _keeps_apart(model: nn.Module) -> bool:
    module: Any = model
    embeddings = getattr(module, "get_input_embeddings", None)
    if embeddings is None:
        return False
    vocabulary = int(embeddings().weight.shape[0])
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, 9), generator=generator).to(device)
    other = ids.clone()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    firsts = (4, 2)
    for row, size in enumerate(firsts):
        other[row, :size] = (ids[row, :size] + 1) % vocabulary
    try:
        one, two = (
            module(input_ids=given, position_ids=positions.to(device), use_cache=False).logits
            for given in (ids, other)
        )
    except TypeError:  # it takes no positions
        return False
    alone = [
        module(input_ids=ids[row : row + 1, size:], use_cache=False).logits[0]
        for row, size in enumerate(firsts)
    ]
    rounding = _ROUNDING.get(one.dtype, _ROUNDING_HALF)
    return all(
        _distance(one[row, size:], two[row, size:]) <= _SCALE
        and _distance(one[row, size:], alone[row]) <= rounding
        for row, size in enumerate(firsts)
    )


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest value."""
    scale = float(other.abs().max()) or 1.0
    return float((one - other).abs().max()) / scale
