"""Layers whose weight is a matrix: which there are, and what each sees of an example.

Linear layers, the Conv1D of transformers and convolutions that are not grouped. Embeddings, gains
of norms and a weight that several layers share are none of them, and are left out.

Shapes: N examples, T positions, O outputs and I inputs of a layer, the bias' included.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from curate.errors import ConfigError
from curate.models.gradients import LowRank, Seen
from curate.models.gradients.forms import Outer, raised
from curate.models.gradients.rules import convolution, linear

log = logging.getLogger(__name__)


class Layer(NamedTuple):
    """One layer of a model."""

    name: str
    weight: str
    """Name of the parameter."""
    bias: str | None
    """Name of the parameter; None where there is none, or it is frozen."""
    num_outputs: int
    num_inputs: int
    """With that of the bias, which is 1."""
    is_transposed: bool
    """The weight is held as (I, O)."""

    @property
    def parameters(self) -> list[str]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def num_bytes(self) -> int:
        """Of both factors and the eigenvalues in float64."""
        outputs, inputs = self.num_outputs, self.num_inputs
        return 8 * (outputs * outputs + inputs * inputs + outputs * inputs)

    def joined(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """(N, O, I) gradients of weight and bias as one matrix."""
        weight = gradients[self.weight].flatten(2)
        weight = weight.mT if self.is_transposed else weight
        if self.bias is None:
            return weight
        return torch.cat([weight, gradients[self.bias][..., None]], 2)

    def separated(self, matrices: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `joined` was given: (N, O, I) as gradients of weight and bias.

        Args:
            matrices: one for each example.
            like: parameter -> a tensor of its shape.
        """
        weight = matrices if self.bias is None else matrices[..., :-1]
        weight = weight.mT if self.is_transposed else weight
        found = {self.weight: weight.reshape(-1, *like[self.weight].shape)}
        if self.bias is not None:
            found[self.bias] = matrices[..., -1]
        return found

    def direction(self, low_rank: LowRank) -> dict[str, Tensor | LowRank]:
        """A matrix (O, I) as the gradient of weight and bias."""
        left, right = low_rank
        if self.bias is None:
            sides = (right, left) if self.is_transposed else (left, right)
            return {self.weight: LowRank(*sides)}
        inner = right[:-1]
        sides = (inner, left) if self.is_transposed else (left, inner)
        return {self.weight: LowRank(*sides), self.bias: left @ right[-1]}


def layers_of(model: nn.Module, *, only: Callable[[str], bool] | None = None) -> list[Layer]:
    """The layers of a model that can be trained, in order.

    A language model's output head is left out unless `only` names it: its factor of the vocabulary
    is larger than all others together.

    Args:
        model: whose parameters that require a gradient count.
        only: parameters to take, by the weight's name.

    Raises:
        ConfigError: there is none.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    found: list[Layer] = []
    for name, module in model.named_modules():
        if not (linear.applies(module) or convolution.applies(module)):
            continue
        if getattr(module, "groups", 1) != 1:
            continue
        weight = cast(nn.Parameter, module.weight)
        bias = cast(nn.Parameter | None, getattr(module, "bias", None))
        if weight not in names or owners[weight] > 1:
            continue
        if not only(names[weight]) if only is not None else module is head:
            continue
        if bias is None or bias not in names or owners[bias] > 1:
            bias = None
        is_transposed = linear.applies(module) and not isinstance(module, nn.Linear)
        rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
        outputs, inputs = (columns, rows) if is_transposed else (rows, columns)
        inputs += bias is not None
        own = None if bias is None else names[bias]
        found.append(Layer(name, names[weight], own, outputs, inputs, is_transposed))
    if not found:
        raise ConfigError(
            "the model has no layer that is trained and whose weight is a matrix of its own",
            fix="choose other parameters, or a scorer without curvature",
        )
    taken = {name for layer in found for name in layer.parameters}
    share = sum(p.numel() for p, n in names.items() if n in taken) / sum(p.numel() for p in names)
    _tell(tuple(found), share)
    return found


@cache
def _tell(found: tuple[Layer, ...], share: float) -> None:
    """Say once in a process what counts: a model is loaded again for every task."""
    log.info("curvature of %d layers with %.0f %% of the numbers that are trained",
             len(found), 100 * share)  # fmt: skip


def in_groups(layers: Sequence[Layer], count: int) -> list[list[Layer]]:
    """Layers in groups of about equal memory, in order; fewer where there are fewer layers."""
    total = sum(layer.num_bytes for layer in layers)
    found: list[list[Layer]] = [[] for _ in range(min(count, len(layers)))]
    before = 0
    for place, layer in enumerate(layers):
        # Each group gets a layer at least: what is left must suffice for those behind.
        group = min(len(found) - 1, before * len(found) // total, place)
        group = max(group, len(found) - (len(layers) - place))
        found[group].append(layer)
        before += layer.num_bytes
    return found


class View(NamedTuple):
    """What one layer sees of a batch: G_b = left_b^T right_b, and the bias' sum_t left_t."""

    layer: Layer
    left: Tensor
    """(N, T, O) gradient of the output, zero where there is no position"""
    right: Tensor
    """(N, T, I) without the bias'"""
    mask: Tensor | None
    """(N, T) bool, the unmasked positions; None: all"""


class Views:
    """Turns what the engine tells into views of whole layers.

    Args:
        layers: to look at.
        take: told of each one, once for a batch.
    """

    def __init__(self, layers: Sequence[Layer], take: Callable[[View], None]) -> None:
        self._by_weight = {layer.weight: layer for layer in layers}
        self._take = take
        self._waiting: dict[str, list[View]] = {}
        self._mask: Tensor | None = None

    def begin(self, mask: Tensor | None, num_examples: int) -> None:
        """A batch comes.

        Args:
            mask: its attention mask, whose first axis is the example.
            num_examples: N.
        """
        self._waiting.clear()
        self._mask = None if mask is None else mask.reshape(num_examples, -1).bool()

    def tell(self, seen: Seen) -> None:
        """One use of a parameter; the view is handed on when all uses of it are in."""
        layer = self._by_weight.get(seen.name)
        if layer is None or not isinstance(seen.form, Outer):
            return
        left, right = raised(seen.form.left), raised(seen.form.right)
        if layer.is_transposed:
            left, right = right, left
        view = View(layer, left, right, self._mask_of(seen, left.shape[1]))
        if seen.uses <= 1:
            self._take(view)
            return
        waiting = self._waiting.setdefault(seen.name, [])
        waiting.append(view)
        if len(waiting) == seen.uses:
            self._take(_together(self._waiting.pop(seen.name)))

    def end(self) -> None:
        """The batch is done; uses without a part in the loss never came."""
        for views in self._waiting.values():
            self._take(_together(views))
        self._waiting.clear()

    def _mask_of(self, seen: Seen, positions: int) -> Tensor | None:
        owner = seen.layout.owner
        if owner is not None:
            return seen.layout.rows(torch.ones_like(owner, dtype=torch.bool), 0)
        mask = self._mask
        return mask if mask is not None and mask.shape[1] == positions else None


def _together(views: Sequence[View]) -> View:
    """A layer that is called several times: its positions one after the other."""
    left = torch.cat([view.left for view in views], 1)
    right = torch.cat([view.right for view in views], 1)
    masks = list(_masks(views))
    return View(views[0].layer, left, right, torch.cat(masks, 1))


def _masks(views: Sequence[View]) -> Iterator[Tensor]:
    for view in views:
        shape = view.left.shape[:2]
        yield (
            torch.ones(shape, dtype=torch.bool, device=view.left.device)
            if (view.mask is None)
            else view.mask
        )
