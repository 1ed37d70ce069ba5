"""Normalisation with a gain and a shift: G_gain = sum_t g_t * xhat_t, G_shift = sum_t g_t.

LayerNorm, RMSNorm (of torch), GroupNorm, and BatchNorm with its running statistics. The
normalised input xhat is computed again from the input rather than kept. The many RMSNorms of
transformers are classes of their own: they are known by what they compute, see `_is_rms`.

Shapes: N examples, C channels or width.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import CurateError
from curate.models.gradients.forms import Form, Whole, raised
from curate.models.gradients.layout import Layout
from curate.models.sharded import run_alone

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def applies(module: nn.Module) -> bool:
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *_BATCH)
    if any(type(module).forward is kind.forward for kind in kinds):
        return True
    return _is_rms(module)


def forms(
    module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, layout: Layout
) -> Iterator[tuple[str, Form]]:
    normal, channels_first = _normalised(module, raised(inputs[0]))
    names = [name for name in ("weight", "bias") if getattr(module, name, None) is not None]
    for name in names:
        moved = raised(grad) * normal if name == "weight" else raised(grad)
        if channels_first:
            moved = moved.flatten(2).sum(2) if moved.dim() > 2 else moved
        tail = cast(Tensor, getattr(module, name)).dim()
        yield name, Whole(layout.rows(moved, tail).sum(1))


def _normalised(module: nn.Module, given: Tensor) -> tuple[Tensor, bool]:
    """xhat, and whether channels stand before positions."""
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        return functional.layer_norm(given, shape, None, None, module.eps), False
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(given, module.normalized_shape, None, module.eps), False
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(given, module.num_groups, None, None, module.eps), True
    if isinstance(module, _BATCH):
        if module.training or module.running_mean is None or module.running_var is None:
            raise CurateError(
                "batch normalisation in training mode mixes the examples of a batch",
                fix="call model.eval(), or use a model with running statistics",
            )
        mean, var = module.running_mean, module.running_var
        return functional.batch_norm(given, mean, var, None, None, False, 0.0, module.eps), True
    # They raise to float32 themselves, and never to more.
    return _rms(given.float(), _eps(module)), False


def _is_rms(module: nn.Module) -> bool:
    """Whether the output is xhat times the gain, or times one plus the gain, on a trial input.

    The gradient of the gain is the same for both.
    """
    gain = getattr(module, "weight", None)
    own = dict(module.named_parameters())
    if list(own) != ["weight"] or not isinstance(gain, Tensor) or gain.dim() != 1:
        return False
    if not hasattr(module, "variance_epsilon") and not hasattr(module, "eps"):
        return False
    # Where the layer is sharded or waits elsewhere, its own gain cannot be had.
    gain = torch.linspace(0.5, 1.5, len(gain), dtype=torch.float32).to(gain.dtype)
    trial = torch.linspace(-1, 2, 3 * len(gain), dtype=torch.float32).view(1, 3, -1)
    try:
        with torch.no_grad():
            found = run_alone(module, gain, trial.to(gain.dtype)).float()
    except (TypeError, RuntimeError, ValueError):
        return False
    normal = _rms(trial.to(gain.dtype).float(), _eps(module))
    close = 0.02 if gain.dtype.itemsize == 2 else 1e-4
    return any(
        found.shape == normal.shape
        and torch.allclose(found, normal * factor, rtol=close, atol=close)
        for factor in (gain.float(), 1 + gain.float())
    )


def _rms(given: Tensor, eps: float) -> Tensor:
    return given * (given.square().mean(-1, keepdim=True) + eps).rsqrt()


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
