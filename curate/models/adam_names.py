"""Which parameter each number in the state of a PyTorch optimiser stands for.

The file numbers parameters group by group. A Trainer of transformers puts into the first group, in
the model's order, what decays, and into the second what does not; which parameters these are has
changed between its versions. All ways that are in use are tried on the shapes of the moments.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from curate.errors import InputError

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")

_SAME_SHAPES = "take the state of the same model; if sharded (FSDP, DeepSpeed), the full state"

Shape = tuple[int, ...]


def names_of(
    model: nn.Module, groups: Sequence[Sequence[Any]], shapes: Mapping[Any, Shape], where: str
) -> dict[Any, str]:
    """Number, or name, in the file -> name of the model's parameter.

    Args:
        model: as it was trained: what was frozen must be.
        groups: what the file lists in each of its groups.
        shapes: of the moments; what has none was never moved.
        where: of the file, for messages.

    Raises:
        InputError: no way fits the model, or two that differ do.
    """
    keys = [key for group in groups for key in group]
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if any(isinstance(key, str) for key in [*keys, *shapes]):
        return _by_name(shapes, trained, where)
    found: list[dict[Any, str]] = []
    for decays in _ways(model):
        split = [[n for n in trained if decays(n)], [n for n in trained if not decays(n)]]
        split = [names for names in split if names]
        if [len(names) for names in split] != [len(group) for group in groups if group]:
            continue
        given = dict(zip(keys, (name for names in split for name in names), strict=True))
        fits = all(trained[given[key]] == shape for key, shape in shapes.items())
        if fits and given not in found:
            found.append(given)
    if len(found) == 1:
        return found[0]
    if found:
        one, other = found[:2]
        key = next(key for key in keys if one[key] != other[key])
        raise InputError(
            f"{where} does not say which parameter its number {key} is: {one[key]} or"
            f" {other[key]}, which have the same shape",
            fix="save the optimiser's state by parameter name, as FSDP's full state is",
        )
    raise _no_way(keys, groups, shapes, trained, where)


def _by_name(
    shapes: Mapping[Any, Shape], trained: Mapping[str, Shape], where: str
) -> dict[Any, str]:
    found: dict[Any, str] = {}
    plain = {_plain(name): name for name in trained}
    for key, shape in shapes.items():
        name = str(key) if str(key) in trained else plain.get(_plain(str(key)))
        if name is None:  # trained then, frozen or taken out since
            continue
        if trained[name] != shape:
            raise _misshapen(where, name, trained[name], shape)
        found[key] = name
    if not found:
        raise InputError(
            f"{where} has moments of {next(iter(shapes), 'no parameter')}, the model has none of"
            f" these: its first is {next(iter(trained), 'none')}",
            fix="take the optimiser's state of the same model, with the same adapter",
        )
    return found


def _plain(name: str) -> str:
    """A name without what wrappers put before it."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name


def _ways(model: nn.Module) -> list[Callable[[str], bool]]:
    """What may have decayed."""
    layers = dict(model.named_modules())
    parameters = dict(model.named_parameters())

    def is_norm(name: str, *, by_class_name: bool) -> bool:
        parts = name.split(".")[:-1]
        owners = [layers[".".join(parts[: end + 1])] for end in range(len(parts))]
        return any(
            isinstance(layer, nn.LayerNorm) or (by_class_name and "Norm" in type(layer).__name__)
            for layer in owners
        )

    return [
        lambda n: not (_NO_DECAY.search(n.lower()) or is_norm(n, by_class_name=False)),
        lambda n: not ("bias" in n or is_norm(n, by_class_name=True)),
        lambda n: not ("bias" in n or is_norm(n, by_class_name=False)),
        lambda n: parameters[n].dim() >= 2,
        lambda _: True,
    ]


def _no_way(
    keys: Sequence[Any],
    groups: Sequence[Sequence[Any]],
    shapes: Mapping[Any, Shape],
    trained: Mapping[str, Shape],
    where: str,
) -> InputError:
    if len(keys) != len(trained):
        sizes = " and ".join(str(len(group)) for group in groups)
        return InputError(
            f"{where} is of {len(keys)} parameters (groups of {sizes}), the model has"
            f" {len(trained)} that can be trained",
            fix="take the optimiser's state of the same model, with the same adapter",
        )
    flat = next((shape for shape in shapes.values() if shape not in set(trained.values())), None)
    if flat is not None:
        return InputError(
            f"{where} has moments of shape {_shown(flat)}, which no parameter of the model has",
            fix=_SAME_SHAPES,
        )
    return InputError(
        f"{where} has its parameters in an order that is neither a Trainer's nor the model's own",
        fix="save the optimiser's state by parameter name",
    )


def _misshapen(where: str, name: str, wanted: Shape, given: Shape) -> InputError:
    return InputError(
        f"{where}: the moments of {name} are {_shown(given)}, the parameter is {_shown(wanted)}",
        fix=_SAME_SHAPES,
    )


def _shown(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a single number"
