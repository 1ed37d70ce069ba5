"""Sees the input and the output gradient of each layer in one forward and one backward pass.

No parameter requires a gradient meanwhile, so that autograd forms no weight gradients. A tap
behind each layer keeps the layer's input among the graph's saved tensors (gradient checkpointing
treats them as its own) and hands it on together with the gradient. The graph begins at the first
tapped layer.
"""

import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curate.errors import CurateError
from curate.models.gradients.layout import Layout
from curate.models.gradients.rules import Rule, embedding, linear, local
from curate.models.gradients.softmax import Sweep, plain_losses, watched_losses
from curate.models.gradients.squares import Place, place_of

HeadSink = Callable[[nn.Linear, Sweep, Tensor, bool], Tensor | None]
"""What is told of a head: (head, first sweep, gradient of the losses, whether the gradient of its
states is wanted); gives that one."""
Sink = Callable[[nn.Module, Rule, tuple[Tensor, ...], Tensor, Layout, bool], None]
"""What is told: (layer, its rule, inputs of the call, gradient of its output, layout, whether the
input is what `Shrink` made of it)."""
Shrink = Callable[[nn.Module, Tensor], Tensor | None]
"""What is kept of a Linear layer's input in its place: fewer columns; None: the input itself."""


class _Tap(torch.autograd.Function):
    """The output unchanged; its gradient is shown on the way back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, tell: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.tell = tell
        if output._is_view():  # pyright: ignore[reportPrivateUsage]
            return output.clone()
        # As if changed in place, so that the model may do so: views of it could not be.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # checkpointing gives them once only
        ctx.tell(saved, grads[0])
        return (grads[0], None, None, *(None for _ in saved))


class Capture:
    """Taps behind layers while it is entered.

    Args:
        rules: layer -> its rule, of the layers whose parameters are wanted.
        loose: layers of which only products with their matrices can be seen.
        layout: which rows belong to which example.
        sink: called in the backward pass, once for each call of a layer.
        head_sink: called in the backward pass for `softmax_losses`.
        shrink: called in the forward pass, for each Linear layer.
    """

    def __init__(
        self,
        rules: Mapping[nn.Module, Rule],
        loose: Mapping[nn.Module, Rule | None],
        layout: Layout,
        sink: Sink,
        head_sink: HeadSink,
        shrink: Shrink | None = None,
    ) -> None:
        self._rules = rules
        self._loose = loose
        self.layout = layout
        self._sink = sink
        self._head_sink = head_sink
        self._shrink = shrink
        self._handles: list[Any] = []
        self._is_backward = False
        self._busy = False
        self._anchor: Tensor | None = None
        self._modes: list[_Products] = []
        self.calls: dict[nn.Module, int] = {}
        """How often each layer was called; a layer that was not is missing."""
        self.lookups: dict[nn.Module, list[Tensor]] = {}
        self.sharers: dict[Place, int] = {}
        """Input -> how many Linear layers were given it."""

    def __enter__(self) -> "Capture":
        for module in self._rules:
            self._handles.append(module.register_forward_hook(self._on_forward, with_kwargs=True))
        for module in self._loose:
            self._handles.append(module.register_forward_pre_hook(self._before_loose))
            self._handles.append(module.register_forward_hook(self._after_loose, with_kwargs=True))
        self._token = _active.set(weakref.ref(self))
        return self

    def __exit__(self, *_: object) -> None:
        _active.reset(self._token)
        while self._modes:  # an error, such as a lack of memory, left the layer early
            self._modes.pop().__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar, down to the first tapped layer."""
        if not loss.requires_grad:
            return  # no tapped layer has a part in it
        self._is_backward = True
        anchor = self._anchor
        assert anchor is not None
        try:
            torch.autograd.grad(loss, anchor, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant=True" in str(error):
                raise _reentrant() from error
            raise

    def tap(
        self,
        module: nn.Module,
        rule: Rule,
        inputs: tuple[Tensor, ...],
        output: Tensor,
        layout: Layout | None = None,
    ) -> Tensor:
        """The output of a call, watched."""
        if not torch.is_grad_enabled() or self._busy or not output.is_floating_point():
            return output
        if not self._is_backward:
            self.calls[module] = self.calls.get(module, 0) + 1
        elif module not in self.calls:
            raise _reentrant()
        if self._anchor is None:
            self._anchor = torch.zeros((), requires_grad=True)
        where = layout or self.layout
        if rule is embedding.forms and output.dim() > 2 and len(output) == 1:
            # Looked up once for all: after a copy for each row its gradient is each row's.
            inputs, output = (self.layout.shared(inputs[0]),), self.layout.shared(output)
        if rule is linear.forms and not self._is_backward:
            place = place_of(inputs[0])
            self.sharers[place] = self.sharers.get(place, 0) + 1
        if rule is embedding.forms and not self._is_backward:
            self.lookups.setdefault(module, []).append(inputs[0])

        small: Tensor | None = None
        if rule is linear.forms and self._shrink is not None:
            small = self._shrink(module, inputs[0].detach())

        def tell(saved: tuple[Tensor, ...], grad: Tensor) -> None:
            self._busy = True  # a rule may run the layer once more
            try:
                self._sink(module, rule, saved, grad, where, small is not None)
            finally:
                self._busy = False

        seen = [value.detach() for value in inputs] if small is None else [small]
        if rule is local.forms or (output.is_leaf and output.requires_grad):
            output = output.clone()  # the layer may need its own output on the way back
        return _Tap.apply(output, self._anchor, tell, *seen)

    def take(self, module: nn.Module, given: Tensor, output: Tensor, owner: Tensor) -> Tensor:
        """The output of a Linear layer called by hand, watched; see `watched`."""
        if self._rules.get(module) is not linear.forms:
            return output
        where = Layout(self.layout.num_examples, owner)
        return self.tap(module, linear.forms, (given,), output, where)

    def take_losses(self, head: nn.Linear, sweep: Sweep) -> Tensor:
        """The losses of a first sweep, watched; see `softmax_losses`."""
        self.calls[head] = self.calls.get(head, 0) + 1
        if self._anchor is None:
            self._anchor = torch.zeros((), requires_grad=True)

        def tell(weights: Tensor, wants_states: bool) -> Tensor | None:
            return self._head_sink(head, sweep, weights, wants_states)

        return watched_losses(sweep.terms.loss, sweep.given, self._anchor, tell)

    def _on_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        rule = self._rules[module]
        given = (*args, *kwargs.values())
        if not isinstance(output, Tensor) or not all(isinstance(v, Tensor) for v in given):
            return None
        return self.tap(module, rule, given, output)

    def _before_loose(self, module: nn.Module, _args: Any) -> None:
        mode = _Products(self, module)
        self._modes.append(mode)
        mode.__enter__()

    def _after_loose(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        mode = self._modes.pop()
        mode.__exit__(None, None, None)
        rule = self._loose[module]
        given = (*args, *kwargs.values())
        plain = isinstance(output, Tensor) and all(isinstance(value, Tensor) for value in given)
        if mode.found or rule is None or not plain:
            return None
        return self.tap(module, rule, given, output)


class _Products(TorchFunctionMode):
    """Watches `linear` and `embedding` with a layer's own `weight` inside the layer."""

    def __init__(self, capture: Capture, module: nn.Module) -> None:
        super().__init__()
        self._capture = capture
        self._module = module
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        rule = _PRODUCTS.get(func)
        if rule is None or len(args) < 2 or args[1] is not getattr(self._module, "weight", None):
            return output
        self.found = True
        return self._capture.tap(self._module, rule, (args[0],), output)


_PRODUCTS: dict[Any, Rule] = {
    functional.linear: linear.forms,
    functional.embedding: embedding.forms,
}


def _reentrant() -> CurateError:
    return CurateError(
        "reentrant gradient checkpointing hides the layers until the backward pass",
        fix="use gradient_checkpointing_kwargs={'use_reentrant': False}",
    )


_active: ContextVar[Any] = ContextVar("capture", default=None)


def watched(module: nn.Module, given: Tensor, output: Tensor, owner: Tensor) -> Tensor:
    """The output of a Linear layer that was computed outside of its forward, for chosen rows.

    Without a capture, or where the layer is none of its, the output itself.

    Args:
        module: whose weight and bias were used.
        given: (M, I) rows that went in.
        output: (M, O)
        owner: (M,) example of each row.
    """
    reference = _active.get()
    capture: Capture | None = None if reference is None else reference()
    return output if capture is None else capture.take(module, given, output, owner)


def softmax_losses(head: nn.Linear, sweep: Sweep) -> Tensor:
    """(M,) cross-entropy of an output head that is too large for its logits to be kept.

    Without a capture they are computed again, by autograd alone.

    Args:
        head: a Linear layer that nothing follows; not called by itself in the same pass.
        sweep: the first one over the counted positions.
    """
    reference = _active.get()
    capture: Capture | None = None if reference is None else reference()
    if capture is None:
        return plain_losses(head, sweep.given, sweep.targets)
    return capture.take_losses(head, sweep)
