"""A compressed-tensors checkpoint: packed integer weights, in the layout that transformers reads.

Weights alone are written pack-quantized, weights of 2 to 8 bits with quantized activations int-quantized (one byte a
code); the layouts stand in qtool/model/readers/compressed_tensors.py. The linears of one scheme are one group in config.json's
quantization_config, named one by one, so that nothing hangs on patterns; linears left dense are listed under `ignore`.
Two things transformers 5.23 reads only by decoding them while it loads (its integrations/compressed_tensors.py), in the
dtype of the scales, here the model's:

- Packed zero points. compressed-tensors 0.20 builds the modules that transformers loads into with unpacked ones (on the
  meta device its packing skips them), and transformers refuses the difference, whoever wrote the file. `dequantize` in the
  quantization_config lets it decode instead, which it does by one scheme for all linears. Zero points in a model of
  several schemes are written without it: transformers refuses to load them, runtimes that unpack by themselves need not.
- The experts of a mixture. They are packed one by one and make a group of their own, found by the word experts in its
  pattern. One symmetric scheme for weights alone must serve them all; other experts are refused before any file is written.

Source: compressed-tensors 0.20, https://github.com/vllm-project/compressed-tensors.
For: transformers and vLLM, integer weights.
Costs: writing the file.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.artifact import Artifact, describe_folder
from qtool.errors import QtoolError
from qtool.formats.packing import pack_int32
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, to_groups
from qtool.layers.quant_linear import QuantLinear
from qtool.model.architectures import is_router
from qtool.model.checkpoint import EXPERT
from qtool.model.handle import ModelHandle
from qtool.model.writer import write_checkpoint
from qtool.options import Options
from qtool.registry import Method

WHERE = "export/compressed_tensors"
EXPERTS = r"re:.*\.experts\."  # target of the experts' group


class CompressedTensorsOptions(Options):
    """The format leaves nothing to choose."""


def compressed_tensors(model: ModelHandle, out: Path, options: CompressedTensorsOptions) -> Artifact:
    """Write the model into `out`; raises QtoolError, before anything is written, for what the format cannot hold."""
    schemes = model.schemes()
    check_model(model, options)
    check_schemes(model, schemes, options)
    config = quantization_config(model, schemes)
    is_lossless = True

    def encode(name: str, layer: QuantLinear) -> dict[str, Tensor]:
        nonlocal is_lossless
        assert layer.low_rank is None, f"{name}: the pipeline hands no low-rank factors to this export"
        is_lossless &= torch.equal(decode(layer.qt, model.dtype), layer.weight_values(model.dtype))
        stored = model.checkpoint.stored_as(name)
        n_out = layer.out_features // len(stored)
        found: dict[str, Tensor] = {}
        for index, part in enumerate(stored):
            rows = layer.qt.rows(index * n_out, (index + 1) * n_out)
            tensors = pack(rows) if layer.activations is None else as_bytes(rows)
            if "dequantize" in config or EXPERT.fullmatch(name):
                tensors["weight_scale"] = rows.scale.to(model.dtype)  # [out, groups]
            found |= {f"{part}.{key}": tensor for key, tensor in tensors.items()}
        return found

    write_checkpoint(model, out, encode, config)
    return describe_folder("compressed_tensors", out, is_lossless)


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
        if scheme.weights.format != "int" or scheme.weights.scale_dtype.startswith("float8"):
            raise QtoolError(f"{WHERE}: {name}: {scheme}: this export holds whole numbers; use export/safetensors")
        if scheme.weights.double_quant or scheme.weights.group_along != "out_channel":
            raise QtoolError(f"{WHERE}: {name}: {scheme}: this export holds plain scales along `in`; use export/safetensors")
        if scheme.weights.zero_dtype != "int":
            raise QtoolError(
                f"{WHERE}: {name}: {scheme}: zero points must be codes, as in w4a16g128-asym; quantize so, or use "
                "export/safetensors"
            )
        if scheme.kv is not None:
            raise QtoolError(f"{WHERE}: {name}: {scheme}: a cache cannot be held; leave kv{scheme.kv.bits} out")
    experts = [name for name in model.linear_names() if EXPERT.fullmatch(name)]
    found = {schemes.get(name) for name in experts}
    if any(s is None or s.activations or not s.weights.symmetric for s in found) or len(found) > 1:
        words = ", ".join(sorted("left dense" if scheme is None else str(scheme) for scheme in found))
        raise QtoolError(
            f"{WHERE}: {experts[0].rsplit('.', 2)[0]}: experts are {words}; those of a model can be held where all share one "
            "symmetric scheme for weights alone, such as w4a16g128: quantize them so, or use export/safetensors"
        )


def quantization_config(model: ModelHandle, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """config.json's quantization_config: one group for each scheme, its linears by name, and one for the experts."""
    targets: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if not EXPERT.fullmatch(name):
            targets.setdefault(scheme, []).append(name)
    has_zeros = any(scheme.activations is None and not scheme.weights.symmetric for scheme in targets)
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
    return config | {"dequantize": True} if has_zeros and len(targets) == 1 else config


def group_config(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """One config group: what the linears named in `targets` are stored as."""
    weights, activations = scheme.weights, scheme.activations
    return {
        "format": "pack-quantized" if activations is None else "int-quantized",
        "targets": targets,
        "weights": {
            "num_bits": weights.bits,
            "type": "int",
            "symmetric": weights.symmetric,
            "strategy": "channel" if weights.group is None else "group",
            "group_size": weights.group,
            "dynamic": False,
        },
        "input_activations": activations
        and {
            "num_bits": activations.bits,
            "type": "int",
            "symmetric": activations.symmetric,
            "strategy": "token",
            "dynamic": True,
        },
        "output_activations": None,
    }


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one linear, pack-quantized."""
    parts = {
        "weight_packed": quantized.packed(),  # [out, words]
        "weight_scale": quantized.scale,  # [out, groups]
        "weight_shape": torch.tensor(quantized.shape),  # [2]
    }
    if quantized.zero is not None:
        parts["weight_zero_point"] = pack_int32(quantized.zero.T, quantized.scheme.bits).T  # [words of out, groups]
    return parts


def as_bytes(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one linear, int-quantized: codes and zero points shifted to signed where they are not."""
    shift = 0 if quantized.zero is None else 1 << (quantized.scheme.bits - 1)
    parts = {
        "weight": (quantized.codes.to(torch.int16) - shift).to(torch.int8),  # [out, in]
        "weight_scale": quantized.scale,  # [out, groups]
    }
    if quantized.zero is not None:
        parts["weight_zero_point"] = (quantized.zero.to(torch.int16) - shift).to(torch.int8)  # [out, groups]
    return parts


def decode(quantized: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Weights [out, in] as the format's readers decode them: they hold scales, and multiply, in the model's dtype."""
    grouped = to_groups(quantized.codes.to(torch.int16), quantized.scheme)  # [out, groups, group]
    if quantized.zero is not None:
        grouped = grouped - quantized.zero.unsqueeze(-1)
    return (grouped.to(dtype) * quantized.scale.to(dtype).unsqueeze(-1)).flatten(1)


METHOD = Method(run=compressed_tensors, options=CompressedTensorsOptions, scope="model", check=check_model, holds=check_schemes)
