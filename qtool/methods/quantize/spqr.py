"""SpQR: few single weights, the largest or those that rounding costs most, stay in float16 beside GPTQ's codes.

    s_j = sum_k d_k (w_k - q_k)²  -  sum_k≠j d_k (w_k - q'_k)²,   over the group of w_j
    q: the group rounded to nearest    q': the same in the range of all but w_j    d_k = 1 / U_kk²    W, s [out, in]
    outliers: the share of a matrix with the largest |w|, or the largest s      W^ = decode(codes) + outliers
    H [in, in] mean of x xᵀ    U [in, in] upper, UᵀU = (H + damp·mean(diag H)·I)⁻¹
GPTQ's ranges are fitted without the outliers. When the turn of an outlier's column comes, what its nearest code leaves of it
is added in float16, so that it passes on next to no error.
Source: Dettmers et al. 2023, arXiv:2306.03078, Algorithm 1; choice magnitude: Kim et al. 2023, arXiv:2306.07629 (SqueezeLLM,
the outliers of its dense-and-sparse form). Differs: a share of each matrix and not a threshold; s is that of W, before any
column is settled; scales are quantized themselves only where the scheme says so (-dq).
Why two refits are enough for s: of full ranges only a group's least and greatest weight change the range when they leave.
Why magnitude is the default: KL on the demo model's validation text, of shares 0.005 and 0.01. At w3a16g128, where GPTQ has
0.0353: sensitivity 0.0280, 0.0268; magnitude 0.0247, 0.0233. At w2a16g64-asym (GPTQ 0.207): sensitivity 0.175, 0.158; magnitude
at 0.01 0.151. What a weight's own error is at first tells little of what it is when its turn comes, and of several large
weights in a group s sees one at a time.
For: more quality than GPTQ's for a few tenths of a bit, where the runtime adds sparse weights.
Costs: GPTQ's; 32 bits for each outlier and for each row, 0.42 bits per weight at a share of 0.01 in the narrow demo model.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.outliers import Outliers, stored_size
from qtool.formats.scheme import SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, from_groups, to_groups
from qtool.linalg.column_rounding import ColumnOptions, ColumnRounding, order_columns
from qtool.linalg.hessian import inverse_factor
from qtool.linalg.sweep import sweep
from qtool.registry import Method


class SpqrOptions(SchemeSelection, ColumnOptions):
    """Options of SpQR."""

    share: float = Field(0.005, ge=0, le=0.5, description="of all weights, that are outliers; each takes 32 bits more")
    choice: Literal["magnitude", "sensitivity"] = Field(
        "magnitude",
        description="outliers: magnitude, the largest weights (SqueezeLLM); sensitivity, what leaving a weight out saves its "
        "group, weighted by the Hessian (SpQR)",
    )


def spqr(
    W: Tensor, stats: LayerStats, scheme: WeightScheme, options: SpqrOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Quantize W [out, in] float32; raises QtoolError where columns do not divide into groups or H is not finite."""
    if stats.n_tokens == 0:
        note("no calibration token reached it; rounded to nearest")  # its H is zero, U is the identity
    H = stats.hessian()  # [in, in]
    order = order_columns(H.diagonal(), W, scheme, options.act_order)  # [in]
    U = inverse_factor(H, options.damp, note, order)  # [in, in], in turn
    curvature = U.diagonal()[order.argsort()] ** -2  # [in], as W stands
    score = W.abs() if options.choice == "magnitude" else sensitivity(W, scheme, curvature)  # [out, in]
    is_outlier = largest(score, options.share) & (W != 0)  # [out, in]; weights that were pruned stay zero
    rounding = ColumnRounding(W, scheme, options, order, U, left_out=is_outlier)
    turns, in_turn = order.tolist(), is_outlier.T[order]  # [in, out]
    added = torch.zeros_like(W.T, dtype=torch.float16)  # [in, out], as W stands

    def settle(c: int, w: Tensor) -> Tensor:
        q = rounding.settle(c, w)  # [out]
        rest = (w - q).to(torch.float16) * in_turn[c]
        added[turns[c]] = rest
        return q + rest

    sweep(rounding.columns, U, rounding.leaf, rounding.begin, settle)
    outliers = Outliers.of(added.T, is_outlier) if bool(is_outlier.any()) else None
    return replace(rounding.tensor(), outliers=outliers)


def sensitivity(W: Tensor, scheme: WeightScheme, curvature: Tensor) -> Tensor:
    """s [out, in] of W [out, in]: what its group's weighted error loses when a weight is left out; curvature [in]."""
    w, d = to_groups(W, scheme), to_groups(curvature.expand_as(W), scheme)  # [out, groups, group]
    grid = scheme.grid.for_tensor(w)
    errors = d * (grid.snap(w, grid.fit(w)) - w).square()
    s = errors.clone()  # in an unchanged range a weight that leaves takes its own error with it
    rising = w.sort(-1).values
    ends = (w.argmin(-1, keepdim=True), rising[..., 1:]), (w.argmax(-1, keepdim=True), rising[..., :-1])
    for end, rest in ends if w.shape[-1] > 1 else ():
        refitted = d * (grid.snap(w, grid.fit(rest)) - w).square()
        left = refitted.sum(-1, keepdim=True) - refitted.gather(-1, end)  # [out, groups, 1]
        s.scatter_(-1, end, errors.sum(-1, keepdim=True) - left)
    return from_groups(s, scheme)


def largest(score: Tensor, share: float) -> Tensor:
    """Which of score [out, in] are the share of all that is largest."""
    chosen = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    chosen[score.flatten().topk(round(share * score.numel())).indices] = True
    return chosen.view(score.shape)


def added_bytes(options: SpqrOptions, out: int, columns: int) -> int:
    """Of the outliers of a matrix [out, columns]."""
    return stored_size(round(options.share * out * columns), out, columns)


METHOD = Method(
    run=spqr, options=SpqrOptions, scope="linear", needs=("hessian",), adds="outliers", added_bytes=added_bytes
)
