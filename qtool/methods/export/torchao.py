"""A torchao checkpoint: int8 weights as transformers loads them with torchao's Int8Tensor, activations in 16 bits or in 8.

    NAME._weight_qdata [out, in] int8    NAME._weight_scale [out, groups] float32    NAME._weight_zero_point [out, groups], 0
    w^ = scale qdata, in rows (w8a16, w8a8) or in groups (w8a16g128)
The metadata of the safetensors files tells each tensor's class and fields; the last file's names all of them. Scales in float32
hold those of every dtype. config.json's quant_type is one for all quantized linears.
`lossless` speaks of the file alone: in whole rows torchao multiplies by the codes first, rounds to 16 bits and then multiplies
by the scales; and it scales the activations of w8a8, a token at a time, by a rule of its own.
Why int8 alone: torchao's four-bit tensors are laid out for kernels that GPUs have, and nothing else decodes them.
Source: torchao 0.18, quantization/quantize_/workflows/int8 and prototype/safetensors, https://github.com/pytorch/ao.
For: transformers with torchao, torch.compile. compressed_tensors holds other widths.
Costs: writing the file.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import check_no_experts, dense_linears
from qtool.model.writer import Describe, Encode, Storage, packed_by, written_by
from qtool.options import ExportOptions
from qtool.registry import Method

WHERE = "export/torchao"
CODES, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"


class TorchaoOptions(ExportOptions):
    """The format leaves nothing else to choose."""


def storage(model: ModelHandle, schemes: dict[str, Scheme], options: TorchaoOptions) -> Storage:
    """What the checkpoint is made of."""
    describe = describer(model, next(iter(schemes.values())))
    return Storage(encoder(model), quantization_config(model, schemes), describe)


def encoder(model: ModelHandle) -> Encode:
    """Of a linear to the fields of its Int8Tensor."""

    def pack(qt: QuantizedTensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = qt.params().scale.squeeze(-1)  # [out, groups]
        W = qt.codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)  # [out, groups, group]
        return {CODES: qt.codes, SCALE: scale, ZERO: torch.zeros(scale.shape, dtype=torch.int8)}, W.flatten(1)

    return packed_by(pack, WHERE, model.dtype)


def describer(model: ModelHandle, scheme: Scheme) -> Describe:
    """Of the tensors stored to what the files' metadata says of them; the last file's names all that came before."""
    names: list[str] = []

    def describe(tensors: dict[str, Tensor]) -> dict[str, str]:
        found = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            if part == CODES:
                groups = tensors[f"{name}.{SCALE}"].shape[1]
                found[f"{name}.weight"] = json.dumps(facts_of(scheme, tensor.shape[1] // groups, model.dtype))
            elif part not in (SCALE, ZERO):
                found[key] = json.dumps({"_type": "Tensor"})
        names.extend(found)
        return found | {"tensor_names": json.dumps(names)}

    return describe


def check_model(model: ModelHandle, options: TorchaoOptions) -> None:
    """Raise QtoolError, before any work, for a model whose blocks the format cannot hold."""
    check_no_experts(WHERE, model)


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: TorchaoOptions) -> None:
    """Raise QtoolError where nothing is quantized, or to more than torchao's int8 tensors take."""
    if not schemes:
        raise QtoolError(f"{WHERE}: no linear is quantized; put a quantize step before it, or use export/safetensors")
    first = next(iter(schemes))
    for name, scheme in schemes.items():
        where, weights = f"{WHERE}: {name}: {scheme}", scheme.weights
        if (weights.format, weights.bits) != ("int", 8):
            raise QtoolError(f"{where}: this export holds int of 8 bits; quantize to w8a16 or w8a8, or use another export")
        if not weights.symmetric or weights.double_quant or weights.group_along != "out_channel":
            raise QtoolError(f"{where}: this export holds plain scales along `in`; quantize without {weights.ending}")
        if scheme.kv is not None:
            raise QtoolError(f"{where}: a cache cannot be held; leave kv{scheme.kv.bits} out")
        if (activations := scheme.activations) is not None:
            if str(activations) != "int8":
                raise QtoolError(f"{where}: activations have 8 bits and no zero points here; quantize to w8a8 or w8a16")
            if weights.group is not None:
                raise QtoolError(f"{where}: activations go with whole rows here; quantize to w8a8, or to w8a16g{weights.group}")
        kind = type(model.model.get_submodule(name))
        if kind is not nn.Linear:
            raise QtoolError(f"{WHERE}: {name}: {kind.__name__} cannot be held, nn.Linear can; use export/safetensors")
        if stored_form(scheme) != stored_form(schemes[first]):
            raise QtoolError(
                f"{WHERE}: {first} is {schemes[first]}, {name} is {scheme}, but the config says one of all; use one, or "
                "export/compressed_tensors"
            )


def stored_form(scheme: Scheme) -> tuple[int | None, bool]:
    """What must be the same throughout: the group, and whether activations are quantized."""
    return scheme.weights.group, scheme.activations is not None


def facts_of(scheme: Scheme, group: int, dtype: torch.dtype) -> dict[str, Any]:
    """The metadata of one quantized weight; group: columns of one scale."""
    rule = {
        "_type": "QuantizeTensorToInt8Kwargs",
        "_data": {
            "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
            "reduce_range": False,
        },
    }
    fields = {
        "act_quant_kwargs": None if scheme.activations is None else rule,
        "reduce_range": False,
        "block_size": [1, group],
        "dtype": {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")},
    }
    return {"_type": "Int8Tensor", "_data": fields, "_tensor_data_names": ["zero_point", "qdata", "scale"]}


def quantization_config(model: ModelHandle, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """config.json's quantization_config."""
    group, has_activations = stored_form(next(iter(schemes.values())))
    row = {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1}
    groups = {"_data": {"group_size": group}, "_type": "PerGroup", "_version": 1}
    fields: dict[str, Any] = {"granularity": row if group is None else groups, "set_inductor_config": True}
    if has_activations:
        fields["act_mapping_type"] = {"_data": "SYMMETRIC", "_type": "MappingType"}
    kind = "Int8DynamicActivationInt8WeightConfig" if has_activations else "Int8WeightOnlyConfig"
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_data": fields, "_type": kind, "_version": 2}},
        "modules_to_not_convert": dense_linears(model, schemes),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


METHOD = Method(
    run=written_by(storage),
    options=TorchaoOptions,
    scope="model",
    check=check_model,
    holds=check_schemes,
    storage=storage,
    schemes=("w8a16", "w8a16g32", "w8a8"),
)
