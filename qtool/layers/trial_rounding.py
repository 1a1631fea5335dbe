"""Trial rounding: what the outputs of linears that share an input lose when channels are scaled and then rounded.

    L(s) = sum over the linears  ‖Q_a(X / s) Q(W diag(s))ᵀ - Y‖²,    Y = X Wᵀ
    X [tokens, in] their input    W [out, in], Y [tokens, out] of each    s [in]    Q, Q_a rounding of weights and of inputs
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import snap_inputs


def output_loss(X: Tensor, weights: Sequence[Tensor], Y: Sequence[Tensor], s: Tensor, scheme: Scheme) -> float:
    """L(s), both kinds of rounding as the scheme says."""
    x = X / s if scheme.activations is None else snap_inputs(X / s, scheme.activations)  # [tokens, in]
    rounded = [quantize(W * s, scheme.weights).dequantize() for W in weights]
    return sum(float(torch.addmm(y, x, Q.T, beta=-1).square().sum()) for Q, y in zip(rounded, Y, strict=True))
