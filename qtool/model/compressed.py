"""Reads linears of a checkpoint in compressed-tensors' pack-quantized layout, so that exports are judged by their own bytes.

    NAME.weight_packed [out, words] int32    NAME.weight_scale [out, groups]    NAME.weight_shape [2]
    NAME.weight_zero_point [words of out, groups] int32, packed along `out`, where asymmetric
Codes are stored shifted to unsigned; signed code = stored - 2^(bits - 1).
Source: the layout that compressed-tensors 0.18 documents for `pack-quantized`.
"""

from typing import Any

import torch

from qtool.errors import QtoolError
from qtool.formats.packing import unpack_int32
from qtool.formats.scheme import ActivationScheme, Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint

SCALE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def read_compressed(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    if config.get("quant_method") != "compressed-tensors":
        raise QtoolError(f"model: quantization by {config.get('quant_method')} cannot be read; compressed-tensors can")
    parts = {part: f"{name}.{part}" for part in ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape")}
    have = set(checkpoint.names)
    if parts["weight_scale"] not in have:
        return None
    found = {key.rsplit(".", 1)[-1]: tensor for key, tensor in checkpoint.read(list(parts.values()), None)}
    group = next(iter(config["config_groups"].values()))
    for candidate in config["config_groups"].values():
        if name in candidate["targets"]:
            group = candidate
    bits, symmetric = group["weights"]["num_bits"], group["weights"]["symmetric"]
    scheme = Scheme(
        weights=WeightScheme(
            bits=bits,
            group=group["weights"]["group_size"] if group["weights"]["strategy"] == "group" else None,
            symmetric=symmetric,
            scale_dtype=SCALE_NAMES[found["weight_scale"].dtype],  # type: ignore[arg-type]
        ),
        activations=ActivationScheme(bits=group["input_activations"]["num_bits"]) if group.get("input_activations") else None,
    )
    if "weight_packed" in found:
        rows, columns = found["weight_shape"].tolist()
        unsigned = unpack_int32(found["weight_packed"], bits, columns)  # [out, in]
    else:
        unsigned = found["weight"].to(torch.int64) + (1 << (bits - 1))
        rows = len(unsigned)
    zero = None
    if not symmetric:
        zero = unpack_int32(found["weight_zero_point"].T.contiguous(), bits, rows).T.to(torch.uint8).contiguous()
    codes = (unsigned - (1 << (bits - 1))).to(torch.int8) if symmetric else unsigned.to(torch.uint8)
    return QuantizedTensor(codes, found["weight_scale"], zero, scheme.weights), scheme
