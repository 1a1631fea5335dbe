"""Fragment order: codes lie in memory as the tensor core's registers take them, so that a warp reads only whole lines.

The product is computed as W xᵀ by mma.m16n8k16: 16 outputs of W times 16 inputs are its A operand, of which lane 4 g + t holds
four registers of two neighbours each: a0 of row g, a1 of row g + 8, and a2, a3 of the same rows further right. Which inputs a
lane holds is free, as long as x is read in the same order; here lane t takes inputs 8 t .. 8 t + 7 of each 32, which is one
load of 16 bytes from x. Of an output n and an input k
    n = 16 tile + 8 r + g         k = KB block + 32 h + 8 t + 4 j + 2 c + e
h tells the half or quarter of a block, j the first or second product of 32 inputs, i = 2 c + r the register, e the half of it.
    4 bits, KB  64    word 2 h + j of 4:                 bits 4 i + 16 e; of a table's codes 8 i + 4 e
    2 bits, KB 128    word h of 4:                       bits 2 (4 j + i) + 16 e
    3 bits, KB 128    its low two bits as 2 bits;  word h / 2 of 2 more, after them:  bit 8 (h mod 2) + 4 j + i + 16 e
    8 bits, KB  64    word 4 h + 2 j + c of 8:           byte 2 r + e
    codes [out, in] unsigned    words [tiles, blocks, words of a block] int32: four words of each lane, 16 bytes, then the rest
Outputs are padded to whole groups of 64, inputs to whole blocks, with code 0; kernels read zeros for x there.
Source: the operand of mma.m16n8k16 in NVIDIA's PTX ISA; one read of 16 bytes a lane as in Marlin (Frantar et al. 2024,
arXiv:2408.11743). Differs: inputs are permuted within 32, so that x needs no ldmatrix.
"""

import torch
from torch import Tensor

ROWS = 64  # outputs are padded to whole multiples
BLOCK = {2: 128, 3: 128, 4: 64, 8: 64}  # bits: inputs of a block
WORDS = {2: 4, 3: 6, 4: 4, 8: 8}  # bits: words that a lane holds of a block
AXES = "n r g b h t j c e"  # of codes seen as [tiles, 2, 8, blocks, BLOCK / 32, 4, 2, 2, 2]


def padded(size: int, multiple: int) -> int:
    """size rounded up to a multiple."""
    return -(-size // multiple) * multiple


def to_fragments(codes: Tensor, bits: int, is_table: bool = False) -> Tensor:
    """Words [tiles, blocks, 32 WORDS] int32 of unsigned codes [out, in]; is_table: codes of 4 bits name levels of a table."""
    n, k = codes.shape
    block = BLOCK[bits]
    rest = (0, padded(k, block) - k, 0, padded(n, ROWS) - n)
    q = torch.nn.functional.pad(codes.int(), rest)  # [out, in], padded
    q = q.view(-1, 2, 8, q.shape[1] // block, block // 32, 4, 2, 2, 2)  # as AXES
    n_tiles, n_blocks = len(q), q.shape[3]
    # [tiles, blocks, g, t, h, j, c, r, e]
    q = q.permute(0, 3, 2, 5, 4, 6, 7, 1, 8)
    if bits == 8:
        words = _sum_bits(q, [0, 8, 16, 24], 2)  # [..., h, j, c]
        words = words.flatten(5).movedim(4, 2)  # [tiles, blocks, h, g, t, 4]
    elif bits == 4:
        words = _sum_bits(q, _nibbles(is_table), 3)  # [..., h, j]
    else:
        low = _sum_bits(q & 3, [2 * i + 16 * e for i in range(8) for e in range(2)], 4)  # [..., h]
        words = low
        if bits == 3:
            high = (q >> 2).unflatten(4, (2, 2))  # [tiles, blocks, g, t, 2, 2, j, c, r, e]
            more = _sum_bits(high, [i + 16 * e for i in range(16) for e in range(2)], 5)  # [..., 2]
            words = torch.cat([low.flatten(2), more.flatten(2)], -1)
    return words.reshape(n_tiles, n_blocks, 32 * WORDS[bits]).contiguous()


def from_fragments(words: Tensor, bits: int, out: int, n_in: int, is_table: bool = False) -> Tensor:
    """Unsigned codes [out, in] int32 of words [tiles, blocks, 32 WORDS]."""
    n_tiles, n_blocks, _ = words.shape
    lanes = (n_tiles, n_blocks, 8, 4)
    if bits == 8:
        q = _bits_of(words.view(n_tiles, n_blocks, 2, 8, 4, 2, 2).movedim(2, 4), [0, 8, 16, 24], 255)
    elif bits == 4:
        q = _bits_of(words.view(*lanes, 2, 2), _nibbles(is_table), 15)
    else:
        q = _bits_of(words[..., :128].reshape(*lanes, 4), [2 * i + 16 * e for i in range(8) for e in range(2)], 3)
        if bits == 3:
            high = _bits_of(words[..., 128:].reshape(*lanes, 2), [i + 16 * e for i in range(16) for e in range(2)], 1)
            q = q | high.reshape(q.shape) << 2
    q = q.reshape(*lanes, BLOCK[bits] // 32, 2, 2, 2, 2).permute(0, 7, 2, 1, 4, 3, 5, 6, 8)  # AXES
    return q.reshape(16 * n_tiles, n_blocks * BLOCK[bits])[:out, :n_in].contiguous()


def rows_to_lanes(values: Tensor) -> Tensor:
    """values [out, groups] as [groups, tiles, 8, 2]: what lane g needs of a tile and a group side by side."""
    whole = torch.zeros(padded(len(values), ROWS), values.shape[1], dtype=values.dtype, device=values.device)
    whole[: len(values)] = values
    return whole.view(-1, 2, 8, values.shape[1]).permute(3, 0, 2, 1).contiguous()


def rows_from_lanes(values: Tensor, out: int) -> Tensor:
    """values [out, groups] of [groups, tiles, 8, 2]."""
    return values.permute(1, 3, 2, 0).reshape(-1, len(values))[:out].contiguous()


def sixteenths_to_lanes(values: Tensor) -> Tensor:
    """values [out, in / 16] as [blocks of 64, tiles, 8, 2, 2, 2]: of lanes t < 2 and t >= 2, halves h, rows g and g + 8.

    Lane t of a half holds inputs 8 t .. 8 t + 7 of it, which are all of group t / 2.
    """
    n, n_groups = values.shape
    whole = torch.zeros(padded(n, ROWS), padded(n_groups, 4), dtype=values.dtype, device=values.device)
    whole[:n, :n_groups] = values
    whole = whole.view(-1, 2, 8, whole.shape[1] // 4, 2, 2)  # [tiles, r, g, blocks, h, t / 2]
    return whole.permute(3, 0, 2, 5, 4, 1).contiguous()


def sixteenths_from_lanes(values: Tensor, out: int, n_groups: int) -> Tensor:
    """values [out, groups] of [blocks, tiles, 8, 2, 2, 2]."""
    rows = values.permute(1, 5, 2, 0, 4, 3)  # [tiles, r, g, blocks, h, t / 2]
    return rows.reshape(16 * values.shape[1], -1)[:out, :n_groups].contiguous()


def _nibbles(is_table: bool) -> list[int]:
    i_step, e_step = (8, 4) if is_table else (4, 16)
    return [i_step * i + e_step * e for i in range(4) for e in range(2)]


def _sum_bits(q: Tensor, shifts: list[int], n_axes: int) -> Tensor:
    """Words of fields: the last n_axes axes of q, in their order, go to bit `shifts`."""
    fields = q.flatten(-n_axes)
    words = torch.zeros_like(fields[..., 0])
    for index, shift in enumerate(shifts):
        words |= fields[..., index] << shift
    return words


def _bits_of(words: Tensor, shifts: list[int], mask: int) -> Tensor:
    """The fields [..., len(shifts)] of words [...]."""
    return torch.stack([(words >> shift) & mask for shift in shifts], -1)
