"""YAQA: round for the model's predictions: columns make up for each other's errors, and so do rows.

Minimize tr(Hₒ (W - Q) H (W - Q)ᵀ) over grid points Q, which stands for KL of the predictions from the original's:
    q_rc = nearest grid point of  w_rc - U_cc sum over rows k before r of V_kr f_kc
    f_rc = (what was rounded - q_rc) / (U_cc V_rr)      e_c = (w_c - q_c) / U_cc      w_j -= e_c U_cj  for later columns j
    W, Q [out, in]    H [in, in] mean of x xᵀ    Hₒ [out, out] mean of g gᵀ, g the gradient, by the linear's outputs, of
    log p(y), y drawn from the original's own predictions    UᵀU = (H + damp·mean(diag H)·I)⁻¹,  VᵀV the same of Hₒ
With alpha > 0 the target is what the original's input gives, as in GPTAQ, see quantize/gptq.
Source: Tseng, Sun, De Sa 2025, arXiv:2505.22988 (YAQA), its factors of the Hessian with tokens taken as independent.
Differs: H is of the inputs that the linear really has once earlier ones are rounded, and weighs all tokens alike;
rows have turns by falling diag Hₒ, as columns have by diag H; no incoherence processing.
Why it is GPTQ on both sides: the inverse of Hₒ ⊗ H has the factor V ⊗ U, and of what a column passes on only the error as a
whole, w_c - q_c, is left; so the walk over columns stays GPTQ's, and what is new is how a column is rounded.
Why output_damp is larger: Hₒ is known from fewer independent tokens than H. On the demo model's validation text at w3a16g128,
KL after 2048 tokens is 0.066 with output_damp 0.01, 0.053 with 0.3, 0.057 with GPTQ; after 8192 0.034, 0.033, 0.041; after
65536 0.0209, 0.0207, 0.0267 (alpha 0.25). With alpha 0 it is 0.0219 there, from 0.25 to 1 0.020 to 0.021; at two bits
0.133, 0.135 and 0.144 with 0.25, 0.5 and 1. Rows in the order they stand cost 3 %.
Why no Hₒ for the output head: it is the vocabulary's size squared; the head is rounded by its inputs alone.
For: the lowest KL before any training; where a pass of gradients through the original can be afforded.
Costs: GPTQ's; that pass; on disk, until the step ends, a float32 matrix of each linear's outputs squared.
"""

from collections.abc import Callable

from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.linalg.column_rounding import ColumnRounding, DriftOptions, order_columns, pull
from qtool.linalg.hessian import inverse_factor
from qtool.linalg.sweep import WAVE, sweep, sweep_both
from qtool.options import Curvature, Needs
from qtool.registry import Method


class YaqaOptions(SchemeSelection, DriftOptions, Curvature):
    """Options of YAQA."""

    output_damp: float = Field(0.3, gt=0, le=1, description="as damp, for what the outputs are worth")
    alpha: float = Field(0.5, ge=0, le=1, description="how far to make up for inputs that drifted from the original's")


def yaqa(
    W: Tensor, stats: LayerStats, scheme: WeightScheme, options: YaqaOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Quantize W [out, in] float32; raises QtoolError where columns do not divide into groups, or H is not finite."""
    if scheme.group_along == "in_channel":
        raise QtoolError("groups along input channels are fitted to whole columns, and rows have turns here; use quantize/gptq")
    if stats.n_tokens == 0:
        note("no calibration token reached it; rounded to nearest")
    H, H_out = stats.hessian(), stats.output_hessian()  # [in, in], [out, out]
    order = order_columns(H.diagonal(), W, scheme, options.act_order)  # [in]
    U = inverse_factor(H, options.damp, note, order)  # [in, in], in turn
    rounding = ColumnRounding(W, scheme, options, order, U)
    P = pull(stats.drift(note), U, order, options.alpha) if options.alpha > 0 else None  # [in, in], in turn
    if H_out is None:
        sweep(rounding.columns, U, rounding.leaf, rounding.begin, rounding.settle, P)
        return rounding.tensor()
    rows = H_out.diagonal().argsort(descending=True, stable=True)  # [out]
    V = inverse_factor(H_out, options.output_damp, note, rows)  # [out, out], in turn
    leaf = WAVE if rounding.is_fitted else rounding.leaf
    sweep_both(rounding.columns, U, V, rows, leaf, rounding.begin, rounding.settle_each, P)
    return rounding.tensor()


def needs(options: YaqaOptions) -> Needs:
    """The drift only where it is made up for."""
    return ("hessian", "output_hessian", "drift") if options.alpha > 0 else ("hessian", "output_hessian")


METHOD = Method(run=yaqa, options=YaqaOptions, scope="linear", needs=needs)
