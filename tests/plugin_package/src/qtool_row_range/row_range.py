"""Row range: rounding to nearest, with the range of each output channel shrunk as far as its output error falls.

    r_o = argmin over r of (Q_r(w_o) - w_o) H (Q_r(w_o) - w_o)ᵀ,    Q_r rounds to the grid of the range r [min, max]
    W [out, in] weights    H [in, in] mean of x xᵀ    r [out]
Source: grid search over clipped ranges, judged by GPTQ's loss (arXiv:2210.17323, equation 1); a plugin to copy.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.registry import Method


class RowRangeOptions(SchemeSelection):
    """What to store weights in, and how finely to search."""

    candidates: int = Field(8, ge=1, le=100, description="ranges to try, from the full one down to 3/4 of it")


def row_range(
    W: Tensor, stats: LayerStats, scheme: WeightScheme, options: RowRangeOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """W [out, in] float32, rounded in its best ranges; the full range is among them, so never worse than rounding."""
    if scheme.group_along == "in_channel":
        raise QtoolError("a row's range needs groups along its row; leave -ic away")
    H, grouped = stats.hessian(), to_groups(W, scheme)  # [in, in], [out, groups, group]
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)  # [out, groups, 1]
    ratios = 1 - 0.25 * torch.arange(options.candidates) / options.candidates  # [candidates]
    losses = []
    for ratio in ratios:
        E = quantize(W, scheme, scheme.grid.fit_range(ratio * low, ratio * high)).dequantize() - W  # [out, in]
        losses.append(((E @ H) * E).sum(-1))  # [out]
    best = ratios[torch.stack(losses).argmin(0)].view(-1, 1, 1)  # [out, 1, 1]
    return quantize(W, scheme, scheme.grid.fit_range(best * low, best * high))


METHOD = Method(run=row_range, options=RowRangeOptions, scope="linear", needs=("hessian",), rowwise=True)
