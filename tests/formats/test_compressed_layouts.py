"""compressed-tensors' layouts: bytes as worked out by hand, the library's own decoding of every code, and the way back."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from qtool.errors import QtoolError
from qtool.formats.codebook import LEVELS
from qtool.formats.compressed_layouts import decode, layout_of, pack, reciprocal, unpack, weight_arguments
from qtool.formats.scales import tensor_scale
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize

HELD = {
    "w4a16g32": "pack-quantized",
    "w3a16-asym": "pack-quantized",
    "w8a8": "int-quantized",
    "w4a8g32-asym": "int-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8_e4m3": "mxfp8-quantized",
    "e4m3": "float-quantized",
    "e4m3g32": "float-quantized",
}
FLOATS = [word for word, layout in HELD.items() if layout not in ("pack-quantized", "int-quantized")]


def scheme_of(word: str) -> Scheme:
    return Scheme.model_validate(word)


def rounded(word: str, rows: int = 6, columns: int = 64) -> QuantizedTensor:
    """A matrix whose rows are of many magnitudes, one of them all zeros."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 1, rows).unsqueeze(1)
    w[1] = 0
    return quantize(w, scheme_of(word).weights)


def every_code(word: str) -> QuantizedTensor:
    """Each code that encoding can give, under four scales a row, some far apart."""
    weights = scheme_of(word).weights
    n_codes = len(LEVELS[weights.format])
    codes = torch.arange(n_codes, dtype=torch.uint8).repeat(4, max(1, 64 // n_codes))  # [4, in]
    if weights.format == "e4m3":
        codes = torch.where(codes & 127 == 127, codes - 1, codes)  # which would be NaN
    scale = torch.tensor([[1.0], [2.0**-5], [1.125], [320.0]]).expand(4, codes.shape[1] // (weights.group or codes.shape[1]))
    stored = scale.to(getattr(torch, weights.scale_dtype)).contiguous()
    return QuantizedTensor(codes, stored, None, weights, 2.0**-9 if weights.scale_dtype == "float8_e4m3fn" else 1.0)


def assert_equal(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert a.codes.dtype == b.codes.dtype and torch.equal(a.codes, b.codes)
    assert a.scale.dtype == b.scale.dtype and torch.equal(a.scale.float(), b.scale.float())
    assert (a.zero is None) == (b.zero is None) and (a.zero is None or torch.equal(a.zero, b.zero))
    assert (a.scheme, a.of_tensor) == (b.scheme, b.of_tensor)


def test_nvfp4_by_hand() -> None:
    # E2M1's codes: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and from 8 on the same below zero. Pairs of codes, the first in the low bits.
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]], dtype=torch.uint8)
    weights = scheme_of("nvfp4").weights
    quantized = QuantizedTensor(codes, torch.tensor([[1.5]]).to(torch.float8_e4m3fn), None, weights, of_tensor=0.25)
    parts = pack(quantized, scheme_of("nvfp4"))
    assert set(parts) == {"weight_packed", "weight_scale", "weight_global_scale"}
    assert parts["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert parts["weight_packed"].dtype == torch.uint8
    assert parts["weight_scale"].dtype == torch.float8_e4m3fn
    assert parts["weight_scale"].view(torch.uint8).tolist() == [[0b0_0111_100]]  # 2^(7 - 7) · (1 + 4/8)
    assert parts["weight_global_scale"].tolist() == [4.0] and parts["weight_global_scale"].dtype == torch.float32
    by_hand = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert decode(quantized, torch.float32).tolist() == [[v * 1.5 / 4 for v in by_hand] + [-v * 1.5 / 4 for v in by_hand]]


def test_mxfp4_by_hand() -> None:
    codes = torch.tensor([[7, 9] * 16, [2, 0] * 16], dtype=torch.uint8)
    scale = torch.tensor([[2.0**-3], [2.0**5]]).to(torch.float8_e8m0fnu)
    parts = pack(QuantizedTensor(codes, scale, None, scheme_of("mxfp4").weights), scheme_of("mxfp4"))
    assert set(parts) == {"weight_packed", "weight_scale"}
    assert parts["weight_packed"].tolist() == [[0x97] * 16, [0x02] * 16]
    assert parts["weight_scale"].dtype == torch.uint8 and parts["weight_scale"].tolist() == [[124], [132]]  # 127 + exponent


def test_fp8_by_hand() -> None:
    w = torch.tensor([[448.0, -224.0, 1.0, 0.0, 2.0**-9, -13.0, 26.0, -0.75]])
    parts = pack(quantize(w, scheme_of("e4m3").weights), scheme_of("e4m3"))
    assert set(parts) == {"weight", "weight_scale"}
    assert parts["weight"].dtype == torch.float8_e4m3fn and parts["weight"].float().tolist() == w.tolist()
    assert parts["weight"].view(torch.uint8).tolist() == [[0x7E, 0xF6, 0x38, 0x00, 0x01, 0xD5, 0x5D, 0xB4]]
    assert parts["weight_scale"].tolist() == [[1.0]]


@pytest.mark.parametrize("word", HELD)
def test_what_is_packed_comes_back_to_the_bit(word: str) -> None:
    scheme = scheme_of(word)
    assert layout_of(scheme) == HELD[word]
    quantized = rounded(word)
    assert_equal(unpack(pack(quantized, scheme), scheme.weights), quantized)


@pytest.mark.parametrize("word", FLOATS)
def test_every_code_comes_back_to_the_bit(word: str) -> None:
    quantized = every_code(word)
    assert_equal(unpack(pack(quantized, scheme_of(word)), scheme_of(word).weights), quantized)


@pytest.mark.parametrize("word", FLOATS)
@pytest.mark.parametrize("make", [rounded, every_code])
def test_the_library_decodes_the_same(word: str, make: object) -> None:
    assert callable(make)
    quantized, scheme = make(word), scheme_of(word)
    group = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weight_arguments(scheme.weights)})
    parts = pack(quantized, scheme)
    theirs = BaseCompressor.get_value_from_registry(HELD[word]).decompress(parts, group)["weight"]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs, decode(quantized, torch.bfloat16))
    assert torch.equal(theirs, quantized.dequantize().to(torch.bfloat16))


def test_on_a_border_of_bfloat16_the_librarys_division_is_what_counts() -> None:
    # 1.5 · 60 · amax / 2688 with an amax of eight bits that 7 divides: nine bits, halfway between two bfloat16 numbers.
    quantized, scheme = every_code("nvfp4"), scheme_of("nvfp4")
    of_tensor = float(1 / torch.tensor(2688 * 256 / 203))  # as other tools choose it
    scale = torch.full(quantized.scale.shape, 60.0).to(torch.float8_e4m3fn)
    quantized = replace(quantized, scale=scale, of_tensor=of_tensor)
    group = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weight_arguments(scheme.weights)})
    theirs = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(pack(quantized, scheme), group)["weight"]
    assert torch.equal(theirs, decode(quantized, torch.bfloat16))
    ours = quantized.dequantize().to(torch.bfloat16)
    assert not torch.equal(theirs, ours)
    assert ((theirs - ours).abs() <= 2.0**-7 * ours.abs()).all()


@pytest.mark.parametrize("word", ["nvfp4", "mxfp4"])
def test_the_library_packs_the_same(word: str) -> None:
    quantized, scheme = rounded(word), scheme_of(word)
    group = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weight_arguments(scheme.weights)})
    ours = pack(quantized, scheme)
    given = {"weight": quantized.dequantize(), "weight_scale": quantized.scale.float()}
    given |= {key: value for key, value in ours.items() if key == "weight_global_scale"}
    theirs = BaseCompressor.get_value_from_registry(HELD[word]).compress(given, group)
    assert set(theirs) == set(ours)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor.float(), theirs[key].float()), key


def test_the_scale_of_a_tensor_is_told_by_its_reciprocal() -> None:
    for amax in torch.logspace(-9, 6, 400).tolist():
        of_tensor = tensor_scale(torch.tensor([[amax]]), 6.0, "float8_e4m3fn")
        stored = reciprocal(of_tensor)
        assert stored.dtype == torch.float32 and float(1 / stored) == of_tensor
        assert amax / 1344 * (1 - 1e-6) <= of_tensor < amax / 672


def test_a_scale_that_is_no_reciprocal_gets_the_nearest() -> None:
    values = 1 + torch.arange(2**20, 2**20 + 4000) / 2**21  # between sqrt 2 and 2, where floats lie closer than reciprocals
    reachable = {float(1 / reciprocal(float(value))) == float(value) for value in values}
    assert reachable == {True, False}
    assert all(float(reciprocal(float(value))) == pytest.approx(1 / float(value), rel=1e-7) for value in values)


def test_the_sign_of_an_nvfp4_scale_moves_into_its_codes() -> None:
    quantized = every_code("nvfp4")
    turned = replace(quantized, scale=(-quantized.scale.float()).to(quantized.scale.dtype))
    parts = pack(turned, scheme_of("nvfp4"))
    assert bool((parts["weight_scale"].float() > 0).all())
    assert torch.equal(unpack(parts, turned.scheme).dequantize(), turned.dequantize())


def test_a_zero_scale_stays_zero() -> None:
    quantized = every_code("nvfp4")
    empty = replace(quantized, scale=torch.zeros(quantized.scale.shape).to(quantized.scale.dtype))
    assert not bool(unpack(pack(empty, scheme_of("nvfp4")), empty.scheme).dequantize().any())


@pytest.mark.parametrize("word", ["nvfp4", "mxfp4", "e4m3"])
def test_a_scale_that_is_no_number_is_refused_both_ways(word: str) -> None:
    quantized = every_code(word)
    broken = replace(quantized, scale=torch.full(quantized.scale.shape, torch.nan).to(quantized.scale.dtype))
    with pytest.raises(QtoolError, match="a scale is not a number; train with a lower lr"):
        pack(broken, scheme_of(word))
    parts = pack(quantized, scheme_of(word))
    parts["weight_scale"] = broken.scale.view(torch.uint8) if word == "mxfp4" else broken.scale
    with pytest.raises(QtoolError, match="a scale is not a number; the checkpoint is damaged"):
        unpack(parts, quantized.scheme)


@pytest.mark.parametrize(
    "word",
    [
        *("nf4g64", "fp4_bnb", "e5m2", "e2m3g32", "e2m1", "e2m1g16", "e2m1g32", "e4m3-asymf16", "power4g128", "e8pg64"),
        *("mxint8", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e5m2", "w4a16g32-dq", "w4a16g32-ic", "w4a16g32-asymf16", "ternary"),
    ],
)
def test_no_layout_holds_anything_else(word: str) -> None:
    assert layout_of(scheme_of(word)) is None
    wide = {"format": "e2m1", "group": 32, "scale_dtype": "float8_e4m3fn"}
    assert layout_of(Scheme.model_validate({"weights": wide})) is None


def test_one_scale_of_a_tensor_is_read_as_one_for_each_row() -> None:
    quantized = every_code("e4m3")
    parts = {"weight": quantized.codes.view(torch.float8_e4m3fn), "weight_scale": torch.tensor([0.5], dtype=torch.bfloat16)}
    read = unpack(parts, quantized.scheme)
    assert read.scale.tolist() == [[0.5]] * 4 and torch.equal(read.codes, quantized.codes)


@pytest.mark.parametrize(
    ("word", "change", "message"),
    [
        ("nvfp4", {"weight_global_scale": torch.tensor([0.0])}, r"must be one positive number, not \[0\.0\]"),
        ("nvfp4", {"weight_global_scale": torch.tensor([torch.inf])}, "must be one positive number"),
        ("nvfp4", {"weight_global_scale": torch.ones(2)}, "must be one positive number"),
        ("nvfp4", {"weight_global_scale": None}, r"must be one positive number, not \[\]"),
        ("nvfp4", {"weight_packed": None}, "a scale but no nvfp4 codes in weight_packed, uint8"),
        ("mxfp4", {"weight_packed": torch.zeros(4, 8, dtype=torch.int32)}, "no mxfp4 codes in weight_packed, uint8"),
        ("e4m3", {"weight": torch.zeros(4, 64, dtype=torch.int8)}, "a scale but no e4m3 codes in weight, float8_e4m3fn"),
        ("e4m3", {"weight_zero_point": torch.zeros(4, 1)}, "zero points of float weights cannot be read"),
        ("e4m3g32", {"weight_scale": torch.ones(4, 1)}, "1 scales a row do not fit 256 weights of e4m3g32"),
    ],
)
def test_what_contradicts_the_scheme_is_refused(word: str, change: dict[str, torch.Tensor | None], message: str) -> None:
    quantized = every_code(word)
    parts = {**pack(quantized, scheme_of(word)), **change}
    with pytest.raises(QtoolError, match=message):
        unpack({name: tensor for name, tensor in parts.items() if tensor is not None}, quantized.scheme)
