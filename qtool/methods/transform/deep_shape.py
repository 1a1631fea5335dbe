"""DeepShape: pull a linear's weights into a more peaked distribution, so that their codes say less and compress better.

    w' = m + F⁻¹(r / n)     w one of the n = out · in weights    m their mean    r its rank, 1/2 to n - 1/2, ties together
    F⁻¹(p) = sign(2p - 1) α P⁻¹(1/ν', |2p - 1|)^(1/ν')       quantile of a generalised Gaussian of shape ν'
        density ν' / (2 α Γ(1/ν')) exp(-(|w| / α)^ν'): 2 is normal, 1 Laplace; P is the regularised lower incomplete gamma
    ν' = factor · ν,   Γ(1/ν) Γ(3/ν) / Γ(2/ν)² = mean (w - m)² / (mean |w - m|)²    ν by matching moments
α is such that the standard deviation stays. The map is monotone: the largest weight stays the largest.
It changes what the model computes. Let distill/logits follow, which brings most of that back, and then quantize.
Source: arXiv:2506.00486, DeepShape. Differs: a factor for each matrix's own ν in place of one ν for all; about the
mean; α from the standard deviation of the n quantiles themselves, whose last stands before the tail's end.
For: fewer bits after an entropy coder, at the same bits in memory; where size in memory counts, leave it away.
Costs: one sort of each matrix, no calibration; then the training that must follow.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.linalg.generalized_gaussian import LEAST, fit_shape
from qtool.options import Selection
from qtool.registry import Method

NODES = 2**16  # of the table of F⁻¹: its relative error is below 1e-6, that of weights in float32 6e-8


class DeepShapeOptions(Selection):
    """How far to go."""

    factor: float = Field(0.9, gt=0, le=1, description="new shape over the weights' own; smaller is more peaked")


def quantiles(p: Tensor, shape: float) -> Tensor:
    """F⁻¹(p) of p [n] float64 within 0 and 1, for α = 1: straight lines between NODES points of (F, F⁻¹)."""
    a = torch.tensor(1 / shape, dtype=torch.float64, device=p.device)
    # Beyond the last node lies less than 1e-18, for every shape from LEAST to MOST.
    y = (50 + 2 / shape) * torch.linspace(0, 1, NODES, dtype=torch.float64, device=p.device) ** 3  # (|w| / α)^ν, dense at 0
    F, x = torch.special.gammainc(a, y), y ** (1 / shape)  # [nodes]
    u = (2 * p - 1).abs()  # [n]
    right = torch.searchsorted(F, u).clamp(1, NODES - 1)  # F[right - 1] < u <= F[right]
    part = (u - F[right - 1]) / (F[right] - F[right - 1])
    return torch.sign(2 * p - 1) * torch.lerp(x[right - 1], x[right], part)


def deep_shape(W: Tensor, stats: LayerStats | None, options: DeepShapeOptions, note: Callable[[str], None]) -> Tensor:
    """W [out, in] float32 with its ranks, mean and standard deviation kept and its shape `factor` times what it was."""
    if bool(W.min() == W.max()):
        note("all weights are equal; left as they are")
        return W
    spread, mean = W.std(correction=0), W.mean()
    shape = max(LEAST, options.factor * fit_shape(W - mean))
    ordered, places = W.flatten().sort()  # [out · in]
    counts = ordered.unique_consecutive(return_counts=True)[1]  # [distinct]
    ranks = counts.cumsum(0).double() - counts / 2  # float64, because float32 counts to 2^24 only
    q = quantiles(ranks / W.numel(), shape).repeat_interleave(counts)  # [out · in]
    q = ((q - q.mean()) * (spread / q.std(correction=0)) + mean).to(W.dtype)
    return torch.empty_like(q).scatter_(0, places, q).view_as(W)


METHOD = Method(run=deep_shape, options=DeepShapeOptions, scope="linear")
