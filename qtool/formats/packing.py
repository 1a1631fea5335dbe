"""Packing: codes as one stream of bits in int32 words, lowest bits first, as compressed-tensors packs them.

Code i of a row stands at bits i·b .. i·b + b - 1 of the row, across the border of two words where b does not divide 32;
rows are padded with zeros to whole words. Formats of 3 or 5 levels waste less: five ternary codes make one number below
243, eight bits, and three quinary ones one below 125, seven bits; these numbers are packed.
    codes [out, in] in 0 .. 2^b - 1    words [out, ceil(in b / 32)] int32
Source: pack-quantized of compressed-tensors 0.20. Before its pull request 732 (June 2026) a word held floor(32 / b) codes,
which is the same for 2, 4 and 8 bits.
"""

import torch
from torch import Tensor

PERIOD = 32  # codes after which the borders of codes and of words meet again


SYMBOLS = {3: (5, 8), 5: (3, 7)}  # levels: codes in one number, bits of the number


def symbol_of(n_levels: int) -> tuple[int, int]:
    """Codes that make one number, and the bits of the number, for a format of so many levels."""
    return SYMBOLS.get(n_levels, (1, (n_levels - 1).bit_length()))


def n_words_of(columns: int, n_levels: int) -> int:
    """Words that a row of codes below n_levels takes."""
    n_codes, bits = symbol_of(n_levels)
    return n_words(-(-columns // n_codes), bits)


def pack_codes(codes: Tensor, n_levels: int) -> Tensor:
    """Words [out, n_words_of(in)] int32 of codes [out, in] from 0 to n_levels - 1."""
    n_codes, bits = symbol_of(n_levels)
    if n_codes > 1:
        padded = torch.nn.functional.pad(codes.int(), (0, -codes.shape[1] % n_codes))
        powers = torch.tensor([n_levels**i for i in range(n_codes)], dtype=torch.int32, device=codes.device)
        codes = (padded.unflatten(1, (-1, n_codes)) * powers).sum(-1, dtype=torch.int32)  # [out, numbers]
    return pack_int32(codes, bits)


def unpack_codes(words: Tensor, n_levels: int, columns: int) -> Tensor:
    """Codes [out, columns] int32 of words [out, n_words_of(columns)]."""
    n_codes, bits = symbol_of(n_levels)
    numbers = unpack_int32(words, bits, -(-columns // n_codes)).int()
    if bits > 15:
        numbers = numbers & ((1 << bits) - 1)  # int16 took the highest bit for a sign
    if n_codes == 1:
        return numbers
    powers = torch.tensor([n_levels**i for i in range(n_codes)], dtype=torch.int32, device=words.device)
    return (numbers.unsqueeze(-1) // powers % n_levels).flatten(1)[:, :columns].contiguous()


def n_words(columns: int, bits: int) -> int:
    """Words that a row of codes takes."""
    return -(-columns * bits // 32)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Words [out, ceil(in b / 32)] of unsigned codes [out, in]."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % PERIOD))
    places = padded.reshape(-1, PERIOD).T.to(torch.int32).contiguous()  # [32, periods]
    words = torch.zeros(bits, places.shape[1], dtype=torch.int32, device=codes.device)
    for i, code in enumerate(places):
        word, shift = divmod(i * bits, 32)
        words[word] |= code << shift
        if shift + bits > 32:
            words[word + 1] |= code >> (32 - shift)
    return words.T.reshape(rows, -1)[:, : n_words(columns, bits)].contiguous()  # [out, words]


def unpack_int32(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unsigned codes [out, columns] int16 of words [out, ceil(columns b / 32)]."""
    rows = len(words)
    assert words.shape[1] == n_words(columns, bits), f"{words.shape[1]} words for {columns} codes of {bits} bits"
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    parts = padded.reshape(-1, bits).T.contiguous()  # [b, periods]
    codes = torch.empty(PERIOD, parts.shape[1], dtype=torch.int16, device=words.device)
    for i in range(PERIOD):
        word, shift = divmod(i * bits, 32)
        code = parts[word] >> shift
        if shift + bits > 32:  # the right shift brought copies of the sign bit along; the rest stands in the next word
            code = (code & ((1 << (32 - shift)) - 1)) | (parts[word + 1] << (32 - shift))
        codes[i] = code & ((1 << bits) - 1)
    return codes.T.reshape(rows, -1)[:, :columns].contiguous()  # [out, columns]
