"""A GGUF file that llama.cpp loads: qtool's own codes where a block type has the same grid, else rounded to a stated type.

    w4 in groups of 32, 64, ...    q4_0    d = scale          with whole or float16 zero points    q4_1    m = -scale zero
    w5                             q5_0                                                            q5_1
    w8                             q8_0                       iq4_nl, mxfp4                        the same
Types hold one scale for 32 weights; wider groups, and rows, repeat theirs. Scales are rounded to float16: those in bfloat16
lose nothing above 2^-17, offsets m may lose a bit. `lossless` in the artifact is what came of it, every tensor decoded and
compared. Any other scheme is refused before any work unless `type` says what becomes of it. Then linears that match a type
keep it with their codes, whole numbers of fewer bits than `type` has (w3 in q4_0) keep their codes too, and all other linears
of the blocks, dense ones as well, are rounded to it by least squared error (see formats/ggml_rounding.py). Norms and biases
are f32. Beside model.gguf stand config.json and the tokenizer's files, so that qtool reads the folder as any other model.
llama.cpp has no windows of attention for these families: mistral's context length is written as its window, where it has one.
Differs from llama.cpp's own converter: no second type for sensitive tensors; search/mixed_precision finds such by measuring.
Source: ggml and llama.cpp, https://github.com/ggml-org/llama.cpp, GGUF version 3.
For: llama.cpp and what is built on it, on CPUs and small GPUs; llama, mistral, qwen2, qwen3, gpt2 and gpt_neox models.
Costs: writing the file, and where weights are rounded to `type` two to six minutes per billion of them on one CPU core.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.ggml import TYPES, GgmlType, decodes_to, from_codes, takes_codes, type_of
from qtool.formats.ggml_rounding import round_to
from qtool.formats.scheme import Scheme
from qtool.layers.quant_linear import QuantLinear
from qtool.model.gguf import GGUF, Value, file_size, write_gguf
from qtool.model.gguf_metadata import family_of, general, hyperparameters, rope_factors, tokenizer_metadata
from qtool.model.gguf_names import Family, is_transposed, row_order, stored_name
from qtool.model.handle import ModelHandle
from qtool.model.sizes import settings_size
from qtool.model.writer import unit_tensors, write_settings
from qtool.options import ExportOptions
from qtool.registry import Method

WHERE = "export/gguf"
TypeName = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "mxfp4", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"
]  # fmt: skip
DENSE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class GgufOptions(ExportOptions):
    """What becomes of tensors whose own grid GGUF does not have."""

    type: TypeName | None = Field(
        None, description="type of the blocks' linears whose scheme no type has, and of dense ones; null: refuse, and keep"
    )
    embeddings: TypeName | None = Field(
        None, description="type of the embedding, and of the head where it is not quantized; null: the model's own dtype"
    )
    pre: str | None = Field(None, description="llama.cpp's name of how the tokenizer cuts text; null: found from its pattern")


def gguf(model: ModelHandle, out: Path, options: GgufOptions) -> bool:
    """Write the model into `out`; returns whether every tensor is stored as it is."""
    family, kinds = family_of(model.config), kinds_of(model, model.schemes(), options)
    metadata, tensors = contents(model, kinds, options)
    is_lossless = True

    def encode(name: str, layer: QuantLinear) -> tuple[dict[str, Tensor], bool]:
        kind, W = kinds[f"{name}.weight"], layer.weight_values(torch.float32)  # [out, in]
        data = bytes_of(name, W, kind, layer)
        return {f"{name}.weight": data}, decodes_to(data, kind, W)

    with write_gguf(out / GGUF, metadata, tensors) as write:
        if (factors := rope_factors(model)) is not None:
            write("rope_freqs.weight", factors.view(torch.uint8))
        for unit, is_exact in unit_tensors(model, encode, fuses_experts=False):
            is_lossless &= is_exact
            while unit:  # so that nothing is left of a block when the next is loaded
                name, tensor = unit.popitem()
                stored, data = named(family, name), tensor
                if tensor.dtype != torch.uint8:
                    W = tensor.T if is_transposed(family, stored) else tensor
                    W = W.view(-1, W.shape[-1])  # [out, in]; a vector is one row
                    data = bytes_of(name, W, kinds[name])
                    is_lossless &= decodes_to(data, kinds[name], W)
                write(stored, reordered(model, family, stored, data.view(tensors[stored][0][0], -1)))
    write_settings(model, out)
    return is_lossless


def bytes_of(name: str, W: Tensor, kind: GgmlType, layer: QuantLinear | None = None) -> Tensor:
    """Bytes [out, row bytes] of W [out, in]: the codes of its layer where the type takes them, else rounded."""
    try:
        return from_codes(layer.qt, kind) if layer and takes_codes(kind, layer.scheme) else round_to(W, kind)
    except QtoolError as error:
        raise QtoolError(f"{WHERE}: {name}: {error}; use export/safetensors") from error


def size(model: ModelHandle, schemes: dict[str, Scheme], options: GgufOptions) -> int:
    """Bytes of the folder, before any work."""
    return file_size(*contents(model, kinds_of(model, schemes, options), options)) + settings_size(model)


def check_model(model: ModelHandle, options: GgufOptions) -> None:
    """Raise QtoolError, before any work, for a model or a tokenizer that the file cannot hold."""
    try:
        family = family_of(model.config)
        tokenizer_metadata(model, options.pre)
    except QtoolError as error:
        raise QtoolError(f"{WHERE}: {error}") from error
    for name in sorted(model.stored_names()):
        if stored_name(family, name) is None:
            raise QtoolError(f"{WHERE}: {name}: llama.cpp's {family.architecture} has no such tensor; use export/safetensors")


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: GgufOptions) -> None:
    """Raise QtoolError for schemes that no type has where none is stated, more than weights, and widths that do not divide."""
    for name, scheme in schemes.items():
        if scheme.activations is not None or scheme.kv is not None:
            raise QtoolError(
                f"{WHERE}: {name}: {scheme}: llama.cpp rounds activations in its own way; quantize weights alone, such as "
                "w8a16g32"
            )
        option = "type" if is_inner(model, name) else "embeddings"
        if type_of(scheme.weights) is None and getattr(options, option) is None:
            raise QtoolError(
                f"{WHERE}: {name}: {scheme}: no type has this grid; quantize to w4, w5 or w8 in groups of 32, 64 or 128, or to "
                f"mxfp4, or say what such linears are rounded to: {option}: one of {', '.join(TYPES)}"
            )
        if model.is_tied and not is_inner(model, name):
            raise QtoolError(f"{WHERE}: {name}: a head that is the embedding has no codes of its own; add it to ignore")
    kinds_of(model, schemes, options)


def is_inner(model: ModelHandle, name: str) -> bool:
    """Whether a tensor or linear belongs to a decoder block."""
    return name.startswith(f"{model.blocks_name}.")


def kinds_of(model: ModelHandle, schemes: dict[str, Scheme], options: GgufOptions) -> dict[str, GgmlType]:
    """transformers' name: type, of every tensor that is stored; raises QtoolError where blocks do not divide the columns."""
    own, stored, linears = TYPES[DENSE[model.dtype]], model.stored_names(), set(model.linear_names())
    kinds: dict[str, GgmlType] = {}
    for name, tensor in model.model.state_dict().items():
        if name not in stored:
            continue
        linear = name.removesuffix(".weight")
        matching = type_of(schemes[linear].weights) if linear in schemes else None
        stated = options.type if is_inner(model, name) else options.embeddings
        if tensor.ndim == 1 or name.endswith(".wpe.weight"):
            kinds[name] = TYPES["f32"]  # what llama.cpp adds or multiplies element by element
        else:
            kinds[name] = matching or (own if stated is None else TYPES[stated])
        n_in = model.linear_shape(linear)[1] if linear in linears else tensor.shape[-1]
        if n_in % kinds[name].block:
            raise QtoolError(
                f"{WHERE}: {linear}: {n_in} columns do not divide into {kinds[name].name}'s blocks of {kinds[name].block}; "
                "use a type whose blocks are smaller: q8_0, q5_0, q4_0 (32), bf16, f16"
            )
    return kinds


def contents(
    model: ModelHandle, kinds: dict[str, GgmlType], options: GgufOptions
) -> tuple[dict[str, Value], dict[str, tuple[tuple[int, ...], GgmlType]]]:
    """The file's metadata, and its tensors' shapes and types; all of its size follows from these."""
    family, tensors = family_of(model.config), {}
    weights: dict[int, int] = {}  # how many in the blocks are of a type, by its file_type
    if (factors := rope_factors(model)) is not None:
        tensors["rope_freqs.weight"] = (tuple(factors.shape), TYPES["f32"])
    for name, tensor in model.model.state_dict().items():
        if name in kinds:
            stored = named(family, name)
            shape = tuple(tensor.shape[::-1] if is_transposed(family, stored) else tensor.shape)
            tensors[stored] = (shape, kinds[name])
            if tensor.ndim > 1 and is_inner(model, name):
                weights[kinds[name].file_type] = weights.get(kinds[name].file_type, 0) + tensor.numel()
    metadata = general(model, max(weights, key=lambda number: weights[number]))
    return metadata | hyperparameters(model.config) | tokenizer_metadata(model, options.pre), tensors


def named(family: Family, name: str) -> str:
    stored = stored_name(family, name)
    assert stored is not None, f"{name}: check_model lets no such tensor pass"
    return stored


def reordered(model: ModelHandle, family: Family, stored: str, data: Tensor) -> Tensor:
    """Bytes [out, row bytes] with the rows where llama.cpp has them."""
    heads = int(model.config.num_attention_heads)
    order = row_order(family, stored, len(data), heads, int(getattr(model.config, "num_key_value_heads", None) or heads))
    return data if order is None else data[order]


METHOD = Method(run=gguf, options=GgufOptions, scope="model", check=check_model, holds=check_schemes, size=size)
