"""A bitsandbytes checkpoint: NF4, FP4 or int8 weights as transformers loads them with bitsandbytes, rounded no further.

The layouts stand in qtool/formats/bnb_layouts.py: codes as the methods found them, scales in float32, which holds those of
every dtype. Four bits: nf4 and fp4_bnb in groups that bitsandbytes has blocks for, and with scales quantized themselves (-dq):
their steps are not those of bitsandbytes, but the file brings a table for them, so that nothing is rounded again. Formats,
groups and -dq may differ from linear to linear. Eight bits: w8a16, whole rows, where SCB is 127 scales; scales may be
negative. One model holds four bits or eight, and linears left dense are listed in llm_int8_skip_modules.
`lossless` speaks of the file alone. On CPUs with AVX512-BF16 bitsandbytes multiplies four-bit weights by scales in bfloat16,
which those of qtool are but for float32 ones and -dq, and asks for outputs in multiples of 32. Its int8 kernels round
activations to eight bits too, one scale a token, all but channels from llm_int8_threshold on: 6.0, its default, of w8a16, and
their own of schemes that say so, such as w8-aint8t6 (LLM.int8), which all linears of a model must share. qtool_inputs in the
config, which transformers passes over, tells qtool's reader that they do.
Source: bitsandbytes 0.50, https://github.com/bitsandbytes-foundation/bitsandbytes; Dettmers et al. 2023, arXiv:2305.14314
(NF4); Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8).
For: transformers with bitsandbytes, and QLoRA training on top of better rounding than its own.
Costs: writing the file.
"""

from collections import Counter
from typing import Any

from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.formats.bnb_layouts import BLOCKS, TYPES, pack_blocks, pack_rows, unpack_blocks, unpack_rows
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import check_no_experts, dense_linears
from qtool.model.writer import Encode, Storage, packed_by, written_by
from qtool.options import ExportOptions
from qtool.registry import Method

WHERE = "export/bitsandbytes"
THRESHOLD = 6.0  # inputs beyond it stay in 16 bits: bitsandbytes' default


class BitsandbytesOptions(ExportOptions):
    """The format leaves nothing else to choose."""


def storage(model: ModelHandle, schemes: dict[str, Scheme], options: BitsandbytesOptions) -> Storage:
    """What the checkpoint is made of."""
    return Storage(encoder(model), quantization_config(model, schemes))


def encoder(model: ModelHandle) -> Encode:
    """Of a linear to the tensors that its layout stores."""

    def pack(qt: QuantizedTensor) -> tuple[dict[str, Tensor], Tensor]:
        is_rows = qt.scheme.format == "int"
        parts = pack_rows(qt) if is_rows else pack_blocks(qt, model.dtype)
        return parts, (unpack_rows(parts) if is_rows else unpack_blocks(parts)).dequantize()

    return packed_by(pack, WHERE, model.dtype)


def check_model(model: ModelHandle, options: BitsandbytesOptions) -> None:
    """Raise QtoolError, before any work, for a model whose blocks the format cannot hold."""
    check_no_experts(WHERE, model)


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: BitsandbytesOptions) -> None:
    """Raise QtoolError where nothing is quantized, or to more than bitsandbytes takes."""
    if not schemes:
        raise QtoolError(f"{WHERE}: no linear is quantized; put a quantize step before it, or use export/safetensors")
    first = next(iter(schemes))
    for name, scheme in schemes.items():
        where = f"{WHERE}: {name}: {scheme}"
        _check_inputs(where, scheme, schemes[first])
        _check_weights(where, scheme.weights)
        kind = type(model.model.get_submodule(name))
        if issubclass(kind, nn.Linear) and kind is not nn.Linear:
            raise QtoolError(
                f"{WHERE}: {name}: transformers puts bitsandbytes' linears in place of nn.Linear, not of {kind.__name__}; use "
                "export/safetensors"
            )
        if scheme.weights.bits != schemes[first].weights.bits:
            raise QtoolError(
                f"{WHERE}: {first} is {schemes[first]}, {name} is {scheme}, but a model is loaded in four bits or in eight; "
                "use one, or export/safetensors"
            )


def _check_inputs(where: str, scheme: Scheme, first: Scheme) -> None:
    inputs = scheme.activations
    is_llm_int8 = inputs is not None and inputs.threshold is not None and (inputs.bits, scheme.weights.bits) == (8, 8)
    if (inputs is not None and not is_llm_int8) or scheme.kv is not None:
        or_so = ", or by quantize/llm_int8" if scheme.weights == WeightScheme(bits=8) else ""
        raise QtoolError(f"{where}: this export holds weights alone; quantize to {scheme.weights}{or_so}")
    if inputs is not None and inputs.threshold == 0:
        raise QtoolError(f"{where}: bitsandbytes takes a threshold of 0 for none; quantize to w8a16, or to a threshold above 0")
    if inputs != first.activations:
        raise QtoolError(f"{where}: other linears are {first}, but a model has one llm_int8_threshold; use one scheme")


def _check_weights(where: str, weights: WeightScheme) -> None:
    if weights.format not in TYPES and (weights.format, weights.bits) != ("int", 8):
        raise QtoolError(f"{where}: bitsandbytes has nf4, fp4_bnb and int of 8 bits; quantize so, or use another export")
    if not weights.symmetric or weights.group_along != "out_channel":
        raise QtoolError(
            f"{where}: bitsandbytes has no zero points, and groups along `in` alone; quantize without {weights.ending}, or use "
            "export/safetensors"
        )
    if weights.format == "int" and (weights.group is not None or weights.double_quant):
        raise QtoolError(f"{where}: its 8 bits have one plain scale for each row; quantize to w8a16, or use export/gptq")
    if weights.format in TYPES and weights.group not in BLOCKS:
        words = ", ".join(map(str, BLOCKS))
        raise QtoolError(f"{where}: its blocks are of {words}; quantize so, such as nf4g64, or use export/safetensors")


def quantization_config(model: ModelHandle, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """config.json's quantization_config; of what differs from linear to linear, what most of them have."""
    weights = Counter(scheme.weights for scheme in schemes.values()).most_common(1)[0][0]
    is_rows = weights.format == "int"
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": not is_rows,
        "load_in_8bit": is_rows,
        "llm_int8_skip_modules": dense_linears(model, schemes),
    }
    if is_rows:
        inputs = next(iter(schemes.values())).activations
        threshold = THRESHOLD if inputs is None else inputs.threshold
        said = {} if inputs is None else {"qtool_inputs": str(inputs)}
        return config | {"llm_int8_threshold": threshold, "llm_int8_has_fp16_weight": False} | said
    return config | {
        "bnb_4bit_quant_type": TYPES[weights.format],
        "bnb_4bit_use_double_quant": weights.double_quant,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


METHOD = Method(
    run=written_by(storage),
    options=BitsandbytesOptions,
    scope="model",
    check=check_model,
    holds=check_schemes,
    storage=storage,
    schemes=("nf4g64", "fp4_bnbg32-dq", "w8a16"),
)
