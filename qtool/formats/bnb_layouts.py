"""bitsandbytes' layouts of one quantized linear, written and read: NF4 and FP4 by blocks, int8 by rows.

Four bits:  w^ = absmax[b] level[code],  b = (in o + i) // blocksize, blocks of the flat matrix; rows hold whole ones here
    weight [out in / 2, 1] uint8, two codes a byte, the first in the high bits    weight.quant_map [16] float32, the levels
    weight.absmax [blocks] float32
    weight.quant_state.bitsandbytes__nf4 (or __fp4) [bytes] uint8, JSON of quant_type, blocksize, dtype, shape (out, in)
Double quantization:  absmax[b] = nested_quant_map[c[b]] nested_absmax[b // 256] + nested_offset
    weight.absmax [blocks] uint8 is c    weight.nested_quant_map [256], weight.nested_absmax [blocks / 256] float32
    nested_blocksize, nested_dtype and nested_offset stand in the JSON too
Eight bits:  w^[o, i] = code[o, i] SCB[o] / 127
    weight [out, in] int8    SCB [out] float32    weight_format [] uint8, 0: by rows
The largest level of both tables is 1, so that absmax is what qtool calls scale.
Why nested_quant_map holds whole numbers when written: scales that are quantized themselves are mean + step k here (see
scales.py), where bitsandbytes rounds to a table of 8-bit floats; but it reads the table from the file. With k from -128 to 127
for a table, the steps for nested_absmax and the mean for nested_offset it computes the same scales, to the bit. Scales from
another table are read as what they decode to, in float32.
Source: bitsandbytes 0.50, functional.py (QuantState), nn/modules.py (Linear8bitLt) and backends/default/ops.py.
"""

import json
from typing import Any

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.codebook import LEVELS
from qtool.formats.scales import BLOCK, scale_codes, single_scale
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import QuantizedTensor

TYPES = {"nf4": "nf4", "fp4_bnb": "fp4"}  # format: bitsandbytes' quant_type
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "weight.quant_state.bitsandbytes__"  # and the quant_type
STATES = tuple(STATE + kind for kind in TYPES.values())
NESTED_MAP = "weight.nested_quant_map"
BLOCK_PARTS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", NESTED_MAP, *STATES)
ROW_PARTS = ("weight", "SCB", "weight_format")
Parts = dict[str, Tensor]


def pack_blocks(quantized: QuantizedTensor, dtype: torch.dtype) -> Parts:
    """The tensors of one linear in four bits, by the names of `BLOCK_PARTS`; dtype: what bitsandbytes is to decode to."""
    assert quantized.zero is None and quantized.column_scale is None and quantized.salient is None
    assert quantized.outliers is None, "what stands beside codes and scales does not go into this layout"
    scheme, codes = quantized.scheme, quantized.codes.flatten()  # [out in]
    kind = TYPES[scheme.format]
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": scheme.group,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(quantized.shape),
    }
    parts = {
        "weight": (codes[::2] << 4 | codes[1::2]).unsqueeze(1),  # [out in / 2, 1]
        "weight.absmax": quantized.params().scale.flatten(),  # [blocks]
        "weight.quant_map": _levels(scheme.format),  # [16]
    }
    if quantized.second is not None:
        c = scale_codes(quantized.scale, quantized.second).flatten().int() + 128  # [blocks]
        mean, steps = quantized.second[0], quantized.second[1:]
        parts |= {
            "weight.absmax": c.to(torch.uint8),  # [blocks]
            "weight.nested_absmax": steps.float(),  # [blocks / 256]
            NESTED_MAP: _whole_numbers(),  # [256]
        }
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": float(mean)}
    parts[STATE + kind] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)  # [bytes]
    return parts


def scheme_of_blocks(parts: Parts) -> WeightScheme:
    """The scheme that a linear's state tells; raises QtoolError for what qtool cannot decode. Reads no weights."""
    state = _read_state(parts)
    if state["blocksize"] not in BLOCKS:
        raise QtoolError(f"blocks of {state['blocksize']} cannot be read, {', '.join(map(str, BLOCKS))} can")
    columns = state["shape"][-1]
    if len(state["shape"]) != 2 or columns % state["blocksize"]:
        raise QtoolError(
            f"its blocks of {state['blocksize']} run from row to row of a matrix {state['shape']}, blocks within rows can be "
            "read; quantize again with a size that divides the columns"
        )
    found = next(format for format, kind in TYPES.items() if kind == state["quant_type"])
    return WeightScheme.model_validate(
        {
            "format": found,
            "group": state["blocksize"],
            "scale_dtype": "float32",
            "double_quant": NESTED_MAP in parts and torch.equal(parts[NESTED_MAP].cpu(), _whole_numbers()),
        }
    )


def unpack_blocks(parts: Parts) -> QuantizedTensor:
    """The linear of four bits that these parts hold; raises QtoolError where they do not fit each other."""
    scheme, state = scheme_of_blocks(parts), _read_state(parts)
    (rows, columns), group = state["shape"], state["blocksize"]
    blocks, is_nested = rows * columns // group, NESTED_MAP in parts
    weight = _expect(parts, "weight", torch.uint8, rows * columns // 2)
    absmax = _expect(parts, "weight.absmax", torch.uint8 if is_nested else torch.float32, blocks)
    levels = _expect(parts, "weight.quant_map", torch.float32, 16)
    if not torch.allclose(levels, _levels(scheme.format).to(levels.device), rtol=0, atol=1e-6):
        raise QtoolError(f"weight.quant_map is not the table of {state['quant_type']}, which kernels decode by; save it again")
    codes = torch.stack([weight >> 4, weight & 15], dim=1).view(rows, columns)  # [out, in]
    if not is_nested:
        return QuantizedTensor(codes, absmax.view(rows, -1), None, scheme)
    if state.get("nested_blocksize") != BLOCK or "nested_offset" not in state:
        raise QtoolError(
            f"its scales are quantized in blocks of {state.get('nested_blocksize')} around {state.get('nested_offset')}, must "
            f"be {BLOCK} around a number; save it again"
        )
    steps = _expect(parts, "weight.nested_absmax", torch.float32, -(-blocks // BLOCK))
    table = _expect(parts, NESTED_MAP, torch.float32, 256)
    second = torch.cat([torch.tensor([state["nested_offset"]], device=steps.device), steps])  # [1 + blocks / 256]
    scale = single_scale(table[absmax.int()], second).view(rows, -1)  # [out, groups]
    return QuantizedTensor(codes, scale, None, scheme, second=second if scheme.double_quant else None)


def pack_rows(quantized: QuantizedTensor) -> Parts:
    """The tensors of one linear in eight bits, by the names of `ROW_PARTS`."""
    assert quantized.is_plain and quantized.zero is None and quantized.scale.shape[1] == 1
    return {
        "weight": quantized.codes,  # [out, in]
        "SCB": quantized.params().scale.flatten() * 127,  # [out]
        "weight_format": torch.tensor(0, dtype=torch.uint8),  # []
    }


def unpack_rows(parts: Parts) -> QuantizedTensor:
    """The linear of eight bits that these parts hold; raises QtoolError where they do not fit each other."""
    weight = parts.get("weight")
    if weight is None or weight.ndim != 2:
        raise QtoolError(f"its weight is {_words(weight)}, must be torch.int8 [out, in] beside SCB; save it again")
    _expect(parts, "weight", torch.int8, weight.numel())
    SCB = _expect(parts, "SCB", torch.float32, len(weight))
    if int(parts.get("weight_format", torch.tensor(0))):
        raise QtoolError("its weight_format is that of an old kernel, 0 (by rows) can be read; save it again")
    scheme = WeightScheme(bits=8, scale_dtype="float32")
    return QuantizedTensor(weight, (SCB / 127).unsqueeze(1), None, scheme)


def _read_state(parts: Parts) -> dict[str, Any]:
    """The JSON of a linear in four bits, checked to say what all of them do."""
    name = next(name for name in STATES if name in parts)
    try:
        state: dict[str, Any] = json.loads(bytes(parts[name].tolist()))
        right = state["quant_type"] == name.removeprefix(STATE) and all(isinstance(size, int) for size in state["shape"])
        right &= isinstance(state["blocksize"], int)
    except (ValueError, KeyError, TypeError) as error:
        raise QtoolError(f"{name} is no JSON of a quantized weight ({error!r}); download it again") from error
    if not right:
        raise QtoolError(f"{name} says {state}, which is no state of its kind; save it again")
    return state


def _levels(format: str) -> Tensor:
    return torch.tensor(LEVELS[format]) + 0.0  # no negative zeros


def _whole_numbers() -> Tensor:
    return torch.arange(-128.0, 128.0)


def _expect(parts: Parts, name: str, dtype: torch.dtype, count: int) -> Tensor:
    """The part, flat but for matrices; raises QtoolError where it is not this many numbers of this dtype."""
    tensor = parts.get(name)
    if tensor is None or tensor.dtype != dtype or tensor.numel() != count:
        raise QtoolError(f"{name} is {_words(tensor)}, must be {count} numbers of {dtype}; its other tensors ask for that")
    return tensor.flatten()


def _words(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
