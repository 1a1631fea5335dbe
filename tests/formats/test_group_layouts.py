"""GPTQ's and AWQ's layouts: every word is what a loop over single bits makes of the codes, and codes come back from it."""

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.group_layouts import GPTQ_BITS, ORDER, awq_is_symmetric, pack_awq, pack_gptq, unpack_awq, unpack_gptq
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize

OUT, IN, GROUP = 64, 96, 32


def random_tensor(bits: int, symmetric: bool, group: int | None = GROUP, rows: int = OUT, columns: int = IN) -> QuantizedTensor:
    """Codes from end to end, zero points too, and scales of both signs."""
    scheme = WeightScheme(bits=bits, group=group, symmetric=symmetric)
    generator = torch.Generator().manual_seed(bits)
    W = torch.randn(rows, columns, generator=generator) + (0 if symmetric else torch.randn(rows, 1, generator=generator))
    tensor = quantize(W, scheme)
    assert symmetric == bool((tensor.scale < 0).any())
    return tensor


def unsigned(tensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and zero points [out, groups] from 0."""
    middle = 1 << (tensor.scheme.bits - 1)
    if tensor.zero is None:
        return tensor.codes.int() + middle, torch.full(tensor.scale.shape, middle)
    return tensor.codes.int(), tensor.zero.int()


def words_of(codes: list[int], bits: int) -> list[int]:
    """int32 words that hold the codes one after the other, set bit by bit."""
    words = [0] * (len(codes) * bits // 32)
    for place, code in enumerate(codes):
        for bit in range(bits):
            if code >> bit & 1:
                words[(place * bits + bit) // 32] |= 1 << (place * bits + bit) % 32
    return [word - (1 << 32) if word >> 31 else word for word in words]


def same(ours: QuantizedTensor, theirs: QuantizedTensor) -> bool:
    zeros = (ours.zero is None and theirs.zero is None) or torch.equal(ours.zero, theirs.zero)
    dtypes = ours.codes.dtype == theirs.codes.dtype
    return zeros and dtypes and torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale.float(), theirs.scale.float())


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_gptq_words_are_those_of_a_loop_over_bits(bits: int, symmetric: bool, is_v2: bool) -> None:
    tensor = random_tensor(bits, symmetric)
    if not (symmetric or is_v2):
        tensor.zero.clamp_(min=1)
    parts, (codes, zero) = pack_gptq(tensor, is_v2), unsigned(tensor)
    assert parts["qweight"].shape == (IN * bits // 32, OUT) and parts["qzeros"].shape == (IN // GROUP, OUT * bits // 32)
    for o in range(OUT):
        assert parts["qweight"][:, o].tolist() == words_of(codes[o].tolist(), bits)
    for g in range(IN // GROUP):
        assert parts["qzeros"][g].tolist() == words_of((zero[:, g] - (0 if is_v2 else 1)).tolist(), bits)
    assert parts["scales"].dtype == torch.float16 and torch.equal(parts["scales"].T.float(), tensor.scale.float())
    assert parts["g_idx"].dtype == torch.int32 and parts["g_idx"].tolist() == [i // GROUP for i in range(IN)]


def test_gptq_lays_codes_along_the_inputs_lowest_bits_first() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[1, :8] = torch.arange(1, 9)  # the second output's first eight inputs
    tensor = QuantizedTensor(codes, torch.ones(32, 1), codes[:, :1], WeightScheme(bits=4, symmetric=False))
    assert pack_gptq(tensor, is_v2=True)["qweight"][0, 1] == 0x87654321 - (1 << 32)


def test_three_bits_cross_two_borders_in_every_three_words() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21], codes[0, 31] = 0b101, 0b011, 0b110  # bits 30..32, 63..65, 93..95
    tensor = QuantizedTensor(codes, torch.ones(32, 1), codes[:, :1], WeightScheme(bits=3, symmetric=False))
    words = [word & 0xFFFFFFFF for word in pack_gptq(tensor, is_v2=True)["qweight"][:, 0].tolist()]
    assert words == [0b01 << 30, 0b1 | 1 << 31, 0b01 | 0b110 << 29]


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_words_are_those_of_a_loop_over_nibbles(symmetric: bool) -> None:
    tensor = random_tensor(4, symmetric)
    parts, (codes, zero) = pack_awq(tensor), unsigned(tensor)
    assert parts["qweight"].shape == (IN, OUT // 8) and parts["qzeros"].shape == (IN // GROUP, OUT // 8)
    for found, values in ((parts["qweight"], codes.T), (parts["qzeros"], zero.T)):
        for row, words in zip(values.tolist(), found.tolist(), strict=True):
            ordered = [row[8 * word + output] for word in range(OUT // 8) for output in (0, 2, 4, 6, 1, 3, 5, 7)]
            assert words == words_of(ordered, 4)


def test_awq_gives_the_even_outputs_the_lower_half_of_a_word() -> None:
    codes = (torch.arange(8, dtype=torch.uint8) + 8).unsqueeze(1).expand(8, 32)  # output o has the code 8 + o
    tensor = QuantizedTensor(codes, torch.ones(8, 1), codes[:, :1] - 8, WeightScheme(bits=4, symmetric=False))
    parts = pack_awq(tensor)
    assert set(parts["qweight"].flatten().tolist()) == {0xFDB9ECA8 - (1 << 32)} and parts["qzeros"].tolist() == [[0x75316420]]


@pytest.mark.parametrize("shape", [(64, 96), (32, 32), (160, 224)])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_codes_come_back_from_either_layout(bits: int, symmetric: bool, group: int | None, shape: tuple[int, int]) -> None:
    tensor = random_tensor(bits, symmetric, group, *shape)
    assert same(unpack_gptq(pack_gptq(tensor, is_v2=True), tensor.scheme, is_v2=True), tensor)
    if symmetric:
        assert same(unpack_gptq(pack_gptq(tensor, is_v2=False), tensor.scheme, is_v2=False), tensor)
    if bits == 4:
        parts = pack_awq(tensor)
        assert same(unpack_awq(parts, tensor.scheme), tensor) and awq_is_symmetric(parts["qzeros"]) == symmetric


@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_every_zero_point_comes_back_from_gptq_v2_and_all_but_0_from_gptq(bits: int) -> None:
    zero = (torch.arange(256) % (1 << bits)).to(torch.uint8).unsqueeze(1)  # [out, groups]
    tensor = QuantizedTensor(zero.expand(256, 32), torch.ones(256, 1), zero, WeightScheme(bits=bits, symmetric=False))
    assert same(unpack_gptq(pack_gptq(tensor, is_v2=True), tensor.scheme, is_v2=True), tensor)
    with pytest.raises(AssertionError, match="zero points of 0"):
        pack_gptq(tensor, is_v2=False)
    tensor.zero.clamp_(min=1)
    parts = pack_gptq(tensor, is_v2=False)
    assert same(unpack_gptq(parts, tensor.scheme, is_v2=False), tensor)
    parts["qzeros"][0, 0] = -1
    with pytest.raises(QtoolError, match="a zero point of 0, which checkpoint format gptq cannot tell from others"):
        unpack_gptq(parts, tensor.scheme, is_v2=False)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ones_taken_from_whole_words_come_back_to_every_zero_point(bits: int) -> None:
    tensor = random_tensor(bits, False)
    tensor.zero[::3] = 0
    parts = pack_gptq(tensor, is_v2=True)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    less = [[(word - ones) % (1 << 32) for word in row] for row in parts["qzeros"].tolist()]
    signed = [[word - (1 << 32) if word >> 31 else word for word in row] for row in less]
    parts["qzeros"] = torch.tensor(signed, dtype=torch.int32)
    assert same(unpack_gptq(parts, tensor.scheme, is_v2=False, borrows=True), tensor)
    with pytest.raises(QtoolError, match="a zero point of 0"):
        unpack_gptq(parts, tensor.scheme, is_v2=False)


def test_groups_of_others_than_neighbours_are_refused_and_may_be_left_unsaid() -> None:
    tensor = random_tensor(4, True)
    parts = pack_gptq(tensor, is_v2=False)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0))
    with pytest.raises(QtoolError, match=r"g_idx orders columns .*\(desc_act\), .*desc_act: false"):
        unpack_gptq(parts | {"g_idx": parts["g_idx"][order]}, tensor.scheme, is_v2=False)
    del parts["g_idx"]
    assert same(unpack_gptq(parts, tensor.scheme, is_v2=False), tensor)


@pytest.mark.parametrize(
    ("layout", "wrong", "message"),
    [
        ("gptq", {"bits": 8}, r"qzeros is torch.int32 \[3, 8\], must be torch.int32 \[3, 16\] for w8g32"),
        ("gptq", {"bits": 3}, r"q(weight|zeros) is .* for w3g32"),
        ("gptq", {"group": 16}, "3 groups of scales do not belong to 96 columns of w4g16"),
        ("gptq", {"group": None}, "3 groups of scales do not belong to 96 columns of w4"),
        ("awq", {"group": 96}, "3 groups of scales do not belong to 96 columns of w4g96"),
    ],
)
def test_a_scheme_that_the_file_contradicts_is_refused(layout: str, wrong: dict[str, object], message: str) -> None:
    tensor = random_tensor(4, True)
    scheme = tensor.scheme.model_copy(update=wrong)
    with pytest.raises(QtoolError, match=message):
        if layout == "gptq":
            unpack_gptq(pack_gptq(tensor, is_v2=False), scheme, is_v2=False)
        else:
            unpack_awq(pack_awq(tensor), scheme)


def test_one_layout_is_not_taken_for_the_other() -> None:
    tensor = random_tensor(4, True)
    with pytest.raises(QtoolError, match="qweight is .* must be"):
        unpack_awq(pack_gptq(tensor, is_v2=True), tensor.scheme)
    with pytest.raises(QtoolError, match="qweight is .* must be"):
        unpack_gptq(pack_awq(tensor), tensor.scheme, is_v2=True)
    with pytest.raises(QtoolError, match="zero points other than 8 contradict its symmetric scheme"):
        unpack_gptq(pack_gptq(tensor, is_v2=True), tensor.scheme, is_v2=False)  # the zeros, one too high
    assert sorted(ORDER) == list(range(8))


def test_scales_beyond_float16_are_refused() -> None:
    tensor = random_tensor(4, True)
    tensor.scale[0, 0] = 1e5
    for pack in (lambda: pack_awq(tensor), lambda: pack_gptq(tensor, is_v2=False)):
        with pytest.raises(QtoolError, match=r"a scale of 9.98e\+04 is beyond float16, .*; use export/compressed_tensors"):
            pack()


def test_what_stands_beside_codes_and_scales_is_an_assertion() -> None:
    tensor = quantize(
        torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), WeightScheme(bits=4, group_along="in_channel")
    )
    with pytest.raises(AssertionError, match="does not go into this layout"):
        pack_gptq(tensor, is_v2=True)
