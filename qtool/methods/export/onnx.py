"""An ONNX model that onnxruntime runs: quantized weights as codes, attention with a cache of earlier tokens.

model.onnx is the graph, model.onnx.data holds its tensors; beside them stand config.json and the tokenizer's files. Inputs and
outputs have the names that optimum gives them (see qtool/model/onnx_graph.py; layouts: formats/onnx_layouts.py).
    w2, w4, w8 in groups of 16 to 256    matmul_nbits: MatMulNBits, onnxruntime's own operator
                                         qdq: DequantizeLinear and MatMul, ONNX's own
    w2, w4, w8 with a scale for a row    qdq in either layout
MatMulNBits' accuracy_level is 1, inputs and sums in float32, unless 4 is asked for: inputs rounded to 8 bits, which moves a
linear's outputs by half a percent, and which no measurement of qtool's sees. w4 is about as fast with 1; w2 and w8 take ten
times as long for a token with 1, as onnxruntime 1.31 has no kernel for them (measured with AVX-512 VNNI). onnxruntime turns
qdq into MatMulNBits too when it loads, and there its session option session.qdq_matmulnbits_accuracy_level decides, which is
4 unless set. w2 in qdq asks for opset 25 (INT2), all else for opset 21.
All is computed in float32, as onnxruntime's CPU kernels do, whatever the model's dtype; dense tensors are stored in that dtype
and widened on loading, scales are stored in float32, which holds every dtype's. So `lossless` speaks of every stored number;
sums of a bfloat16 model are nearer to the exact ones here.
Source: ONNX 1.23, https://onnx.ai/onnx, and onnxruntime 1.31, docs/ContribOperators.md (com.microsoft.MatMulNBits).
For: onnxruntime on CPUs and what is built on it, such as optimum; llama, mistral, qwen2 and qwen3 models. pip install
qtool[onnx].
Costs: writing the file; onnxruntime keeps a dense head in 32 bits a weight.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.onnx_layouts import ONNX_BITS, ONNX_GROUPS, Form, Layout, Part, form_of, pack, unpack
from qtool.formats.scheme import Scheme
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import check_whole_numbers, head_name
from qtool.model.onnx_file import KINDS, OnnxWriter, dense, files_size, require_onnx
from qtool.model.onnx_graph import build_graph, check_family
from qtool.model.sizes import settings_size
from qtool.model.writer import unit_tensors, write_settings
from qtool.options import ExportOptions
from qtool.registry import Method

WHERE = "export/onnx"


class OnnxOptions(ExportOptions):
    layout: Layout = Field(
        "matmul_nbits",
        description="how quantized linears in groups are written: matmul_nbits, onnxruntime's own operator; qdq, "
        "DequantizeLinear and MatMul, which other runtimes read too",
    )
    accuracy_level: Literal[1, 4] = Field(
        1,
        description="MatMulNBits' own: 1, inputs and sums in float32; 4, inputs rounded to 8 bits, ten times as fast for w2 "
        "and w8; qdq has none",
    )

    @model_validator(mode="after")
    def _agree(self) -> "OnnxOptions":
        if self.layout == "qdq" and self.accuracy_level != 1:
            raise ValueError("accuracy_level is MatMulNBits'; with qdq the session that loads the file decides, leave it away")
        return self


def onnx(model: ModelHandle, out: Path, options: OnnxOptions) -> bool:
    """Write the model into `out`; returns whether every number of it is stored as it is."""
    forms = forms_of(model, model.schemes(), options)
    graph, writer, is_lossless = build_graph(model, forms, options.accuracy_level), OnnxWriter(out), True
    parts: dict[str, Part] = {}  # of the quantized linears in memory

    def encode(name: str, layer: QuantLinear) -> tuple[dict[str, Tensor], bool]:
        assert layer.low_rank is None, f"{name}: the pipeline hands no low-rank factors to this export"
        own = pack(layer.qt, options.layout)
        parts.update({f"{name}.{part}": value for part, value in own.items()})
        W = unpack(own, forms[name], layer.scheme).dequantize()  # [out, in]
        return {f"{name}.{part}": value.data for part, value in own.items()}, torch.equal(W, layer.weight_values(torch.float32))

    for unit, is_exact in unit_tensors(model, encode, fuses_experts=False):
        is_lossless &= is_exact
        while unit:  # so that nothing is left of a block when the next is loaded
            name, tensor = unit.popitem()
            writer.add(name, parts.pop(name) if name in parts else dense(tensor))
    writer.close(graph)
    write_settings(model, out)
    return is_lossless


def forms_of(model: ModelHandle, schemes: dict[str, Scheme], options: OnnxOptions) -> dict[str, Form]:
    """How each quantized linear's weights are held."""
    return {name: form_of(scheme.weights, model.linear_shape(name), options.layout) for name, scheme in schemes.items()}


def size(model: ModelHandle, schemes: dict[str, Scheme], options: OnnxOptions) -> int:
    """Bytes of the folder, before any work."""
    forms = forms_of(model, schemes, options)
    tensors = {name: (KINDS[model.dtype], tuple(p.shape)) for name, p in model.model.named_parameters()}
    for name, form in forms.items():
        tensors |= {f"{name}.{part}": (form.kinds()[part], shape) for part, shape in form.shapes().items()}
    return files_size(build_graph(model, forms, options.accuracy_level), tensors) + settings_size(model)


def check_model(model: ModelHandle, options: OnnxOptions) -> None:
    """Raise QtoolError, before any work, for a model that has no graph here, and where onnx is not installed."""
    try:
        require_onnx()
        check_family(model)
    except QtoolError as error:
        raise QtoolError(f"{WHERE}: {error}") from error


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: OnnxOptions) -> None:
    """Raise QtoolError for what the operators do not decode."""
    for name, scheme in schemes.items():
        check_whole_numbers(f"{WHERE}: {name}: {scheme}", scheme, ONNX_BITS, ONNX_GROUPS)
        if model.is_tied and name == head_name(model):
            raise QtoolError(f"{WHERE}: {name}: a head that is the embedding has no codes of its own; add it to ignore")


METHOD = Method(
    run=onnx,
    options=OnnxOptions,
    scope="model",
    check=check_model,
    holds=check_schemes,
    size=size,
    schemes=("w4a16g32", "w4a16g32-asym", "w8a16"),
)
