"""Linears with weights of few bits and inputs of 16: y = x W^ᵀ + bias, W^ decoded on the way.

    W^[n, k] = alpha scale[n, g] (level(code[n, k]) - zero[n, g]),  g = k // group
    level(code) = code of 2, 3, 4 or 8 bits, whole numbers, or table[code] of 4 bits, a format of up to 16 levels
    x [..., in] float16 or bfloat16    code [out, in], in fragment order (fragments.py)    y [..., out] in x's dtype
Scales are kept in bfloat16 where they fit it exactly, so that powers of two do, else in float32; those of NVFP4, of 16 inputs
each, in E4M3, its bits as uint8. Zero points are float16. alpha is the scale that all of a tensor share.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import QuantizedTensor, with_common_scale
from qtool.kernels.fragments import (
    from_fragments,
    rows_from_lanes,
    rows_to_lanes,
    sixteenths_from_lanes,
    sixteenths_to_lanes,
    to_fragments,
)
from qtool.kernels.launch import Launch, counters, n_processors, run

BITS = (2, 3, 4, 8)
TABLE_BITS = 4
E4M3_GROUP = 16  # the one group that scales in E4M3 go with


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] as the kernels read it.

    codes [tiles, blocks, words] int32    scale [groups, tiles, 8, 2], of E4M3 [blocks, tiles, 8, 2, 2, 2]
    zero as scale, float16, or None    table [16] float32, or None for whole numbers
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    bits: int
    shape: tuple[int, int]
    group: int
    alpha: float

    @property
    def format(self) -> str:
        """w2, w3, w4, w8; table; nvfp4: a table with scales in E4M3."""
        if self.scale.dtype == torch.uint8:
            return "nvfp4"
        return f"w{self.bits}" if self.table is None else "table"

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.zero, self.table) if part is not None)

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same on a device."""
        zero = None if self.zero is None else self.zero.to(device)
        table = None if self.table is None else self.table.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=zero, table=table)


def supports(scheme: WeightScheme, shape: tuple[int, int]) -> str | None:
    """Why weights [out, in] of a scheme have no kernel, or None."""
    n_in = shape[1]
    if n_in % 8:
        return f"{n_in} inputs are no multiple of 8, which loads of 16 bytes need"
    if scheme.group_along != "out_channel":
        return "groups along `out` have no kernel"
    if scheme.format == "int" and scheme.bits not in BITS:
        return f"whole numbers of {scheme.bits} bits have no kernel; {', '.join(map(str, BITS))} bits do"
    if scheme.format == "e8p" or scheme.grid.n_levels > 16 and scheme.format != "int":
        return f"{scheme.format} has no kernel; tables of up to 16 levels do"
    if scheme.scale_dtype == "float8_e4m3fn":
        return None if scheme.group == E4M3_GROUP and scheme.format == "e2m1" else "E4M3 scales have a kernel in nvfp4 alone"
    group = scheme.group
    if group is not None and (group < 32 or group & (group - 1)):
        return f"groups of {group} have no kernel; 32, 64, 128 and other powers of two, or one group per row, do"
    return None


def join(tensors: list[QuantizedTensor]) -> QuantizedTensor:
    """One tensor of several with the same input and scheme, outputs one after another: q, k and v in one product.

    Raises QtoolError where they do not go together.
    """
    if len({(str(tensor.scheme), tensor.shape[1], tensor.exponent) for tensor in tensors}) > 1:
        raise QtoolError(
            f"{', '.join(str(t.scheme) for t in tensors)} of {[t.shape for t in tensors]}: no one product; scheme "
            "and inputs must be the same"
        )
    for tensor in tensors:
        _refuse_extras(tensor)
    alike = with_common_scale(tensors) if tensors[0].scheme.scale_dtype == "float8_e4m3fn" else tensors
    if alike is None:
        raise QtoolError("scales of the parts do not fit one scale of the whole exactly; pack them one by one")
    zeros = [tensor.zero for tensor in alike if tensor.zero is not None]
    return replace(
        alike[0],
        codes=torch.cat([tensor.codes for tensor in alike]),
        scale=torch.cat([tensor.scale for tensor in alike]),
        zero=torch.cat(zeros) if zeros else None,
        second=None,
    )


def pack(tensor: QuantizedTensor) -> PackedWeight:
    """A tensor as the kernels read it; `unpack` gives its values to the bit. Raises QtoolError with what has no kernel."""
    reason = supports(tensor.scheme, tensor.shape)
    if reason is not None:
        raise QtoolError(f"{tensor.scheme} [{tensor.shape[0]}, {tensor.shape[1]}]: {reason}")
    _refuse_extras(tensor)
    grid = tensor.grid
    table = None
    if tensor.scheme.format != "int":
        levels = grid.levels(torch.arange(grid.n_levels, device=tensor.codes.device))  # [levels]
        table = torch.zeros(16, device=levels.device)
        table[: len(levels)] = levels
    bits = tensor.scheme.bits if table is None else TABLE_BITS
    codes = tensor.codes.int() - (grid.low if table is None else 0)
    group = tensor.scheme.group or tensor.shape[1]
    zero = None if tensor.zero is None else rows_to_lanes(tensor.zero.to(torch.float16))
    return PackedWeight(
        to_fragments(codes, bits, table is not None),
        _stored_scale(tensor),
        zero,
        table,
        bits,
        tensor.shape,
        group,
        float(tensor.of_tensor),
    )


def _refuse_extras(tensor: QuantizedTensor) -> None:
    extras = {"scales of columns": tensor.column_scale, "salient columns": tensor.salient, "outliers": tensor.outliers}
    if found := [name for name, part in extras.items() if part is not None]:
        raise QtoolError(f"{tensor.scheme} with {' and '.join(found)} has no kernel")


def _stored_scale(tensor: QuantizedTensor) -> Tensor:
    if tensor.scale.dtype == torch.float8_e4m3fn:
        return sixteenths_to_lanes(tensor.scale.view(torch.uint8))
    scale = tensor.scale.float()  # [out, groups]
    short = scale.to(torch.bfloat16)
    return rows_to_lanes(short if torch.equal(short.float(), scale) else scale)


def unpack(packed: PackedWeight) -> Tensor:
    """W^ [out, in], float32."""
    n, n_in = packed.shape
    codes = from_fragments(packed.codes, packed.bits, n, n_in, packed.table is not None)  # [out, in]
    if packed.table is not None:
        levels = packed.table[codes]
    else:
        levels = (codes if packed.zero is not None else codes - (1 << (packed.bits - 1))).float()
    if packed.scale.dtype == torch.uint8:
        scale = sixteenths_from_lanes(packed.scale, n, n_in // packed.group).view(torch.float8_e4m3fn)  # [out, groups]
    else:
        scale = rows_from_lanes(packed.scale, n)
    levels = levels.view(n, -1, packed.group)  # [out, groups, group]
    if packed.zero is not None:
        levels = levels - rows_from_lanes(packed.zero, n).float().unsqueeze(-1)
    return (levels * (scale.float() * packed.alpha).unsqueeze(-1)).view(n, n_in)


def matmul(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y [..., out] of x [..., in], bias [out] in x's dtype; the kernel where x is on a GPU, else the reference."""
    y: Tensor = torch.ops.qtool.weight_only_matmul(
        x, packed.codes, packed.scale, packed.zero, packed.table, bias, packed.bits, packed.shape[0], packed.group, packed.alpha
    )
    return y


# ---- the kernels ----

WARPS = 8  # of a block
FEW = 16  # tokens up to which decode_step serves


def decode_step(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    y: Tensor,
    n_splits: int,
    partial: Tensor | None,
    counters: Tensor | None,
) -> Launch:
    """The launch for up to 16 tokens x [tokens, in] into y [tokens, out], with inputs split over n_splits blocks.

    partial: float32, as many as `partial_sums` says, and counters, zeros: of more than one split.
    """
    n_in = x.shape[1]
    n_tiles, n_blocks, _ = packed.codes.shape
    n_token_tiles = 1 if len(x) <= 8 else 2
    tiles, depth = tiles_of(packed, n_token_tiles)
    is_grouped = packed.group < n_in
    kind = {torch.bfloat16: "BFLOAT", torch.float32: "FLOAT", torch.uint8: "E4M3"}[packed.scale.dtype]
    span = 32 if is_grouped and packed.group == 32 else 64
    template = (
        "F16" if x.dtype == torch.float16 else "BF16",
        f"W{packed.bits}" if packed.table is None else "TABLE",
        kind,
        "false" if packed.zero is None else "true",
        *(span, tiles, n_token_tiles, depth),
    )
    shared = WARPS * 8 * n_token_tiles * (16 * tiles + 4) + 1
    return Launch(
        "decode_step.cu",
        f"decode_step<{', '.join(map(str, template))}>",
        (n_tiles // tiles, n_splits, 1),
        32 * WARPS,
        4 * shared,
        (
            *(x, packed.codes, packed.scale, packed.zero, packed.table, bias, y, partial, counters),
            *(len(x), packed.shape[0], n_in, n_blocks, n_tiles),
            *(packed.group.bit_length() - 1 if is_grouped else 31, len(packed.scale), packed.alpha),
        ),
    )


def tiles_of(packed: PackedWeight, n_token_tiles: int) -> tuple[int, int]:
    """Tiles of 16 outputs that a block of decode_step has, and how many blocks of codes a warp has under way."""
    if packed.bits == 8:
        return 2, 2
    return (2, 4) if n_token_tiles == 1 else (4, 2)


def splits_of(packed: PackedWeight, n_tokens: int, n_processors: int) -> int:
    """Over how many blocks decode_step splits the inputs: about two blocks for each multiprocessor, a turn for every warp."""
    n_tiles, n_blocks, _ = packed.codes.shape
    tiles, _ = tiles_of(packed, 1 if n_tokens <= 8 else 2)
    wanted = round(2 * n_processors * tiles / n_tiles)
    return max(1, min(wanted, n_blocks // WARPS))


def partial_sums(packed: PackedWeight, n_tokens: int, n_splits: int) -> int:
    """Floats that decode_step writes between its blocks."""
    n_token_tiles = 1 if n_tokens <= 8 else 2
    return n_splits * len(packed.codes) * 16 * 8 * n_token_tiles


# ---- the operator ----

torch.library.define(
    "qtool::weight_only_matmul",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? table, Tensor? bias, int bits, int out, int group, "
    "float alpha) -> Tensor",
)


@torch.library.impl("qtool::weight_only_matmul", "CPU")
def _reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out: int,
    group: int,
    alpha: float,
) -> Tensor:
    W = unpack(PackedWeight(codes, scale, zero, table, bits, (out, x.shape[-1]), group, alpha))  # [out, in]
    y = x.float() @ W.T  # [..., out]
    return (y if bias is None else y + bias.float()).to(x.dtype)


@torch.library.impl("qtool::weight_only_matmul", "CUDA")
def _on_gpu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out: int,
    group: int,
    alpha: float,
) -> Tensor:
    packed = PackedWeight(codes, scale, zero, table, bits, (out, x.shape[-1]), group, alpha)
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise QtoolError(f"inputs in {x.dtype} have no kernel; cast them to float16 or bfloat16")
    if bias is not None and bias.dtype != x.dtype:
        raise QtoolError(f"bias in {bias.dtype} of inputs in {x.dtype}; cast it to {x.dtype}")
    flat = x.reshape(-1, x.shape[-1]).contiguous()  # [tokens, in]
    y = x.new_empty((len(flat), out))  # [tokens, out]
    if not y.numel():
        return y.view(*x.shape[:-1], out)
    if len(flat) > FEW:
        W = unpack(packed).to(x.dtype)
        return torch.nn.functional.linear(x, W, bias)
    n_splits = splits_of(packed, len(flat), n_processors(x.device))
    partial = x.new_empty(partial_sums(packed, len(flat), n_splits), dtype=torch.float32) if n_splits > 1 else None
    count = counters(x.device, len(codes)) if n_splits > 1 else None
    run(decode_step(flat, packed, bias, y, n_splits, partial, count), x.device)
    return y.view(*x.shape[:-1], out)


def _shape_of(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out: int,
    group: int,
    alpha: float,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


torch.library.register_fake("qtool::weight_only_matmul", _shape_of)
