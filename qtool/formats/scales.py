"""Scales: how a group's range becomes the scale that is stored, in each dtype that scales are stored in.

    float32, float16, bfloat16    scale = nearest(amax / largest)
    float8_e4m3fn                 scale = s_t · nearest(amax / (largest s_t)),  s_t = 2^ceil(log2(amax of all / (224 largest)))
    float8_e8m0fnu                scale = 2^(floor(log2 amax) - floor(log2 largest)),  a power of two
    amax [..., 1] largest magnitude of a group    largest: that of the grid's levels    s_t: one float32 per tensor
Inputs that are rounded at run time have an s_t for each token.
Source: OCP Microscaling Formats 1.0, section 6.3 (powers of two); NVFP4 as in NVIDIA's TensorRT Model Optimizer, where s_t is
amax of all / (448 largest).
Why s_t is a power of two here: E4M3 is a float, so that its numbers are as fine at half their range; twice the range
is left for groups whose best range is wider than the full one; runtimes that want one s_t for several tensors get it without
any scale being rounded again; and its reciprocal, which compressed-tensors stores, is exact.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SCALE_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}
BLOCK = 256  # scales that share a step where they are quantized themselves
E4M3_LARGEST = 448.0
E4M3_SMALLEST = 2.0**-9


def tensor_scale(w: Tensor, largest: float, dtype: str) -> float:
    """s_t of a whole tensor w; 1 where scales are stored alone, or the tensor is zero."""
    return float(_power_above(w.abs().amax(), largest)) if dtype == "float8_e4m3fn" and w.numel() else 1.0


def token_scale(x: Tensor, largest: float) -> Tensor:
    """s_t [..., 1] of each token of x [..., in], as of a tensor of its own."""
    return _power_above(x.abs().amax(-1, keepdim=True), largest)


def _power_above(amax: Tensor, largest: float) -> Tensor:
    """s_t of tensors whose largest magnitudes are amax, a tensor of any shape; 1 where those are zero."""
    mantissa, exponent = torch.frexp(2 * amax.float() / (E4M3_LARGEST * largest))  # 1/2 <= mantissa < 1
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-126, 127)  # so that the reciprocal is a float32 too
    return torch.where(amax > 0, torch.ldexp(torch.ones_like(mantissa), exponent), 1.0)


def fit_scale(amax: Tensor, largest: float, dtype: str, of_tensor: float | Tensor) -> Tensor:
    """The scale [..., 1] that is stored for groups whose largest magnitude is amax [..., 1]; s_t where it would be zero."""
    if dtype == "float8_e8m0fnu":
        exponent = torch.frexp(amax).exponent - torch.frexp(torch.tensor(largest)).exponent  # floors of both logarithms
        stored = torch.ldexp(torch.ones_like(amax), exponent.clamp(-127, 127))
    elif dtype == "float8_e4m3fn":
        stored = (amax / (largest * of_tensor)).clamp(E4M3_SMALLEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float() * of_tensor
    else:
        stored = (amax / largest).to(SCALE_DTYPES[dtype]).float()
    return torch.where((amax > 0) & (stored > 0), stored, torch.ones_like(stored) * of_tensor)


def store_scale(scale: Tensor, dtype: str, of_tensor: float) -> Tensor:
    """scale as it lies in the file, without s_t."""
    return (scale / of_tensor).to(SCALE_DTYPES[dtype])


def scales_between(low: Tensor, high: Tensor, dtype: str, of_tensor: float) -> Iterator[Tensor]:
    """Every scale [..., 1] of eight bits from high down to low, both [..., 1]; groups that have fewer repeat low."""
    first, last = (_float8_codes(scale, dtype, of_tensor) for scale in (high, low))
    for step in range(int((first - last).max()) + 1):
        codes = torch.maximum(first - step, last).to(torch.uint8)
        yield codes.view(SCALE_DTYPES[dtype]).float() * of_tensor


def _float8_codes(scale: Tensor, dtype: str, of_tensor: float) -> Tensor:
    """Codes of positive scales, int32: of both formats they rise as the scales do."""
    return store_scale(scale, dtype, of_tensor).view(torch.uint8).int()


# ---- scales that are quantized themselves ----


def double_quantize(scale: Tensor) -> tuple[Tensor, Tensor]:
    """scale [...] as it is stored in 8 bits, and what tells it: the mean, and a step for each block, [1 + blocks].

    scale^ = mean + step k,  k = -127 .. 127,  step = max |scale - mean| / 127 over each BLOCK scales in their order.
    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 (double quantization). Differs: k is a whole number, not an
    8-bit float, and large enough that scale^ is positive.
    """
    mean = scale.mean()
    blocks = _in_blocks(scale - mean)  # [blocks, BLOCK]
    step = blocks.abs().amax(1) / 127
    second = torch.cat([mean.view(1), torch.where(step > 0, step, 1)])
    return single_scale(scale_codes(scale, second), second), second


def scale_codes(scale: Tensor, second: Tensor) -> Tensor:
    """k of double-quantized scales [...], int8."""
    mean, step = second[0], second[1:].unsqueeze(1)
    k = (_in_blocks(scale - mean) / step).round()
    positive = torch.floor(-mean / step) + 1  # the least k with mean + step k > 0
    return torch.maximum(k, positive).clamp(-127, 127).flatten()[: scale.numel()].view(scale.shape).to(torch.int8)


def single_scale(codes: Tensor, second: Tensor) -> Tensor:
    """The scales [...], float32, of k [...] int8."""
    values = second[0] + _in_blocks(codes.float()) * second[1:].unsqueeze(1)
    return values.flatten()[: codes.numel()].view(codes.shape)


def _in_blocks(values: Tensor) -> Tensor:
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
