"""SparseGPT: prune column after column, the columns not yet done making up for each weight that goes.

    score S_ij = w_ij² / U_jj²      e_j = (w_j - q_j) / U_jj      w_k -= e_j U_jk  for every later column k
    w_ij current weights [out, in]    q_j [out] column j with its chosen weights zero
    U [in, in] upper, UᵀU = (H + damp·mean(diag H)·I)⁻¹
Source: Frantar and Alistarh 2023, arXiv:2301.00774, Algorithm 1 and section 3.2: unstructured masks are chosen for 128
columns over all rows together, N:M masks for M columns in each row. Differs: a block's count is rounded so that the
whole matrix has round(sparsity · out · in) zeros.
For: the best sparse model without training, and before quantize/gptq.
Costs: one pass through the model and a factorization for each linear, as GPTQ.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.sparsity import SharedSparsity, check_columns, choose_block
from qtool.linalg.hessian import inverse_factor
from qtool.linalg.sweep import sweep
from qtool.options import Sequential
from qtool.registry import Method

BLOCK = 128  # columns whose unstructured mask is chosen at once; the paper's B_s


class SparseGptOptions(SharedSparsity, Sequential):
    """Options of SparseGPT."""

    damp: float = Field(0.01, gt=0, le=1, description="share of mean(diag H) added to it; raised where too little")


def sparsegpt(W: Tensor, stats: LayerStats, options: SparseGptOptions, note: Callable[[str], None]) -> Tensor:
    """W [out, in] float32, pruned and updated; raises QtoolError where columns do not divide or H is not finite."""
    if stats.n_tokens == 0:
        note("no calibration token reached it; pruned by magnitude")  # its H is zero, U is the identity
    H = stats.hessian()  # [in, in]
    U = inverse_factor(H, options.damp, note)  # [in, in]
    curvature = U.diagonal() ** -2  # [in]
    if stats.n_tokens > 0:
        curvature[H.diagonal() == 0] = 0  # a dead column costs nothing, so it goes first
    columns = W.T.contiguous()  # [in, out]
    mask = torch.zeros_like(columns, dtype=torch.bool)  # [in, out]
    pattern = options.keep_of()
    if pattern is not None:
        check_columns(len(columns), pattern[1])

    def begin(start: int, stop: int) -> None:
        scores = columns[start:stop].square() * curvature[start:stop, None]  # [block, out]
        mask[start:stop] = choose_block(scores, options, start)

    sweep(columns, U, BLOCK if pattern is None else pattern[1], begin, lambda c, w: w.masked_fill(mask[c], 0))
    return columns.T.contiguous()


METHOD = Method(run=sparsegpt, options=SparseGptOptions, scope="linear", needs=("hessian",))
