"""AdaRound: learn for every weight whether it is rounded up or down, by the error that the layer's output takes.

Minimize  in · (W~ - W) H (W~ - W)ᵀ / r  +  weight · sum(1 - |2h - 1|^beta)  for each output channel, over V, by Adam:
    W~ = low + gap h      h = clip(1.2 sigmoid(V) - 0.1, 0, 1), from W~ = W on; in the end the level above where V >= 0
    W [out, in]    H [in, in] mean of x xᵀ    V, h, low, gap [out, in]: low the level below each weight, gap to that above
    r [out]: (W^ - W) H (W^ - W)ᵀ of W^, all weights rounded to nearest      beta falls from 20 to 2
Source: Nagel et al. 2020, arXiv:2004.10568, section 3.3. Differs: the error of the output is taken over all tokens at once,
by H, not over batches and behind an activation function; r is its unit, so that `weight` means the same in every layer; the
second term is there from the first step, as nothing else moves W~ away from W; levels are those of any grid. Weights that
lie on a level stay, so that pruned ones do. A channel whose error did not fall below r is rounded to nearest.
Why these defaults: on three of the demo model's layers at w3a16g64-asym they end with 0.3 % of h between 0 and 1 or less, and
with 12, 21 and 60 % of rounding's error, 500 steps with 16, 24 and 60 %, 2000 with 11, 21 and 60 % (GPTQ: 6, 23 and 55 %).
A weight of 1 leaves a fifth of h undecided.
For: learned rounding without gradients through blocks; GPTQ is faster and mostly better.
Costs: 1000 small matrix products for each linear, some five times GPTQ's time.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, assemble, from_groups, quantize, settle, to_groups
from qtool.linalg.ranges import plain_cost, search_range
from qtool.options import Sequential
from qtool.registry import Method

STRETCH, SHIFT = 1.2, 0.1  # of the sigmoid, so that h reaches 0 and 1 (the paper's zeta - gamma and -gamma)
EPS = 1e-3  # of Adam, whose gradients are about 1 here: what float32 leaves of a gradient of zero moves nothing
BETA_FIRST, BETA_LAST = 20.0, 2.0


class AdaRoundOptions(SchemeSelection, Sequential):
    """Options of AdaRound."""

    steps: int = Field(1000, ge=0, description="updates of V; 0 is rounding to nearest")
    lr: float = Field(0.03, gt=0, le=1, description="Adam's learning rate")
    weight: float = Field(10.0, gt=0, description="of the term that drives h to 0 and 1, against the output's error")
    range: Literal["minmax", "mse"] = Field("mse", description="a group's range: minmax, all of it; mse, of least error")


def ada_round(
    W: Tensor, stats: LayerStats, scheme: WeightScheme, options: AdaRoundOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Quantize W [out, in] float32; raises QtoolError where columns do not divide into groups or H is not finite."""
    grouped = to_groups(W, scheme)  # [out, groups, group]
    grid = scheme.grid.for_tensor(grouped)
    params = settle(grid.fit(grouped) if options.range == "minmax" else search_range(grouped, grid, plain_cost), scheme)
    nearest = quantize(W, scheme, params)
    if stats.n_tokens == 0:
        note("no calibration token reached it; rounded to nearest")
        return nearest
    H = stats.hessian()  # [in, in]
    if not torch.isfinite(H).all():
        raise QtoolError("the Hessian holds NaN or infinity; check the model's weights and load it with dtype: float32")
    below, above = grid.neighbours(grouped, params)  # [out, groups, group]
    low, high = (from_groups(grid.decode(codes, params), scheme) for codes in (below, above))  # [out, in]
    gap = (high - low).masked_fill(W == low, 0)  # [out, in]
    r = error_of(nearest.dequantize() - W, H)  # [out, 1]
    V = learn(W, H, low, gap, r, options)  # [out, in]
    is_up = (V >= 0) & (gap > 0)
    is_better = error_of(low + gap * is_up - W, H) < r  # [out, 1]
    codes = torch.where(is_up, from_groups(above, scheme), from_groups(below, scheme))  # [out, in]
    return assemble(torch.where(is_better, codes, nearest.codes.float()), params, scheme, grid)


def error_of(D: Tensor, H: Tensor) -> Tensor:
    """Mean squared error of each output [out, 1], of weights that are off by D [out, in]."""
    return ((D @ H) * D).sum(1, keepdim=True)


def learn(W: Tensor, H: Tensor, low: Tensor, gap: Tensor, r: Tensor, options: AdaRoundOptions) -> Tensor:
    """V [out, in] after all steps, all of [out, in] but H [in, in] and r [out, 1]."""
    share = ((W - low) / gap.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)  # of the gap: h at first
    V = -(STRETCH / (share + SHIFT) - 1).log()  # [out, in]
    pull = 2 * W.shape[1] * gap / torch.where(r > 0, r, 1)  # [out, in], from (W~ - W) H to the gradient of h
    optimizer = torch.optim.Adam([V], lr=options.lr, eps=EPS)
    for step in range(options.steps):
        soft = V.sigmoid()
        h = STRETCH * soft - SHIFT  # [out, in]
        slope = STRETCH * soft * (1 - soft) * ((h > 0) & (h < 1))
        h = h.clamp_(0, 1)
        gradient = ((low + gap * h - W) @ H).mul_(pull)  # [out, in]
        beta, sides = beta_at(step, options.steps), 2 * h - 1
        gradient -= 2 * options.weight * beta * sides.sign() * sides.abs().pow_(beta - 1)
        V.grad = gradient.mul_(slope)
        optimizer.step()
    return V


def beta_at(step: int, steps: int) -> float:
    """From 20, where all but the ends are level, to 2, as a cosine."""
    return BETA_LAST + (BETA_FIRST - BETA_LAST) * 0.5 * (1 + math.cos(math.pi * step / steps))


def operations(options: AdaRoundOptions, out: int, columns: int) -> float:
    """Of one linear's updates: a product with H each."""
    return options.steps * 2 * out * columns**2


METHOD = Method(
    run=ada_round, options=AdaRoundOptions, scope="linear", needs=("hessian",), rowwise=True, operations=operations
)
