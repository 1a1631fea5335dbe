"""ggml's types: every layout decodes as the package gguf decodes it, and takes qtool's own codes as they are."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from qtool.errors import QtoolError
from qtool.formats.codebook import LEVELS
from qtool.formats.ggml import TYPES, Blocks, GgmlType, decode, from_codes, pack, takes_codes, type_of, unpack, values
from qtool.formats.integer import Params
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize

PACKED = [name for name, kind in TYPES.items() if kind.dtype is None]
OWN = {"w4a16g32": "q4_0", "w4a16g64": "q4_0", "w4a16g128": "q4_0", "w4a16": "q4_0", "w5a16g32": "q5_0", "w8a16g32": "q8_0"}
OWN |= {"iq4_nlg32": "iq4_nl", "iq4_nlg64": "iq4_nl"}
OWN |= {"w4a16g32-asym": "q4_1", "w4a16g64-asymf16": "q4_1", "w5a16g32-asym": "q5_1", "mxfp4": "mxfp4", "mxint8": "q8_0"}


def scheme_of(text: str) -> WeightScheme:
    return Scheme.model_validate(text).weights


def random_bytes(kind: GgmlType, n_blocks: int = 512) -> torch.Tensor:
    """Blocks of random bytes [blocks, n_bytes], whose float16 and powers of two are finite: every code point comes up."""
    random = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (n_blocks, kind.n_bytes), generator=random, dtype=torch.uint8)
    start = 0
    for part in kind.layout:
        n = kind.bytes_of(part)
        if part == "e":
            data[:, start] = torch.arange(n_blocks) % 252
        elif isinstance(part, str):
            half = torch.randn(n_blocks, 1, generator=random).to(torch.float16)
            data[:, start : start + 2] = half.view(torch.uint8)
        start += n
    return data


def test_numbers_and_sizes_are_those_of_the_package() -> None:
    for name, kind in TYPES.items():
        number = GGMLQuantizationType[name.upper()]
        assert (kind.number, (kind.block, kind.n_bytes)) == (number, gguf.GGML_QUANT_SIZES[number])
        word = name.upper() if "_k" not in name or name in ("q2_k", "q6_k") else f"{name.upper()}_M"
        word = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(word, f"MOSTLY_{word}")
        assert kind.file_type == gguf.LlamaFileType[word]


@pytest.mark.parametrize("name", PACKED)
def test_any_bytes_decode_as_the_package_decodes_them(name: str) -> None:
    kind = TYPES[name]
    data = random_bytes(kind)
    expected = torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[name.upper()]))
    assert torch.equal(values(unpack(data, kind), kind), expected)


@pytest.mark.parametrize("name", PACKED)
def test_packing_gives_back_any_bytes(name: str) -> None:
    data = random_bytes(TYPES[name])
    assert torch.equal(pack(unpack(data, TYPES[name]), TYPES[name]), data)


@pytest.mark.parametrize("name", PACKED)
def test_every_code_and_every_scale_survives_packing(name: str) -> None:
    kind = TYPES[name]
    n_codes = 1 << kind.bits
    codes = (torch.arange(kind.block * 256).view(256, -1) * 7 + torch.arange(256).unsqueeze(1)) % n_codes + kind.low
    scales = None
    if kind.n_scales:
        span = 256 if name == "q6_k" else 16 if name == "q2_k" else 64
        scales = (torch.arange(256 * kind.n_scales).view(256, -1) * 5) % span + kind.scale_low
        assert len(scales.unique()) == span
    d = torch.arange(256).to(torch.uint8) if name == "mxfp4" else torch.linspace(-2, 2, 256).to(torch.float16)
    blocks = Blocks(codes, d, torch.linspace(3, -1, 256).to(torch.float16) if kind.has_minimum else None, scales)
    again = unpack(pack(blocks, kind), kind)
    assert len(codes.unique()) == n_codes
    assert torch.equal(again.codes, codes) and torch.equal(again.d, d)
    assert scales is None or torch.equal(again.scales, scales)
    assert blocks.m is None or torch.equal(again.m, blocks.m)


@pytest.mark.parametrize(("scheme", "name"), OWN.items())
def test_a_schemes_own_type_holds_its_values(scheme: str, name: str) -> None:
    kind = TYPES[name]
    assert type_of(scheme_of(scheme)) == kind
    tensor = quantize(torch.randn(6, 256, generator=torch.Generator().manual_seed(0)), scheme_of(scheme))
    data = from_codes(tensor, kind)
    assert data.shape == (6, kind.row_bytes(256))
    theirs = torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[name.upper()]))
    assert torch.equal(decode(data, kind), theirs)
    if kind.has_minimum:  # -scale zero has up to four bits more than bfloat16's eight, float16 eleven
        torch.testing.assert_close(theirs, tensor.dequantize(), rtol=2**-11, atol=2**-11 * 4)
    else:
        assert torch.equal(theirs, tensor.dequantize())


def test_a_block_of_q4_0_by_hand() -> None:
    codes = torch.arange(32).remainder(16).sub(8).to(torch.int8).view(1, 32)
    tensor = QuantizedTensor(codes, torch.tensor([[-0.5]], dtype=torch.bfloat16), None, scheme_of("w4a16g32"))
    data = from_codes(tensor, TYPES["q4_0"])
    assert data.tolist() == [[0x00, 0xB8, *(code | code << 4 for code in range(16))]]  # float16 -0.5 is B800


def test_whole_numbers_of_fewer_bits_fit_a_wider_type() -> None:
    for scheme, name in (("w3a16g32", "q4_0"), ("w2a16g64", "q8_0"), ("w6a16g32", "q8_0"), ("w3a16g32-asym", "q5_1")):
        tensor = quantize(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)), scheme_of(scheme))
        assert type_of(tensor.scheme) is None and takes_codes(TYPES[name], tensor.scheme)
        torch.testing.assert_close(decode(from_codes(tensor, TYPES[name]), TYPES[name]), tensor.dequantize(), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "scheme",
    [
        "w4a16g16",
        "w4a16g48",
        "w3a16g32",
        "w6a16g32",
        "w8a16g32-asym",
        "nf4g64",
        "e2m1g32",
        "nvfp4",
        "w4a16g32-ic",
        "ternaryg256",
    ],
)
def test_other_grids_have_no_type(scheme: str) -> None:
    assert type_of(scheme_of(scheme)) is None


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("w4a16g32", "q4_1"), ("w4a16g32-asym", "q4_0"), ("w5a16g32", "q4_0"), ("w3a16g16", "q4_0"), ("w4a16g32", "mxfp4")]
    + [("w4a16g32", "q4_k"), ("nf4g32", "q4_0"), ("w4a16g32", "f16")],
)
def test_codes_of_another_grid_are_not_taken(scheme: str, name: str) -> None:
    assert not takes_codes(TYPES[name], scheme_of(scheme))


def test_scales_beyond_float16_are_refused() -> None:
    scheme = WeightScheme(bits=4, group=32, scale_dtype="float32")
    tensor = quantize(torch.randn(2, 32), scheme, Params(torch.full((2, 1, 1), 1e5), None))
    with pytest.raises(QtoolError, match=r"scales are beyond float16, up to 1\.0e\+05"):
        from_codes(tensor, TYPES["q4_0"])


def test_the_levels_of_mxfp4_stand_in_ggmls_order() -> None:
    assert [2 * level for level in LEVELS["e2m1"]] == list(quants._type_traits[GGMLQuantizationType.MXFP4].kvalues)
