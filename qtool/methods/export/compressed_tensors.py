"""A compressed-tensors checkpoint: packed integers, NVFP4, MXFP4 and FP8, in the layouts that transformers reads.

The layouts stand in qtool/formats/compressed_layouts.py: weights of 2 to 8 bits, nvfp4, mxfp4, mxfp8_e4m3, and e4m3 with plain
scales by row or group (FP8). The linears of one scheme are one group in config.json's quantization_config, named one by one,
so that nothing hangs on patterns; linears left dense are listed under `ignore`.
Three things transformers 5.23 reads only by decoding them while it loads (its integrations/compressed_tensors.py), in the
dtype of the scales, here the model's:

- Packed zero points. compressed-tensors 0.20 builds the modules that transformers loads into with unpacked ones (on the
  meta device its packing skips them), and transformers refuses the difference, whoever wrote the file. `dequantize` in the
  quantization_config lets it decode instead, which it does by one scheme for all linears. Zero points in a model of
  several schemes are written without it: transformers refuses to load them, runtimes that unpack by themselves need not.
- NVFP4, MXFP4 and MXFP8 in a model that is not in bfloat16: the library decodes them to bfloat16, whatever the model is in.
  With several schemes, or quantized activations, transformers loads such a model, but its linears refuse to multiply.
- The experts of a mixture. They are packed one by one and make a group of their own, found by the word experts in its
  pattern. One symmetric scheme for weights alone, of whole numbers or MXFP4, must serve them all: NVFP4 is decoded without
  its global scale, FP8 by group not at all. Other experts are refused before any file is written. MXFP4's multiply in
  bfloat16, whatever the model is in.

Static scales of inputs are stored beside the weights, those of NVFP4 inputs, which serve all linears that read them, likewise
as reciprocals. NVFP4 inputs that find their float32 scale at run time have no place here.
NVFP4's scale of a tensor is stored as its reciprocal, weight_global_scale. The library divides by that where qtool multiplies:
where it is no power of two, as other tools choose it, a weight on the border of two bfloat16 numbers may become the other
one, and the export is not called lossless.
vLLM joins linears that share an input (q, k, v; gate, up) and takes the largest weight_global_scale for all of them. Steps that
see text give such linears of one scheme a common one; after rounding without text some come out too small there, by half or
more, so that `runtime: vllm` is refused.
Source: compressed-tensors 0.20, https://github.com/vllm-project/compressed-tensors.
For: transformers and vLLM, integer and floating weights.
Costs: writing the file.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.formats.compressed_layouts import activation_arguments, decode, has_plain_scales, layout_of, pack, weight_arguments
from qtool.formats.kivi import KiviScheme
from qtool.formats.scheme import Scheme
from qtool.layers.quant_linear import QuantLinear
from qtool.model.architectures import is_router
from qtool.model.checkpoint import EXPERT
from qtool.model.handle import ModelHandle
from qtool.model.writer import Encode, Storage, written_by
from qtool.options import ExportOptions
from qtool.registry import Method

WHERE = "export/compressed_tensors"
EXPERTS = r"re:.*\.experts\."  # target of the experts' group
PACKED = ("pack-quantized", "mxfp4-pack-quantized")  # layouts whose experts transformers 5.23 decodes


class CompressedTensorsOptions(ExportOptions):
    """The format leaves nothing else to choose."""


def storage(model: ModelHandle, schemes: dict[str, Scheme], options: CompressedTensorsOptions) -> Storage:
    """What the checkpoint is made of."""
    config = quantization_config(model, schemes) | cache_config(model)
    return Storage(encoder(model, schemes, "dequantize" in config), config)


def encoder(model: ModelHandle, schemes: dict[str, Scheme], must_decode: bool) -> Encode:
    """Of a linear to the tensors of the checkpoint's own that it comes from; `must_decode`: see quantization_config."""

    def encode(name: str, layer: QuantLinear) -> tuple[dict[str, Tensor], bool]:
        assert layer.low_rank is None, f"{name}: the pipeline hands no low-rank factors to this export"
        is_exact = torch.equal(decode(layer.qt, model.dtype), layer.weight_values(model.dtype))
        stored = model.checkpoint.stored_as(name)
        n_out = layer.out_features // len(stored)
        found: dict[str, Tensor] = {}
        for index, part in enumerate(stored):
            rows = layer.qt.rows(index * n_out, (index + 1) * n_out)
            try:
                tensors = pack(rows, schemes[name], layer.inputs)
            except QtoolError as error:
                raise QtoolError(f"{WHERE}: {part}: {error}") from error
            if has_plain_scales(layer.scheme) and (must_decode or EXPERT.fullmatch(name)):
                tensors["weight_scale"] = rows.scale.to(model.dtype)  # [out, groups]
            found |= {f"{part}.{key}": tensor for key, tensor in tensors.items()}
        return found, is_exact

    return encode


def check_model(model: ModelHandle, options: CompressedTensorsOptions) -> None:
    """Raise QtoolError, before any work, for a model whose blocks the format cannot hold."""
    for name in model.linear_names():
        if not model.checkpoint.stored_as(name):
            raise QtoolError(f"{WHERE}: {name}: experts that checkpoints keep fused cannot be held; use export/safetensors")
        kind = type(model.model.get_submodule(name))
        if not issubclass(kind, nn.Linear):
            raise QtoolError(f"{WHERE}: {name}: {kind.__name__} cannot be held, nn.Linear can; use export/safetensors")


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: CompressedTensorsOptions) -> None:
    """Raise QtoolError where nothing is quantized, or more than the format can say."""
    if not schemes:
        raise QtoolError(f"{WHERE}: no linear is quantized; put a quantize step before it, or use export/safetensors")
    for name, scheme in schemes.items():
        if scheme.weights.double_quant or scheme.weights.group_along != "out_channel":
            raise QtoolError(f"{WHERE}: {name}: {scheme}: this export holds plain scales along `in`; use export/safetensors")
        if scheme.weights.zero_dtype != "int":
            raise QtoolError(
                f"{WHERE}: {name}: {scheme}: zero points must be codes, as in w4a16g128-asym; quantize so, or use "
                "export/safetensors"
            )
        if layout_of(scheme) is None:
            raise QtoolError(
                f"{WHERE}: {name}: {scheme}: this export holds whole numbers and e4m3 with plain scales, nvfp4, mxfp4 and "
                "mxfp8_e4m3; quantize so, or use export/safetensors"
            )
        if scheme.activations is not None and activation_arguments(scheme.activations) is None:
            raise QtoolError(
                f"{WHERE}: {name}: {scheme}: this export can say of inputs that they are whole numbers or e4m3, scaled per "
                "token or static, mxfp4, mxfp8_e4m3, or nvfp4 after quantize/inputs; quantize so, or use export/qtool"
            )
        if scheme.kv is not None:
            raise QtoolError(f"{WHERE}: {name}: {scheme}: write quantize/kv_cache as a step, and leave kv{scheme.kv.bits} out")
    experts = [name for name in model.linear_names() if EXPERT.fullmatch(name)]
    found = {schemes.get(name) for name in experts}
    is_fit = {s is not None and layout_of(s) in PACKED and s.weights.symmetric and s.activations is None for s in found}
    if len(found) > 1 or False in is_fit:
        words = ", ".join(sorted("left dense" if scheme is None else str(scheme) for scheme in found))
        raise QtoolError(
            f"{WHERE}: {experts[0].rsplit('.', 2)[0]}: experts are {words}; those of a model can be held where all share one "
            "symmetric scheme for weights alone, whole numbers such as w4a16g128 or mxfp4: quantize them so, or use "
            "export/safetensors"
        )


def quantization_config(model: ModelHandle, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """config.json's quantization_config: one group for each scheme, its linears by name, and one for the experts."""
    targets: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if not EXPERT.fullmatch(name):
            targets.setdefault(scheme, []).append(name)
    must_decode = any(decodes_while_loading(scheme, model.dtype) for scheme in targets)
    experts = {scheme for name, scheme in schemes.items() if EXPERT.fullmatch(name)}
    groups = [group_config(scheme, names) for scheme, names in targets.items()]
    groups += [group_config(scheme, [EXPERTS]) for scheme in experts]
    formats = {group["format"] for group in groups}
    modules = model.model.named_modules()
    dense = [name for name, module in modules if (isinstance(module, nn.Linear) or is_router(name)) and name not in schemes]
    config = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": dense,
    }
    return config | {"dequantize": True} if must_decode and len(targets) == 1 else config


def cache_config(model: ModelHandle) -> dict[str, Any]:
    """kv_cache_scheme of a model whose cache is quantized; its scales are tensors of the attentions, k_scale and v_scale."""
    scheme = model.cache()
    assert not isinstance(scheme, KiviScheme), "an export that cannot hold what KIVI keeps is refused before"
    if scheme is None:
        return {}
    kind = "float" if scheme.format == "e4m3" else "int"
    how = {"num_bits": scheme.bits, "type": kind, "strategy": "tensor", "symmetric": True, "dynamic": False}
    return {"kv_cache_scheme": how}


def decodes_while_loading(scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether transformers must decode these weights while it loads them into a model of `dtype`."""
    if scheme.activations is not None:
        return False  # it would leave them as they are
    return not scheme.weights.symmetric or (dtype != torch.bfloat16 and not has_plain_scales(scheme.weights))


def group_config(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """One config group: what the linears named in `targets` are stored as."""
    activations = scheme.activations
    return {
        "format": layout_of(scheme),
        "targets": targets,
        "weights": weight_arguments(scheme.weights),
        "input_activations": activations and activation_arguments(activations),
        "output_activations": None,
    }


METHOD = Method(
    run=written_by(storage),
    options=CompressedTensorsOptions,
    scope="model",
    check=check_model,
    holds=check_schemes,
    storage=storage,
    holds_cache=True,
)
