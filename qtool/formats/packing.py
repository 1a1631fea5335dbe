"""Packing: several codes in one int32 word, lowest bits first, as compressed-tensors' pack-quantized lays them out.

A word holds floor(32 / bits) codes, so 3-bit codes take 3.2 bits each. Rows are padded with zeros to whole words.
    codes [out, in] in 0 .. 2^bits - 1    words [out, ceil(in / per_word)] int32
"""

import torch
from torch import Tensor


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Words [out, ceil(in / per_word)] of unsigned codes [out, in]."""
    per_word = 32 // bits
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // per_word) * per_word, dtype=torch.int64, device=codes.device)
    padded[:, :columns] = codes
    shifts = torch.arange(per_word, device=codes.device) * bits  # [per_word]
    words = (padded.view(rows, -1, per_word) << shifts).sum(-1)  # [out, words]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_int32(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unsigned codes [out, columns] int64 of words [out, words]."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, device=words.device) * bits  # [per_word]
    codes = (words.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # [out, words, per_word]
    return codes.flatten(1)[:, :columns]
