"""Linears with weights of few bits and inputs of 16: y = x W^ᵀ + bias, W^ decoded on the way.

    W^[n, k] = alpha scale[n, g] (level(code[n, k]) - zero[n, g]),  g = k // group
    level(code) = code of 2, 3, 4 or 8 bits, whole numbers, or table[code] of 4 bits, a format of up to 16 levels
    x [..., in] float16 or bfloat16    code [out, in], in fragment order (fragments.py)    y [..., out] in x's dtype
Scales are kept in bfloat16 where they fit it exactly, so that powers of two do, else in float32; those of NVFP4, of 16 inputs
each, in E4M3, its bits as uint8. Zero points are float16. alpha is the scale that all of a tensor share.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import QuantizedTensor, with_common_scale
from qtool.kernels.fragments import (
    BLOCK,
    from_fragments,
    rows_from_lanes,
    rows_to_lanes,
    sixteenths_from_lanes,
    sixteenths_to_lanes,
    to_fragments,
)
from qtool.kernels.launch import Launch, add_operator, aligned, counters, n_processors, run

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


def join(tensors: list[QuantizedTensor]) -> QuantizedTensor | str:
    """One tensor of several with the same input, outputs one after another: q, k and v in one product; else why not."""
    if len({(tensor.scheme, tensor.shape[1], tensor.exponent) for tensor in tensors}) > 1:
        return f"{', '.join(f'{tensor.scheme} {list(tensor.shape)}' for tensor in tensors)}: scheme and inputs are not the same"
    if (reason := next((why for tensor in tensors if (why := _extras_of(tensor)) is not None), None)) is not None:
        return reason
    alike = with_common_scale(tensors) if tensors[0].scheme.scale_dtype == "float8_e4m3fn" else tensors
    if alike is None:
        return "scales of the parts do not fit one scale of the whole exactly"
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
    if (reason := _extras_of(tensor)) is not None:
        raise QtoolError(reason)
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


def _extras_of(tensor: QuantizedTensor) -> str | None:
    extras = {"scales of columns": tensor.column_scale, "salient columns": tensor.salient, "outliers": tensor.outliers}
    found = [name for name, part in extras.items() if part is not None]
    return f"{tensor.scheme} with {' and '.join(found)} has no kernel" if found else None


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

FEW = 16  # tokens up to which decode_step serves
MANY = 256  # tokens above which decoding once and torch's own product are faster
WARPS = 8  # of a block of decode_step
# bits: tiles of 16 outputs of a block of decode_step, and blocks of codes that a warp has under way, for 8 and for 16 tokens
STEP_TILES = {2: ((2, 3), (2, 2)), 3: ((2, 3), (2, 2)), 4: ((2, 4), (4, 2)), 8: ((2, 2), (2, 2))}
# Of batch: outputs of a block and its threads; bits: sixteenths of its tokens, blocks of codes under way, and of x in shared
# memory; where 32 inputs are scaled at once, or a block has 128, registers suffice for fewer.
BATCH_OUT, BATCH_THREADS = 128, 128
BATCH_TILES = {2: (2, 2, 3), 3: (2, 2, 3), 4: (4, 2, 4), 8: (4, 1, 4)}
BATCH_TILES_OF_32 = {2: (2, 1, 3), 3: (2, 1, 3), 4: (2, 2, 4), 8: (2, 1, 4)}
DEQUANTIZE_WARPS = 8  # of a block of dequantize


@dataclass(frozen=True)
class Traits:
    """What kernels are compiled for: the first parameters of every template."""

    dtype: torch.dtype
    bits: int
    has_table: bool
    scale_dtype: torch.dtype
    has_zero: bool
    span: int  # inputs whose sum is scaled at once

    def __str__(self) -> str:
        element = {torch.float16: "F16", torch.bfloat16: "BF16"}[self.dtype]
        kind = {torch.bfloat16: "BFLOAT", torch.float32: "FLOAT", torch.uint8: "E4M3"}[self.scale_dtype]
        zero = "true" if self.has_zero else "false"
        return f"{element}, {'TABLE' if self.has_table else f'W{self.bits}'}, {kind}, {zero}"


def traits_of(dtype: torch.dtype, packed: PackedWeight) -> Traits:
    """The templates for inputs in a dtype."""
    span = 32 if packed.group == 32 < packed.shape[1] else 64
    return Traits(dtype, packed.bits, packed.table is not None, packed.scale.dtype, packed.zero is not None, span)


def every_template() -> dict[str, dict[str, int]]:
    """All that can be launched, by file, with the dynamic shared bytes of a block."""
    scales = [(dtype, zero, span) for dtype in (torch.bfloat16, torch.float32) for zero in (False, True) for span in (32, 64)]
    weights = [(bits, False, *scale) for bits in BITS for scale in scales]
    weights += [(TABLE_BITS, True, *scale) for scale in [*scales, (torch.uint8, False, 64)]]
    traits = [Traits(dtype, *weight) for dtype in (torch.float16, torch.bfloat16) for weight in weights]
    return {
        "decode_step.cu": {_step_template(each, n): _step_shared(each.bits, n) for each in traits for n in (1, 2)},
        "batch.cu": {_batch_template(each): _batch_shared(each) for each in traits},
        "dequantize.cu": {f"dequantize<{each}>": 0 for each in traits if each.span == 64},
    }


def _step_template(traits: Traits, n_token_tiles: int) -> str:
    tiles, depth = STEP_TILES[traits.bits][n_token_tiles - 1]
    return f"decode_step<{traits}, {traits.span}, {tiles}, {n_token_tiles}, {depth}>"


def _step_shared(bits: int, n_token_tiles: int) -> int:
    tiles, _ = STEP_TILES[bits][n_token_tiles - 1]
    return 4 * (WARPS * 8 * n_token_tiles * (16 * tiles + 4) + 1)  # sums of each warp, and a flag


def _batch_tiles(traits: Traits) -> tuple[int, int, int]:
    return (BATCH_TILES_OF_32 if traits.span == 32 else BATCH_TILES)[traits.bits]


def _batch_template(traits: Traits) -> str:
    tiles, depth, stages = _batch_tiles(traits)
    return f"batch<{traits}, {traits.span}, {tiles}, {depth}, {stages}>"


def _batch_shared(traits: Traits) -> int:
    tiles, _, stages = _batch_tiles(traits)
    tokens = 16 * tiles
    return max(2 * stages * tokens * BLOCK[traits.bits], 4 * (tokens * (BATCH_OUT + 4) + 1))  # x; sums, and a flag


def product_launch(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, y: Tensor, n_splits: int, partial: Tensor | None, count: Tensor | None
) -> Launch:
    """The launch for up to 256 tokens x [tokens, in] into y [tokens, out], with inputs split over n_splits blocks.

    Of more than one split partial, float32, has as many as `partial_sums` says, and count one zero for each block's outputs.
    """
    traits = traits_of(x.dtype, packed)
    n_tiles, n_blocks, _ = packed.codes.shape
    out, tokens = _block_of(packed, len(x))
    grid = (-(-16 * n_tiles // out), n_splits, -(-len(x) // tokens))
    arguments = (
        *(x, packed.codes, packed.scale, packed.zero, packed.table, bias, y, partial, count),
        *(len(x), packed.shape[0], x.shape[1], n_blocks, n_tiles, *_groups_of(packed), packed.alpha),
    )
    if len(x) <= FEW:
        n = tokens // 8
        return Launch("decode_step.cu", _step_template(traits, n), grid, 32 * WARPS, _step_shared(traits.bits, n), arguments)
    return Launch("batch.cu", _batch_template(traits), grid, BATCH_THREADS, _batch_shared(traits), arguments)


def dequantize_launch(packed: PackedWeight, w: Tensor) -> Launch:
    """The launch that decodes into w [out, in], float16 or bfloat16."""
    n_tiles, n_blocks, _ = packed.codes.shape
    arguments = (packed.codes, packed.scale, packed.zero, packed.table, w, *packed.shape, n_blocks, n_tiles)
    return Launch(
        "dequantize.cu",
        f"dequantize<{traits_of(w.dtype, packed)}>",
        (n_tiles, -(-n_blocks // DEQUANTIZE_WARPS), 1),
        32 * DEQUANTIZE_WARPS,
        0,
        (*arguments, *_groups_of(packed), packed.alpha),
    )


def _groups_of(packed: PackedWeight) -> tuple[int, int]:
    """By how many bits an input is shifted to give its group, and how many groups there are."""
    return packed.group.bit_length() - 1 if packed.group < packed.shape[1] else 31, len(packed.scale)


def _block_of(packed: PackedWeight, n_tokens: int) -> tuple[int, int]:
    """Outputs and tokens that one block has."""
    if n_tokens > FEW:
        return BATCH_OUT, 16 * _batch_tiles(traits_of(torch.float16, packed))[0]
    n_token_tiles = 1 if n_tokens <= 8 else 2
    return 16 * STEP_TILES[packed.bits][n_token_tiles - 1][0], 8 * n_token_tiles


def splits_of(packed: PackedWeight, n_tokens: int, n_processors: int) -> int:
    """Over how many blocks the inputs are split: about two blocks for each multiprocessor, and work for each block."""
    n_tiles, n_blocks, _ = packed.codes.shape
    out, tokens = _block_of(packed, n_tokens)
    n_outputs = -(-16 * n_tiles // out) * -(-n_tokens // tokens)
    return max(1, min(round(2 * n_processors / n_outputs), n_blocks // WARPS))


def partial_sums(packed: PackedWeight, n_tokens: int, n_splits: int) -> int:
    """Floats that blocks write for each other."""
    out, tokens = _block_of(packed, n_tokens)
    return n_splits * -(-16 * len(packed.codes) // out) * out * -(-n_tokens // tokens) * tokens


# ---- the operator ----


def _of_weight(compute: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """`compute` of the operator's arguments, which are a packed weight's parts."""

    def call(
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
        return compute(x, PackedWeight(codes, scale, zero, table, bits, (out, x.shape[-1]), group, alpha), bias)

    return call


def _reference(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    y = x.float() @ unpack(packed).T  # [..., out]
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _on_gpu(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise QtoolError(f"inputs in {x.dtype} have no kernel; cast them to float16 or bfloat16")
    if bias is not None and bias.dtype != x.dtype:
        raise QtoolError(f"bias in {bias.dtype} of inputs in {x.dtype}; cast it to {x.dtype}")
    flat = aligned(x.reshape(-1, x.shape[-1]))  # [tokens, in]
    out = packed.shape[0]
    y = x.new_empty((len(flat), out))  # [tokens, out]
    if not y.numel():
        return y.view(*x.shape[:-1], out)
    if len(flat) > MANY:
        W = x.new_empty(packed.shape)  # [out, in]
        run(dequantize_launch(packed, W), x.device)
        return torch.nn.functional.linear(x, W, bias)
    n_splits = splits_of(packed, len(flat), n_processors(x.device))
    partial, count = None, None
    if n_splits > 1:
        partial = x.new_empty(partial_sums(packed, len(flat), n_splits), dtype=torch.float32)
        count = counters(x.device, len(packed.codes) * -(-len(flat) // 8))  # no fewer than blocks' outputs
    run(product_launch(flat, packed, bias, y, n_splits, partial, count), x.device)
    return y.view(*x.shape[:-1], out)


def _shape_of(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


add_operator("weight_only_matmul", _of_weight(_reference), _of_weight(_on_gpu), _of_weight(_shape_of))
