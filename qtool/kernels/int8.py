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

from qtool.errors import QtoolError
from qtool.formats.inputs import fit_inputs
from qtool.formats.scheme import ActivationScheme
from qtool.kernels.launch import Launch, add_operator, aligned, counters, n_processors, run

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


# ---- the kernels ----

ELEMENTS = {torch.float16: "F16", torch.bfloat16: "BF16"}
OUT, BLOCK = 128, 128  # of a block of int8_product: outputs, and inputs that it takes at once
# Tokens up to which a template serves: sixteenths of its tokens, and blocks of inputs in shared memory.
TILES = {16: (1, 4), 64: (4, 3), 1 << 31: (8, 3)}


def every_template() -> dict[str, dict[str, int | None]]:
    """All that can be launched, by file, with the dynamic shared bytes of a block; None where these depend on the inputs."""
    names, flags = ELEMENTS.values(), ("false", "true")
    products: dict[str, int | None] = {
        f"int8_product<{name}, {tiles}, {stages}>": _product_shared(tiles, stages)
        for name in names
        for tiles, stages in TILES.values()
    }
    rounding = {f"quantize_tokens<{name}, {a}, {b}>": None for name in names for a in flags for b in flags}
    return {"int8.cu": products | rounding}


def _product_shared(tiles: int, stages: int) -> int:
    return max(stages * (OUT + 16 * tiles) * BLOCK, 4 * (16 * tiles * (OUT + 4) + 1))  # w and x; sums, and a flag


def product_launch(
    xq: Tensor,
    wq: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero: Tensor | None,
    w_colsum: Tensor | None,
    y: Tensor,
    n_splits: int,
    partial: Tensor | None,
    count: Tensor | None,
) -> Launch:
    """The launch into y [tokens, out], with inputs split over n_splits blocks; partial as `partial_sums` says, int32."""
    tiles, stages = _tiles_of(len(xq))
    return Launch(
        "int8.cu",
        f"int8_product<{ELEMENTS[y.dtype]}, {tiles}, {stages}>",
        (-(-len(wq) // OUT), n_splits, -(-len(xq) // (16 * tiles))),
        128,
        _product_shared(tiles, stages),
        (xq, wq, x_scale, w_scale, bias, x_zero, w_colsum, y, partial, count, len(xq), len(wq), xq.shape[1]),
    )


def quantize_launch(x: Tensor, symmetric: bool, gain: Tensor | None, eps: float, out: tuple[Tensor, Tensor, Tensor]) -> Launch:
    """The launch that rounds x [tokens, in] into codes, scales and zero points."""
    flags = f"{'true' if symmetric else 'false'}, {'false' if gain is None else 'true'}"
    shared = 32 + 2 * x.shape[1]
    template = f"quantize_tokens<{ELEMENTS[x.dtype]}, {flags}>"
    return Launch("int8.cu", template, (len(x), 1, 1), 256, shared, (x, gain, *out, x.shape[1], eps))


def _tiles_of(n_tokens: int) -> tuple[int, int]:
    return next(found for most, found in TILES.items() if n_tokens <= most)


def splits_of(n_tokens: int, n_out: int, n_in: int, n_processors: int) -> int:
    """Over how many blocks the inputs are split: about two blocks for each multiprocessor, and work for each block."""
    n_outputs = -(-n_out // OUT) * -(-n_tokens // (16 * _tiles_of(n_tokens)[0]))
    return max(1, min(round(2 * n_processors / n_outputs), n_in // BLOCK // 4))


def partial_sums(n_tokens: int, n_out: int, n_splits: int) -> int:
    """Whole numbers that blocks write for each other."""
    tokens = 16 * _tiles_of(n_tokens)[0]
    return n_splits * -(-n_out // OUT) * OUT * -(-n_tokens // tokens) * tokens


# ---- the operators ----


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


def _matmul_on_gpu(
    xq: Tensor,
    wq: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero: Tensor | None,
    w_colsum: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    (n_tokens, n_in), n_out = xq.shape, len(wq)
    if n_in % 16:
        raise QtoolError(f"{n_in} inputs are no multiple of 16, which the int8 kernel needs")
    if dtype not in ELEMENTS or (bias is not None and bias.dtype != dtype):
        raise QtoolError(f"outputs in {dtype} have no int8 kernel; float16 and bfloat16 do, with a bias of the same")
    y = xq.new_empty((n_tokens, n_out), dtype=dtype)
    if not y.numel():
        return y
    n_splits = splits_of(n_tokens, n_out, n_in, n_processors(xq.device))
    partial, count = None, None
    if n_splits > 1:
        partial = xq.new_empty(partial_sums(n_tokens, n_out, n_splits), dtype=torch.int32)
        count = counters(xq.device, len(partial) // n_splits // OUT)
    xq, wq = aligned(xq), aligned(wq)
    run(
        product_launch(xq, wq, x_scale.contiguous(), w_scale.contiguous(), bias, x_zero, w_colsum, y, n_splits, partial, count),
        xq.device,
    )
    return y


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


def _quantize_on_gpu(x: Tensor, symmetric: bool, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype not in ELEMENTS or (gain is not None and gain.dtype != x.dtype):
        raise QtoolError(f"inputs in {x.dtype} have no kernel; float16 and bfloat16 do, with a gain of the same")
    if x.shape[1] % 8:
        raise QtoolError(f"{x.shape[1]} inputs are no multiple of 8, which loads of 16 bytes need")
    out = _quantize_shape(x, symmetric, gain, eps)
    if x.numel():
        run(quantize_launch(aligned(x), symmetric, gain, eps, out), x.device)
    return out


def _quantize_shape(x: Tensor, symmetric: bool, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(len(x), dtype=torch.float32),
        x.new_empty(len(x), dtype=torch.int32),
    )


add_operator("int8_matmul", _matmul_reference, _matmul_on_gpu, _matmul_shape)
add_operator("quantize_tokens", _quantize_reference, _quantize_on_gpu, _quantize_shape)
