"""Linears in eight bits: y = s_x s_w (q_x - z_x) q_wᵀ + bias, the product in whole numbers, and the rounding of x for it.

    q_x [tokens, in] int8    s_x [tokens] float32    z_x [tokens] int32, or None where symmetric
    q_w [out, in] int8       s_w [out] float32       y [tokens, out]
    (q_x - z_x) q_wᵀ = q_x q_wᵀ - z_x w_colsum,    w_colsum [out] int32, each output's sum of q_w
Tokens are rounded as formats/inputs.py rounds them, each in its own range (grid int8 or int8asym, whose codes 0 .. 255 are kept
less 128, and so is z_x); with a norm's gain they are normalized before: x / sqrt(mean x² + eps) · gain, in x's dtype as
transformers has it.
"""

import torch
from torch import Tensor

from qtool.formats.inputs import fit_inputs
from qtool.formats.scheme import ActivationScheme

SYMMETRIC = ActivationScheme(bits=8)
ASYMMETRIC = ActivationScheme(bits=8, symmetric=False)
OFFSET = 128  # what codes 0 .. 255 are kept less


def matmul_int8(
    xq: Tensor,
    wq: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    x_zero: Tensor | None = None,
    w_colsum: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """y [tokens, out] of codes in a dtype, float16 or bfloat16 on a GPU; w_colsum is needed with x_zero."""
    assert (x_zero is None) == (w_colsum is None), "zero points of x go with sums of w's rows"
    y: Tensor = torch.ops.qtool.int8_matmul(xq, wq, x_scale, w_scale, bias, x_zero, w_colsum, dtype)
    return y


def quantize_tokens(
    x: Tensor, symmetric: bool = True, gain: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """q_x [tokens, in] int8, s_x [tokens] float32, z_x [tokens] int32 (zeros where symmetric) of x [tokens, in].

    With gain [in] of x's dtype, of x after RMSNorm.
    """
    q: Tensor
    scale: Tensor
    zero: Tensor
    q, scale, zero = torch.ops.qtool.quantize_tokens(x, symmetric, gain, eps)
    return q, scale, zero


torch.library.define(
    "qtool::int8_matmul",
    "(Tensor xq, Tensor wq, Tensor x_scale, Tensor w_scale, Tensor? bias, Tensor? x_zero, Tensor? w_colsum, ScalarType dtype) "
    "-> Tensor",
)
torch.library.define(
    "qtool::quantize_tokens", "(Tensor x, bool symmetric, Tensor? gain, float eps) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl("qtool::int8_matmul", "CPU")
def _matmul_reference(
    xq: Tensor,
    wq: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero: Tensor | None,
    w_colsum: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    product = torch._int_mm(xq, wq.T) if len(xq) else xq.new_zeros((0, len(wq)), dtype=torch.int32)  # [tokens, out] int32
    if x_zero is not None and w_colsum is not None:
        product = product - x_zero[:, None] * w_colsum
    y = product.float() * (x_scale[:, None] * w_scale)
    return (y if bias is None else y + bias.float()).to(dtype)


def _matmul_shape(
    xq: Tensor,
    wq: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero: Tensor | None,
    w_colsum: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return xq.new_empty((len(xq), len(wq)), dtype=dtype)


@torch.library.impl("qtool::quantize_tokens", "CPU")
def _quantize_reference(x: Tensor, symmetric: bool, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if gain is not None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        x = gain * wide.to(x.dtype)
    scheme = SYMMETRIC if symmetric else ASYMMETRIC
    grouped = x.float().unsqueeze(1)  # [tokens, 1, in]
    params = fit_inputs(grouped, scheme)  # [tokens, 1, 1]
    codes = scheme.grid.encode(grouped, params).squeeze(1)  # [tokens, in]
    scale = params.scale.reshape(len(x))
    if params.zero is None:
        return codes.to(torch.int8), scale, torch.zeros(len(x), dtype=torch.int32)
    return (codes - OFFSET).to(torch.int8), scale, params.zero.reshape(len(x)).int() - OFFSET


def _quantize_shape(x: Tensor, symmetric: bool, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=torch.int8),
        x.new_empty(len(x), dtype=torch.float32),
        x.new_empty(len(x), dtype=torch.int32),
    )


torch.library.register_fake("qtool::int8_matmul", _matmul_shape)
torch.library.register_fake("qtool::quantize_tokens", _quantize_shape)
