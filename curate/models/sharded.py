"""Models that are not whole on one device: spread by accelerate, or sharded by FSDP2.

Spread over devices, each layer runs where its weights are; a layer whose weights wait in the CPU's
memory or on disk has empty parameters (on the device `meta`) except while it runs. Sharded, every
rank holds a slice of each parameter (a DTensor), which is put together while its layer runs. In
both, a parameter may be looked at and used inside of its layer's call only.

Shapes: N examples, D width.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_whole(parameter: Tensor) -> bool:
    """Whether a parameter's values are here, outside of its layer's call."""
    return parameter.device.type != "meta" and not isinstance(parameter, DTensor)


def is_spread(model: nn.Module) -> bool:
    """Whether a model must be called as one, as its parts are in several places."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) > 1 or not all(is_whole(parameter) for parameter in model.parameters())


def is_placed(model: nn.Module) -> bool:
    """Whether a model is to stay where it is, and of the type it is: spread, or in few bits."""
    few_bits = getattr(model, "quantization_method", None) is not None
    return few_bits or hasattr(model, "hf_device_map") or is_spread(model)


def main_device(model: nn.Module) -> torch.device:
    """Where batches go and results are kept: the first device on which the model runs."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    here = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(here, torch.device("cpu"))


def run_alone(module: nn.Module, weight: Tensor, given: Tensor) -> Tensor:
    """The output of a layer with another `weight`, without what was hooked on it.

    Args:
        module: a layer whose only parameter is `weight`, which need not be here.
        weight: (D,) to take in its place.
        given: its input.
    """
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = OrderedDict(weight=weight)
    twin.__dict__.pop("forward", None)  # accelerate puts its own before the class's
    return cast(Any, type(module)).forward(twin, given)


def sharded_gradients(
    model: nn.Module,
    losses: Callable[[nn.Module, Any], Tensor],
    batch: Mapping[str, Tensor],
    weights: Tensor,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Gradients of this rank's weighted sum of losses, by one plain pass of a sharded model.

    They are taken at the parameters as they are put together for the pass, so that nothing is
    added up over the ranks. Every rank must take part, with a batch of its own.

    Args:
        model: sharded by `fully_shard`; no parameter of it requires a gradient.
        losses: of the batch.
        batch: of N examples.
        weights: (N,)
        names: parameters as `named_parameters` has them; one that is not used gets no entry.
    """
    parameters = dict(model.named_parameters())
    chosen = {parameters[name]: name for name in names}
    live: dict[str, Tensor] = {}
    handles: list[Any] = []
    for module in model.modules():
        own = {
            short: chosen[parameter]
            for short, parameter in module.named_parameters(recurse=False)
            if parameter in chosen
        }

        def before(module: nn.Module, _args: Any, own: dict[str, str] = own) -> None:
            for short, name in own.items():
                live.setdefault(name, getattr(module, short))

        if own:
            handles.append(module.register_forward_pre_hook(before))
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            total = (losses(model, batch) * weights).sum()
        used = {name: value for name, value in live.items() if value.requires_grad}
        found = torch.autograd.grad(total, list(used.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in chosen:
            parameter.requires_grad_(False)
    return {
        name: value
        for name, value in zip(used, cast(Sequence[Tensor | None], found), strict=True)
        if value is not None
    }
