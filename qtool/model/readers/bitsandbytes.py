"""Reads linears in bitsandbytes' layouts, whoever wrote them: NF4 and FP4 by blocks, int8 by rows.

    NAME.weight, NAME.weight.absmax, NAME.weight.quant_map, NAME.weight.quant_state.bitsandbytes__nf4 ...; or NAME.SCB
See qtool/formats/bnb_layouts.py. The tensors of each linear say how it is stored; of quantization_config only the storage
counts. Scales come as float32, in which the file has them. Of double quantization, only the table that qtool writes is known
as such; scales by bitsandbytes' own table are read as what they decode to.
Int8 weights are read with inputs as they are, though LLM.int8 rounds those too, all but the largest; but where qtool_inputs in
quantization_config tells that qtool has rounded them so, they are.
Source: bitsandbytes 0.50, functional.py and nn/modules.py; transformers 5.23, quantizers/quantizer_bnb_4bit.py and _8bit.py.
"""

from typing import Any

from qtool.errors import QtoolError
from qtool.formats.bnb_layouts import (
    BLOCK_PARTS,
    NESTED_MAP,
    ROW_PARTS,
    STATES,
    Parts,
    scheme_of_blocks,
    unpack_blocks,
    unpack_rows,
)
from qtool.formats.scheme import ActivationScheme, Scheme, WeightScheme, input_fields
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.readers import read_parts


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense. Raises QtoolError for what qtool cannot decode."""
    check_config(config)
    parts = _read(checkpoint, name, (*STATES, NESTED_MAP, "SCB"))
    try:
        if any(state in parts for state in STATES):
            return Scheme(weights=scheme_of_blocks(parts))
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error
    if "SCB" not in parts:
        return None
    return Scheme(weights=WeightScheme(bits=8, scale_dtype="float32"), activations=_inputs(config))


def read_linear(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    scheme = read_scheme(checkpoint, name, config)
    if scheme is None:
        return None
    is_rows = scheme.weights.format == "int"
    parts = _read(checkpoint, name, ROW_PARTS if is_rows else BLOCK_PARTS)
    try:
        return (unpack_rows if is_rows else unpack_blocks)(parts), scheme
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error


def _inputs(config: dict[str, Any]) -> ActivationScheme | None:
    """How inputs were rounded when qtool wrote it; raises QtoolError where that contradicts what bitsandbytes reads."""
    word = config.get("qtool_inputs")
    if word is None:
        return None
    fields = input_fields(f"a{word}")
    if fields is None or fields.get("threshold") != config.get("llm_int8_threshold"):
        raise QtoolError(
            f"model: config.json's quantization_config: qtool_inputs is {word}, llm_int8_threshold "
            f"{config.get('llm_int8_threshold')}; they must agree: export it again"
        )
    return ActivationScheme.model_validate(fields)


def check_config(config: dict[str, Any]) -> None:
    """Raise QtoolError for codes that are not kept in bytes."""
    storage = config.get("bnb_4bit_quant_storage") or "uint8"
    if storage != "uint8":
        raise QtoolError(
            f"model: config.json's quantization_config: codes kept as {storage} (bnb_4bit_quant_storage) cannot be read, uint8 "
            "can; save it again so"
        )


def _read(checkpoint: Checkpoint, name: str, parts: tuple[str, ...]) -> Parts:
    """Those of the parts that the checkpoint has, by their names in the layout."""
    found = read_parts(checkpoint, name, parts)
    return {part: found[last] for part in parts if (last := part.rsplit(".", 1)[-1]) in found}
