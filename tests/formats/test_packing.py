"""Packing: codes come back from words, at every width, and lie in them lowest bits first."""

import math

import pytest
import torch

from qtool.formats.packing import n_words_of, pack_codes, pack_int32, unpack_codes, unpack_int32


@pytest.mark.parametrize("columns", [1, 7, 10, 31, 32, 33, 96, 129])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back_from_words(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(columns))
    codes[0], codes[1] = 0, 2**bits - 1
    words = pack_int32(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (5, math.ceil(columns * bits / 32))
    assert torch.equal(unpack_int32(words, bits, columns).long(), codes)


def test_the_first_code_takes_the_lowest_bits() -> None:
    assert pack_int32(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x321]]
    assert pack_int32(torch.tensor([[1, 2, 3]]), 8).tolist() == [[0x030201]]
    assert pack_int32(torch.tensor([[1, 2, 3]]), 3).tolist() == [[1 | 2 << 3 | 3 << 6]]


def test_a_word_whose_highest_bit_is_set_is_negative() -> None:
    assert pack_int32(torch.full((1, 8), 15), 4).tolist() == [[-1]]
    assert pack_int32(torch.tensor([[0, 0, 0, 128]]), 8).tolist() == [[-(2**31)]]


def test_a_code_may_begin_in_one_word_and_end_in_the_next() -> None:
    codes = torch.zeros(1, 11, dtype=torch.int64)
    codes[0, 10] = 0b101  # bits 30, 31 and 32 of the row
    assert pack_int32(codes, 3).tolist() == [[0b01 << 30, 0b1]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_read_as_one_number_spell_the_codes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (1, 37), generator=torch.Generator().manual_seed(bits))
    row = sum(code << bits * i for i, code in enumerate(codes[0].tolist()))
    words = [word % 2**32 for word in pack_int32(codes, bits)[0].tolist()]
    assert sum(word << 32 * i for i, word in enumerate(words)) == row


@pytest.mark.parametrize("columns", [1, 4, 5, 33, 160])
@pytest.mark.parametrize("n_levels", [2, 3, 5, 16, 65536])
def test_codes_of_any_number_of_levels_come_back(n_levels: int, columns: int) -> None:
    codes = torch.randint(0, n_levels, (5, columns), generator=torch.Generator().manual_seed(columns))
    codes[0], codes[1] = 0, n_levels - 1
    words = pack_codes(codes, n_levels)
    assert words.shape == (5, n_words_of(columns, n_levels))
    assert torch.equal(unpack_codes(words, n_levels, columns).long(), codes)


def test_five_ternary_codes_take_a_byte_and_three_quinary_ones_seven_bits() -> None:
    assert pack_codes(torch.tensor([[1, 2, 0, 0, 2]]), 3).tolist() == [[1 + 2 * 3 + 2 * 81]]
    assert pack_codes(torch.tensor([[1, 2, 4, 3]]), 5).tolist() == [[(1 + 2 * 5 + 4 * 25) | 3 << 7]]
