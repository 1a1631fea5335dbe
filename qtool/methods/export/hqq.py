"""An HQQ checkpoint: whole numbers with float zero points, as hqq's layers and transformers 4 load them from safetensors.

The layout stands in qtool/formats/hqq_layouts.py: each linear's tensors are the state of an HQQLinear, which says by itself
how it is stored, so that widths and groups may differ from linear to linear. 1, 2, 3, 4 or 8 bits, symmetric, with zero points
that are codes (-asym) or float16 (-asymf16), which no other export holds. Scales keep their dtype.
Who loads it: transformers 4 with hqq, by from_pretrained, in float32: 4.57 decodes to that and multiplies by no other; and
HQQLinear's load_state_dict under any transformers. transformers 5.23 builds no HQQLinear: it passes over these tensors with a
warning, and draws the weights at random. hqq's own from_quantized reads a pickle (qmodel.pt), which qtool does not write.
`lossless` speaks of the file alone: hqq casts scales and zero points to the dtype that it computes in, and decodes in that.
Source: hqq 0.2.8, https://github.com/mobiusml/hqq; Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog.
For: models by quantize/hqq with float zero points, for hqq's layers. compressed_tensors and gptq hold -asym for more runtimes.
Costs: writing the file.
"""

from collections import Counter
from typing import Any

from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.hqq_layouts import CODES_OF_WORD, flags_of, numbers_of, pack_hqq, unpack_hqq
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import check_no_experts, check_weights_alone, dense_linears
from qtool.model.writer import Encode, Storage, packed_by, rope_settings, written_by
from qtool.options import ExportOptions
from qtool.registry import Method

WHERE = "export/hqq"
BITS = (1, 2, 3, 4, 8)


class HqqOptions(ExportOptions):
    """The format leaves nothing else to choose."""


def storage(model: ModelHandle, schemes: dict[str, Scheme], options: HqqOptions) -> Storage:
    """What the checkpoint is made of."""
    return Storage(encoder(model), quantization_config(model, schemes), settings=rope_settings(model))


def encoder(model: ModelHandle) -> Encode:
    """Of a linear to the state of its HQQLinear."""

    def pack(qt: QuantizedTensor) -> tuple[dict[str, Tensor], Tensor]:
        parts = pack_hqq(qt, model.dtype)
        return parts, unpack_hqq(parts).dequantize()

    return packed_by(pack, WHERE, model.dtype)


def check_model(model: ModelHandle, options: HqqOptions) -> None:
    """Raise QtoolError, before any work, for a model whose blocks the format cannot hold."""
    check_no_experts(WHERE, model)


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: HqqOptions) -> None:
    """Raise QtoolError where nothing is quantized, or to more than hqq's layers take."""
    check_weights_alone(WHERE, model, schemes)
    for name, scheme in schemes.items():
        weights, where = scheme.weights, f"{WHERE}: {name}: {scheme}"
        if weights.format != "int" or weights.scale_dtype.startswith("float8"):
            raise QtoolError(f"{where}: hqq has whole numbers with plain scales; use export/safetensors")
        if weights.bits not in BITS:
            raise QtoolError(f"{where}: hqq packs {', '.join(map(str, BITS))} bits; quantize so, or use export/gguf")
        out, columns = model.linear_shape(name)
        n_groups, n_codes = out * columns // (weights.group or columns), CODES_OF_WORD[weights.bits]
        if weights.bits != 3 and n_groups % n_codes:
            raise QtoolError(
                f"{where}: hqq puts codes of {n_codes} groups into a byte, and {n_groups} groups do not divide; add it to "
                "ignore"
            )
        hidden = next((dense for dense in dense_linears(model, schemes) if dense in name), None)
        if hidden is not None:
            raise QtoolError(
                f"{where}: {hidden} is dense, and transformers leaves dense what has that in its name; quantize both, or "
                "neither"
            )


def quantization_config(model: ModelHandle, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """config.json's quantization_config; of what differs from linear to linear, what most of them have."""
    weights = Counter(scheme.weights for scheme in schemes.values()).most_common(1)[0][0]
    flags = flags_of(weights)
    stated = {name: flags[name] for name in ("channel_wise", "optimize", "round_zero", "view_as_float")}
    return {
        "quant_method": "hqq",
        "quant_config": {
            "weight_quant_params": numbers_of(weights.bits, weights.group) | stated,
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": dense_linears(model, schemes),
    }


METHOD = Method(
    run=written_by(storage),
    options=HqqOptions,
    scope="model",
    check=check_model,
    holds=check_schemes,
    storage=storage,
    schemes=("w4a16g32", "w3a16-asymf16"),
)
