"""The passes of EK-FAC over examples: factors, eigenvalues, self-influence, low-rank queries.

    factors          sums of x x^T and g g^T over tokens
    eigenvalues      sum over examples of (Q_S^T G_b Q_A)^2
    self-influence   sum of (Q_S^T G_b Q_A)^2 / (Lambda + d), which is g_b^T H^-1 g_b
    scores           <G_b, H^-1 G_q> for queries of low rank

No G_b is kept: x and g are turned into the eigenvectors' axes and multiplied a piece at a time, in
a buffer that stays in the cache. Layers that share their input turn it once.

Which tokens: A and S are means over the positions that the attention mask leaves, or all where
there is none; the head sees the counted ones only. A position without a part in the loss adds to A
and nothing to S or G_b.
Cost beside the forward and activation-backward pass, for each token and layer: factors
2 (I^2 + O^2), eigenvalues and self-influence 2 (I^2 + O^2 + I O), scores 2 R (I + O) a query.
Memory: factors (I^2 + O^2) in float64 and a batch's in float32, so that a batch that does not fit
leaves no trace; then (I^2 + O^2 + I O) for the eigenvectors and eigenvalues.

Shapes: N examples of a partition, n chosen, B of a batch, T positions, O outputs and I inputs of a
layer, Q queries.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from curate.errors import ConfigError
from curate.models.batches import for_each_batch
from curate.models.example_losses import DRAWS, ExampleLosses, Labels, Reduction
from curate.models.gradients import Engine, Sides, Wanted
from curate.models.gradients.request import Direction, Gradients
from curate.models.kfac import Basis, Curvature, Sums
from curate.models.kfac_layers import Layer, View, Views
from curate.models.kfac_products import squares_summed, weighted_squares
from curate.models.quantities import to_device
from curate.models.tasks import Batch, Encoded, Task

_KEPT_INPUTS = 2


class Losses(NamedTuple):
    """Of the examples of a pass, in their order."""

    totals: Tensor
    """(n,) float64 sum of the cross-entropies of the counted positions, nats"""
    counts: Tensor
    """(n,) float64 counted positions"""


class KFACPass:
    """Passes over a task's examples with one model.

    Args:
        model: in eval mode, on `device`.
        task: that encodes the examples.
        layers: from `layers_of`.
        batch_tokens: budget of a batch, padding included.
        device: where the model is.
        reduction: of an example's loss over its counted positions.

    Raises:
        ConfigError: a layer cannot be watched; known after the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        layers: Sequence[Layer],
        *,
        batch_tokens: int,
        device: torch.device,
        reduction: Reduction = "sum",
    ) -> None:
        self.layers = list(layers)
        self._task = task
        self._device = device
        self._reduction: Reduction = reduction
        self._budget = batch_tokens
        self.halved = 0
        """How often memory did not suffice for a batch."""
        nothing = torch.zeros(0, dtype=torch.float64)
        self.seen = Losses(nothing, nothing)
        """Of the last pass."""
        names = {name for layer in layers for name in layer.parameters}
        self._engine = Engine(model, only=names.__contains__)
        ask = getattr(model, "get_output_embeddings", None)
        head = ask() if callable(ask) else None
        modules = dict(model.named_modules())
        self._has_head = any(modules[layer.name] is head for layer in layers)
        self._inputs: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def factors(
        self,
        encoded: Encoded,
        chosen: np.ndarray,
        draws: np.ndarray | None = None,
        *,
        labels: Labels = "sampled",
    ) -> dict[str, Sums]:
        """Layer -> sums over the tokens of some examples, float64.

        Args:
            encoded: a partition.
            chosen: (n,) positions of examples that have something to score.
            draws: (N, 2) int64 keys of the labels' random numbers, see `draw_keys`.
            labels: dataset gives the empirical Fisher matrix, which is another one.
        """
        found: dict[str, Sums] = {}
        pending: dict[str, Sums] = {}

        def take(view: View) -> None:
            left, right = _rows(view.left), _rows(view.right)
            mask = None if view.mask is None or bool(view.mask.all()) else view.mask.flatten()
            key = (*_address(view.right), view.layer.bias is None, mask is None)
            inputs = self._shared(key, view.right, lambda: _squared(_counted(right, mask), view))
            count = len(right) if mask is None else int(mask.sum())
            tokens = torch.tensor(float(count), dtype=torch.float64)
            pending[view.layer.name] = Sums(inputs, left.T @ left, tokens)

        def commit(_members: np.ndarray, _found: Gradients) -> None:
            for name, sums in pending.items():
                exact = Sums(*(value.double() for value in sums))
                found[name] = found[name].plus(exact) if name in found else exact
            pending.clear()

        self._run(encoded, chosen, take=take, commit=commit, labels=labels, draws=draws)
        return {layer.name: found.get(layer.name, _nothing(layer)) for layer in self.layers}

    def eigenvalues(
        self,
        encoded: Encoded,
        chosen: np.ndarray,
        bases: Mapping[str, Basis],
        draws: np.ndarray | None = None,
        *,
        labels: Labels = "sampled",
    ) -> dict[str, Tensor]:
        """Layer -> (O, I) float64 sum over examples of (Q_S^T G_b Q_A)^2.

        Args:
            encoded: a partition.
            chosen: (n,) positions of examples; the mean is over them all.
            bases: from `basis_of`, for every layer.
            draws: as in `factors`, and better not the same: axes fit the noise of their own labels.
            labels: as in `factors`.
        """
        sides = self._sides(bases)
        found: dict[str, Tensor] = {}
        pending: dict[str, Tensor] = {}

        def take(view: View) -> None:
            left, right = self._turned(view, *sides[view.layer.name])
            pending[view.layer.name] = squares_summed(left, right)

        def commit(_members: np.ndarray, _found: Gradients) -> None:
            for name, values in pending.items():
                found[name] = found[name].add_(values) if name in found else values.double()
            pending.clear()

        self._run(encoded, chosen, take=take, commit=commit, labels=labels, draws=draws)
        return {
            layer.name: found[layer.name]
            if layer.name in found
            else torch.zeros(layer.num_outputs, layer.num_inputs, dtype=torch.float64)
            for layer in self.layers
        }

    def self_influence(
        self, encoded: Encoded, chosen: np.ndarray, curvatures: Mapping[str, Curvature]
    ) -> Tensor:
        """(n,) float64 g_b^T H^-1 g_b with the examples' own labels, 0 and up.

        `seen` has the losses of the same pass.

        Args:
            encoded: a partition.
            chosen: (n,) positions of examples.
            curvatures: from `damped`, for every layer.
        """
        sides = self._sides(curvatures)
        weights = {
            name: one.damped.reciprocal().to(sides[name][0]) for name, one in curvatures.items()
        }
        found = torch.zeros(len(chosen), dtype=torch.float64, device=self._device)
        pending: list[Tensor] = []

        def take(view: View) -> None:
            name = view.layer.name
            left, right = self._turned(view, *sides[name])
            pending.append(weighted_squares(left, right, weights[name]))

        def commit(members: np.ndarray, _found: Gradients) -> None:
            if pending:
                found[torch.from_numpy(members).to(self._device)] = torch.stack(pending).sum(0)
            pending.clear()

        self._run(encoded, chosen, take=take, commit=commit)
        return found.cpu()

    def scores(self, encoded: Encoded, chosen: np.ndarray, queries: Sequence[Direction]) -> Tensor:
        """(n, Q) float64 inner products; positive: training on the example lowers the query's loss.

        Args:
            encoded: a partition.
            chosen: (n,) positions of examples.
            queries: from `kfac_queries.query_directions`.
        """
        found = torch.zeros(len(chosen), len(queries), dtype=torch.float64, device=self._device)
        wanted = Wanted(squares=False, directions={str(i): q for i, q in enumerate(queries)})

        def commit(members: np.ndarray, measured: Gradients) -> None:
            rows = torch.from_numpy(members).to(self._device)
            for i in range(len(queries)):
                found[rows, i] = measured.inner[str(i)]

        self._run(encoded, chosen, commit=commit, wanted=wanted)
        return found.cpu()

    def gradients(self, encoded: Encoded, chosen: np.ndarray) -> dict[str, Tensor]:
        """Layer -> (n, O, I) gradients of the examples' losses: of queries, which are few."""
        names = [name for layer in self.layers for name in layer.parameters]
        parts: dict[str, Tensor] = {}

        def commit(members: np.ndarray, measured: Gradients) -> None:
            for layer in self.layers:
                values = layer.joined(measured.whole)
                if layer.name not in parts:
                    parts[layer.name] = values.new_zeros(len(chosen), *values.shape[1:])
                parts[layer.name][torch.from_numpy(members).to(values.device)] = values

        self._run(encoded, chosen, commit=commit, wanted=Wanted(squares=False, whole=names))
        return parts

    def projections(
        self, encoded: Encoded, chosen: np.ndarray, sides: Mapping[str, Sides]
    ) -> dict[str, Tensor]:
        """Parameter -> (n, p * q) projected gradients, of the layers' parameters among `sides`."""
        names = {name for layer in self.layers for name in layer.parameters}
        kept = {name: own for name, own in sides.items() if name in names}
        parts: dict[str, Tensor] = {}

        def commit(members: np.ndarray, measured: Gradients) -> None:
            for name, values in measured.projections.items():
                if name not in parts:
                    parts[name] = values.new_zeros(len(chosen), values[0].numel())
                parts[name][torch.from_numpy(members).to(values.device)] = values.flatten(1)

        self._run(encoded, chosen, commit=commit, wanted=Wanted(squares=False, projections=kept))
        return parts

    def parameter_gradients(self, encoded: Encoded, chosen: np.ndarray) -> list[dict[str, Tensor]]:
        """Parameter -> gradient, of each of a few examples."""
        names = [name for layer in self.layers for name in layer.parameters]
        found: list[dict[str, Tensor]] = [{} for _ in chosen]

        def commit(members: np.ndarray, measured: Gradients) -> None:
            for place, member in enumerate(members.tolist()):
                found[member] = {name: measured.whole[name][place].clone() for name in names}

        self._run(encoded, chosen, commit=commit, wanted=Wanted(squares=False, whole=names))
        return found

    def _run(
        self,
        encoded: Encoded,
        chosen: np.ndarray,
        *,
        commit: Callable[[np.ndarray, Gradients], None],
        take: Callable[[View], None] | None = None,
        wanted: Wanted | None = None,
        labels: Labels = "dataset",
        draws: np.ndarray | None = None,
    ) -> None:
        """Measure all batches; `commit` is called for each one that fitted into memory."""
        views = Views(self.layers, take) if take is not None else None
        request = wanted or Wanted(squares=False, tell=None if views is None else views.tell)
        losses = ExampleLosses(
            self._task, reduction=self._reduction, labels=labels, keeps_logits=self._has_head
        )

        def work(members: np.ndarray) -> None:
            batch = to_device(self._task.collate(encoded, chosen[members]), self._device)
            if views is not None:
                views.begin(_unmasked(batch), len(members))
            if draws is not None:
                batch[DRAWS] = torch.from_numpy(draws[chosen[members]])
            try:
                found = self._engine.measure(
                    losses, batch, num_examples=len(members), wanted=request
                )
                if views is not None:
                    views.end()
            finally:
                self._inputs.clear()
            self._check()
            self._keep(members, losses)
            commit(members, found)

        zeros = torch.zeros(len(chosen), dtype=torch.float64)
        self.seen = Losses(zeros, zeros.clone())
        with torch.no_grad():
            passed = for_each_batch(encoded.lengths[chosen], work, batch_tokens=self._budget)
        self.halved += passed.halved
        self._budget = passed.batch_tokens  # what did not fit once need not be tried again

    def _keep(self, members: np.ndarray, losses: ExampleLosses) -> None:
        """What the batch's examples lost: the engine's last call of the losses is for all."""
        rows = torch.from_numpy(members)
        self.seen.totals[rows] = losses.totals.double().cpu()
        self.seen.counts[rows] = losses.counts.double().cpu()

    def _check(self) -> None:
        slow = set(self._engine.slow)
        for layer in self.layers:
            if slow.intersection(layer.parameters):
                raise ConfigError(
                    f"layer {layer.name} is not used the way its class says, so that its curvature"
                    " cannot be measured",
                    fix="leave it out of the parameters that are measured",
                )

    def _sides(
        self, found: Mapping[str, Basis] | Mapping[str, Curvature]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Eigenvectors in the model's precision; those of equal inputs are one tensor."""
        seen: dict[tuple[Any, ...], Tensor] = {}
        sides: dict[str, tuple[Tensor, Tensor]] = {}
        dtype = self._dtype()
        for layer in self.layers:
            one = found[layer.name]
            right = one.right.to(self._device, dtype)
            key = (right.shape, float(right[0, 0]), float(right[-1, -1]))
            same = seen.get(key)
            if same is None or not torch.equal(same, right):
                seen[key] = same = right
            sides[layer.name] = one.left.to(self._device, dtype), same
        return sides

    def _dtype(self) -> torch.dtype:
        first = next(self._engine.model.parameters()).dtype
        return torch.float64 if first == torch.float64 else torch.float32

    def _turned(self, view: View, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """g' = g Q_S and x' = x Q_A."""
        key = (*_address(view.right), right.data_ptr())

        def turn() -> Tensor:
            if view.layer.bias is None:
                return view.right @ right
            moved = torch.addmm(right[-1], _rows(view.right), right[:-1])
            return moved.reshape(*view.right.shape[:2], -1)

        return view.left @ left, self._shared(key, view.right, turn)

    def _shared(self, key: tuple[Any, ...], given: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What the last layers made of the same input. `given` is kept: its address is its name."""
        if key not in self._inputs:
            while len(self._inputs) >= _KEPT_INPUTS:
                del self._inputs[next(iter(self._inputs))]
            self._inputs[key] = given, make()
        return self._inputs[key][1]


def _unmasked(batch: Batch) -> Tensor | None:
    """The positions that hold a token, the example first; None: all.

    Of an example in several rows (windows) those that only fill the batch up hold none, whatever
    the attention mask says: a row must attend to something.
    """
    mask, targets = batch.get("attention_mask"), batch.get("targets")
    if targets is None or targets.dim() != 3:
        return mask
    ids = batch["input_ids"]
    is_row = (targets >= 0).any(2, keepdim=True).expand_as(ids)
    return is_row if mask is None else mask.bool() & is_row


def _squared(rows: Tensor, view: View) -> Tensor:
    """(I, I) x^T x; with a bias a row and a column for the input that is 1."""
    square = rows.T @ rows
    if view.layer.bias is None:
        return square
    total = rows.sum(0)
    count = total.new_tensor([float(len(rows))])
    return torch.cat([torch.cat([square, total[:, None]], 1), torch.cat([total, count])[None]], 0)


def _counted(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows[mask]


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _address(values: Tensor) -> tuple[Any, ...]:
    return (values.data_ptr(), *values.shape, *values.stride())


def _nothing(layer: Layer) -> Sums:
    outputs, inputs = layer.num_outputs, layer.num_inputs
    zero = torch.zeros((), dtype=torch.float64)
    return Sums(zero.new_zeros(inputs, inputs), zero.new_zeros(outputs, outputs), zero)
