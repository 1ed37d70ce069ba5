"""Exact per-example gradients from one forward and one backward pass that forms no weight gradient.

Shapes: N examples, B rows of the batch, T positions.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from curate.errors import ConfigError
from curate.models.gradients.capture import Capture, HeadSink
from curate.models.gradients.collector import Collector
from curate.models.gradients.early import finish, shrink_inputs
from curate.models.gradients.fallback import Batch, Losses, one_by_one, weighted_gradients
from curate.models.gradients.forms import Whole, raised
from curate.models.gradients.head_part import HeadPart
from curate.models.gradients.layout import Layout, NoExampleAxisError
from curate.models.gradients.request import Gradients, Seen, Wanted
from curate.models.gradients.rules import Rule, linear, local, rule_of
from curate.models.gradients.softmax import Sweep
from curate.models.gradients.squares import Place
from curate.models.sharded import is_whole, main_device, sharded_gradients

log = logging.getLogger(__name__)

_HALF_SCALE = 256.0
"""Loss scale of float16 models, whose small gradients would become 0; taken back out."""


_CHECKED_EXAMPLES = 2
_PIECE = 1 << 20
_TOLERANCE = 1e-3
_TOLERANCE_HALF = 0.1


class Engine:
    """Per-example gradients of a model's parameters.

    Every parameter that requires a gradient is measured; frozen ones are not.

    Args:
        model: in eval mode: dropout would give every example another network.
        only: parameters to measure, by name; None for all that require a gradient.
        head: a layer whose use of its own parameters is measured by itself too: what it shares
            with an embedding counts in `Gradients.alone` as the head's alone.
        head_only: measure no other layer; the gradient then goes no further back than the head.

    Raises:
        ConfigError: nothing is left to measure.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        only: Callable[[str], bool] | None = None,
        head: nn.Module | None = None,
        head_only: bool = False,
    ) -> None:
        self.model = model
        self._head = head
        self._names = {
            parameter: name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (only is None or only(name))
        }
        if not self._names:
            raise ConfigError(
                "no parameter of the model is to be measured: all are frozen or left out",
                fix="choose at least one parameter",
            )
        self._owners: dict[str, list[nn.Module]] = {name: [] for name in self._names.values()}
        self._own: dict[nn.Module, dict[str, str]] = {}
        """Layer -> its own parameters: short name -> name. Sharded ones change with every call."""
        self._rules: dict[nn.Module, Rule] = {}
        self._loose: dict[nn.Module, Rule | None] = {}
        self._uncovered: list[str] = []
        """Parameters that need the whole model's way."""
        self._is_checked = False
        first = next(iter(self._names))
        self._scale = _HALF_SCALE if first.dtype == torch.float16 else 1.0
        self._device = main_device(model)
        for module in model.modules():
            if module is head or not head_only:
                self._enlist(module)
        # Autograd would add the embedding's use to the head's.
        self._unchecked = _shared(model, head, self._names) if head_only else set[str]()

    @property
    def names(self) -> list[str]:
        """The parameters that are measured, a tied one once."""
        return list(self._names.values())

    @property
    def slow(self) -> list[str]:
        """Those that no rule covers; known after the first batch."""
        return list(self._uncovered)

    def measure(
        self,
        losses: Losses,
        batch: Batch,
        *,
        num_examples: int,
        wanted: Wanted | None = None,
        segments: Tensor | None = None,
    ) -> Gradients:
        """What is wanted of each example's loss gradient.

        Args:
            losses: gives (N,) losses of a batch; their sum is differentiated.
            batch: what `losses` takes.
            num_examples: N.
            wanted: squared norms of all parameters where it is None.
            segments: (B, T) the example at each position of packed rows, -1 for padding; None:
                each row is an example.

        Raises:
            CurateError: a layer mixes examples, or a parameter cannot be measured.
        """
        wanted = wanted or Wanted()
        layout = Layout(num_examples, segments)
        with self._frozen():
            if not self._is_checked:
                self._check(losses, batch, layout)
            slow = self._slow_way(losses, batch, segments)
            # The last call of `losses` is the one for the whole batch.
            found = self._watch(losses, batch, layout, wanted)
            for name, values in slow.items():
                found.take(name, Whole(raised(values) / self._scale))
        return found.finish()

    def _slow_way(self, losses: Losses, batch: Batch, segments: Tensor | None) -> dict[str, Tensor]:
        """Gradients of the parameters that no rule covers, times the loss scale."""
        if not self._uncovered:
            return {}
        away = [p for p, name in self._names.items() if name in self._uncovered and not is_whole(p)]
        if away:
            raise ConfigError(
                f"parameter {self._names[away[0]]} has no layer that can be watched, and its values"
                " are not all here: it is sharded, or waits on another device",
                fix="freeze it, or measure a subset of the parameters without it",
            )
        if segments is not None:
            raise ConfigError(
                f"parameter {self._uncovered[0]} cannot be measured in packed rows",
                fix="give each example a row of its own, or freeze the parameter",
            )

        def scaled(model: nn.Module, part: Batch) -> Tensor:
            return losses(model, part) * self._scale

        return one_by_one(self.model, scaled, batch, self._uncovered)

    def _watch(self, losses: Losses, batch: Batch, layout: Layout, wanted: Wanted) -> Collector:
        """One forward and one backward pass."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        sharers: dict[Place, int] = {}
        collector = Collector(wanted, parameters, layout.num_examples, self._device, sharers)
        sink, head_sink = self._sink(collector, wanted), self._head_sink(collector)
        shrink = shrink_inputs(wanted, self._watched_weight)
        with Capture(self._rules, self._loose, layout, sink, head_sink, shrink) as taps:
            self._taps = taps
            taps.sharers = sharers
            with torch.enable_grad():
                total = losses(self.model, batch).sum() * self._scale
            taps.backward(total)
        return collector

    def _check(self, losses: Losses, batch: Batch, layout: Layout) -> None:
        """Compare the rules with autograd on two examples; what differs goes the slow way.

        For random weights c and signs V of each parameter, sum_i c_i <g_i, V> must be the inner
        product of V with the gradient of sum_i c_i loss_i. That finds a use of a parameter that no
        tap shows, a layer that is not what its class says, and rows given to the wrong example.
        """
        if layout.owner is None and layout.num_examples > _CHECKED_EXAMPLES:
            batch = {key: value[:_CHECKED_EXAMPLES] for key, value in batch.items()}
            layout = Layout(_CHECKED_EXAMPLES)
        first = next(iter(self._names))
        draw = torch.Generator().manual_seed(0)
        weights = torch.rand(layout.num_examples, generator=draw, dtype=torch.float64) + 0.5
        weights = weights.to(self._device)
        signs = {
            name: _signs(parameter.shape, draw).to(
                parameter.device if is_whole(parameter) else self._device, parameter.dtype
            )
            for parameter, name in self._names.items()
        }
        wanted = Wanted(directions={name: {name: sign} for name, sign in signs.items()})
        found = self._watch(losses, batch, layout, wanted).finish()
        truth = self._truth(losses, batch, weights * self._scale)
        tolerance = _TOLERANCE_HALF if first.dtype.itemsize == 2 else _TOLERANCE
        # A gradient that is zero but for rounding, as of a key's bias, is not compared.
        rounding = 16 * torch.finfo(first.dtype).eps * (weights * found.total().sqrt()).sum()
        for name in list(truth):
            expected, norm = _product_and_norm(truth.pop(name), signs[name])
            expected = expected.to(self._device) / self._scale
            scale = norm.to(self._device) / self._scale
            scale += (weights * found.squares[name].sqrt()).sum()
            distance = ((found.inner[name] * weights).sum() - expected).abs()
            if name in self._uncovered:
                continue
            if bool(distance > tolerance * scale + rounding):  # not where a loss is not finite
                self._uncovered.append(name)
        self._is_checked = True
        if self._uncovered:
            log.warning(
                "%d parameters have no layer that can be watched and are measured the slow way,"
                " through the whole model for each example: %s",
                len(self._uncovered), _listed(self._uncovered),
            )  # fmt: skip

    def _truth(self, losses: Losses, batch: Batch, weights: Tensor) -> dict[str, Tensor]:
        """Gradients by autograd, of the parameters whose values can be had."""
        names = {p: name for p, name in self._names.items() if name not in self._unchecked}
        here = [name for parameter, name in names.items() if is_whole(parameter)]
        away = [n for p, n in names.items() if not is_whole(p) and p.device.type != "meta"]
        truth = weighted_gradients(self.model, losses, batch, weights, here) if here else {}
        if away:
            truth |= sharded_gradients(self.model, losses, batch, weights, away)
        unseen = [n for n in names.values() if n not in here and n not in away]
        for name in unseen:
            if not all(owner in self._rules for owner in self._owners[name]):
                self._uncovered.append(name)
        if unseen:
            log.info("%d parameters wait on another device: their layers' rules are not checked"
                     " against autograd", len(unseen))  # fmt: skip
        return truth

    def _enlist(self, module: nn.Module) -> None:
        own = {
            short: self._names[parameter]
            for short, parameter in module.named_parameters(recurse=False)
            if parameter in self._names
        }
        if not own:
            return
        self._own[module] = own
        for name in own.values():
            self._owners[name].append(module)
        rule = rule_of(module)
        if rule is None or rule is local.forms:
            if next(module.children(), None) is None:
                self._loose[module] = rule
        else:
            self._rules[module] = rule

    def _sink(self, collector: Collector, wanted: Wanted) -> Callable[..., None]:
        def sink(
            module: nn.Module,
            rule: Rule,
            inputs: tuple[Tensor, ...],
            grad: Tensor,
            where: Layout,
            is_small: bool,
        ) -> None:
            grad = grad if self._scale == 1 else grad.float() / self._scale
            own = self._covered(module)
            if not own:
                return
            try:
                with torch.no_grad():
                    for short, form in rule(module, inputs, grad, where):
                        if short in own and short == "weight" and is_small:
                            sides = wanted.projections[own[short]]
                            collector.add_projection(own[short], finish(module, form, sides))
                        elif short in own:
                            uses, ids = self._uses(own[short], module, where)
                            alone = module is self._head
                            collector.take(own[short], form, uses=uses, lookup_ids=ids, alone=alone)
                            if wanted.tell is not None:
                                wanted.tell(Seen(own[short], form, where, uses))
            except NoExampleAxisError:
                if self._is_checked:
                    raise
                self._uncovered += own.values()

        return sink

    def _watched_weight(self, module: nn.Module) -> str | None:
        """Name of a Linear layer's weight, if its rule measures it."""
        is_linear = self._rules.get(module) is linear.forms
        return self._covered(module).get("weight") if is_linear else None

    def _covered(self, module: nn.Module) -> dict[str, str]:
        """Short name -> name of the parameters of a layer that its rule measures."""
        own = self._own.get(module, {})
        return {short: name for short, name in own.items() if name not in self._uncovered}

    def _head_sink(self, collector: Collector) -> HeadSink:
        def sink(
            head: nn.Linear, sweep: Sweep, weights: Tensor, wants_states: bool
        ) -> Tensor | None:
            own = self._covered(head) if head in self._rules else {}
            if not own and not wants_states:
                return None
            with torch.no_grad():
                part = HeadPart(head, sweep, weights / self._scale, own, collector)
                layout = Layout(self._taps.layout.num_examples, sweep.owner)
                states = part.run(
                    layout,
                    {name: self._uses(name, head, layout) for name in own.values()},
                    wants_states=wants_states,
                    alone=head is self._head,
                )
            return None if states is None else (states * self._scale).to(sweep.given.dtype)

        return sink

    def _uses(self, name: str, module: nn.Module, where: Layout) -> tuple[int, Tensor | None]:
        """How often a parameter is used in this pass, and the ids of its one other use."""
        owners, taps = self._owners[name], self._taps
        uses = sum(taps.calls.get(owner, 0) for owner in owners)
        lookups = [ids for owner in owners for ids in taps.lookups.get(owner, [])]
        if uses != 2 or len(lookups) != 1 or module in taps.lookups:
            return uses, None
        return uses, taps.layout.rows(lookups[0], 0)

    @contextmanager
    def _frozen(self) -> Generator[None]:
        """No parameter requires a gradient, so that autograd forms none."""
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        for parameter, _ in before:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, needed in before:
                parameter.requires_grad_(needed)


def _product_and_norm(gradient: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, without a copy of the whole gradient."""
    inner = torch.zeros((), dtype=torch.float64, device=gradient.device)
    square = torch.zeros_like(inner)
    pieces = zip(gradient.flatten().split(_PIECE), sign.flatten().split(_PIECE), strict=True)
    for part, signs in pieces:
        part = part.double()
        inner += (part * signs).sum()
        square += part.square().sum()
    return inner, square.sqrt()


def _signs(shape: torch.Size, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=draw, dtype=torch.int8) * 2 - 1


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _shared(
    model: nn.Module, head: nn.Module | None, names: Mapping[nn.Parameter, str]
) -> set[str]:
    """Parameters of the head that other layers have too."""
    own = set() if head is None else set(head.parameters(recurse=False))
    others = [module for module in model.modules() if module is not head]
    found = {p for module in others for p in module.parameters(recurse=False) if p in own}
    return {names[parameter] for parameter in found if parameter in names}
