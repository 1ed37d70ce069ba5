"""Are a model's gradients measured as autograd and forward differentiation have them.

Four checks on a few examples: squared norms against a loop of single examples in float64; inner
products against the slopes of the losses along a random direction, which no backward pass has a
part in; what rounding adds in the model's own type; and the time, beside a plain step.

Shapes: N examples.
"""

import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional

from curate.errors import CurateError
from curate.models.gradient_pass import GradientPass
from curate.models.gradients import Engine, Wanted
from curate.models.load import LoadedModel
from curate.models.sharded import is_placed
from curate.models.tasks import Batch, Encoded, Task
from jobs.doctor import Check

_ENGINE = logging.getLogger("curate.models.gradients.engine")
_EXACT = 1e-5
"""Relative error that float64 may have: some models compute parts in float32 whatever they get."""
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""What the model's own type may add, or four times what plain autograd in that type adds."""
_STEP = 1e-6
_ROUNDS = 3
_REPORT = "do not use gradient scores of this model, and report it"


def gradient_checks(loaded: LoadedModel, task: Task, encoded: Encoded) -> Iterator[Check]:
    """The four checks, and which parameters go the slow way.

    Args:
        loaded: the model.
        task: that encoded the examples.
        encoded: examples, of which those with something to score are used.
    """
    model = loaded.model
    if not any(parameter.requires_grad for parameter in model.parameters()):
        yield Check("model: gradients", "note", "no parameter can be trained: none to measure")
        return
    before = _ENGINE.level
    _ENGINE.setLevel(logging.ERROR)  # what it warns of is told as a check
    try:
        yield from _checks(loaded, task, encoded)
    finally:
        _ENGINE.setLevel(before)


def _checks(loaded: LoadedModel, task: Task, encoded: Encoded) -> Iterator[Check]:
    model = loaded.model
    rows = [index for index in range(len(encoded)) if encoded.num_scored[index] > 0]
    # A model in few bits, or in several places, has no copy in float64.
    exact = model if is_placed(model) else copy.deepcopy(model).double()
    batch = _moved(task, encoded, rows, loaded.device)
    try:
        own = GradientPass(model, task, ("grad_sq_norm",))
        squares = own.measure(batch, len(rows)).squares["grad_sq_norm"]
        twin = own if exact is model else GradientPass(exact, task, ("grad_sq_norm",))
        found = twin.measure(_moved(task, encoded, rows, loaded.device), len(rows))
    except CurateError as error:
        yield Check("model: gradients", "bad", error.what, error.fix)
        return
    loop = _loop(exact, task, encoded, rows, loaded.device)
    yield _norms(found.squares["grad_sq_norm"].sqrt(), loop, model)
    yield _slopes(exact, task, batch, twin, loop)
    if exact is not model:
        plain = _loop(model, task, encoded, rows, loaded.device)
        yield _rounding(squares.sqrt(), plain, loop, next(model.parameters()).dtype)
    yield _slow(own.slow, model)
    yield _time(model, task, batch, own, len(rows))


def _norms(found: Tensor, loop: Tensor, model: nn.Module) -> Check:
    error = _distance(found, loop)
    text = (
        f"norms of {len(loop)} examples over {_count(model)} parameters are those of a loop in"
        f" float64 to {error:.1e}"
    )
    limit = _EXACT if not is_placed(model) else 1e-2
    return _judged("model: gradients", text, error, limit)


def _slopes(
    model: nn.Module, task: Task, batch: Batch, measured: GradientPass, loop: Tensor
) -> Check:
    """Inner products with a random direction against the losses' slopes along it."""
    draw = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.device, p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    wanted = Wanted(squares=False, directions={"v": direction})
    num = len(loop)
    found = Engine(model).measure(measured.losses, batch, num_examples=num, wanted=wanted)
    try:
        slopes, how = _forward_mode(model, task, batch, direction, num), "forward differentiation"
    except (RuntimeError, NotImplementedError) as error:
        if is_placed(model):
            text = f"forward differentiation does not know this model: {_first_line(error)}"
            return Check("model: slopes", "note", text)
        slopes, how = _differences(model, task, batch, direction, num), "differences"
    # The inner product with a normal direction is about as large as the norm.
    error = float(((found.inner["v"] - slopes).abs() / loop).max())
    text = f"inner products with a random direction are the slopes by {how} to {error:.1e}"
    return _judged("model: slopes", text, error, 10 * _EXACT if not is_placed(model) else 1e-2)


def _rounding(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> Check:
    error, other = _distance(found, exact), _distance(plain, exact)
    kind = str(dtype).removeprefix("torch.")
    text = f"in {kind} the norms are exact to {error:.1e}, those of plain autograd to {other:.1e}"
    return _judged("model: rounding", text, error, max(_ROUNDING[dtype], 4 * other))


def _slow(names: list[str], model: nn.Module) -> Check:
    if not names:
        return Check("model: slow way", "ok", "every parameter has a rule of its layer")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    share = sum(sizes[name] for name in names) / sum(sizes.values())
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    text = f"{len(names)} parameters, {share:.2%} of all numbers, go through the whole model: "
    fix = "leave them out (grand: parameters), or live with the time below"
    return Check("model: slow way", "note", text + listed, fix)


def _time(model: nn.Module, task: Task, batch: Batch, measured: GradientPass, num: int) -> Check:
    def plain() -> None:
        _losses(model, task, batch, num).sum().backward()
        model.zero_grad(set_to_none=True)

    plain()
    ratios = [
        _seconds(lambda: measured.measure(batch, num)) / _seconds(plain) for _ in range(_ROUNDS)
    ]
    text = (
        f"norms and scores take {statistics.median(ratios):.2f} times a plain forward and backward"
        f" pass of {num} short examples"
    )
    return Check("model: time", "ok", text)


def _loop(
    model: nn.Module, task: Task, encoded: Encoded, rows: list[int], device: torch.device
) -> Tensor:
    """(N,) float64 norms, by plain autograd on one example at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found: list[Tensor] = []
    for row in rows:
        batch = _moved(task, encoded, [row], device)
        total = _losses(model, task, batch, 1).sum()
        grads: Any = torch.autograd.grad(total, parameters, allow_unused=True)
        squares = [grad.double().square().sum().to(device) for grad in grads if grad is not None]
        found.append(torch.stack(squares).sum().sqrt())
    return torch.stack(found)


def _losses(model: nn.Module, task: Task, batch: Batch, num: int) -> Tensor:
    """(N,) sums over the counted positions, of the task's own logits."""
    flat = task.logits_and_targets(model, batch)
    each = functional.cross_entropy(flat.logits, flat.targets, reduction="none")
    return torch.zeros(num, dtype=each.dtype, device=each.device).index_add(0, flat.owner, each)


class _Scored(nn.Module):
    """The losses as a module, so that parameters can be replaced for a call."""

    def __init__(self, model: nn.Module, losses: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self) -> Tensor:
        return self._losses(self.model)


def _forward_mode(
    model: nn.Module, task: Task, batch: Batch, direction: Mapping[str, Tensor], num: int
) -> Tensor:
    scored = _Scored(model, lambda model: _losses(model, task, batch, num))
    values = {f"model.{name}": p.detach() for name, p in model.named_parameters()
              if p.requires_grad}  # fmt: skip
    along = {f"model.{name}": value for name, value in direction.items()}
    set_attention: Any = getattr(model, "set_attn_implementation", None)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if set_attention is not None:
        set_attention("eager")  # the fused kernels have no forward derivative
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on loading its derivatives
            found: Any = jvp(lambda given: functional_call(scored, given, ()), (values,), (along,))
    finally:
        if set_attention is not None and before is not None:
            set_attention(before)
    return found[1].detach().double()


def _differences(
    model: nn.Module, task: Task, batch: Batch, direction: Mapping[str, Tensor], num: int
) -> Tensor:
    """Central differences, on a copy."""
    moved = copy.deepcopy(model)
    ends: list[Tensor] = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in moved.named_parameters():
                if name in direction:
                    parameter.add_(direction[name], alpha=sign * _STEP)
            ends.append(_losses(moved, task, batch, num))
    return (ends[0] - ends[1]).double() / (2 * _STEP)


def _judged(name: str, text: str, error: float, limit: float) -> Check:
    if error <= limit:  # not where it is NaN
        return Check(name, "ok", text)
    return Check(name, "bad", f"{text}; at most {limit:.0e} is right", _REPORT)


def _distance(found: Tensor, wanted: Tensor) -> float:
    scale = wanted.clamp(min=1e-300)
    return float(((found.double() - wanted).abs() / scale).max())


def _count(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"


def _moved(task: Task, encoded: Encoded, rows: list[int], device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in task.collate(encoded, rows).items()}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
