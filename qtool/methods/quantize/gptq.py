"""GPTQ: quantize columns in turn, spreading each column's error over those not yet done.

Minimize tr((W - Q) H (W - Q)ᵀ) over grid points Q, column c by column c:
    q_c = nearest grid point of w_c      e_c = (w_c - q_c) / U_cc      w_j -= e_c U_cj  for every later column j
    W, Q [out, in]    H [in, in] mean of x xᵀ    U [in, in] upper, UᵀU = (H + damp·mean(diag H)·I)⁻¹
With alpha > 0 (GPTAQ) the target is what the original model's input x° gives, W x°, and not W x: each column also passes
    w_j += P_cj w_c,   P = alpha triu(D Uᵀ, 1) U      D [in, in] mean of (x° - x) xᵀ
Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1; Li et al. 2025, arXiv:2504.02692 (GPTAQ), section 4.
Differs: ranges may be searched (linalg/column_rounding.py); errors spread as linalg/sweep.py tells.
Why no g_idx: in every order a group is `group` neighbouring columns, so any runtime reads the result.
Why these defaults: on the demo model's validation text at w3a16g128, over two draws of the calibration text and with ranges
searched by mse, act_order none costs 15 % of KL, group 6 %, damp 0.03 4 % (0.003 the same), two passes 1 %; a search by the
Hessian 6 %. See linalg/ranges.py for auto.
For: the first choice at two to four bits; alpha: 0.25 (GPTAQ) is better and costs twice the passes, quantize/yaqa best.
Costs: one pass through the model, and for each linear a factorization of a matrix of its inputs' size.
"""

from collections.abc import Callable

from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.linalg.column_rounding import ColumnRounding, DriftOptions, order_columns, pull
from qtool.linalg.hessian import inverse_factor
from qtool.linalg.sweep import sweep
from qtool.options import Needs
from qtool.registry import Method


class GptqOptions(SchemeSelection, DriftOptions):
    """Options of GPTQ."""


def gptq(
    W: Tensor, stats: LayerStats, scheme: WeightScheme, options: GptqOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Quantize W [out, in] float32; raises QtoolError where columns do not divide into groups or H is not finite."""
    if stats.n_tokens == 0:
        note("no calibration token reached it; rounded to nearest")  # its H is zero, U is the identity
    H = stats.hessian()  # [in, in]
    order = order_columns(H.diagonal(), W, scheme, options.act_order)  # [in]
    U = inverse_factor(H, options.damp, note, order)  # [in, in], in turn
    rounding = ColumnRounding(W, scheme, options, order, U)
    del W  # `rounding` holds its columns now
    P = pull(stats.drift(note), U, order, options.alpha) if options.alpha > 0 else None  # [in, in], in turn
    sweep(rounding.columns, U, rounding.leaf, rounding.begin, rounding.settle, P)
    return rounding.tensor()


def needs(options: GptqOptions) -> Needs:
    """The drift only where it is made up for."""
    return ("hessian", "drift") if options.alpha > 0 else ("hessian",)


METHOD = Method(run=gptq, options=GptqOptions, scope="linear", needs=needs, rowwise=True)
