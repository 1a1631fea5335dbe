"""Reads linears in MLX's layouts, as mlx-lm and others write them: whole numbers with biases, mxfp4, mxfp8, nvfp4.

    NAME.weight [out, in b / 32] uint32    NAME.scales, NAME.biases [out, groups]
See qtool/formats/mlx_layouts.py. quantization_config, which is `quantization` said again, has group_size, bits and mode of all
linears, and under the name of one what it has instead; false under a name: dense. There is no quant_method.
A model whose embedding is quantized, as mlx-lm does unless told otherwise, is refused: qtool has dense embeddings alone.
Source: mlx-lm 0.32, utils.py, load_model and quantize_model.
"""

from typing import Any

from qtool.errors import QtoolError
from qtool.formats.mlx_layouts import scheme_of_parts, unpack_mlx
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.readers import read_parts


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense. Raises QtoolError for what qtool cannot decode."""
    check_embeddings(checkpoint)
    parts, setting = read_parts(checkpoint, name, ("scales", "biases")), setting_of(config, name)
    if "scales" not in parts or setting is None:
        return None
    try:
        return Scheme(weights=scheme_of_parts(parts, *setting))
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error


def read_linear(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    scheme, setting = read_scheme(checkpoint, name, config), setting_of(config, name)
    if scheme is None or setting is None:
        return None
    try:
        return unpack_mlx(read_parts(checkpoint, name, ("weight", "scales", "biases")), *setting), scheme
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error


def setting_of(config: dict[str, Any], name: str) -> tuple[int, int, str] | None:
    """Group, bits and mode of the linear `name`; None where the config says that it is dense."""
    own = config.get(name, {})
    if own is False:
        return None
    found = config | (own if isinstance(own, dict) else {})
    return int(found["group_size"]), int(found["bits"]), str(found.get("mode", "affine"))


def check_embeddings(checkpoint: Checkpoint) -> None:
    """Raise QtoolError where an embedding is quantized."""
    found = next((name for name in checkpoint.embeddings if read_parts(checkpoint, name, ("scales",))), None)
    if found is not None:
        raise QtoolError(
            f"model: {found} is a quantized embedding, qtool reads dense ones alone; convert the model "
            "again with a predicate that leaves it out"
        )
