"""compressed-tensors' layouts: what one linear is stored as, from codes to tensors and back.

pack-quantized, whole numbers, weights alone:
    weight_packed [out, words] int32    weight_scale [out, groups]    weight_shape [2] = (out, in)
    weight_zero_point [words of out, groups] int32, packed along `out`, where asymmetric
int-quantized, whole numbers, where activations are quantized too:
    weight [out, in] int8               weight_scale [out, groups]
    weight_zero_point [out, groups] int8, where asymmetric
nvfp4-pack-quantized, E2M1 in groups of 16:
    weight_packed [out, in / 2] uint8   weight_scale [out, groups] float8_e4m3fn    weight_global_scale [1] float32
mxfp4-pack-quantized, E2M1 in groups of 32:
    weight_packed [out, in / 2] uint8   weight_scale [out, groups] uint8, the bits of float8_e8m0fnu
float-quantized, E4M3 with plain scales:
    weight [out, in] float8_e4m3fn      weight_scale [out, groups]; [1] where one serves the whole tensor
mxfp8-quantized, E4M3 in groups of 32:
    weight [out, in] float8_e4m3fn      weight_scale [out, groups] uint8, as above
Inputs of any of them with static scales: input_scale [1], input_zero_point [1] int8 where asymmetric; of NVFP4 inputs
input_global_scale [1] float32, of which their float32 scale is the reciprocal.
Codes of whole numbers are signed: asymmetric ones, and zero points, are shifted by -2^(bits - 1). Packing shifts all of them
back. Of two E2M1 codes in a byte the first has the lower bits. w^ = level · weight_scale / weight_global_scale.
Source: compressed-tensors 0.20, compressors/pack_quantized, naive_quantized, nvfp4, mxfp4 and mxfp8.
"""

from typing import Any

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.inputs import InputScales
from qtool.formats.packing import n_words, pack_int32, unpack_int32
from qtool.formats.scheme import PRESETS, ActivationScheme, Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor, to_groups

INPUT_PARTS = ("input_scale", "input_zero_point", "input_global_scale")
PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale")
FLOATS = {
    ("e2m1", 16, "float8_e4m3fn"): "nvfp4-pack-quantized",
    ("e2m1", 32, "float8_e8m0fnu"): "mxfp4-pack-quantized",
    ("e4m3", 32, "float8_e8m0fnu"): "mxfp8-quantized",
}
BLOCK_INPUTS = ("mxfp4", "mxfp8_e4m3")
SIGN = 8  # the sign's bit in a code of E2M1
STORED_SCALES = {"float8_e4m3fn": "torch.float8_e4m3fn", "float8_e8m0fnu": "torch.uint8"}


def layout_of(scheme: Scheme) -> str | None:
    """The layout that holds weights of this scheme; None where none does."""
    weights = scheme.weights
    if weights.double_quant or weights.group_along != "out_channel" or weights.zero_dtype != "int":
        return None
    if not has_plain_scales(weights):
        return FLOATS.get((weights.format, weights.group or 0, weights.scale_dtype))
    if weights.format == "int":
        has_int_inputs = scheme.activations is not None and scheme.activations.format == "int"
        return "int-quantized" if has_int_inputs else "pack-quantized"
    return "float-quantized" if weights.format == "e4m3" else None


def has_plain_scales(weights: WeightScheme) -> bool:
    """Whether scales are floats of 16 or 32 bits, with nothing of the tensor's."""
    return not weights.scale_dtype.startswith("float8")


def weight_arguments(weights: WeightScheme) -> dict[str, Any]:
    """What a config group says of its weights."""
    arguments: dict[str, Any] = {
        "num_bits": weights.bits,
        "type": "int" if weights.format == "int" else "float",
        "symmetric": weights.symmetric,
        "strategy": "channel" if weights.group is None else "group",
        "group_size": weights.group,
        "dynamic": False,
    }
    if weights.scale_dtype == "float8_e4m3fn":
        arguments["strategy"] = "tensor_group"
    return arguments if has_plain_scales(weights) else arguments | {"scale_dtype": STORED_SCALES[weights.scale_dtype]}


def activation_arguments(activations: ActivationScheme) -> dict[str, Any] | None:
    """What a config group says of a linear's input; None where it has no word for it."""
    if activations.threshold is not None:
        return None
    if activations.scale_dtype == "float8_e4m3fn":
        block = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": STORED_SCALES["float8_e4m3fn"]}
        stated = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": "local"}
        return {**stated, **block} if activations.static else None
    if activations.static:
        kind = "int" if activations.format == "int" else "float"
        how = {"num_bits": activations.bits, "type": kind, "symmetric": activations.symmetric}
        is_known = activations.format in ("int", "e4m3")
        return {**how, "strategy": "tensor", "dynamic": False} if is_known else None
    per_token = {"num_bits": activations.bits, "symmetric": activations.symmetric, "strategy": "token", "dynamic": True}
    if activations.format == "int" and activations.group is None:
        return {"type": "int", **per_token}
    word = str(activations)
    if word == "e4m3":
        return {"type": "float", **per_token}
    block = {"strategy": "group", "group_size": 32, "scale_dtype": STORED_SCALES["float8_e8m0fnu"]}
    return {"type": "float", **per_token, **block} if word in BLOCK_INPUTS else None


def activation_scheme(arguments: dict[str, Any]) -> ActivationScheme | None:
    """What `activation_arguments` were made of; None for what it does not make."""
    bits, symmetric = arguments.get("num_bits"), arguments.get("symmetric")
    is_static = arguments.get("strategy") == "tensor" and arguments.get("dynamic") is False
    if arguments.get("strategy") == "tensor_group":
        found = ActivationScheme.model_validate({**PRESETS["nvfp4"], "static": True})
    elif arguments.get("type") == "int" and bits in range(2, 9):
        found = ActivationScheme(bits=bits, symmetric=bool(symmetric), static=is_static)
    elif is_static:
        found = ActivationScheme(format="e4m3", bits=8, static=True)
    elif arguments.get("strategy") == "token":
        found = ActivationScheme(format="e4m3", bits=8)
    else:
        format = "e4m3" if bits == 8 else "e2m1"
        found = ActivationScheme.model_validate({"format": format, "group": 32, "scale_dtype": "float8_e8m0fnu"})
    expected = activation_arguments(found)
    assert expected is not None, f"{found} came from a config group"
    return found if all(arguments.get(key) == value for key, value in expected.items() if key != "scale_dtype") else None


# ---- from codes to tensors ----


def pack(quantized: QuantizedTensor, scheme: Scheme, inputs: InputScales | None = None) -> dict[str, Tensor]:
    """The tensors of one linear in the layout of its scheme, static scales of its inputs among them.

    Raises QtoolError for a float's scale that is not a number.
    """
    return _pack_weights(quantized, scheme) | ({} if inputs is None else pack_inputs(inputs))


def _pack_weights(quantized: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
    layout = layout_of(scheme)
    assert layout is not None, f"no layout holds {scheme}"
    assert quantized.is_plain, "what stands beside codes, scales and zero points does not go into these layouts"
    if layout == "pack-quantized":
        return _as_words(quantized)
    if layout == "int-quantized":
        return _as_bytes(quantized)
    codes, scale = quantized.codes, quantized.scale  # [out, in] uint8, [out, groups]
    if bool(scale.float().isnan().any()):
        raise QtoolError("a scale is not a number; train with a lower lr, or quantize again")
    if layout == "nvfp4-pack-quantized":
        # Kernels take scales for positive (vLLM's leave their sign out): training may have moved one below zero.
        is_negative = (scale.float() < 0).repeat_interleave(16, dim=1)  # [out, in]
        codes = torch.where(is_negative, codes ^ SIGN, codes)
        scale = scale.float().abs().to(scale.dtype)
    elif not has_plain_scales(quantized.scheme):
        scale = scale.view(torch.uint8)
    if quantized.scheme.format == "e4m3":
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    parts = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scale}  # [out, in / 2]
    return parts | ({"weight_global_scale": reciprocal(quantized.of_tensor)} if layout.startswith("nvfp4") else {})


def reciprocal(of_tensor: float) -> Tensor:
    """weight_global_scale [1], float32, of which `of_tensor` is the reciprocal; the nearest where it is of none."""
    nearest = 1 / torch.tensor([of_tensor])
    near = torch.cat([nearest, nearest.nextafter(torch.tensor(torch.inf)), nearest.nextafter(torch.tensor(0.0))])  # [3]
    exact = near[1 / near == of_tensor]
    return exact[:1].clone() if len(exact) else nearest


def pack_inputs(inputs: InputScales) -> dict[str, Tensor]:
    """The tensors of static scales."""
    if inputs.scheme.scale_dtype == "float8_e4m3fn":
        return {"input_global_scale": reciprocal(float(inputs.scale))}
    if inputs.zero is None:
        return {"input_scale": inputs.scale}
    shift = 1 << (inputs.scheme.bits - 1)
    return {"input_scale": inputs.scale, "input_zero_point": (inputs.zero.to(torch.int16) - shift).to(torch.int8)}


def _as_words(quantized: QuantizedTensor) -> dict[str, Tensor]:
    parts = {
        "weight_packed": quantized.packed(),  # [out, words]
        "weight_scale": quantized.scale,  # [out, groups]
        "weight_shape": torch.tensor(quantized.shape),  # [2]
    }
    if quantized.zero is not None:
        parts["weight_zero_point"] = pack_int32(quantized.zero.T, quantized.scheme.bits).T  # [words of out, groups]
    return parts


def _as_bytes(quantized: QuantizedTensor) -> dict[str, Tensor]:
    shift = 0 if quantized.zero is None else 1 << (quantized.scheme.bits - 1)
    parts = {
        "weight": (quantized.codes.to(torch.int16) - shift).to(torch.int8),  # [out, in]
        "weight_scale": quantized.scale,  # [out, groups]
    }
    if quantized.zero is not None:
        parts["weight_zero_point"] = (quantized.zero.to(torch.int16) - shift).to(torch.int8)  # [out, groups]
    return parts


def decode(quantized: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Weights [out, in] as the library decodes them for a model of `dtype`.

    It holds plain scales, and multiplies, in the model's dtype; weights of microscaling formats it gives in bfloat16.
    """
    if has_plain_scales(quantized.scheme):
        levels = to_groups(quantized.grid.levels(quantized.codes), quantized.scheme)  # [out, groups, group]
        if quantized.zero is not None:
            levels = levels - quantized.zero.unsqueeze(-1)
        return (levels.to(dtype) * quantized.scale.to(dtype).unsqueeze(-1)).flatten(1)
    scale = quantized.scale.float() / reciprocal(quantized.of_tensor).to(quantized.scale.device)  # [out, groups]
    levels = to_groups(quantized.grid.levels(quantized.codes), quantized.scheme)  # [out, groups, group]
    return (levels * scale.unsqueeze(-1)).flatten(1).to(torch.bfloat16).to(dtype)


# ---- from tensors to codes ----


def unpack(parts: dict[str, Tensor], scheme: WeightScheme) -> QuantizedTensor:
    """One linear of its tensors by name; raises QtoolError where they contradict the scheme."""
    return _whole_numbers(parts, scheme) if scheme.format == "int" else _floats(parts, scheme)


def unpack_inputs(parts: dict[str, Tensor], scheme: ActivationScheme) -> InputScales:
    """Static scales of their tensors by name; raises QtoolError where they contradict the scheme."""
    is_nvfp4 = scheme.scale_dtype == "float8_e4m3fn"
    name = "input_global_scale" if is_nvfp4 else "input_scale"
    scale, zero = parts.get(name, torch.empty(0)), parts.get("input_zero_point")
    if scale.numel() != 1 or not 0 < float(scale) < torch.inf:
        raise QtoolError(f"{name} must be one positive number, not {scale.tolist()}; calibrate it again")
    if is_nvfp4:
        return InputScales(scheme, 1 / scale.float().view(1))
    if scheme.symmetric:
        if zero is not None and bool(zero.float().any()):
            raise QtoolError(f"input_zero_point is {zero.tolist()}, but inputs have no zero points; calibrate it again")
        return InputScales(scheme, scale.view(1))
    if zero is None or zero.numel() != 1 or zero.dtype != torch.int8:
        raise QtoolError("input_zero_point must be one number in int8; calibrate it again")
    return InputScales(scheme, scale.view(1), (zero.view(1).to(torch.int16) + (1 << (scheme.bits - 1))).to(torch.uint8))


def _whole_numbers(parts: dict[str, Tensor], scheme: WeightScheme) -> QuantizedTensor:
    bits, low, zero = scheme.bits, scheme.grid.low, parts.get("weight_zero_point")
    if "weight_packed" in parts and parts["weight_packed"].dtype == torch.int32:
        rows, columns = parts["weight_shape"].tolist()
        codes = _unpack_words(parts["weight_packed"], bits, columns) + low  # [out, in]
        if zero is not None:
            zero = _unpack_words(zero.T.contiguous(), bits, rows).T.contiguous()  # [out, groups]
    elif "weight" in parts and parts["weight"].dtype == torch.int8:
        shift = low + (1 << (bits - 1))
        codes = parts["weight"].to(torch.int16) + shift  # [out, in]
        zero = None if zero is None else zero.to(torch.int16) + shift  # [out, groups]
    else:
        raise QtoolError("it has a scale but neither packed codes nor int8 codes of its own; qtool reads those")
    if (zero is None) != scheme.symmetric:
        raise QtoolError("zero points and the scheme's symmetry contradict each other; export again")
    zero = None if zero is None else zero.to(torch.uint8)
    return QuantizedTensor(codes.to(torch.int8 if scheme.symmetric else torch.uint8), parts["weight_scale"], zero, scheme)


def _floats(parts: dict[str, Tensor], scheme: WeightScheme) -> QuantizedTensor:
    name = "weight_packed" if scheme.format == "e2m1" else "weight"
    dtype = torch.uint8 if scheme.format == "e2m1" else torch.float8_e4m3fn
    if name not in parts or parts[name].dtype != dtype:
        words = str(dtype).removeprefix("torch.")
        raise QtoolError(f"it has a scale but no {scheme} codes in {name}, {words}; qtool reads those")
    if "weight_zero_point" in parts:
        raise QtoolError("zero points of float weights cannot be read; export again with a symmetric scheme")
    codes, scale, of_tensor = parts[name].view(torch.uint8), parts["weight_scale"], 1.0
    if scheme.format == "e2m1":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)  # [out, in]
    if scheme.scale_dtype == "float8_e8m0fnu":
        scale = scale.view(torch.float8_e8m0fnu)
    scale = (scale.expand(len(codes)) if scale.numel() == 1 else scale).reshape(len(codes), -1).contiguous()  # [out, groups]
    if scale.shape[1] != (1 if scheme.group is None else codes.shape[1] / scheme.group):
        raise QtoolError(f"{scale.shape[1]} scales a row do not fit {codes.shape[1]} weights of {scheme}; export again")
    if scheme.scale_dtype == "float8_e4m3fn":
        of_tensor = _of_tensor(parts)
    if bool(scale.float().isnan().any()):
        raise QtoolError("a scale is not a number; the checkpoint is damaged, download it again")
    return QuantizedTensor(codes, scale, None, scheme, of_tensor)


def _of_tensor(parts: dict[str, Tensor]) -> float:
    found = parts.get("weight_global_scale", torch.empty(0))
    if found.numel() != 1 or not 0 < float(found) < torch.inf:
        raise QtoolError(f"weight_global_scale must be one positive number, not {found.tolist()}; export again")
    return float(1 / found.float())


def _unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    if words.shape[1] != n_words(columns, bits):
        raise QtoolError(
            f"{words.shape[1]} words do not hold {columns} codes of {bits} bits without gaps; "
            "compressed-tensors left gaps before June 2026: export again with a later one"
        )
    return unpack_int32(words, bits, columns)
