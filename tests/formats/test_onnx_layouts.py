"""ONNX's layouts: codes stand where the specifications say, the package onnx decodes them, and every code comes back."""

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from qtool.errors import QtoolError
from qtool.formats.onnx_layouts import CODES, SCALES, ZEROS, Layout, Part, form_of, pack, unpack
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize

SCHEMES = [f"w{bits}a16{group}{ending}" for bits in (2, 4, 8) for group in ("g16", "") for ending in ("", "-asym")]


def random_tensor(scheme: str, n_out: int = 6, n_in: int = 48) -> QuantizedTensor:
    W = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) + 0.3  # so that zero points differ from the middle
    return quantize(W, Scheme.model_validate(scheme).weights)


def hand_made(bits: int, codes: list[int], zero: list[int] | None) -> QuantizedTensor:
    """One row in groups of 16."""
    scheme = Scheme.model_validate(f"w{bits}a16g16{'' if zero is None else '-asym'}").weights
    groups = len(codes) // 16
    dtype = torch.int8 if zero is None else torch.uint8
    zeros = None if zero is None else torch.tensor([zero], dtype=torch.uint8)
    return QuantizedTensor(torch.tensor([codes], dtype=dtype), torch.ones(1, groups), zeros, scheme)


def test_codes_of_four_bits_stand_low_nibble_first_shifted_by_eight() -> None:
    parts = pack(hand_made(4, list(range(-8, 8)), None), "matmul_nbits")
    assert parts[CODES].data.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert parts[CODES].shape == (1, 1, 8) and parts[SCALES].shape == (1, 1) and ZEROS not in parts


def test_codes_of_two_bits_stand_lowest_first_shifted_by_two() -> None:
    parts = pack(hand_made(2, [-2, -1, 0, 1] * 4, None), "matmul_nbits")
    assert parts[CODES].data.tolist() == [[0b11100100] * 4]


def test_zero_points_of_a_row_are_padded_to_whole_bytes() -> None:
    parts = pack(hand_made(4, [0] * 48, [1, 2, 3]), "matmul_nbits")
    assert parts[ZEROS].data.tolist() == [[0x21, 0x03]] and parts[ZEROS].shape == (1, 2)


def test_qdq_packs_signed_nibbles_of_neighbouring_outputs() -> None:
    scheme = Scheme.model_validate("w4a16g16").weights
    codes = torch.tensor([[-8] * 16, [7] * 16], dtype=torch.int8)  # [out, in]
    parts = pack(QuantizedTensor(codes, torch.ones(2, 1), None, scheme), "qdq")
    assert parts[CODES].data.tolist() == [0x78] * 16
    assert (parts[CODES].kind, parts[CODES].shape, parts[SCALES].shape) == ("INT4", (16, 2), (1, 2))


@pytest.mark.parametrize("layout", ["matmul_nbits", "qdq"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_code_comes_back(scheme: str, layout: Layout) -> None:
    quantized = random_tensor(scheme, n_out=5)
    again = unpack(pack(quantized, layout), form_of(quantized.scheme, (5, 48), layout), quantized.scheme)
    assert torch.equal(again.codes, quantized.codes) and again.codes.dtype == quantized.codes.dtype
    assert torch.equal(again.scale, quantized.scale.float())
    assert (again.zero is None) == (quantized.zero is None)
    assert again.zero is None or torch.equal(again.zero, quantized.zero)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_package_decodes_qdq(scheme: str) -> None:
    quantized = random_tensor(scheme)
    group, kinds, helper = quantized.scheme.group, onnx.TensorProto, onnx.helper
    initializers = [
        kinds(name=name, data_type=kinds.DataType.Value(part.kind), dims=part.shape, raw_data=part.data.numpy().tobytes())
        for name, part in pack(quantized, "qdq").items()
    ]
    attributes = {"axis": 1} if group is None else {"axis": 0, "block_size": group}
    node = helper.make_node("DequantizeLinear", [part.name for part in initializers], ["W"], **attributes)
    output = helper.make_tensor_value_info("W", kinds.FLOAT, [48, 6])
    graph = helper.make_graph([node], "one", [], [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    (W,) = ReferenceEvaluator(model).run(None, {})
    assert torch.equal(torch.from_numpy(W).T, quantized.dequantize())


@pytest.mark.parametrize("layout", ["matmul_nbits", "qdq"])
def test_parts_of_another_shape_are_refused(layout: Layout) -> None:
    quantized = random_tensor("w4a16g16-asym")
    form, parts = form_of(quantized.scheme, (6, 48), layout), pack(quantized, layout)
    with pytest.raises(QtoolError, match=r"zero_points is missing, must be UINT\d \[.*\] for w4g16-asym; export it again"):
        unpack({name: part for name, part in parts.items() if name != ZEROS}, form, quantized.scheme)
    with pytest.raises(QtoolError, match=r"scales is FLOAT \[1\], must be FLOAT \[\d, \d\]"):
        unpack(parts | {SCALES: Part("FLOAT", (1,), torch.ones(1))}, form, quantized.scheme)
