"""Four bits on the CPU: y = x W^ᵀ for whole-numbered levels, by torch's packed product where it is the fastest, else decoded.

    few tokens     aten::_weight_int4pack_mm_for_cpu, which reads half a byte a weight
    many tokens    W^ in bfloat16, some rows at a time, and a plain product
    y += (x summed over each group) (scale · shift)ᵀ     where codes have a shift: see whole_levels.py
    x [tokens, in] bfloat16, or float16 rounded to it    scale [out, groups]
    codes in torch's own order [out / rows, in, rows / 2], two a byte
Scales are rounded to bfloat16, as the decoded weights of the reference are.
Why bfloat16 alone: for float16 and float32 torch runs plain loops.
Why shifts are a product of their own: torch takes them in bfloat16, scaled, which is too coarse for sums over a group.
Source: torch, aten/src/ATen/native/cpu/int4mm_kernel.cpp.
"""

from functools import cache

import torch
from torch import Tensor, nn

from qtool.formats.tensor import QuantizedTensor
from qtool.kernels.whole_levels import WholeLevels, whole_levels

DTYPES = (torch.bfloat16, torch.float16)  # of inputs
BITS = 4
GROUPS = (256, 128, 64, 32)  # that the packed product takes
ROWS = 64  # outputs must come in so many
# Tokens up to which the packed product is faster than decoding; `qtool bench kernels --device cpu --format w4a16g128 --batch
# 96,97` times one and the other, which take about the same there.
FEW = 96
DECODED_BYTES = 1 << 20  # of weights that are decoded at a time: what a core's own cache holds


class Int4Product(nn.Module):
    """The packed weights of one linear; made by `int4_product`."""

    name = "torch int4"
    hidden_bytes = 0
    codes: Tensor
    scale: Tensor
    shift: Tensor | None

    def __init__(self, whole: WholeLevels, group: int) -> None:
        super().__init__()
        n, n_in = whole.code.shape
        self._group = group
        unsigned = whole.code.int() + (1 << (BITS - 1))
        self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1))  # [out, in / 2] uint8
        repeats = n_in // group // whole.scale.shape[1]
        scale = whole.scale.repeat_interleave(repeats, 1).to(torch.bfloat16).T  # [groups, out]
        self.register_buffer("scale", torch.stack([scale, torch.zeros_like(scale)], -1).contiguous())  # [groups, out, 2]
        shift = None if whole.shift is None else whole.scale * whole.shift
        self.register_buffer("shift", shift)  # [out, groups as stored]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., out] of x [..., in], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)  # [tokens, in]
        if len(rows) <= FEW:
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self._group, self.scale)  # [tokens, out]
        else:
            y = self._decoded_product(rows)
        if self.shift is not None:
            sums = rows.unflatten(1, (self.shift.shape[1], -1)).sum(-1, dtype=torch.float32)  # [tokens, groups]
            y = torch.addmm(y.float(), sums, self.shift.T)
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def _decoded_product(self, x: Tensor) -> Tensor:
        """y [tokens, out] of x [tokens, in], the weights decoded in bfloat16."""
        block = block_rows()
        assert block is not None, "supported() asks for a known order"
        tokens, n_in = x.shape
        # With 8 taken off both halves of each byte, shifts of signed bytes keep the sign.
        words = self.codes.view(torch.int8).view(-1, n_in, block // 2)  # [blocks, in, rows / 2]
        scale = self.scale[..., 0].unflatten(1, (-1, block)).transpose(0, 1)  # [blocks, groups, rows]
        scale = scale.unsqueeze(2).contiguous()  # [blocks, groups, 1, rows]
        parts = []
        step = max(1, DECODED_BYTES // (2 * n_in * block))
        for first in range(0, len(words), step):
            pairs = words[first : first + step] ^ -0x78  # the byte 0x88
            W = torch.cat([pairs << 4 >> 4, pairs >> 4], -1).to(torch.bfloat16)  # [blocks, in, rows]
            W.unflatten(1, (-1, self._group)).mul_(scale[first : first + step])  # [blocks, groups, group, rows]
            y = torch.bmm(x.expand(len(W), tokens, n_in), W)  # [blocks, tokens, rows]
            parts.append(y.transpose(0, 1).reshape(tokens, -1))
        return torch.cat(parts, 1)


def int4_product(tensor: QuantizedTensor, dtype: torch.dtype) -> Int4Product | str:
    """The product for inputs in a dtype; else why there is none."""
    if dtype not in DTYPES:
        return f"inputs in {str(dtype).removeprefix('torch.')}: torch's packed products are fast in bfloat16 alone"
    n, n_in = tensor.shape
    if n % ROWS:
        return f"{n} outputs, which do not divide by {ROWS}"
    own = tensor.scheme.group or n_in
    group = next((size for size in GROUPS if own % size == 0), None)
    if group is None:
        return f"groups of {own}, which do not divide by {GROUPS[-1]}"
    whole = whole_levels(tensor, BITS)
    if isinstance(whole, str):
        return whole
    if block_rows() is None:
        return f"an order of packed codes that this torch alone knows ({torch.backends.cpu.get_cpu_capability()})"
    return Int4Product(whole, group)


@cache
def block_rows() -> int | None:
    """Outputs whose codes torch packs together on this processor: 64 with AVX-512, 32 with AVX2; None where neither is it."""
    random = torch.randint(0, 16, (2 * ROWS, GROUPS[-1]), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(random, 1)
    for block in (64, 32):
        words = packed.view(-1, random.shape[1], block // 2)  # [blocks, in, rows / 2]
        codes = torch.cat([words & 15, words >> 4], -1).transpose(1, 2).reshape(random.shape)
        if torch.equal(codes.int(), random):
            return block
    return None
