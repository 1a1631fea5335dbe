"""HQQ's layout of one quantized linear, written and read: what HQQLinear's state holds, for safetensors.

    w^[o, i] = scale[g] (code[o, i] - zero[g]),  g = (in o + i) // group,  groups along `in` (axis 1), rows of whole groups
    W_q [words, group] uint8, int32 for three bits    scale, zero [out groups, 1] floats
    nbits, group_size, axis [] int32    shape [2] int64, (out, in)    packing, compute_dtype ... [letters] uint8
The matrix [out groups, group] of codes is cut into as many slabs of rows as a word holds codes: 8 / b, or ten of three bits;
word r of a column holds row r of each slab, the first slab's in its highest bits. At three bits rows of zeros make up the
last slab; the other widths need a number of rows that divides. A code of five or six bits takes a byte.
Symmetric codes -2^(b-1) .. 2^(b-1) - 1 are stored plus 2^(b-1), which then is every zero point; scales may be negative.
The layout does not say what zero points were: all 2^(b-1) are read as a symmetric scheme's, else whole numbers among the codes
as codes, else as floats, in the dtype that they are stored in. A group of a whole row is read as one.
Source: hqq 0.2.8, core/quantize.py (HQQLinear.state_dict and load_state_dict), core/bitpack.py and core/utils.py.
"""

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import QuantizedTensor

PACKINGS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
CODES_OF_WORD = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}
FACTS = ("nbits", "group_size", "shape", "axis", "packing", "view_as_float", "quant_scale", "quant_zero")
SCHEME_PARTS = ("scale", "zero", *FACTS)
PARTS = ("W_q", *SCHEME_PARTS)
Parts = dict[str, Tensor]


def pack_hqq(quantized: QuantizedTensor, dtype: torch.dtype) -> Parts:
    """All of HQQLinear's state but a bias, by the names in it; dtype: what hqq is to compute in."""
    assert quantized.is_plain, "what stands beside codes, scales and zero points does not go into this layout"
    bits, low, (rows, columns) = quantized.scheme.bits, quantized.grid.low, quantized.shape
    group = quantized.scheme.group or columns
    zero = torch.full(quantized.scale.shape, -low) if quantized.zero is None else quantized.zero
    codes = quantized.codes.int() - low  # [out, in]
    return {
        "W_q": _pack(codes.reshape(-1, group), bits),  # [words, group]
        "scale": quantized.scale.reshape(-1, 1),  # [out groups, 1]
        "zero": (zero if zero.is_floating_point() else zero.half()).reshape(-1, 1),  # [out groups, 1]
        "shape": torch.tensor([rows, columns]),
        "packing": _letters(PACKINGS[bits]),
        "unpack_view_dtype": _letters("torch.int32" if bits == 3 else "torch.uint8"),
        "compute_dtype": _letters(str(dtype)),
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers_of(bits, group).items()},
        **{name: torch.tensor(value, dtype=torch.uint8) for name, value in flags_of(quantized.scheme).items()},
    }


def numbers_of(bits: int, group: int | None) -> dict[str, int | None]:
    """What hqq's configuration says in numbers."""
    return {"nbits": bits, "group_size": group, "axis": 1}


def flags_of(scheme: WeightScheme) -> dict[str, bool]:
    """What HQQLinear's state says in truths; of the last ones, nothing decodes by them."""
    return {
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": scheme.zero_dtype == "int",
    }


def scheme_of_state(parts: Parts) -> WeightScheme:
    """The scheme that a linear's parts but W_q tell; raises QtoolError for what qtool cannot decode."""
    missing = [name for name in ("scale", "zero", "nbits", "group_size", "shape") if name not in parts]
    if missing:
        raise QtoolError(f"{missing[0]} is missing beside scale or W_q; is it the state of an HQQLinear?")
    bits, group, columns = float(parts["nbits"]), int(parts["group_size"]), int(parts["shape"][-1])
    if bits not in PACKINGS:
        raise QtoolError(f"codes of {bits:g} bits cannot be read, {', '.join(map(str, sorted(PACKINGS)))} can")
    if int(parts.get("axis", torch.tensor(0))) != 1:
        raise QtoolError("its groups do not lie along `in` (axis 0), those of axis 1 can be read; quantize again with axis=1")
    for flag in ("view_as_float", "quant_scale", "quant_zero"):
        if bool(parts.get(flag, torch.tensor(False))):
            raise QtoolError(f"{flag} cannot be read; quantize again without it")
    packing = PACKINGS[int(bits)]
    if "packing" in parts and bytes(parts["packing"].tolist()).decode("ascii", "replace") != packing:
        raise QtoolError(f"its packing is not {packing}, which {bits:g} bits have; save it again")
    scale, zero = parts["scale"], parts["zero"]
    if scale.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not zero.is_floating_point():
        raise QtoolError(f"scales of {scale.dtype} and zero points of {zero.dtype} cannot be read, floats can")
    middle, is_whole = float(1 << (int(bits) - 1)), bool((zero == zero.round()).all())
    is_code = is_whole and bool(((zero >= 0) & (zero < 2 * middle)).all())
    symmetric = int(bits) > 1 and bool((zero == middle).all())
    return WeightScheme.model_validate(
        {
            "bits": int(bits),
            "group": None if group == columns else group,
            "symmetric": symmetric,
            "zero_dtype": "int" if is_code else "float16",
            "scale_dtype": str(scale.dtype).removeprefix("torch."),
        }
    )


def unpack_hqq(parts: Parts) -> QuantizedTensor:
    """The linear that these parts hold; raises QtoolError where they do not fit each other."""
    scheme = scheme_of_state(parts)
    rows, columns = parts["shape"].tolist()
    group = scheme.group or columns
    n_groups, n_words = rows * columns // group, -(-rows * columns // (group * CODES_OF_WORD[scheme.bits]))
    _expect(parts, "W_q", torch.int32 if scheme.bits == 3 else torch.uint8, (n_words, group))
    _expect(parts, "scale", parts["scale"].dtype, (n_groups, 1))
    _expect(parts, "zero", parts["zero"].dtype, (n_groups, 1))
    codes = _unpack(parts["W_q"], scheme.bits)[:n_groups].reshape(rows, columns)  # [out, in]
    scale, zero = parts["scale"].view(rows, -1), parts["zero"].view(rows, -1)  # [out, groups]
    if scheme.symmetric:
        return QuantizedTensor((codes + scheme.grid.low).to(torch.int8), scale, None, scheme)
    return QuantizedTensor(codes.to(torch.uint8), scale, zero.to(torch.uint8) if scheme.zero_dtype == "int" else zero, scheme)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Words of codes [rows, group], int32."""
    n_codes = CODES_OF_WORD[bits]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % n_codes))
    slabs = padded.view(n_codes, -1, codes.shape[1])  # [codes of a word, words, group]
    words = torch.zeros_like(slabs[0])
    for slab in slabs:
        words = words << bits | slab
    return words if bits == 3 else words.to(torch.uint8)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Codes [rows, group], int32, of words [words, group], with the rows that fill the last slab."""
    shifts = [bits * place for place in reversed(range(CODES_OF_WORD[bits]))]
    return torch.cat([words.int() >> shift & ((1 << bits) - 1) for shift in shifts])


def _letters(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _expect(parts: Parts, name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    tensor = parts.get(name)
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        words = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise QtoolError(f"{name} is {words}, must be {dtype} {list(shape)} beside what its other tensors say; save it again")
