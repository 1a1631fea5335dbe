"""Reads quantized linears of ONNX folders, as export/onnx writes them: in MatMulNBits, or DequantizeLinear before a MatMul.

    NAME.qweight    NAME.scales    NAME.zero_points, of asymmetric ones
See qtool/formats/onnx_layouts.py. What stands in place of a quantization_config is read from the graph's nodes.
Source: onnxruntime 1.31, docs/ContribOperators.md (com.microsoft.MatMulNBits), and ONNX 1.23.
"""

from typing import Any

import torch

from qtool.errors import QtoolError
from qtool.formats.onnx_layouts import unpack
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.onnx_file import read_header, read_linear_parts
from qtool.model.readers import scheme_of


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense."""
    form = read_header(checkpoint.folder).forms.get(name)
    return None if form is None else scheme_of(name, form.bits, form.group, form.symmetric, torch.float32)


def read_linear(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where they are dense."""
    scheme = read_scheme(checkpoint, name, config)
    if scheme is None:
        return None
    try:
        form = read_header(checkpoint.folder).forms[name]
        return unpack(read_linear_parts(checkpoint.folder, name), form, scheme.weights), scheme
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error
