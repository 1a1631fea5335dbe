"""QuantizedTensor: decoding, counting of stored bytes, slicing, and groups that must divide."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qtool.errors import QtoolError
from qtool.formats.codebook import LEVELS, PowerGrid
from qtool.formats.outliers import Outliers
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor, Salient, quantize, to_groups, with_common_scale
from qtool.model.store import load_changes, save_changes

INTEGERS = ["w4a16g32", "w3a16g32-asym", "w4a16g32-asymf16", "w8a16", "w2a16-asym"]
FEW = ["binary", "ternaryg32", "w2starg32"]
LONG = ["power4g32", "power2", "nf4g32-asymf16", "w4a16g32-dq", "w3a16g32-asym-dq", "w3a16g8-ic", "nf4-ic"]
TABLES = [
    "nf4g32",
    "fp4_bnbg16",
    "e3m0g32",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "nvfp4",
    "e4m3",
    "rf8g32",
]
SCHEMES = [*INTEGERS, *TABLES, *FEW, *LONG, "mxint8"]


def weights(rows: int = 8, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("short", [*INTEGERS, "mxint8"])
def test_decoding_is_scale_times_code_minus_zero(short: str) -> None:
    scheme = Scheme.model_validate(short).weights
    tensor = quantize(weights(), scheme)
    group = scheme.group or 96
    decoded = tensor.dequantize()
    for row in range(8):
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
    for row in range(8):
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


@pytest.mark.parametrize("short", [*INTEGERS, *TABLES, *FEW, "mxint8", "nf4g32-asymf16"])
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
        to_groups(weights(), WeightScheme(bits=4, group=128))
    with pytest.raises(QtoolError, match="one group per row"):
        to_groups(weights(2, 50), WeightScheme(bits=4, group=32))


@pytest.mark.parametrize("short", SCHEMES)
def test_the_neighbours_of_a_weight_are_the_levels_just_below_and_just_above_it(short: str) -> None:
    tensor = quantize(weights(), Scheme.model_validate(short).weights)
    grid, params = tensor.grid, tensor.params()
    w = 1.3 * to_groups(weights(), tensor.scheme)  # [out, groups, group], some beyond the ends
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


def everything() -> QuantizedTensor:
    """A tensor with all that may be added: salient columns, column scales, outliers, double-quantized scales."""
    W = weights()
    chosen = torch.tensor([3, 40, 95])
    rest = [column for column in range(96) if column not in chosen.tolist()]
    base = quantize(W[:, rest], Scheme.model_validate("w2a16-dq").weights)
    salient = Salient(chosen.to(torch.int16), quantize(W[:, chosen], Scheme.model_validate("w4a16-asym").weights))
    outliers = Outliers.of(10 * W, W.abs() > 2.5)
    return replace(base, column_scale=torch.linspace(0.5, 2, 96).half(), salient=salient, outliers=outliers)


def test_salient_columns_column_scales_and_outliers_stand_where_they_belong() -> None:
    tensor, W = everything(), weights()
    decoded = tensor.dequantize()
    assert tensor.shape == (8, 96) == tuple(decoded.shape)
    assert tensor.salient is not None and tensor.column_scale is not None
    inner, base = (
        tensor.salient.tensor.dequantize(),
        replace(tensor, column_scale=None, salient=None, outliers=None).dequantize(),
    )
    columns, seen = tensor.salient.columns.tolist(), 0
    for column in range(96):
        plain = inner[:, columns.index(column)] if column in columns else base[:, seen]
        seen += column not in columns
        for row in range(8):
            added = float((10 * W[row, column]).half()) if abs(float(W[row, column])) > 2.5 else 0.0
            value = float(plain[row]) * float(tensor.column_scale[column]) + added
            assert float(decoded[row, column]) == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("short", [*SCHEMES, "everything"])
def test_a_file_gives_back_what_was_saved_and_takes_the_bytes_that_were_counted(short: str, tmp_path: Path) -> None:
    scheme = Scheme.model_validate("w2a16-dq" if short == "everything" else short)
    tensor = everything() if short == "everything" else quantize(weights(), scheme.weights)
    save_changes(tmp_path / "block.safetensors", {"x.weight": (tensor, scheme)})
    found = load_changes(tmp_path / "block.safetensors")["x.weight"]
    assert isinstance(found, tuple) and found[1] == scheme
    assert found[0].facts() == tensor.facts()
    for name, part in tensor.parts().items():
        assert torch.equal(found[0].parts()[name].to(part.dtype), part), name
    assert torch.equal(found[0].dequantize(), tensor.dequantize())
    with safe_open(tmp_path / "block.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).nbytes for name in file.keys()}
    of_tensor = 4 * (scheme.weights.scale_dtype == "float8_e4m3fn" or scheme.weights.format == "power")  # in the header
    packed_zeros = tensor.zero is not None and scheme.weights.zero_dtype == "int"
    zeros = stored.pop("x.weight::zero") if packed_zeros else 0  # which files of other tools pack
    counted = tensor.stored_bytes - of_tensor - (tensor._bytes_of_zeros() if packed_zeros else 0)
    if tensor.salient is not None:  # a bit a column is counted for salient columns, and the file names them
        counted += tensor.salient.columns.nbytes - 96 // 8
        counted += stored["x.weight::salient_zero"] - tensor.salient.tensor._bytes_of_zeros()
    assert sum(stored.values()) == counted and (zeros > 0) == packed_zeros


@pytest.mark.parametrize(("short", "bits"), [("binary", 1), ("ternary", 1.6), ("w2star", 7 / 3), ("power4", 4), ("w5a16", 5)])
def test_formats_take_the_bits_that_they_are_known_for(short: str, bits: float) -> None:
    wide = torch.randn(4, 3360, generator=torch.Generator().manual_seed(0))
    assert quantize(wide, Scheme.model_validate(short).weights).bits_per_weight == pytest.approx(bits, rel=0.01)


def test_doubly_quantized_scales_cost_an_eighth_of_a_bit() -> None:
    tensor = quantize(
        torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), Scheme.model_validate("nf4g64-dq").weights
    )
    assert tensor.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-3)  # QLoRA's 4.127, and one mean
    plain = quantize(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), Scheme.model_validate("nf4g64").weights)
    assert float((tensor.scale / plain.scale.float() - 1).abs().max()) < 0.03


def test_groups_of_an_input_channel_are_those_of_the_transposed_matrix() -> None:
    W = weights()
    across = quantize(W, Scheme.model_validate("w3a16g8-ic").weights)
    along = quantize(W.T.contiguous(), Scheme.model_validate("w3a16g8").weights)
    assert torch.equal(across.dequantize(), along.dequantize().T) and across.scale.shape == (96, 1)
    with pytest.raises(QtoolError, match="8 rows do not divide into groups of 16"):
        quantize(W, Scheme.model_validate("w3a16g16-ic").weights)


def test_a_power_grid_takes_the_best_exponent() -> None:
    W = weights(64, 96)
    scheme = Scheme.model_validate("power4").weights
    found = quantize(W, scheme)
    grid = scheme.grid
    assert isinstance(grid, PowerGrid)
    costs = {}
    for a in torch.linspace(0.3, 1.2, 91).tolist():
        one = grid.with_exponent(a)
        costs[a] = float((one.snap(W, one.fit(W)) - W).square().sum())
    best = min(costs, key=lambda a: costs[a])
    assert abs(found.exponent - best) < 0.02 and 0.5 < found.exponent < 0.9  # the spec names 0.7 for normal weights
    assert float((found.dequantize() - W).square().sum()) <= 1.001 * costs[best]


def test_binary_and_ternary_scales_are_mean_magnitudes() -> None:
    W = weights()
    binary = quantize(W, Scheme.model_validate("binary").weights).dequantize()
    mean = W.abs().mean(1, keepdim=True).bfloat16().float()
    assert torch.equal(binary, torch.where(W > 0, mean, -mean))
    ternary = quantize(W, Scheme.model_validate("ternary").weights).dequantize()
    assert torch.equal(ternary, (W / mean).round().clamp(-1, 1) * mean)


def test_tensors_of_other_ranges_take_one_scale_without_a_weight_that_changes() -> None:
    scheme = Scheme.model_validate("nvfp4").weights
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    tensors = [quantize(factor * W, scheme) for factor in (1.0, 5.0, 0.3)]
    assert len({tensor.of_tensor for tensor in tensors}) == 3
    common = with_common_scale(tensors)
    assert common is not None and {tensor.of_tensor for tensor in common} == {tensors[1].of_tensor}
    for before, after in zip(tensors, common, strict=True):
        assert torch.equal(before.dequantize(), after.dequantize())


def test_scales_too_small_for_a_common_one_stay_as_they_are() -> None:
    scheme = Scheme.model_validate("nvfp4").weights
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert with_common_scale([quantize(W, scheme), quantize(1e5 * W, scheme)]) is None
