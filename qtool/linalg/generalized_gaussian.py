"""The generalised Gaussian that a set of weights is closest to, by matching moments.

    density ν / (2 α Γ(1/ν)) exp(-(|w| / α)^ν)     shape ν: 2 is normal, 1 Laplace, less is more peaked with longer tails
    Γ(1/ν) Γ(3/ν) / Γ(2/ν)² = E w² / (E |w|)²      which falls as ν rises, so that halving finds ν
Source: Mallat 1989, IEEE Trans. PAMI 11(7), section IV.B, for the moments; arXiv:2506.00486 fits weights with it.
"""

import math

import torch
from torch import Tensor

LEAST, MOST = 0.1, 3.0  # shapes that are told apart; more peaked or flatter ones count as these
HALVINGS = 40  # of that span: far below what a sample tells of ν


def moment_ratio(shape: float) -> float:
    """E w² / (E |w|)² of a generalised Gaussian; it falls as the shape rises, from 2 at 1 to π/2 at 2."""
    return math.exp(math.lgamma(1 / shape) + math.lgamma(3 / shape) - 2 * math.lgamma(2 / shape))


def kurtosis_of_shape(shape: float) -> float:
    """E w⁴ / (E w²)² of a generalised Gaussian: 3 at 2 (normal), 6 at 1 (Laplace)."""
    return math.exp(math.lgamma(5 / shape) + math.lgamma(1 / shape) - 2 * math.lgamma(3 / shape))


def fit_shape(D: Tensor) -> float:
    """The shape ν of deviations D, any shape, not all zero: the one whose moment ratio is theirs, within LEAST and MOST."""
    mean_square = float(D.square().mean(dtype=torch.float64))
    ratio = mean_square / float(D.abs().mean(dtype=torch.float64)) ** 2
    low, high = LEAST, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if moment_ratio(middle) > ratio else (low, middle)
    return (low + high) / 2
