"""HQQ's layout: words worked by hand, every code point back, and what it cannot read."""

import pytest
import torch

from qtool.errors import QtoolError
from qtool.formats.hqq_layouts import PARTS, pack_hqq, scheme_of_state, unpack_hqq
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize


def every_code(word: str) -> QuantizedTensor:
    """A tensor [8, 64] of a scheme, all of whose codes come up."""
    scheme = Scheme.model_validate(word).weights
    random = torch.Generator().manual_seed(0)
    tensor = quantize(torch.randn(8, 64, generator=random), scheme)
    codes = torch.arange(512) % scheme.grid.n_levels + scheme.grid.low
    return QuantizedTensor(codes.view(8, 64).to(tensor.codes.dtype), tensor.scale, tensor.zero, scheme)


@pytest.mark.parametrize("ending", ["", "-asym", "-asymf16"])
@pytest.mark.parametrize("size", ["w2a16g32", "w3a16g32", "w3a16", "w4a16g16", "w4a16", "w8a16g32"])
def test_every_code_comes_back(size: str, ending: str) -> None:
    tensor = every_code(size + ending)
    found = unpack_hqq(pack_hqq(tensor, torch.bfloat16))
    assert found.scheme == tensor.scheme and torch.equal(found.codes, tensor.codes) and torch.equal(found.scale, tensor.scale)
    assert found.codes.dtype == tensor.codes.dtype and torch.equal(found.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("ending", ["-asym", "-asymf16"])
def test_every_code_of_one_bit_comes_back(ending: str) -> None:
    tensor = every_code(f"w1a16g16{ending}")
    found = unpack_hqq(pack_hqq(tensor, torch.float32))
    assert torch.equal(found.codes, tensor.codes) and torch.equal(found.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(("bits", "per_word"), [(1, 8), (2, 4), (3, 10), (4, 2), (8, 1)])
def test_words_are_those_worked_code_by_code(bits: int, per_word: int) -> None:
    tensor = every_code(f"w{bits}a16g16-asym")  # 32 rows of 16
    W_q, rows = pack_hqq(tensor, torch.bfloat16)["W_q"], tensor.codes.view(32, 16).tolist()
    step = -(-32 // per_word)
    rows += [[0] * 16] * (step * per_word - 32)
    words = [
        [sum(rows[slab * step + r][c] << bits * (per_word - 1 - slab) for slab in range(per_word)) for c in range(16)]
        for r in range(step)
    ]
    assert W_q.tolist() == words and W_q.dtype == (torch.int32 if bits == 3 else torch.uint8)


def test_the_state_says_how_it_is_stored() -> None:
    parts = pack_hqq(every_code("w3a16g32"), torch.bfloat16)
    letters = {name: bytes(parts[name].tolist()).decode() for name in ("packing", "unpack_view_dtype", "compute_dtype")}
    assert letters == {"packing": "3bit_32", "unpack_view_dtype": "torch.int32", "compute_dtype": "torch.bfloat16"}
    numbers = {name: int(parts[name]) for name in ("nbits", "group_size", "axis", "encoded_state_dict", "view_as_float")}
    assert numbers == {"nbits": 3, "group_size": 32, "axis": 1, "encoded_state_dict": 1, "view_as_float": 0}
    assert parts["shape"].tolist() == [8, 64] and set(parts["zero"].flatten().tolist()) == {4.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_zero_points_of_any_dtype_are_kept(dtype: torch.dtype) -> None:
    parts = pack_hqq(every_code("w4a16g32-asymf16"), torch.float32)
    parts["zero"] = (parts["zero"].float() + 0.001).to(dtype)
    found = unpack_hqq(parts)
    assert found.zero is not None and torch.equal(found.zero.flatten(), parts["zero"].flatten())


@pytest.mark.parametrize("bits", [5, 6])
def test_codes_of_five_and_six_bits_are_read_from_bytes(bits: int) -> None:
    parts = pack_hqq(every_code("w8a16g32-asym"), torch.float32)
    parts |= {"nbits": torch.tensor(bits), "W_q": parts["W_q"] % 2**bits, "zero": parts["zero"] % 2**bits}
    found = unpack_hqq(parts)
    assert found.scheme.bits == bits and torch.equal(found.codes.flatten(), parts["W_q"].flatten())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nbits": torch.tensor(1.58)}, "codes of 1.58 bits cannot be read, 1, 2, 3, 4, 5, 6, 8 can"),
        ({"axis": torch.tensor(0)}, r"its groups do not lie along `in` \(axis 0\)"),
        ({"view_as_float": torch.tensor(1)}, "view_as_float cannot be read; quantize again without it"),
        ({"quant_zero": torch.tensor(1)}, "quant_zero cannot be read"),
        ({"packing": torch.tensor(list(b"8bit_u8"))}, "its packing is not 4bit_u8, which 4 bits have"),
        ({"scale": torch.ones(16, 1, dtype=torch.uint8)}, "scales of torch.uint8 and zero points of torch.float16 cannot be"),
        ({"scale": torch.ones(8, 2)}, r"scale is torch.float32 \[8, 2\], must be torch.float32 \[16, 1\]"),
        ({"W_q": torch.ones(8, 32)}, r"W_q is torch.float32 \[8, 32\], must be torch.uint8 \[8, 32\]"),
    ],
)
def test_what_it_cannot_decode_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(QtoolError, match=message):
        unpack_hqq(pack_hqq(every_code("w4a16g32-asymf16"), torch.float32) | change)


@pytest.mark.parametrize("name", ["scale", "zero", "nbits", "group_size", "shape", "W_q"])
def test_a_part_that_is_missing_is_named(name: str) -> None:
    parts = pack_hqq(every_code("w4a16g32"), torch.float32)
    assert set(PARTS) <= set(parts)
    del parts[name]
    with pytest.raises(QtoolError, match=f"{name} is missing"):
        unpack_hqq(parts)


def test_a_group_of_a_whole_row_is_read_as_one() -> None:
    assert str(scheme_of_state(pack_hqq(every_code("w4a16g64"), torch.float32))) == "w4"
