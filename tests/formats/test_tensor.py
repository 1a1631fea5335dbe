"""QuantizedTensor: decoding, counting of stored bytes, slicing, and groups that must divide."""

import pytest
import torch

from qtool.errors import QtoolError
from qtool.formats.codebook import LEVELS
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups

INTEGERS = ["w4a16g32", "w3a16g32-asym", "w4a16g32-asymf16", "w8a16", "w2a16-asym"]
TABLES = ["nf4g32", "fp4_bnbg16", "e3m0g32", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4", "e4m3"]
SCHEMES = [*INTEGERS, *TABLES, "mxint8"]


def weights(rows: int = 6, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("short", [*INTEGERS, "mxint8"])
def test_decoding_is_scale_times_code_minus_zero(short: str) -> None:
    scheme = Scheme.model_validate(short).weights
    tensor = quantize(weights(), scheme)
    group = scheme.group or 96
    decoded = tensor.dequantize()
    for row in range(6):
        for column in range(96):
            zero = 0 if tensor.zero is None else float(tensor.zero[row, column // group])
            value = float(tensor.scale[row, column // group]) * (int(tensor.codes[row, column]) - zero)
            assert float(decoded[row, column]) == pytest.approx(value, rel=1e-6)  # one float32 product


def test_bits_per_weight_count_codes_scales_and_zero_points() -> None:
    # 8 rows of 256: codes 4 bits, two bfloat16 scales a row, zero points 4 bits each in whole words of 8 rows.
    symmetric = quantize(weights(8, 256), Scheme.model_validate("w4a16g128").weights)
    assert symmetric.bits_per_weight == 4 + 16 / 128
    asymmetric = quantize(weights(8, 256), Scheme.model_validate("w4a16g128-asym").weights)
    assert asymmetric.bits_per_weight == 4 + (16 + 4) / 128
    floating = quantize(weights(8, 256), Scheme.model_validate("w4a16g128-asymf16").weights)
    assert floating.bits_per_weight == 4 + (16 + 16) / 128


@pytest.mark.parametrize("short", TABLES)
def test_decoding_a_table_is_scale_times_level(short: str) -> None:
    scheme = Scheme.model_validate(short).weights
    tensor = quantize(weights(), scheme)
    group = scheme.group or 96
    decoded, scale = tensor.dequantize(), tensor.scale.float()
    for row in range(6):
        for column in range(96):
            level = LEVELS[scheme.format][int(tensor.codes[row, column])]
            value = float(scale[row, column // group]) * tensor.of_tensor * level
            assert float(decoded[row, column]) == pytest.approx(value, rel=1e-6)  # two float32 products


@pytest.mark.parametrize(
    ("short", "bits"),
    [("nf4g64", 4 + 16 / 64), ("mxfp4", 4.25), ("mxfp6_e2m3", 6.25), ("mxint8", 8.25), ("nvfp4", 4.5 + 32 / (8 * 256))],
)
def test_bits_per_weight_of_tables_and_small_scales(short: str, bits: float) -> None:
    assert quantize(weights(8, 256), Scheme.model_validate(short).weights).bits_per_weight == bits


def test_three_bits_take_the_words_they_are_stored_in() -> None:
    tensor = quantize(weights(4, 100), Scheme.model_validate("w3a16").weights)
    assert tensor.stored_bytes == 4 * 10 * 4 + 4 * 2  # 300 bits a row take ten words, and one bfloat16 scale
    assert tensor.packed().numel() * 4 + tensor.scale.numel() * 2 == tensor.stored_bytes


@pytest.mark.parametrize("short", SCHEMES)
def test_rows_decode_to_the_rows_of_the_whole(short: str) -> None:
    tensor = quantize(weights(), Scheme.model_validate(short).weights)
    part = tensor.rows(2, 5)
    assert part.shape == (3, 96) and torch.equal(part.dequantize(), tensor.dequantize()[2:5])


@pytest.mark.parametrize("short", SCHEMES)
def test_quantizing_the_decoded_weights_by_the_same_params_changes_nothing(short: str) -> None:
    tensor = quantize(weights(), Scheme.model_validate(short).weights)
    again = quantize(tensor.dequantize(), tensor.scheme, tensor.params())
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.scale, tensor.scale)


def test_codes_take_one_byte_and_scales_their_stated_dtype() -> None:
    long = {"weights": {"bits": 8, "symmetric": False, "scale_dtype": "float16"}}
    tensor = quantize(weights(), Scheme.model_validate(long).weights)
    assert isinstance(tensor, QuantizedTensor) and tensor.zero is not None
    assert (tensor.codes.dtype, tensor.zero.dtype, tensor.scale.dtype) == (torch.uint8, torch.uint8, torch.float16)
    assert quantize(weights(), Scheme.model_validate("w8a16").weights).codes.dtype == torch.int8


def test_columns_that_do_not_divide_are_refused_with_groups_that_do() -> None:
    with pytest.raises(QtoolError, match=r"96 columns do not divide into groups of 128; use 32"):
        to_groups(weights(), 128)
    with pytest.raises(QtoolError, match="one group per row"):
        to_groups(weights(2, 50), 32)


@pytest.mark.parametrize("short", SCHEMES)
def test_the_neighbours_of_a_weight_are_the_levels_just_below_and_just_above_it(short: str) -> None:
    tensor = quantize(weights(), Scheme.model_validate(short).weights)
    grid, params = tensor.scheme.grid, tensor.params()
    w = 1.3 * to_groups(weights(), tensor.scheme.group)  # [out, groups, group], some beyond the ends
    w[0, 0, 0] = 0.0
    below, above = grid.neighbours(w, params)
    every = grid.decode(torch.arange(grid.low, grid.high + 1).float().view(1, 1, -1), params)  # [out, groups, codes]
    levels = every.sort(-1).values.unsqueeze(-2)  # [out, groups, 1, codes]
    least, most = levels[..., 0], levels[..., -1]  # [out, groups, 1]
    expected_below = torch.where(levels <= w.unsqueeze(-1), levels, -torch.inf).amax(-1).maximum(least)
    expected_above = torch.where(levels > w.unsqueeze(-1), levels, torch.inf).amin(-1).minimum(most)
    found_below, found_above = grid.decode(below, params), grid.decode(above, params)
    inside = (w >= least) & (w < most)
    assert torch.equal(found_below[inside], expected_below[inside]) and torch.equal(found_above[inside], expected_above[inside])
    assert torch.equal(found_below[w < least], least.expand_as(w)[w < least]) and bool((w < least).any())
    assert torch.equal(found_above[w < least], found_below[w < least])
    assert torch.equal(found_below[w >= most], most.expand_as(w)[w >= most])
