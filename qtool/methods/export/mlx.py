"""An MLX folder: whole numbers by groups with scales and biases, mxfp4 or mxfp8, as mlx-lm loads it on Apple's machines.

The layouts stand in qtool/formats/mlx_layouts.py. 1, 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, with or without zero
points, or mxfp4 and mxfp8_e4m3; what differs from linear to linear stands in config.json's `quantization`, under their names,
which are those of the model's original checkpoints. The embedding and a tied head stay dense; mlx-lm takes for quantized
what has scales in the file. rope_theta and tie_word_embeddings are said in so many words, as mlx-lm's defaults are others.
`lossless` speaks of the file alone: symmetric schemes and mx ones are, -asym and -asymf16 lose a little of their zero points
where scales and biases have 16 bits, as mlx-lm has them. With dtype: float32 they are too, but activations become float32.
Why no nvfp4: qtool's has a scale of the whole tensor, which MLX has for layers of experts alone.
Source: MLX and mlx-lm 0.32, https://github.com/ml-explore/mlx-lm.
For: mlx-lm and what is built on it, of the families that it knows, on Apple silicon; its CPU and CUDA builds elsewhere.
Costs: writing the file.
"""

from collections import Counter
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.mlx_layouts import AFFINE, BITS, GROUPS, MODES, decode_mlx, pack_mlx
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import check_no_experts, check_weights_alone, head_name
from qtool.model.writer import Encode, Storage, packed_by, rope_settings, written_by
from qtool.options import ExportOptions
from qtool.registry import Method

WHERE = "export/mlx"
MODE_OF = {scheme: mode for mode, scheme in MODES.items() if mode != "nvfp4"}


class MlxOptions(ExportOptions):
    """What the file's scales and biases are stored in."""

    dtype: Literal["model", "float32"] = Field(
        "model",
        description="dtype of scales and biases; model: the model's own, as mlx-lm writes them; float32 keeps every zero "
        "point, but makes activations float32",
    )


def storage(model: ModelHandle, schemes: dict[str, Scheme], options: MlxOptions) -> Storage:
    """What the checkpoint is made of."""
    config = quantization_config(schemes)
    settings = {"quantization": config, "tie_word_embeddings": model.is_tied, **rope_settings(model)}
    return Storage(encoder(model, options), config, settings=settings)


def encoder(model: ModelHandle, options: MlxOptions) -> Encode:
    """Of a linear to the tensors that its layout stores."""
    dtype = torch.float32 if options.dtype == "float32" else model.dtype

    def pack(qt: QuantizedTensor) -> tuple[dict[str, Tensor], Tensor]:
        parts = pack_mlx(qt, dtype)
        group, bits, mode = layout_of(qt.scheme)
        return parts, decode_mlx(parts, group, bits, mode)

    return packed_by(pack, WHERE, model.dtype)


def check_model(model: ModelHandle, options: MlxOptions) -> None:
    """Raise QtoolError, before any work, for a model whose blocks the format cannot hold."""
    check_no_experts(WHERE, model)


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: MlxOptions) -> None:
    """Raise QtoolError where nothing is quantized, or to more than MLX takes."""
    check_weights_alone(WHERE, model, schemes)
    for name, scheme in schemes.items():
        weights, where = scheme.weights, f"{WHERE}: {name}: {scheme}"
        if str(weights) in MODE_OF:
            continue
        if weights.format != "int" or weights.scale_dtype.startswith("float8"):
            raise QtoolError(
                f"{where}: MLX has whole numbers with plain scales, {' and '.join(MODE_OF)}; quantize so, or use "
                "export/safetensors"
            )
        if weights.bits not in BITS or weights.group not in GROUPS:
            raise QtoolError(f"{where}: MLX has {AFFINE}; quantize so, or use export/compressed_tensors")
    head = head_name(model)
    if model.is_tied and head in schemes:
        raise QtoolError(f"{WHERE}: {head} is tied to the embedding, which stays dense; add it to ignore")


def layout_of(weights: WeightScheme) -> tuple[int, int, str]:
    """Group, bits and mode."""
    assert weights.group is not None, "check_schemes lets no whole row through"
    return weights.group, weights.bits, MODE_OF.get(str(weights), "affine")


def quantization_config(schemes: dict[str, Scheme]) -> dict[str, Any]:
    """config.json's quantization: what most linears have, and under the names of the others what those have."""
    layouts = {name: layout_of(scheme.weights) for name, scheme in schemes.items()}
    base = Counter(layouts.values()).most_common(1)[0][0]
    return setting_of(base) | {name: setting_of(layout) for name, layout in layouts.items() if layout != base}


def setting_of(layout: tuple[int, int, str]) -> dict[str, Any]:
    """Group, bits and mode as the config names them."""
    return dict(zip(("group_size", "bits", "mode"), layout, strict=True))


METHOD = Method(
    run=written_by(storage),
    options=MlxOptions,
    scope="model",
    check=check_model,
    holds=check_schemes,
    storage=storage,
    schemes=("w3a16g64-asym", "mxfp4"),
)
