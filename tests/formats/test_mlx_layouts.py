"""MLX's layouts: words and values worked by hand, every code point back, and what cannot be read."""

import pytest
import torch

from qtool.errors import QtoolError
from qtool.formats.codebook import LEVELS
from qtool.formats.mlx_layouts import decode_mlx, pack_mlx, scheme_of_parts, unpack_mlx
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize


def every_code(word: str) -> QuantizedTensor:
    """A tensor [8, 256] of a scheme, all of whose codes come up."""
    scheme = Scheme.model_validate(word).weights
    tensor = quantize(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)), scheme)
    codes = torch.arange(2048) % scheme.grid.n_levels + scheme.grid.low
    return QuantizedTensor(codes.view(8, 256).to(tensor.codes.dtype), tensor.scale, tensor.zero, scheme)


def numbers_in(words: torch.Tensor, bits: int) -> list[list[int]]:
    """Codes [out, in] of words [out, words]: each row one whole number, cut into codes from its lowest bit."""
    rows = [sum(int(word) << 32 * place for place, word in enumerate(row)) for row in words.tolist()]
    return [[row >> bits * i & (1 << bits) - 1 for i in range(words.shape[1] * 32 // bits)] for row in rows]


@pytest.mark.parametrize("ending", ["", "-asym", "-asymf16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_code_comes_back(bits: int, ending: str) -> None:
    tensor = every_code(f"w{bits}a16g64{ending}")
    parts = pack_mlx(tensor, torch.float32)
    found = unpack_mlx(parts, 64, bits, "affine")
    assert (found.scheme.symmetric, found.scheme.zero_dtype) == (tensor.scheme.symmetric, tensor.scheme.zero_dtype)
    assert torch.equal(found.codes, tensor.codes) and torch.equal(found.scale, tensor.scale.float())
    assert (found.zero is None) == (tensor.zero is None)
    assert tensor.zero is None or torch.equal(found.zero.float(), tensor.zero.float())
    assert torch.equal(found.dequantize(), tensor.dequantize())
    assert torch.equal(decode_mlx(parts, 64, bits, "affine").bfloat16(), tensor.dequantize().bfloat16())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_words_and_values_are_those_worked_code_by_code(bits: int) -> None:
    tensor = every_code(f"w{bits}a16g32-asym")
    parts = pack_mlx(tensor, torch.float32)
    codes = numbers_in(parts["weight"], bits)
    assert codes == tensor.codes.tolist() and parts["weight"].shape == (8, 8 * bits)
    scales, biases = parts["scales"].tolist(), parts["biases"].tolist()
    W = [[scales[o][i // 32] * codes[o][i] + biases[o][i // 32] for i in range(256)] for o in range(8)]
    assert torch.tensor(W).equal(tensor.dequantize())


@pytest.mark.parametrize(("scheme", "mode", "format"), [("mxfp4", "mxfp4", "e2m1"), ("mxfp8_e4m3", "mxfp8", "e4m3")])
def test_microscaling_formats_are_their_codes_and_the_exponents_of_scales(scheme: str, mode: str, format: str) -> None:
    tensor = every_code(scheme)
    parts, bits = pack_mlx(tensor, torch.bfloat16), tensor.scheme.bits
    assert set(parts) == {"weight", "scales"} and parts["scales"].dtype == torch.uint8
    codes, exponents = numbers_in(parts["weight"], bits), parts["scales"].tolist()
    W = [[2.0 ** (exponents[o][i // 32] - 127) * LEVELS[format][codes[o][i]] for i in range(256)] for o in range(8)]
    assert torch.tensor(W).equal(tensor.dequantize())
    found = unpack_mlx(parts, 32, bits, mode)
    assert found.scheme == tensor.scheme and torch.equal(found.codes, tensor.codes)
    assert torch.equal(decode_mlx(parts, 32, bits, mode), tensor.dequantize())


def test_nvfp4_without_a_scale_of_the_tensor_is_read() -> None:
    tensor = every_code("nvfp4")
    parts = {"weight": pack_mlx(every_code("mxfp4"), torch.float32)["weight"], "scales": tensor.scale.view(torch.uint8)}
    found = unpack_mlx(parts, 16, 4, "nvfp4")
    assert torch.equal(found.codes, tensor.codes) and torch.equal(found.scale.float(), tensor.scale.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_symmetric_weights_lose_nothing_in_16_bits(dtype: torch.dtype) -> None:
    tensor = every_code("w4a16g32")
    found = unpack_mlx(pack_mlx(tensor, dtype), 32, 4, "affine")
    assert found.scheme.symmetric and torch.equal(found.dequantize(), tensor.dequantize())


def test_zero_points_rounded_to_16_bits_are_read_as_the_numbers_they_became() -> None:
    parts = pack_mlx(every_code("w4a16g32-asym"), torch.bfloat16)
    found = unpack_mlx(parts, 32, 4, "affine")
    assert str(found.scheme) == "w4g32-asymf16"
    # Quotient and product are rounded to float32 each, 2^-24 of at most 16 steps.
    error = (found.dequantize() - decode_mlx(parts, 32, 4, "affine")).abs()
    assert float(error.max()) <= 2**-20 * float(parts["scales"].abs().max())


def test_a_group_of_zeros_with_scale_zero_is_read() -> None:
    parts = pack_mlx(every_code("w4a16g32-asymf16"), torch.float32)
    parts["scales"][0, 0] = parts["biases"][0, 0] = 0
    assert bool((unpack_mlx(parts, 32, 4, "affine").dequantize()[0, :32] == 0).all())
    parts["biases"][0, 0] = 1
    with pytest.raises(QtoolError, match="biases of groups whose scales are 0 cannot be read"):
        unpack_mlx(parts, 32, 4, "affine")


@pytest.mark.parametrize(
    ("change", "setting", "message"),
    [
        ({}, (32, 7, "affine"), "7 bits in groups of 32 cannot be read, 1, 2, 3, 4, 5, 6, 8 bits in groups of 32, 64, 128 can"),
        ({}, (16, 4, "affine"), "4 bits in groups of 16 cannot be read"),
        ({}, (32, 4, "nf4"), "MLX's mode nf4 cannot be read, affine, mxfp4, mxfp8, nvfp4 can"),
        ({}, (32, 4, "mxfp4"), "mxfp4 of 4 bits in groups of 32 with scales of torch.bfloat16 cannot be read; it has 4 bits"),
        ({"biases": None}, (32, 4, "affine"), r"biases are missing, must be floats as scales, torch.bfloat16 \[8, 8\]"),
        ({"biases": torch.ones(8, 8)}, (32, 4, "affine"), r"biases are torch.float32 \[8, 8\], must be floats as scales"),
        ({"weight": None}, (32, 4, "affine"), r"weight is missing, must be torch.uint32 \[8, 32\] for 4 bits"),
        ({}, (64, 4, "affine"), r"weight is torch.uint32 \[8, 32\], must be torch.uint32 \[8, 64\] for 4 bits in groups of 64"),
    ],
)
def test_what_it_cannot_decode_is_refused(
    change: dict[str, torch.Tensor | None], setting: tuple[int, int, str], message: str
) -> None:
    parts = pack_mlx(every_code("w4a16g32"), torch.bfloat16) | change
    with pytest.raises(QtoolError, match=message):
        unpack_mlx({name: part for name, part in parts.items() if part is not None}, *setting)


def test_scales_beyond_the_dtype_are_refused() -> None:
    tensor = quantize(torch.full((1, 32), 1e6), Scheme.model_validate("w4a16g32").weights)
    with pytest.raises(QtoolError, match="a scale of .* is beyond torch.float16; use dtype: float32"):
        pack_mlx(tensor, torch.float16)


def test_a_scheme_is_told_by_scales_and_biases_alone() -> None:
    parts = pack_mlx(every_code("w3a16g64-asym"), torch.float32)
    assert str(scheme_of_parts({name: parts[name] for name in ("scales", "biases")}, 64, 3, "affine")) == "w3g64-asym"
