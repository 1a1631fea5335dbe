"""Reads linears in compressed-tensors' layouts, so that exports are judged by their own bytes.

The layouts stand in qtool/formats/compressed_layouts.py. What is read: whole numbers by group or row, NVFP4, MXFP4, MXFP8, and
FP8 (E4M3) by group, row or tensor (one scale of a tensor is read as one for each row); activations rounded at run time, or by
static scales of a tensor;
key/value caches with one static scale for keys and one for values of a block.
The linears of a mixture's experts stand one by one, gate and up apart, under the names of its dense checkpoints.
Source: compressed-tensors 0.20, quantization/quant_args.py and compressors.
"""

import re
from typing import Any

import torch

from qtool.errors import QtoolError
from qtool.formats.compressed_layouts import INPUT_PARTS, PARTS, activation_scheme, unpack, unpack_inputs
from qtool.formats.inputs import InputScales
from qtool.formats.kv_cache import CacheScales
from qtool.formats.scheme import KvScheme, Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.readers import scales_of_cache, scheme_of

PLAIN = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of scales that stand alone


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense. Raises QtoolError for what qtool cannot decode."""
    check_config(config)
    schemes = [_read_scheme(checkpoint, part, config) for part in checkpoint.stored_as(name)]
    if any(scheme != schemes[0] for scheme in schemes):
        raise QtoolError(f"model: {name}: gate and up of one expert are stored as {schemes[0]} and {schemes[-1]}, not as one")
    return schemes[0] if schemes else None


def read_linear(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    scheme = read_scheme(checkpoint, name, config)
    if scheme is None:
        return None
    parts = [_read_weights(checkpoint, part, scheme.weights) for part in checkpoint.stored_as(name)]
    codes = torch.cat([part.codes for part in parts])  # [out, in]
    scale = torch.cat([part.scale for part in parts])  # [out, groups]
    zeros = [part.zero for part in parts if part.zero is not None]
    zero = torch.cat(zeros) if zeros else None  # [out, groups]
    of_tensor = parts[0].of_tensor
    if any(part.of_tensor != of_tensor for part in parts):
        raise QtoolError(f"model: {name}: gate and up of one expert have a weight_global_scale each, which qtool cannot hold")
    return QuantizedTensor(codes, scale, zero, scheme.weights, of_tensor), scheme


def read_inputs(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> InputScales | None:
    """The static scales of the inputs of the linear `name`; None where its scheme has none."""
    scheme = read_scheme(checkpoint, name, config)
    if scheme is None or scheme.activations is None or not scheme.activations.static:
        return None
    owner = checkpoint.stored_as(name)[0]
    found = checkpoint.read([f"{owner}.{part}" for part in INPUT_PARTS], None)
    try:
        return unpack_inputs({key.rsplit(".", 1)[-1]: tensor for key, tensor in found}, scheme.activations)
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error


def read_cache(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> CacheScales | None:
    """The scales of the attention `name`; None where the cache is as it was."""
    check_config(config)
    scheme = cache_scheme(config.get("kv_cache_scheme") or {})
    return None if scheme is None else scales_of_cache(checkpoint, name, scheme)


def cache_scheme(cache: dict[str, Any]) -> KvScheme | None:
    """What a kv_cache_scheme means; None where that cannot be read."""
    how = tuple(cache.get(key) for key in ("strategy", "symmetric", "dynamic"))
    kind, bits = cache.get("type"), cache.get("num_bits")
    if how != ("tensor", True, False) or not ((kind, bits) == ("float", 8) or (kind == "int" and bits in range(2, 9))):
        return None
    return KvScheme(bits=bits, format="e4m3" if kind == "float" else "int")


def check_config(config: dict[str, Any]) -> None:
    """Raise QtoolError for a quantization_config that changes more than the weights and inputs of linears."""
    where = "model: config.json's quantization_config"
    cache = config.get("kv_cache_scheme")
    if cache and cache_scheme(cache) is None:
        raise QtoolError(
            f"{where}: kv_cache_scheme: a cache of {cache.get('type')} {cache.get('num_bits')} bits, strategy "
            f"{cache.get('strategy')}, cannot be read; one symmetric static scale for a tensor can, float of 8 bits or int"
        )
    if (config.get("transform_config") or {}).get("config_groups"):
        raise QtoolError(f"{where}: rotations at run time (transform_config) cannot be read; quantize again without them")
    for key, group in (config.get("config_groups") or {}).items():
        if not isinstance(group, dict) or group.get("weights") is None:
            raise QtoolError(f"{where}: {key} quantizes no weights; only linears with quantized weights can be read")


def _read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    scale = dict(checkpoint.read([f"{name}.weight_scale"], None)).get(f"{name}.weight_scale")
    if scale is None:
        return None
    group = _group_of(name, config.get("config_groups") or {})
    if group is None:
        raise QtoolError(f"model: {name} is quantized, but no group in config.json's quantization_config names it")
    weights, activations = group["weights"], group.get("input_activations")
    format, scale_dtype = _number_format(weights, scale.dtype)
    if format is None or weights.get("actorder") in ("group", "dynamic"):
        words = str(scale.dtype).removeprefix("torch.")
        raise QtoolError(
            f"model: {name}: {weights['type']} {weights['strategy']} weights of {weights['num_bits']} bits with {words} scales "
            "cannot be read; int group or channel without reordering, NVFP4, MXFP4, MXFP8 and FP8 can"
        )
    inputs = activation_scheme(activations) if activations else None
    if activations and inputs is None:
        raise QtoolError(
            f"model: {name}: activations of {activations.get('type')} {activations.get('num_bits')} bits by "
            f"{activations.get('strategy')} cannot be read; int and float of 8 bits, per token dynamic or per tensor static, "
            "dynamic MX ones and NVFP4 can"
        )
    if group.get("output_activations"):
        raise QtoolError(f"model: {name}: quantized outputs (output_activations) cannot be read, quantized inputs can")
    group_size = weights["group_size"] if "group" in weights["strategy"] else None
    return scheme_of(name, weights["num_bits"], group_size, weights["symmetric"], scale_dtype, inputs, format)


def _number_format(weights: dict[str, Any], stored: torch.dtype) -> tuple[str | None, torch.dtype]:
    """The format and the dtype of scales that a group's `weights` means; None as the format of what cannot be read."""
    kind, size = f"{weights['type']} {weights['strategy']}", (weights["num_bits"], weights.get("group_size"))
    if kind in ("int group", "int channel") and stored in PLAIN:
        return "int", stored
    if kind == "float tensor_group" and size == (4, 16) and stored == torch.float8_e4m3fn:
        return "e2m1", stored
    if kind == "float group" and size in ((4, 32), (8, 32)) and stored == torch.uint8:
        return "e2m1" if weights["num_bits"] == 4 else "e4m3", torch.float8_e8m0fnu
    if kind in ("float group", "float channel", "float tensor") and weights["num_bits"] == 8 and stored in PLAIN:
        return "e4m3", stored
    return None, stored


def _read_weights(checkpoint: Checkpoint, name: str, scheme: WeightScheme) -> QuantizedTensor:
    """One linear as it is stored."""
    found = {key.rsplit(".", 1)[-1]: tensor for key, tensor in checkpoint.read([f"{name}.{part}" for part in PARTS], None)}
    try:
        return unpack(found, scheme)
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error


def _group_of(name: str, groups: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The group whose target means the linear: its name before a pattern (`re:`, and how a name begins) before Linear."""
    targets = {target: group for group in groups.values() for target in group["targets"]}
    patterns = [target for target in sorted(targets) if target.startswith("re:") and re.match(target[3:], name)]
    return next((targets[target] for target in (name, *patterns, "Linear") if target in targets), None)
