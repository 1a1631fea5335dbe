"""A GPTQ checkpoint: packed integer weights in the layout of AutoGPTQ and GPTQModel.

The layout stands in qtool/formats/group_layouts.py, what kernels ask of a model in qtool/model/kernel_limits.py. Scales are
float16, as the layout has them; kernels multiply in 16 bits, and GPTQModel first rounds scales to the dtype it runs in, which
leaves bfloat16 ones as they were. `lossless` speaks of the file alone. The scheme that most linears have is
quantization_config's own; `dynamic` names all others one by one, dense ones with a minus, and once more by the name of what
runtimes join them into. quantize_config.json repeats it for tools that look there.
Differs from GPTQ's own code: groups are always neighbours (desc_act: false), whatever order a method quantized in.
Why zero points need gptq_v2: format gptq stores them less one and cannot hold 0, and GPTQModel 7.7 takes them there only
from its own hand. Symmetric schemes go into either; gptq is what more runtimes read.
Source: GPTQModel 7.7, https://github.com/ModelCloud/GPTQModel.
For: GPTQModel, integer weights of 2, 3, 4 or 8 bits; vLLM and SGLang take those of 4 and 8 without zero points.
compressed_tensors holds more, and loads in plain transformers.
Costs: writing the file.
"""

import re
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.group_layouts import GPTQ_BITS, pack_gptq
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.architectures import fused_units
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import check_linears, check_no_experts, dense_linears, head_name
from qtool.model.writer import Encode, Storage, packed_by, written_by
from qtool.options import ExportOptions
from qtool.registry import Method

WHERE = "export/gptq"
GROUPS = (16, 32, 64, 128, 256, 512, 1024)
Setting = dict[str, int | bool]


class GptqOptions(ExportOptions):
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = Field(
        None,
        description="gptq stores zero points less one, gptq_v2 as they are; null: gptq where all schemes are symmetric, which "
        "more runtimes read, else gptq_v2",
    )


def storage(model: ModelHandle, schemes: dict[str, Scheme], options: GptqOptions) -> Storage:
    """What the checkpoint is made of."""
    layout = layout_of(schemes, options)
    config = quantization_config(model, schemes, layout)
    return Storage(encoder(model, layout), config, files={"quantize_config.json": config})


def layout_of(schemes: dict[str, Scheme], options: GptqOptions) -> str:
    """The checkpoint format, gptq or gptq_v2."""
    has_zeros = any(not scheme.weights.symmetric for scheme in schemes.values())
    return options.checkpoint_format or ("gptq_v2" if has_zeros else "gptq")


def encoder(model: ModelHandle, layout: str) -> Encode:
    """Of a linear to the tensors that the layout stores."""

    def pack(qt: QuantizedTensor) -> tuple[dict[str, Tensor], Tensor]:
        parts = pack_gptq(qt, is_v2=layout == "gptq_v2")
        return parts, replace(qt, scale=parts["scales"].T).dequantize()

    return packed_by(pack, WHERE, model.dtype)


def check_model(model: ModelHandle, options: GptqOptions) -> None:
    """Raise QtoolError, before any work, for a model whose blocks the format cannot hold."""
    check_no_experts(WHERE, model)


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: GptqOptions) -> None:
    """Raise QtoolError where nothing is quantized, or to more than format and kernels take."""
    check_linears(WHERE, model, schemes, GPTQ_BITS, GROUPS)
    for name, scheme in schemes.items():
        if options.checkpoint_format == "gptq" and not scheme.weights.symmetric:
            raise QtoolError(
                f"{WHERE}: {name}: {scheme}: checkpoint_format gptq cannot hold every zero point; use gptq_v2, or a symmetric "
                "scheme"
            )


def quantization_config(model: ModelHandle, schemes: dict[str, Scheme], layout: str) -> dict[str, Any]:
    """config.json's quantization_config."""
    settings = {name: setting_of(scheme) for name, scheme in schemes.items()}
    settings |= {
        unit: settings[members[0]] for unit, members in fused_units(model.linear_names()).items() if members[0] in schemes
    }
    head = head_name(model)
    counted = Counter(scheme for name, scheme in schemes.items() if name != head) or Counter(schemes.values())
    base = setting_of(counted.most_common(1)[0][0])
    dense = [name for name in dense_linears(model, schemes) if name != head]
    dynamic: dict[str, Setting] = {f"-:{pattern_of(name)}": {} for name in (*dense, *fused_units(dense))}
    dynamic |= {f"+:{pattern_of(name)}": setting for name, setting in settings.items() if setting != base}
    config = {
        "quant_method": "gptq",
        **base,
        "desc_act": False,
        "checkpoint_format": layout,
        "lm_head": head in schemes,
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def setting_of(scheme: Scheme) -> Setting:
    """What the config says of one linear."""
    weights = scheme.weights
    return {"bits": weights.bits, "group_size": weights.group or -1, "sym": weights.symmetric}


def pattern_of(name: str) -> str:
    """The regular expression that fits one name."""
    return f"^{re.escape(name)}$"


METHOD = Method(
    run=written_by(storage), options=GptqOptions, scope="model", check=check_model, holds=check_schemes, storage=storage
)
