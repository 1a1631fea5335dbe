"""Reads linears in compressed-tensors' integer layouts, so that exports are judged by their own bytes.

pack-quantized, for weights alone:
    NAME.weight_packed [out, words] int32    NAME.weight_scale [out, groups]    NAME.weight_shape [2] = (out, in)
    NAME.weight_zero_point [words of out, groups] int32, packed along `out`, where asymmetric
int-quantized, where activations are quantized too:
    NAME.weight [out, in] int8               NAME.weight_scale [out, groups]
    NAME.weight_zero_point [out, groups] int8, where asymmetric
Codes are signed: asymmetric ones, and zero points, are shifted by -2^(bits - 1). Packing shifts all of them back.
Source: compressed-tensors 0.20, compressors/pack_quantized and compressors/naive_quantized.
"""

import re
from typing import Any

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.integer import SCALE_DTYPES
from qtool.formats.packing import n_words, unpack_int32
from qtool.formats.scheme import ActivationScheme, Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint

PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape")
SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense. Raises QtoolError for what qtool cannot decode."""
    if config.get("quant_method") != "compressed-tensors":
        raise QtoolError(f"model: quantization by {config.get('quant_method')} cannot be read; compressed-tensors can")
    scale = dict(checkpoint.read([f"{name}.weight_scale"], None)).get(f"{name}.weight_scale")
    if scale is None:
        return None
    groups = config["config_groups"].values()
    group = next((group for group in groups if any(_fits(name, target) for target in group["targets"])), None)
    if group is None:
        raise QtoolError(f"model: {name} is quantized, but no group in config.json's quantization_config names it")
    weights, activations = group["weights"], group.get("input_activations")
    kind = f"{weights['type']} {weights['strategy']}"
    if kind not in ("int group", "int channel") or weights.get("actorder") == "group":
        raise QtoolError(f"model: {name}: {kind} weights cannot be read, int group or channel without reordering can")
    if activations is not None and not (activations["type"] == "int" and activations["dynamic"] is True):
        raise QtoolError(f"model: {name}: only int activations scaled at run time (dynamic) can be read")
    return Scheme(
        weights=WeightScheme(
            bits=weights["num_bits"],
            group=weights["group_size"] if weights["strategy"] == "group" else None,
            symmetric=weights["symmetric"],
            scale_dtype=SCALE_NAMES[scale.dtype],
        ),
        activations=activations and ActivationScheme(bits=activations["num_bits"], symmetric=activations["symmetric"]),
    )


def read_compressed(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    scheme = read_scheme(checkpoint, name, config)
    if scheme is None:
        return None
    found = {key.rsplit(".", 1)[-1]: tensor for key, tensor in checkpoint.read([f"{name}.{part}" for part in PARTS], None)}
    bits, low = scheme.weights.bits, scheme.weights.grid.low
    zero = found.get("weight_zero_point")
    if "weight_packed" in found:
        rows, columns = found["weight_shape"].tolist()
        codes = _unpack(name, found["weight_packed"], bits, columns) + low  # [out, in]
        if zero is not None:
            zero = _unpack(name, zero.T.contiguous(), bits, rows).T.contiguous()  # [out, groups]
    else:
        shift = low + (1 << (bits - 1))
        codes = found["weight"].to(torch.int16) + shift  # [out, in]
        zero = None if zero is None else zero.to(torch.int16) + shift  # [out, groups]
    if (zero is None) != scheme.weights.symmetric:
        raise QtoolError(f"model: {name}: zero points and the scheme's symmetry contradict each other; export again")
    whole = torch.int8 if scheme.weights.symmetric else torch.uint8
    zero = None if zero is None else zero.to(torch.uint8)
    return QuantizedTensor(codes.to(whole), found["weight_scale"], zero, scheme.weights), scheme


def _fits(name: str, target: str) -> bool:
    """Whether a group's target means the linear: a name, Linear for all, or `re:` and what a name begins with."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, "Linear")


def _unpack(name: str, words: Tensor, bits: int, columns: int) -> Tensor:
    if words.shape[1] != n_words(columns, bits):
        raise QtoolError(
            f"model: {name}: {words.shape[1]} words do not hold {columns} codes of {bits} bits without gaps; "
            "compressed-tensors left gaps before June 2026: export again with a later one"
        )
    return unpack_int32(words, bits, columns)
