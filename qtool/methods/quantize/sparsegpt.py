"""SparseGPT with quantization: prune and round in one sweep, later columns making up for both at once.

    score S_ij = w_ij² / U_jj²      q_j = nearest grid points of w_j, 0 where the mask has chosen      e_j = (w_j - q_j) / U_jj
    w_k -= e_j U_jk  for every later column k      U [in, in] upper, UᵀU = (H + damp·mean(diag H)·I)⁻¹
Without sparsity it is quantize/gptq.
Source: Frantar and Alistarh 2023, arXiv:2301.00774, section 3.5 (joint sparsification and quantization). Differs: ranges are
fitted beforehand. Where weights are pruned, columns keep their order whatever act_order says, as in the paper: neighbours share
a pattern, and a mask that is chosen by falling diag H loses more.
For: few bits and zeros together: better than pruning first, since each error is made up for once.
Costs: as quantize/gptq.
"""

from collections.abc import Callable

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import SchemeSelection, WeightScheme
from qtool.formats.sparsity import SparsitySelection, check_columns, choose_block
from qtool.formats.tensor import QuantizedTensor
from qtool.linalg.column_rounding import ColumnOptions, ColumnRounding, order_columns
from qtool.linalg.hessian import inverse_factor
from qtool.linalg.sweep import sweep
from qtool.registry import Method

BLOCK = 128  # columns whose unstructured mask is chosen at once; the paper's B_s


class SparseGptOptions(SchemeSelection, SparsitySelection, ColumnOptions):
    """What to store weights in, and how many of them are zero."""

    sparsity: float = Field(0.0, ge=0, lt=1, description="share of a linear's weights that become zero; 0: GPTQ")

    @model_validator(mode="after")
    def _masks_need_ranges_beforehand(self) -> "SparseGptOptions":
        if (self.sparsity > 0 or self.pattern is not None) and self.act_order != "static":
            raise ValueError("zeros are chosen for columns together, with ranges fitted beforehand; use act_order: static")
        return self


def sparsegpt(
    W: Tensor, stats: LayerStats, scheme: WeightScheme, options: SparseGptOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Prune and quantize W [out, in] float32; raises QtoolError where columns do not divide or the grid has no zero."""
    if stats.n_tokens == 0:
        note("no calibration token reached it; pruned by magnitude, rounded to nearest")  # its H is zero, U is the identity
    H, pattern = stats.hessian(), options.keep_of()  # [in, in]
    is_dense = pattern is None and options.sparsity == 0
    order = order_columns(H.diagonal(), W, scheme, options.act_order if is_dense else "none")  # [in]
    U = inverse_factor(H, options.damp, note, order)  # [in, in], in turn
    curvature = U.diagonal() ** -2  # [in], in turn
    if stats.n_tokens > 0:
        curvature[H.diagonal()[order] == 0] = 0  # a dead column costs nothing, so it goes first
    rounding = ColumnRounding(W, scheme, options, order, U)
    leaf, mask = rounding.leaf, torch.zeros_like(rounding.columns, dtype=torch.bool)  # [in, out], in turn
    if pattern is not None:
        check_columns(len(order), pattern[1])
        leaf = pattern[1]
    elif not is_dense:
        leaf = BLOCK

    def begin(start: int, stop: int) -> None:
        rounding.begin(start, stop)
        if not is_dense:
            scores = rounding.columns[start:stop].square() * curvature[start:stop, None]  # [block, out]
            mask[start:stop] = choose_block(scores, options, start)
            rounding.drop(start, mask[start:stop])

    sweep(rounding.columns, U, leaf, begin, rounding.settle)
    if bool((rounding.columns[mask] != 0).any()):
        raise QtoolError(f"{scheme} has no level at zero, so that no weight can be pruned; use a symmetric scheme")
    return rounding.tensor()


METHOD = Method(run=sparsegpt, options=SparseGptOptions, scope="linear", needs=("hessian",))
