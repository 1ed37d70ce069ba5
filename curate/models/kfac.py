"""EK-FAC: a layer's Fisher matrix from two small ones, its eigenvalues measured.

    A = E[x x^T],  S = E[g g^T]     over the unmasked tokens; a bias is one more input that is 1
    A = Q_A a Q_A^T,  S = Q_S s Q_S^T
    Lambda = E_b[ (Q_S^T G_b Q_A)^2 ]       over examples, G_b = sum_t g_t x_t^T   (EK-FAC)
    Lambda = s a^T * tokens per example                                            (K-FAC)
    H^-1 V = Q_S [ (Q_S^T V Q_A) / (Lambda + d) ] Q_A^T,   d = share * mean(Lambda)

A and S are means over tokens, Lambda is a mean over examples whose gradients are sums over their
tokens: H is the mean over examples of their losses' curvature. g_q^T H^-1 g_i divided by the number
of training examples is what removing example i adds to the loss of q.

Source: George, Laurent, Bouthillier, Ballas and Vincent, "Fast Approximate Natural Gradient Descent
in a Kronecker-factored Eigenbasis", NeurIPS 2018, arXiv:1806.03884; for influence Grosse et al.,
"Studying Large Language Model Generalization with Influence Functions", 2023, arXiv:2308.03296.
Departures: none in the maths; what is sampled and which tokens count stands in `kfac_pass`.
Cost: I^3 + O^3 for the eigenvectors, in float64; memory I^2 + O^2 + I O of each layer.

Shapes: O outputs and I inputs of a layer, the bias' included; R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from curate.models.gradients import LowRank

DAMPING = 0.1
"""Share of the mean eigenvalue that is added to each."""


class Sums(NamedTuple):
    """Factors of one layer before they are divided; those of two sets of examples add up."""

    inputs: Tensor
    """(I, I) float64 sum of x x^T over tokens"""
    outputs: Tensor
    """(O, O) float64 sum of g g^T over tokens"""
    num_tokens: Tensor
    """() float64"""

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(one + two for one, two in zip(self, other, strict=True)))


class Basis(NamedTuple):
    """Eigenvectors of one layer's factors, in columns; eigenvalues ascend."""

    left: Tensor
    """(O, O) Q_S"""
    right: Tensor
    """(I, I) Q_A"""
    left_values: Tensor
    """(O,) s"""
    right_values: Tensor
    """(I,) a"""


class Curvature(NamedTuple):
    """H of one layer, damped."""

    left: Tensor
    """(O, O) Q_S"""
    right: Tensor
    """(I, I) Q_A"""
    damped: Tensor
    """(O, I) Lambda + d"""

    def inverse(self, gradient: Tensor) -> Tensor:
        """(..., O, I) H^-1 V."""
        turned = self.left.mT @ gradient @ self.right / self.damped
        return self.left @ turned @ self.right.mT

    def product(self, gradient: Tensor) -> Tensor:
        """(..., O, I) H V."""
        turned = self.left.mT @ gradient @ self.right * self.damped
        return self.left @ turned @ self.right.mT


def basis_of(sums: Sums) -> Basis:
    """Eigenvectors of the factors, from their means over tokens, in float64."""
    count = sums.num_tokens.clamp(min=1)
    left_values, left = torch.linalg.eigh(_symmetric(sums.outputs / count))
    right_values, right = torch.linalg.eigh(_symmetric(sums.inputs / count))
    return Basis(left, right, left_values.clamp(min=0), right_values.clamp(min=0))


def kfac_eigenvalues(basis: Basis, tokens_per_example: float) -> Tensor:
    """(O, I) eigenvalues as if inputs and output gradients were independent: K-FAC.

    Args:
        basis: from `basis_of`; its factors are means over tokens.
        tokens_per_example: how many of them an example has on average, as an example's curvature
            is the sum over its tokens.
    """
    return basis.left_values[:, None] * basis.right_values * tokens_per_example


def turned(gradients: Tensor, basis: Basis) -> Tensor:
    """(N, O, I) Q_S^T G_b Q_A; the mean of its squares over examples is Lambda."""
    return basis.left.mT @ gradients @ basis.right


def damped(basis: Basis, eigenvalues: Tensor, *, share: float = DAMPING) -> Curvature:
    """The damped curvature of a layer.

    Args:
        basis: of the layer.
        eigenvalues: (O, I) Lambda.
        share: of the mean eigenvalue. A layer that no example reaches has the damping 1, so that
            its gradients, which are all zero, give zero.
    """
    damping = share * eigenvalues.mean()
    damping = torch.where(damping > 0, damping, torch.ones_like(damping))
    return Curvature(basis.left, basis.right, eigenvalues + damping)


def low_rank(matrix: Tensor, rank: int) -> tuple[LowRank, float]:
    """The nearest matrix of a rank, and the share of the squared length that it keeps.

    Args:
        matrix: (O, I), worked on in float64.
        rank: R; a smaller matrix is kept as it is.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    total = values.square().sum()
    kept = float(values[:rank].square().sum() / total) if float(total) > 0 else 1.0
    roots = values[:rank].sqrt()
    left = (left[:, :rank] * roots).to(matrix.dtype)
    return LowRank(left, (right[:rank].mT * roots).to(matrix.dtype)), kept


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
