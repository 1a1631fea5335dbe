"""bitsandbytes' layouts: bytes worked by hand, what its formulas give of them, codes and scales that come back."""

import json

import pytest
import torch

from qtool.errors import QtoolError
from qtool.formats.bnb_layouts import BLOCKS, Parts, pack_blocks, pack_rows, scheme_of_blocks, unpack_blocks, unpack_rows
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize

# By code: what bitsandbytes prints of its tables.
NF4 = (-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1)
FP4 = (0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25, 0, -0.0052, -0.6667, -1, -0.3333, -0.5, -0.1667, -0.25)


def weights_of(word: str) -> WeightScheme:
    return Scheme.model_validate(word).weights


def random_tensor(word: str, rows: int = 24, columns: int = 128) -> QuantizedTensor:
    return quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), weights_of(word))


def state_of(parts: Parts) -> dict[str, object]:
    (name,) = [name for name in parts if name.startswith("weight.quant_state.")]
    return json.loads(bytes(parts[name].tolist()))


def decode_by_loops(parts: Parts, table: tuple[float, ...]) -> list[float]:
    """The flat weights, one by one, as the formulas of bitsandbytes have them."""
    state, found = state_of(parts), []
    for place in range(2 * parts["weight"].numel()):
        byte, block = int(parts["weight"][place // 2, 0]), place // int(str(state["blocksize"]))
        absmax = float(parts["weight.absmax"][block])
        if "weight.nested_absmax" in parts:
            entry = float(parts["weight.nested_quant_map"][int(absmax)])
            absmax = entry * float(parts["weight.nested_absmax"][block // 256]) + float(str(state["nested_offset"]))
        found.append(absmax * table[byte >> 4 if place % 2 == 0 else byte & 15])
    return found


def test_the_first_of_two_codes_stands_in_the_high_bits_of_a_byte() -> None:
    codes = torch.tensor([[1, 2, 3, 4] + 28 * [0], [15, 14, 13, 12] + 28 * [7]], dtype=torch.uint8)
    parts = pack_blocks(QuantizedTensor(codes, torch.tensor([[0.5], [2.0]]), None, weights_of("nf4g32")), torch.bfloat16)
    assert parts["weight"].shape == (32, 1) and parts["weight"].dtype == torch.uint8
    assert parts["weight"].flatten().tolist() == [0x12, 0x34, *14 * [0x00], 0xFE, 0xDC, *14 * [0x77]]
    assert parts["weight.absmax"].tolist() == [0.5, 2.0] and parts["weight.absmax"].dtype == torch.float32
    text = '{"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [2, 32]}'
    assert bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()) == text.encode()
    assert parts["weight.quant_map"].tolist() == pytest.approx(NF4, abs=6e-5)
    assert parts.keys() == {"weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"}


def test_double_quantized_scales_are_a_table_of_whole_numbers_times_steps_and_a_mean() -> None:
    k = torch.tensor([[-1.0], [0.0], [127.0], [-127.0]])
    scale, second = 4 + 0.03125 * k, torch.tensor([4.0, 0.03125])
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    parts = pack_blocks(QuantizedTensor(codes, scale, None, weights_of("fp4_bnbg32-dq"), second=second), torch.float32)
    assert parts["weight.absmax"].tolist() == [127, 128, 255, 1] and parts["weight.absmax"].dtype == torch.uint8
    assert parts["weight.nested_absmax"].tolist() == [0.03125]
    assert parts["weight.nested_quant_map"].tolist() == [float(n) for n in range(-128, 128)]
    state = {"quant_type": "fp4", "blocksize": 32, "dtype": "float32", "shape": [4, 32]}
    assert state_of(parts) == state | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 4.0}
    assert parts["weight.quant_map"].tolist() == pytest.approx(FP4, abs=6e-5)


def test_rows_of_bytes_have_127_scales_each() -> None:
    codes = torch.tensor([[-128, 0, 127], [1, 2, 3]], dtype=torch.int8)
    parts = pack_rows(QuantizedTensor(codes, torch.tensor([[-0.5], [0.25]], dtype=torch.bfloat16), None, weights_of("w8a16")))
    assert parts["weight"].tolist() == codes.tolist() and parts["weight"].dtype == torch.int8
    assert parts["SCB"].tolist() == [-63.5, 31.75] and parts["SCB"].dtype == torch.float32
    assert parts["weight_format"].shape == () and int(parts["weight_format"]) == 0


@pytest.mark.parametrize("ending", ["", "-dq"])
@pytest.mark.parametrize(("format", "table"), [("nf4", NF4), ("fp4_bnb", FP4)])
def test_the_formulas_of_bitsandbytes_give_the_weights(format: str, table: tuple[float, ...], ending: str) -> None:
    tensor = random_tensor(f"{format}g32{ending}", rows=96)  # 384 blocks: more than one that scales share
    found = torch.tensor(decode_by_loops(pack_blocks(tensor, torch.float32), table)).view(96, 128)
    # The tables above have four digits.
    assert torch.allclose(found, tensor.dequantize(), rtol=0, atol=1e-4 * float(tensor.scale.max()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu"])
@pytest.mark.parametrize("format", ["nf4", "fp4_bnb"])
def test_blocks_come_back_to_the_bit_whatever_scales_were_stored_in(format: str, dtype: str) -> None:
    fields = {"weights": {"format": format, "group": 64, "scale_dtype": dtype}}
    tensor = quantize(torch.randn(24, 128), Scheme.model_validate(fields).weights)
    found = unpack_blocks(pack_blocks(tensor, torch.bfloat16))
    assert torch.equal(found.codes, tensor.codes) and found.codes.dtype == tensor.codes.dtype
    assert torch.equal(found.dequantize(), tensor.dequantize())
    assert found.scheme == WeightScheme(format=format, bits=4, group=64, scale_dtype="float32")


@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_double_quantized_blocks_come_back_to_the_bit(rows: int) -> None:
    tensor = random_tensor("nf4g64-dq", rows=rows)
    found = unpack_blocks(pack_blocks(tensor, torch.bfloat16))
    assert found.second is not None and tensor.second is not None
    assert torch.equal(found.second, tensor.second) and torch.equal(found.scale, tensor.scale)
    assert torch.equal(found.codes, tensor.codes) and found.scheme == tensor.scheme
    assert found.settled() is found


@pytest.mark.parametrize("group", BLOCKS)
def test_every_size_of_block_comes_back(group: int) -> None:
    tensor = random_tensor(f"nf4g{group}", rows=2, columns=4096)
    found = unpack_blocks(pack_blocks(tensor, torch.bfloat16))
    assert found.scheme.group == group and torch.equal(found.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_come_back_to_the_bit(dtype: str) -> None:
    tensor = quantize(torch.randn(64, 96), WeightScheme(bits=8, scale_dtype=dtype))
    assert bool((tensor.scale < 0).any()) and int(tensor.codes.min()) == -128
    found = unpack_rows(pack_rows(tensor))
    assert torch.equal(found.codes, tensor.codes) and torch.equal(found.scale, tensor.scale.float())
    assert found.scheme == WeightScheme(bits=8, scale_dtype="float32")


def test_scales_from_another_table_are_read_as_what_they_decode_to() -> None:
    parts = pack_blocks(random_tensor("nf4g32-dq", rows=96), torch.float32)
    parts["weight.nested_quant_map"] = torch.linspace(-1, 1, 256) ** 3
    parts["weight.nested_absmax"] = torch.tensor([0.1, 0.2])
    found = unpack_blocks(parts)
    assert found.second is None and str(found.scheme) == "nf4g32" and found.scheme.scale_dtype == "float32"
    expected = torch.tensor(decode_by_loops(parts, tuple(parts["weight.quant_map"].tolist()))).view(96, 128)
    assert torch.allclose(found.dequantize(), expected, rtol=1e-6, atol=0)  # float32 against float64


def changed(parts: Parts, **fields: object) -> Parts:
    name = next(name for name in parts if name.startswith("weight.quant_state."))
    text = json.dumps(state_of(parts) | fields).encode()
    return parts | {name: torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocksize": 16}, "blocks of 16 cannot be read, 32, 64, .* can"),
        ({"shape": [128, 96], "blocksize": 64}, r"blocks of 64 run from row to row of a matrix \[128, 96\].*; quantize again"),
        ({"shape": [8, 4, 64]}, "run from row to row"),
        ({"shape": [64, 192]}, r"weight is torch.uint8 \[1536, 1\], must be 6144 numbers of torch.uint8"),
        ({"shape": None}, "is no JSON of a quantized weight"),
        ({"shape": ["many", 64]}, "which is no state of its kind"),
        ({"blocksize": "64"}, "which is no state of its kind"),
        ({"quant_type": "fp4"}, "which is no state of its kind"),
        ({"nested_blocksize": 128}, "quantized in blocks of 128 around .*, must be 256"),
    ],
)
def test_a_state_that_cannot_be_decoded_is_refused(fields: dict[str, object], message: str) -> None:
    parts = changed(pack_blocks(random_tensor("nf4g64-dq"), torch.float32), **fields)
    with pytest.raises(QtoolError, match=message):
        unpack_blocks(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight.absmax": torch.ones(48)}, r"weight.absmax is torch.float32 \[48\], must be 48 numbers of torch.uint8"),
        ({"weight.nested_absmax": torch.ones(2)}, "weight.nested_absmax is .*, must be 1 numbers of torch.float32"),
        ({"weight.nested_quant_map": torch.ones(16)}, "weight.nested_quant_map is .*, must be 256 numbers"),
        ({"weight.quant_map": torch.tensor(FP4)}, "weight.quant_map is not the table of nf4, which kernels decode by"),
        ({"weight": torch.ones(1536, 1)}, "weight is torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_the_state_are_refused(change: Parts, message: str) -> None:
    with pytest.raises(QtoolError, match=message):
        unpack_blocks(pack_blocks(random_tensor("nf4g64-dq"), torch.float32) | change)


def test_a_tensor_that_is_missing_is_named() -> None:
    parts = pack_blocks(random_tensor("nf4g64"), torch.float32)
    del parts["weight.absmax"]
    with pytest.raises(QtoolError, match="weight.absmax is missing, must be 48 numbers of torch.float32"):
        unpack_blocks(parts)


def test_a_state_that_is_no_json_is_refused() -> None:
    with pytest.raises(QtoolError, match="is no JSON of a quantized weight"):
        scheme_of_blocks({"weight.quant_state.bitsandbytes__fp4": torch.full((8,), 255, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(24, 128)}, r"weight is torch.float32 \[24, 128\], must be 3072 numbers of torch.int8"),
        ({"weight": torch.ones(24, dtype=torch.int8)}, r"its weight is torch.int8 \[24\], must be torch.int8 \[out, in\]"),
        ({"SCB": torch.ones(23)}, r"SCB is torch.float32 \[23\], must be 24 numbers of torch.float32"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, r"its weight_format is that of an old kernel, 0 \(by rows\)"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(change: Parts, message: str) -> None:
    with pytest.raises(QtoolError, match=message):
        unpack_rows(pack_rows(random_tensor("w8a16")) | change)
