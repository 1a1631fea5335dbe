"""An AWQ checkpoint: packed four-bit weights in the layout "gemm" of AutoAWQ.

The layout stands in qtool/formats/group_layouts.py, what kernels ask of a model in qtool/model/kernel_limits.py. Any four-bit
scheme goes into it, however it was found; symmetric ones with 8 for every zero point. Scales are float16, as the layout has
them; kernels multiply in 16 bits, and `lossless` speaks of the file alone. One group size serves the whole model; dense
linears stand in modules_to_not_convert, and in `dynamic`, where GPTQModel looks for them. The head stays dense: runtimes do
not look for it in this layout.
Source: Lin et al. 2023, arXiv:2306.00978, in the layout of AutoAWQ 0.2, as GPTQModel 7.7 reads it.
For: vLLM, SGLang, transformers with gptqmodel; four-bit weights. gptq holds other widths and mixed schemes.
Costs: writing the file.
"""

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.group_layouts import AWQ_BITS, pack_awq
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import check_linears, check_no_experts, dense_linears, head_name
from qtool.model.writer import Encode, Storage, packed_by, written_by
from qtool.options import ExportOptions
from qtool.registry import Method

WHERE = "export/awq"
GROUPS = (16, 32, 64, 128)


class AwqOptions(ExportOptions):
    """The format leaves nothing else to choose."""


def storage(model: ModelHandle, schemes: dict[str, Scheme], options: AwqOptions) -> Storage:
    """What the checkpoint is made of."""
    return Storage(encoder(model), quantization_config(model, schemes))


def encoder(model: ModelHandle) -> Encode:
    """Of a linear to the tensors that the layout stores."""

    def pack(qt: QuantizedTensor) -> tuple[dict[str, Tensor], Tensor]:
        parts = pack_awq(qt)
        return parts, replace(qt, scale=parts["scales"].T).dequantize()

    return packed_by(pack, WHERE, model.dtype)


def check_model(model: ModelHandle, options: AwqOptions) -> None:
    """Raise QtoolError, before any work, for a model whose blocks the format cannot hold."""
    check_no_experts(WHERE, model)


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: AwqOptions) -> None:
    """Raise QtoolError where nothing is quantized, or to more than format and kernels take."""
    check_linears(WHERE, model, schemes, AWQ_BITS, GROUPS)
    first, head = next(iter(schemes)), head_name(model)
    for name, scheme in schemes.items():
        if name == head:
            raise QtoolError(
                f"{WHERE}: {name}: {scheme}: runtimes take a dense head alone; add it to ignore, or use export/gptq"
            )
        if scheme.weights.group != schemes[first].weights.group:
            raise QtoolError(
                f"{WHERE}: {first} is {schemes[first]}, {name} is {scheme}, but this format has one group size; use one, or "
                "export/gptq"
            )


def quantization_config(model: ModelHandle, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """config.json's quantization_config."""
    scheme, dense, head = next(iter(schemes.values())), dense_linears(model, schemes), head_name(model)
    named: dict[str, dict[str, int]] = {f"-:^{re.escape(name)}$": {} for name in dense if name != head}
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.weights.group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": dense,
    }
    return config | ({"dynamic": named} if named else {})


METHOD = Method(
    run=written_by(storage), options=AwqOptions, scope="model", check=check_model, holds=check_schemes, storage=storage
)
