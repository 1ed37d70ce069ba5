"""Ways of attribution on one set of examples and queries, by the engines of `curate.models`.

Every way gives (n, Q): positive where training on the example lowers the query's loss.

Shapes: n training examples, Q queries, P parameters, k numbers of a projected gradient.
"""

import importlib.util
import tempfile
import warnings
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from many_models import Data, PlainTask
from torch import Tensor, nn
from torch.nn import functional

from curate.models.conjugate import GaussNewton, conjugate_gradients
from curate.models.curvature import Structure, Sums, curvature_of
from curate.models.example_losses import draw_keys
from curate.models.index_pass import IndexPass, index_rows
from curate.models.kfac import Basis, Curvature, basis_of, damped, kfac_eigenvalues
from curate.models.kfac import Sums as LayerSums
from curate.models.kfac_layers import layers_of
from curate.models.kfac_pass import KFACPass
from curate.models.kfac_queries import query_directions
from curate.models.projection import draw_sides

CPU = torch.device("cpu")
BUDGET = 4096

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Ways:
    """Attributions by one trained model.

    Args:
        model: in eval mode.
        train: training examples.
        queries: whose losses are foretold.
    """

    def __init__(self, model: nn.Module, train: Data, queries: Data) -> None:
        self.model, self.train, self.queries = model, train, queries
        self.task = PlainTask()
        both = Data(*(torch.cat(pair) for pair in zip(train, queries, strict=True)))
        self.encoded = self.task.encoded(both)
        self.chosen = np.arange(len(train.targets))
        self.asked = np.arange(len(train.targets), len(both.targets))
        self.layers = layers_of(model)
        self.engine = KFACPass(
            model, self.task, self.layers, batch_tokens=BUDGET, device=CPU, reduction="mean"
        )
        self._fitted: dict[tuple[int, int, bool], tuple[dict[str, Basis], dict[str, Tensor]]] = {}

    def dot(self) -> Floats:
        """<g_i, g_q>."""
        asked = self.engine.parameter_gradients(self.encoded, self.asked)
        return self.engine.scores(self.encoded, self.chosen, asked).numpy()

    def cosine(self, dots: Floats) -> Floats:
        """The same, divided by both lengths; those of the queries change no order."""
        names = {name for layer in self.layers for name in layer.parameters}
        sides = draw_sides(self.model, dim=1, layers=sorted(names))
        index = IndexPass(self.model, self.task, sides, reduction="mean", with_squares=True)
        found, _ = index_rows(
            index, self.task, self.encoded, lambda *_: None, batch_tokens=4 * BUDGET, device=CPU
        )
        lengths = found["grad_sq_norm"].sqrt().numpy()
        return dots / np.maximum(lengths[self.chosen, None], 1e-30)

    def ekfac(
        self,
        *,
        corrected: bool = True,
        rank: int | None = None,
        seed: int = 0,
        rounds: int = 1,
        redraws: bool = True,
    ) -> Floats:
        """g_q^T (H + d)^-1 g_i, d a tenth of each layer's mean eigenvalue.

        Args:
            corrected: by measured eigenvalues; else K-FAC.
            rank: of each layer's query; None: whole.
            seed: of the labels that are drawn.
            rounds: labels drawn for each example.
            redraws: the eigenvalues by other labels than the eigenvectors.
        """
        directions, _ = query_directions(
            self.engine.gradients(self.encoded, self.asked),
            self._curvatures(corrected, seed, rounds, redraws),
            self.layers,
            rank=rank,
        )
        return self.engine.scores(self.encoded, self.chosen, directions).numpy()

    def conjugate(self, *, sample: int, iterations: int, share: float = 0.1) -> Floats:
        """The same with the whole Gauss-Newton matrix of a sample, by conjugate gradients."""
        rows = np.random.default_rng(0).permutation(self.chosen)[:sample]
        batches = [self.task.collate(self.encoded, part) for part in np.array_split(rows, 4)]
        names = [name for layer in self.layers for name in layer.parameters]
        curvature = GaussNewton(self.model, self.task, batches, names, reduction="mean")
        damping = {
            name: share * self._mean_eigenvalue(layer.name)
            for layer in self.layers
            for name in layer.parameters
        }
        solved = [
            conjugate_gradients(
                curvature.product, right, damping, tolerance=1e-2, max_iterations=iterations
            ).solution
            for right in self.engine.parameter_gradients(self.encoded, self.asked)
        ]
        return self.engine.scores(self.encoded, self.chosen, solved).numpy()

    def rows(self, *, dim: int, seed: int) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """(n + Q, k) projected gradients, (n + Q,) chance of the targets, and where layers are."""
        names = [name for layer in self.layers for name in layer.parameters]
        sides = draw_sides(self.model, dim=dim, seed=seed, layers=names)
        spans: dict[str, slice] = {}
        width = 0
        for name, (left, right) in sides.items():
            spans[name] = slice(width, width + left.shape[1] * right.shape[1])
            width = spans[name].stop
        rows = torch.zeros(len(self.encoded), width, dtype=torch.float64)

        def take(chosen: np.ndarray, found: Tensor) -> None:
            rows[torch.from_numpy(chosen)] = found.double()

        index = IndexPass(self.model, self.task, sides, reduction="mean")
        found, _ = index_rows(
            index, self.task, self.encoded, take, batch_tokens=4 * BUDGET, device=CPU
        )
        return rows, found["loss"].neg().exp(), spans

    def projected(
        self, *, dim: int, structure: Structure, share: float = 0.1, seed: int = 0
    ) -> Floats:
        """phi_q^T C^-1 phi_i with the empirical Fisher matrix of projected gradients."""
        rows, _, spans = self.rows(dim=dim, seed=seed)
        own, other = rows[self.chosen], rows[self.asked]
        curvature = curvature_of(Sums.empty(spans, structure).add(own), share=share)
        return (own @ curvature.precondition(other).T).numpy()

    def trak(self, *, dim: int, seed: int, share: float = 0.0) -> tuple[Floats, Floats]:
        """Phi (Phi^T Phi)^-1 Phi_q^T and Q = 1 - p, of one model; `mean_trak` puts them together.

        The output is log(p / (1 - p)), whose gradient is that of the loss over -(1 - p).
        """
        rows, chance, spans = self.rows(dim=dim, seed=seed)
        rows = rows / (1 - chance).clamp(min=1e-12)[:, None]
        own, other = rows[self.chosen], rows[self.asked]
        curvature = curvature_of(Sums.empty(spans, "full").add(own), share=share)
        found = own @ curvature.precondition(other).T
        return found.numpy(), (1 - chance[self.chosen]).numpy()

    def dense(self, *, weight_decay: float, damping: float = 0.0) -> Floats:
        """The influence function with the whole Hessian: of logistic regression, where it is exact.

        H = mean_i (diag(p_i) - p_i p_i^T) (x) x_i x_i^T + weight decay
        """
        inputs = torch.cat([self.train.inputs, torch.ones(len(self.chosen), 1)], 1)
        asked = torch.cat([self.queries.inputs, torch.ones(len(self.asked), 1)], 1)
        with torch.no_grad():
            chance = self.model(self.train.inputs).softmax(1)
            other = self.model(self.queries.inputs).softmax(1)
        count, width, classes = len(inputs), inputs.shape[1], chance.shape[1]
        matrix = torch.zeros(classes, width, classes, width)
        for a in range(classes):
            for b in range(a, classes):
                weight = chance[:, a] * (float(a == b) - chance[:, b])
                block = (inputs * weight[:, None]).T @ inputs / count
                matrix[a, :, b] = matrix[b, :, a] = block
        matrix = matrix.reshape(classes * width, -1)
        matrix.diagonal().add_(weight_decay + damping)
        factor = torch.linalg.cholesky(matrix.double())
        left = chance - functional.one_hot(self.train.targets, classes)
        mine = other - functional.one_hot(self.queries.targets, classes)
        right = torch.einsum("qc,qf->qcf", mine, asked).reshape(len(asked), -1).double()
        solved = torch.cholesky_solve(right.T, factor).T.reshape(-1, classes, width).float()
        return torch.einsum("nc,qcf,nf->nq", left, solved, inputs).double().numpy()

    def _curvatures(
        self, corrected: bool, seed: int, rounds: int, redraws: bool
    ) -> dict[str, Curvature]:
        bases, values = self._fit(seed, rounds, redraws)
        if not corrected:
            tokens = float(self.encoded.lengths[0])
            values = {name: kfac_eigenvalues(base, tokens) for name, base in bases.items()}
        return {name: damped(bases[name], own) for name, own in values.items()}

    def _mean_eigenvalue(self, layer: str) -> float:
        return float(self._fit(0, 1, True)[1][layer].mean())

    def _fit(
        self, seed: int, rounds: int, redraws: bool
    ) -> tuple[dict[str, Basis], dict[str, Tensor]]:
        """Eigenvectors and eigenvalues, made once."""
        known = seed, rounds, redraws
        if known not in self._fitted:
            keys = self._draws(seed, rounds, "")
            found = [self.engine.factors(self.encoded, self.chosen, draws) for draws in keys]
            sums = {name: reduce(LayerSums.plus, [own[name] for own in found]) for name in found[0]}
            bases = {name: basis_of(own) for name, own in sums.items()}
            keys = self._draws(seed, rounds, "again") if redraws else keys
            each = [
                self.engine.eigenvalues(self.encoded, self.chosen, bases, draws) for draws in keys
            ]
            count = len(self.chosen) * rounds
            values = {
                name: torch.stack([own[name] for own in each]).sum(0) / count for name in bases
            }
            self._fitted[known] = bases, values
        return self._fitted[known]

    def _draws(self, seed: int, rounds: int, word: str) -> list[Any]:
        names = [f"{word}{number}" for number in range(len(self.encoded))]
        return [draw_keys(names, seed=1000 * seed + number) for number in range(rounds)]


def mean_trak(parts: Sequence[tuple[Floats, Floats]]) -> Floats:
    """TRAK's scores: the means of both factors over the models, multiplied."""
    weights = np.mean([part[1] for part in parts], axis=0)
    return np.mean([part[0] for part in parts], axis=0) * weights[:, None]


def has_kronfluence() -> bool:
    return importlib.util.find_spec("kronfluence") is not None


def kronfluence_scores(
    model: nn.Module, train: Data, queries: Data, *, damping: float | None, seed: int = 0
) -> Floats:
    """EK-FAC by kronfluence, all defaults but the damping; None is its tenth of the mean."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kronfluence.analyzer import Analyzer, prepare_model  # pyright: ignore
        from kronfluence.arguments import FactorArguments, ScoreArguments  # pyright: ignore
        from kronfluence.task import Task  # pyright: ignore

        class Own(Task):  # pyright: ignore
            def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
                logits = model(batch[0]).flatten(0, -2)
                targets = batch[1].flatten()
                if sample:
                    chance = logits.detach().softmax(-1)
                    targets = torch.multinomial(chance, num_samples=1).flatten()
                return functional.cross_entropy(logits, targets, reduction="sum")

            def compute_measurement(self, batch: Any, model: Any) -> Tensor:
                return self.compute_train_loss(batch, model)

        task: Any = Own()
        prepared = prepare_model(model, task)
        with tempfile.TemporaryDirectory() as folder:
            analyzer: Any = Analyzer(
                analysis_name="lds", model=prepared, task=task, cpu=True, disable_tqdm=True,
                output_dir=str(Path(folder)), disable_model_save=True,
            )  # fmt: skip
            own = torch.utils.data.TensorDataset(*train)
            other = torch.utils.data.TensorDataset(*queries)
            analyzer.fit_all_factors(
                factors_name="factors", dataset=own, per_device_batch_size=250,
                factor_args=FactorArguments(strategy="ekfac"),
            )  # fmt: skip
            analyzer.compute_pairwise_scores(
                scores_name="scores", factors_name="factors", query_dataset=other,
                train_dataset=own, per_device_query_batch_size=20,
                per_device_train_batch_size=250,
                score_args=ScoreArguments(damping_factor=damping),
            )  # fmt: skip
            found = analyzer.load_pairwise_scores("scores")["all_modules"]
    return found.T.double().numpy()
