"""Reads linears in the layout of hqq's safetensors files, whoever wrote them: 1, 2, 3, 4, 5, 6 or 8 bits, groups along `in`.

    NAME.W_q    NAME.scale, NAME.zero [out groups, 1]    NAME.nbits, NAME.group_size, NAME.shape ...
See qtool/formats/hqq_layouts.py. The tensors of each linear say how it is stored; nothing of quantization_config counts.
Source: hqq 0.2.8, core/quantize.py; transformers 4.57, quantizers/quantizer_hqq.py.
"""

from typing import Any

from qtool.errors import QtoolError
from qtool.formats.hqq_layouts import PARTS, SCHEME_PARTS, scheme_of_state, unpack_hqq
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.readers import read_parts


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense. Raises QtoolError for what qtool cannot decode."""
    parts = read_parts(checkpoint, name, SCHEME_PARTS)
    try:
        return Scheme(weights=scheme_of_state(parts)) if parts else None
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error


def read_linear(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    parts = read_parts(checkpoint, name, PARTS)
    try:
        quantized = unpack_hqq(parts) if parts else None
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error
    return None if quantized is None else (quantized, Scheme(weights=quantized.scheme))
