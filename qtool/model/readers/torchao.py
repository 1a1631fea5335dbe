"""Reads linears that torchao keeps as Int8Tensor, whoever wrote them: rows or groups, activations in 16 bits or in 8.

    NAME._weight_qdata [out, in] int8    NAME._weight_scale [out, groups]    NAME._weight_zero_point [out, groups], all 0
config.json's quant_type says how all quantized linears are stored, and whether their inputs are quantized by tokens.
Source: torchao 0.18, quantization/quantize_/workflows/int8; transformers 5.23, quantizers/quantizer_torchao.py.
"""

from typing import Any

import torch

from qtool.errors import QtoolError
from qtool.formats.scheme import ActivationScheme, Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.readers import SCALE_NAMES, read_parts, scheme_of

CODES, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
WEIGHTS, DYNAMIC = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense. Raises QtoolError for what qtool cannot decode."""
    group, activations = setting_of(config)
    scale = read_parts(checkpoint, name, (SCALE,)).get(SCALE)
    if scale is None:
        return None
    if scale.dtype not in SCALE_NAMES:
        raise QtoolError(f"model: {name}: scales of {scale.dtype} cannot be read, {', '.join(SCALE_NAMES.values())} can")
    return scheme_of(name, 8, group, True, scale.dtype, activations)


def read_linear(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    scheme = read_scheme(checkpoint, name, config)
    if scheme is None:
        return None
    parts = read_parts(checkpoint, name, (CODES, SCALE, ZERO))
    codes, scale = parts.get(CODES), parts[SCALE]
    if codes is None or codes.dtype != torch.int8 or codes.ndim != 2:
        words = "missing" if codes is None else f"{codes.dtype} {list(codes.shape)}"
        raise QtoolError(f"model: {name}: {CODES} is {words}, must be torch.int8 [out, in]; is it torchao's Int8Tensor?")
    rows, columns = codes.shape
    expected = [rows, columns // (scheme.weights.group or columns)]
    if list(scale.shape) != expected:
        raise QtoolError(f"model: {name}: scales {list(scale.shape)} must be {expected} for {scheme}; config.json does not "
                         "describe this file")  # fmt: skip
    if bool(parts.get(ZERO, torch.zeros(1)).any()):
        raise QtoolError(f"model: {name}: zero points other than 0 cannot be read; quantize again symmetrically")
    return QuantizedTensor(codes, scale, None, scheme.weights), scheme


def setting_of(config: dict[str, Any]) -> tuple[int | None, ActivationScheme | None]:
    """The group, None for a whole row, and what activations have; raises QtoolError for what cannot be read."""
    where = "model: config.json's quantization_config"
    chosen = (config.get("quant_type") or {}).get("default") or {}
    kind, fields = chosen.get("_type"), chosen.get("_data") or {}
    if kind not in (WEIGHTS, DYNAMIC):
        raise QtoolError(f"{where}: torchao's {kind} cannot be read, {WEIGHTS} and {DYNAMIC} can; quantize again so")
    granularity = fields.get("granularity") or {}
    per, details = granularity.get("_type", "PerRow"), granularity.get("_data") or {}
    if per not in ("PerRow", "PerGroup") or (kind == DYNAMIC and per == "PerGroup"):
        raise QtoolError(f"{where}: torchao's {kind} {per} cannot be read, PerRow can, and PerGroup for weights alone")
    mapping = (fields.get("act_mapping_type") or {}).get("_data", "SYMMETRIC")
    if mapping != "SYMMETRIC":
        raise QtoolError(f"{where}: {mapping} activations (act_mapping_type) cannot be read, SYMMETRIC ones can")
    group = int(details["group_size"]) if per == "PerGroup" else None
    return group, ActivationScheme(bits=8) if kind == DYNAMIC else None
