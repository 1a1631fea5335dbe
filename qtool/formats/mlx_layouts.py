"""MLX's layouts of one quantized linear, written and read: codes in words along `in`, by groups along `in`.

    affine           w^[o, i] = scales[o, g] code[o, i] + biases[o, g],  g = i // group      codes of b bits, 0 .. 2^b - 1
    mxfp4, mxfp8     w^[o, i] = scales[o, g] level[code[o, i]]     E2M1 or E4M3 in groups of 32, scales powers of two (E8M0)
    nvfp4            the same of E2M1 in groups of 16, scales E4M3
    weight [out, in b / 32] uint32    scales, biases [out, groups], floats; scales of the last three uint8, their bits
Code i of a row stands at bits i b .. i b + b - 1 of its words, also across words (see packing.py). b is 1, 2, 3, 4, 5, 6, 8.
A zero point goes in as biases = -scale zero: where it is 2^(b-1), as of symmetric codes, stored plus that, the product is exact
in every dtype; others lose in 16 bits, and are exact in float32. It comes back as -biases / scales: 2^(b-1) throughout as a
symmetric scheme, whole numbers whose products are the biases to the bit as codes, else as float32 numbers.
Source: MLX 0.32, https://ml-explore.github.io/mlx, mlx.core.quantize and dequantize; mlx/backend/cpu/quantized.cpp.
"""

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.packing import n_words, pack_int32, unpack_int32
from qtool.formats.scales import SCALE_DTYPES
from qtool.formats.scheme import PRESETS, WeightScheme
from qtool.formats.tensor import QuantizedTensor

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
MODES = {"mxfp4": "mxfp4", "mxfp8": "mxfp8_e4m3", "nvfp4": "nvfp4"}  # mode: what qtool calls the scheme
AFFINE = f"{', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUPS))}"
Parts = dict[str, Tensor]


def pack_mlx(quantized: QuantizedTensor, dtype: torch.dtype) -> Parts:
    """weight, scales and, of whole numbers, biases; scales and biases in dtype. Raises QtoolError for what is beyond it."""
    assert quantized.is_plain and quantized.of_tensor == 1.0, "what stands beside codes, scales and zero points is not held"
    bits, low = quantized.scheme.bits, quantized.grid.low
    words = pack_int32(quantized.codes.int() - low, bits).view(torch.uint32)  # [out, in b / 32]
    if quantized.scheme.format != "int":
        return {"weight": words, "scales": quantized.scale.view(torch.uint8)}  # [out, groups]
    scale = quantized.scale.float()  # [out, groups]
    biases = scale * low if quantized.zero is None else -scale * quantized.zero.float()
    parts = {"weight": words, "scales": scale.to(dtype), "biases": biases.to(dtype)}
    if not all(bool(part.isfinite().all()) for part in (parts["scales"], parts["biases"])):
        raise QtoolError(
            f"a scale of {float(scale.abs().max()):.3g} or its product with a zero point is beyond {dtype}; use dtype: float32"
        )
    return parts


def unpack_mlx(parts: Parts, group: int, bits: int, mode: str) -> QuantizedTensor:
    """The linear that these parts hold; raises QtoolError where they do not fit each other, or the mode."""
    scheme = scheme_of_parts(parts, group, bits, mode)
    words, (rows, groups) = parts.get("weight"), parts["scales"].shape
    columns = groups * group
    if words is None or words.dtype != torch.uint32 or tuple(words.shape) != (rows, n_words(columns, bits)):
        found = "missing" if words is None else f"{words.dtype} {list(words.shape)}"
        expected = [rows, n_words(columns, bits)]
        raise QtoolError(
            f"weight is {found}, must be torch.uint32 {expected} for {bits} bits in groups of {group} with scales "
            f"{[rows, groups]}; config.json does not describe this file"
        )
    codes = unpack_int32(words.view(torch.int32), bits, columns)  # [out, in]
    if mode != "affine":
        return QuantizedTensor(codes.to(torch.uint8), parts["scales"].view(SCALE_DTYPES[scheme.scale_dtype]), None, scheme)
    if scheme.symmetric:
        return QuantizedTensor((codes + scheme.grid.low).to(torch.int8), parts["scales"], None, scheme)
    zero = _zero_points(parts)
    whole = zero.to(torch.uint8) if scheme.zero_dtype == "int" else zero
    return QuantizedTensor(codes.to(torch.uint8), parts["scales"], whole, scheme)


def decode_mlx(parts: Parts, group: int, bits: int, mode: str) -> Tensor:
    """The weights [out, in], float32, by the layout's own formula."""
    quantized = unpack_mlx(parts, group, bits, mode)
    if mode != "affine":
        return quantized.dequantize()
    codes = (quantized.codes.float() - quantized.grid.low).unflatten(1, (-1, group))  # [out, groups, group]
    scale, bias = (parts[name].float().unsqueeze(-1) for name in ("scales", "biases"))  # [out, groups, 1]
    W: Tensor = (scale * codes + bias).flatten(1)  # [out, in]
    return W


def scheme_of_parts(parts: Parts, group: int, bits: int, mode: str) -> WeightScheme:
    """The scheme of a linear by its scales and biases; raises QtoolError for what qtool cannot decode."""
    scales, biases = parts["scales"], parts.get("biases")
    if mode in MODES:
        scheme = WeightScheme.model_validate(PRESETS[MODES[mode]])
        if (group, bits) != (scheme.group, scheme.bits) or scales.dtype != torch.uint8 or biases is not None:
            raise QtoolError(
                f"{mode} of {bits} bits in groups of {group} with scales of {scales.dtype} cannot be read; it has "
                f"{scheme.bits} bits in groups of {scheme.group}, uint8 scales and no biases"
            )
        return scheme
    if mode != "affine":
        raise QtoolError(f"MLX's mode {mode} cannot be read, affine, {', '.join(MODES)} can")
    if bits not in BITS or group not in GROUPS:
        raise QtoolError(f"{bits} bits in groups of {group} cannot be read, {AFFINE} can")
    if biases is None or biases.shape != scales.shape or biases.dtype != scales.dtype or not scales.is_floating_point():
        found = "missing" if biases is None else f"{biases.dtype} {list(biases.shape)}"
        raise QtoolError(f"biases are {found}, must be floats as scales, {scales.dtype} {list(scales.shape)}; save it again")
    exact = {"zero": _zero_points(parts), "scales": scales.float(), "biases": biases.float()}
    if not bool(exact["zero"].isfinite().all()):
        raise QtoolError("biases of groups whose scales are 0 cannot be read; quantize again")
    middle = float(1 << (bits - 1))
    is_exact = bool((exact["zero"] * exact["scales"] == -exact["biases"]).all())
    is_code = is_exact and bool(((exact["zero"] >= 0) & (exact["zero"] < 2 * middle) & (exact["zero"] % 1 == 0)).all())
    return WeightScheme.model_validate(
        {
            "bits": bits,
            "group": group,
            "symmetric": bits > 1 and is_exact and bool((exact["zero"] == middle).all()),
            "zero_dtype": "int" if is_code else "float16",
            "scale_dtype": str(scales.dtype).removeprefix("torch."),
        }
    )


def _zero_points(parts: Parts) -> Tensor:
    """-biases / scales [out, groups], float32; 0 where both are 0."""
    scales, biases = parts["scales"].float(), parts["biases"].float()
    zero: Tensor = torch.where((scales == 0) & (biases == 0), 0.0, -biases / scales)
    return zero + 0.0  # no -0.0
