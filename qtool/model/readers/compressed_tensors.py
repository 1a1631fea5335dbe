"""Reads linears in compressed-tensors' integer layouts, so that exports are judged by their own bytes.

pack-quantized, for weights alone:
    NAME.weight_packed [out, words] int32    NAME.weight_scale [out, groups]    NAME.weight_shape [2] = (out, in)
    NAME.weight_zero_point [words of out, groups] int32, packed along `out`, where asymmetric
int-quantized, where activations are quantized too:
    NAME.weight [out, in] int8               NAME.weight_scale [out, groups]
    NAME.weight_zero_point [out, groups] int8, where asymmetric
Codes are signed: asymmetric ones, and zero points, are shifted by -2^(bits - 1). Packing shifts all of them back.
The linears of a mixture's experts stand one by one, gate and up apart, under the names of its dense checkpoints.
Source: compressed-tensors 0.20, compressors/pack_quantized and compressors/naive_quantized.
"""

import re
from typing import Any

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.packing import n_words, unpack_int32
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.readers import scheme_of

PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape")


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
    return QuantizedTensor(codes, scale, zero, scheme.weights), scheme


def check_config(config: dict[str, Any]) -> None:
    """Raise QtoolError for a quantization_config that changes more than the weights and inputs of linears."""
    where = "model: config.json's quantization_config"
    if config.get("kv_cache_scheme"):
        raise QtoolError(f"{where}: a quantized cache (kv_cache_scheme) cannot be read; quantize again without it")
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
    kind = f"{weights['type']} {weights['strategy']}"
    if kind not in ("int group", "int channel") or weights.get("actorder") in ("group", "dynamic"):
        raise QtoolError(f"model: {name}: {kind} weights cannot be read, int group or channel without reordering can")
    if activations and (activations["type"], activations.get("strategy"), activations["dynamic"]) != ("int", "token", True):
        raise QtoolError(f"model: {name}: only int activations scaled per token at run time (dynamic) can be read")
    if group.get("output_activations"):
        raise QtoolError(f"model: {name}: quantized outputs (output_activations) cannot be read, quantized inputs can")
    group_size = weights["group_size"] if weights["strategy"] == "group" else None
    return scheme_of(name, weights["num_bits"], group_size, weights["symmetric"], scale.dtype, activations)


def _read_weights(checkpoint: Checkpoint, name: str, scheme: WeightScheme) -> QuantizedTensor:
    """One linear as it is stored, its codes and zero points shifted to the grid's."""
    found = {key.rsplit(".", 1)[-1]: tensor for key, tensor in checkpoint.read([f"{name}.{part}" for part in PARTS], None)}
    bits, low = scheme.bits, scheme.grid.low
    zero = found.get("weight_zero_point")
    if "weight_packed" in found:
        rows, columns = found["weight_shape"].tolist()
        codes = _unpack(name, found["weight_packed"], bits, columns) + low  # [out, in]
        if zero is not None:
            zero = _unpack(name, zero.T.contiguous(), bits, rows).T.contiguous()  # [out, groups]
    elif "weight" in found and found["weight"].dtype == torch.int8:
        shift = low + (1 << (bits - 1))
        codes = found["weight"].to(torch.int16) + shift  # [out, in]
        zero = None if zero is None else zero.to(torch.int16) + shift  # [out, groups]
    else:
        raise QtoolError(f"model: {name} has a scale but neither packed codes nor int8 codes of its own; qtool reads those")
    if (zero is None) != scheme.symmetric:
        raise QtoolError(f"model: {name}: zero points and the scheme's symmetry contradict each other; export again")
    zero = None if zero is None else zero.to(torch.uint8)
    return QuantizedTensor(codes.to(torch.int8 if scheme.symmetric else torch.uint8), found["weight_scale"], zero, scheme)


def _group_of(name: str, groups: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The group whose target means the linear: its name before a pattern (`re:`, and how a name begins) before Linear."""
    targets = {target: group for group in groups.values() for target in group["targets"]}
    patterns = [target for target in sorted(targets) if target.startswith("re:") and re.match(target[3:], name)]
    return next((targets[target] for target in (name, *patterns, "Linear") if target in targets), None)


def _unpack(name: str, words: Tensor, bits: int, columns: int) -> Tensor:
    if words.shape[1] != n_words(columns, bits):
        raise QtoolError(
            f"model: {name}: {words.shape[1]} words do not hold {columns} codes of {bits} bits without gaps; "
            "compressed-tensors left gaps before June 2026: export again with a later one"
        )
    return unpack_int32(words, bits, columns)
