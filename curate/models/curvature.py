"""Curvature of a loss in the space of projected gradients: sums, damping, factors, whitening.

    C = (1/n) Phi^T Phi + lambda I,   lambda = share * trace(Phi^T Phi / n) / k,   C = L L^T
    score(i, q) = phi_q^T C^-1 phi_i = <L^-1 phi_q, L^-1 phi_i>

`blocks` has a C, and a lambda, for each layer block (LoGra); `full` has one for whole rows (TRAK).

Sources: Choe et al., "What is your data worth to GPT?", 2024, arXiv:2405.13954, section 3; Park
et al., "TRAK: Attributing model behavior at scale", 2023, arXiv:2303.14186.
Departures: TRAK's reference code damps nothing and divides the inverse by its mean entry; neither
is done here, so that more numbers than rows (k > n) are no difficulty and scores keep their scale.
Cost: k g products for each row, k g float64 numbers, where g is a block's width, or k with `full`;
g^3 / 3 products for each factor.

Shapes: n rows, k numbers of a row, g of them in a group (a layer block, or all).
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.errors import ConfigError, InputError, counted

log = logging.getLogger(__name__)

Structure = Literal["blocks", "full"]
Arrays = dict[str, npt.NDArray[np.float64]]

ALL = "all"
"""Name of the only group of `full`."""
FEW_ROWS = 10
"""Fewer than these say little about a curvature."""
_SMALLEST_PIVOT = 8 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Phi^T Phi over the rows seen so far."""

    spans: Mapping[str, slice]
    """Group -> where its numbers are in a row; in the order of a row, without gaps."""
    sums: Mapping[str, Tensor]
    """Group -> (g, g) float64."""
    num_rows: int = 0
    num_left_out: int = 0
    """Rows without a value, or not finite; no part of the sums."""

    @classmethod
    def empty(
        cls,
        spans: Mapping[str, slice],
        structure: Structure,
        *,
        device: torch.device | str = "cpu",
    ) -> "Sums":
        """Sums over no rows.

        Args:
            spans: of the layer blocks, as `index_rows.Header.spans` has them.
            structure: what is taken to be independent of what.
            device: where the sums are kept and made.
        """
        if structure == "full":
            spans = {ALL: slice(0, _width(spans))}
        sums = {
            name: torch.zeros(
                span.stop - span.start, span.stop - span.start, dtype=torch.float64, device=device
            )
            for name, span in spans.items()
        }
        return cls(spans=dict(spans), sums=sums)

    def add(self, rows: Tensor, usable: Tensor | npt.NDArray[np.bool_] | None = None) -> "Sums":
        """With more rows.

        Args:
            rows: (n, k) of any float type.
            usable: (n,) False where a row has no value, which the index stores as zeros.

        Returns:
            New sums; these are left as they are.
        """
        assert rows.shape[1] == _width(self.spans)
        device = next(iter(self.sums.values())).device
        values = rows.detach().to(device, torch.float64)
        kept = values.isfinite().all(1)
        if usable is not None:
            kept &= torch.as_tensor(usable, dtype=torch.bool, device=device)
        values = values[kept]
        added = {name: values[:, span].T @ values[:, span] for name, span in self.spans.items()}
        return self.plus(
            Sums(
                spans=self.spans,
                sums=added,
                num_rows=len(values),
                num_left_out=len(rows) - len(values),
            )
        )

    def plus(self, other: "Sums") -> "Sums":
        """Over the rows of both, which must be laid out alike."""
        assert dict(self.spans) == dict(other.spans)
        return Sums(
            spans=self.spans,
            sums={
                name: total + other.sums[name].to(total.device) for name, total in self.sums.items()
            },
            num_rows=self.num_rows + other.num_rows,
            num_left_out=self.num_left_out + other.num_left_out,
        )

    def arrays(self) -> Arrays:
        """As a file of safetensors takes them."""
        found = _spans_as_arrays(self.spans)
        found |= {f"sum/{name}": _as_array(total) for name, total in self.sums.items()}
        found["num_rows"] = np.array([self.num_rows, self.num_left_out], dtype=np.float64)
        return found

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[np.float64]]) -> "Sums":
        """What `arrays` gave; the order of the keys does not matter."""
        spans = _spans_of_arrays(arrays)
        num_rows, num_left_out = arrays["num_rows"].astype(int).tolist()
        return cls(
            spans=spans,
            sums={name: torch.from_numpy(np.array(arrays[f"sum/{name}"])) for name in spans},
            num_rows=num_rows,
            num_left_out=num_left_out,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Curvature:
    """Cholesky factors of the damped C, and what they were made with."""

    spans: Mapping[str, slice]
    """Group -> where its numbers are in a row."""
    factors: Mapping[str, Tensor]
    """Group -> (g, g) float64 lower triangle L; groups that are zero in every row have none."""
    damping: Mapping[str, float]
    """Group -> lambda; 0 for groups without a factor."""
    dimensions: Mapping[str, float]
    """Group -> trace(C^-1 (C - lambda I)), in [0, min(n, g)]."""
    share: float
    """lambda by the mean eigenvalue; NaN where lambda itself was given."""
    num_rows: int
    num_left_out: int

    @property
    def excluded(self) -> tuple[str, ...]:
        """Groups that are zero in every row: they have no part in a product."""
        return tuple(name for name in self.spans if name not in self.factors)

    @property
    def effective_dimension(self) -> float:
        """Sum over the groups; the mean of |L^-1 phi|^2 over the rows that C is made of."""
        return sum(self.dimensions.values())

    def whiten(self, rows: Tensor) -> Tensor:
        """(n, k) float64 z = L^-1 phi of rows (n, k); zeros in groups that are excluded."""
        return self._solved(rows, twice=False)

    def precondition(self, rows: Tensor) -> Tensor:
        """(n, k) float64 C^-1 phi of rows (n, k); zeros in groups that are excluded."""
        return self._solved(rows, twice=True)

    def _solved(self, rows: Tensor, *, twice: bool) -> Tensor:
        assert rows.shape[1] == _width(self.spans)
        found = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
        for name, factor in self.factors.items():
            lower = factor.to(rows.device)
            part = rows[:, self.spans[name]].double().T  # (g, n)
            part = torch.linalg.solve_triangular(lower, part, upper=False)
            if twice:
                part = torch.linalg.solve_triangular(lower.T, part, upper=True)
            found[:, self.spans[name]] = part.T
        return found

    def arrays(self) -> Arrays:
        """As a file of safetensors takes them."""
        found = _spans_as_arrays(self.spans)
        found |= {f"factor/{name}": _as_array(factor) for name, factor in self.factors.items()}
        for name in self.spans:
            found[f"damping/{name}"] = np.array([self.damping[name]])
            found[f"dimension/{name}"] = np.array([self.dimensions[name]])
        found["share"] = np.array([self.share])
        found["num_rows"] = np.array([self.num_rows, self.num_left_out], dtype=np.float64)
        return found

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[np.float64]]) -> "Curvature":
        """What `arrays` gave; the order of the keys does not matter."""
        spans = _spans_of_arrays(arrays)
        num_rows, num_left_out = arrays["num_rows"].astype(int).tolist()
        return cls(
            spans=spans,
            factors={
                name: torch.from_numpy(np.array(arrays[f"factor/{name}"]))
                for name in spans
                if f"factor/{name}" in arrays
            },
            damping={name: float(arrays[f"damping/{name}"][0]) for name in spans},
            dimensions={name: float(arrays[f"dimension/{name}"][0]) for name in spans},
            share=float(arrays["share"][0]),
            num_rows=num_rows,
            num_left_out=num_left_out,
        )


def curvature_of(sums: Sums, *, share: float = 0.1, damping: float | None = None) -> Curvature:
    """Damped and factored curvature of the rows that were summed.

    Args:
        sums: over at least one row.
        share: lambda by the mean eigenvalue of each group, at least 0.
        damping: lambda of every group, in place of `share`.

    Raises:
        ConfigError: `share` or `damping` is no number of at least 0, or too small to factor C.
        InputError: there are no rows, or all of them are zeros.
    """
    given = share if damping is None else damping
    if not 0 <= given < float("inf"):
        raise ConfigError(f"the damping is {given}", fix="give a number of at least 0")
    _check_rows(sums)
    if sums.num_rows < FEW_ROWS:
        log.warning(
            "the curvature stands on %s only: scores that divide by it mean little; hundreds of"
            " rows are usual",
            counted(sums.num_rows, "row"),
        )
    factors: dict[str, Tensor] = {}
    lambdas = dict.fromkeys(sums.spans, 0.0)
    dimensions = dict.fromkeys(sums.spans, 0.0)
    for name, total in sums.sums.items():
        plain = total / sums.num_rows
        trace = float(plain.trace())
        if not trace:
            continue
        lambdas[name] = share * trace / len(plain) if damping is None else damping
        factors[name] = _factor(name, plain, lambdas[name])
        # k - lambda trace(C^-1) would cancel where lambda is large.
        dimensions[name] = float(torch.cholesky_solve(plain, factors[name]).trace())
    if len(factors) < len(sums.spans):
        missing = [name for name in sums.spans if name not in factors]
        log.warning(
            "%s left out of the curvature, the gradient of every example is zero there: %s",
            counted(len(missing), "layer is", "layers are"),
            ", ".join(missing),
        )
    return Curvature(
        spans=sums.spans,
        factors=factors,
        damping=lambdas,
        dimensions=dimensions,
        share=share if damping is None else float("nan"),
        num_rows=sums.num_rows,
        num_left_out=sums.num_left_out,
    )


def _check_rows(sums: Sums) -> None:
    if not sums.num_rows:
        raise InputError(
            f"no row of the index has a finite gradient ({sums.num_left_out:,} are without one)",
            fix="look for weights of the model that are NaN or infinite, or set model.dtype:"
            " float32; the log says which examples have no gradient for another reason",
        )
    if not any(bool(total.any()) for total in sums.sums.values()):
        raise InputError(
            f"the gradients of all {counted(sums.num_rows, 'row')} of the index are zero",
            fix="choose layers that the loss depends on",
        )


def _factor(name: str, plain: Tensor, damping: float) -> Tensor:
    """(g, g) lower triangle of the damped matrix."""
    if not math.isfinite(damping):
        raise ConfigError(
            f"the damping of {name!r} is {damping:g}, more than a number can be",
            fix="lower the damping; 0.1 of the mean eigenvalue is usual",
        )
    damped = plain + damping * torch.eye(len(plain), dtype=plain.dtype, device=plain.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal().square()
    # A singular matrix often passes, its last pivots being rounding.
    if int(failed) or float(pivots.min()) <= _SMALLEST_PIVOT * len(plain) * float(
        damped.diagonal().max()
    ):
        raise ConfigError(
            f"the curvature of {name!r} cannot be inverted with a damping of {damping:g}",
            fix="raise the damping; 0.1 of the mean eigenvalue is usual",
        )
    return factor


def _width(spans: Mapping[str, slice]) -> int:
    """k."""
    return max(span.stop for span in spans.values())


def _as_array(values: Tensor) -> npt.NDArray[np.float64]:
    return np.ascontiguousarray(values.cpu().numpy())


def _spans_as_arrays(spans: Mapping[str, slice]) -> Arrays:
    return {
        f"span/{name}": np.array([span.start, span.stop], dtype=np.float64)
        for name, span in spans.items()
    }


def _spans_of_arrays(arrays: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, slice]:
    """In the order of a row: safetensors sorts its keys."""
    found = {
        key.removeprefix("span/"): slice(*values.astype(int).tolist())
        for key, values in arrays.items()
        if key.startswith("span/")
    }
    return dict(sorted(found.items(), key=lambda item: item[1].start))
