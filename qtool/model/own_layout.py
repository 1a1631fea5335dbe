"""qtool's own layout of a linear: the tensors that a run keeps of it, and one more that says what they are.

    NAME.weight::PART    each part of the quantized weight; NAME.low_rank::PART    of its low-rank factors
    NAME.inputs::PART    of the static scales of its inputs
    NAME.rotation::signs [in] int8, ±1    where the linear, quantized or dense, rotates its input
    NAME.weight::facts [bytes] uint8, JSON:
        {"scheme": ..., "facts": ..., "columns": [...], "weight": {PART: [dtype, shape]}, "low_rank": {...}, "inputs": {...}}
See qtool/model/store.py for the parts and for scheme, facts and columns.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.inputs import InputScales
from qtool.formats.low_rank import LowRank
from qtool.formats.packing import n_words_of
from qtool.formats.rotations import InputRotation
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.store import (
    INPUTS,
    LOW_RANK,
    ROTATION,
    in_json,
    low_rank_parts,
    quantized_facts,
    quantized_parts,
    restore_quantized,
)

VERSION = 3  # 2: with a quantized cache, or attentions that round; 3: with static scales or rotations of inputs
FACTS = "facts"
Form = tuple[str, tuple[int, ...]]  # dtype and shape
Read = Callable[[list[str]], dict[str, Tensor]]  # those of the named tensors that there are


@dataclass(frozen=True)
class StoredLinear:
    """What the facts of one linear say."""

    name: str
    scheme: Scheme
    facts: dict[str, Any]
    weight: dict[str, Form]
    low_rank: dict[str, Form]
    inputs: dict[str, Form]


def pack_linear(
    name: str, quantized: QuantizedTensor, scheme: Scheme, low_rank: LowRank | None, inputs: InputScales | None = None
) -> dict[str, Tensor]:
    """All tensors of the linear `name` by their full names."""
    weight = quantized_parts(quantized)
    factors = {} if low_rank is None else low_rank_parts(low_rank)
    scales = {} if inputs is None else inputs.parts()
    forms = {
        kind: {part: _form(tensor) for part, tensor in parts.items()}
        for kind, parts in (("weight", weight), ("low_rank", factors), ("inputs", scales))
    }
    text = in_json({**quantized_facts(quantized, scheme), **forms})
    return {
        **{f"{name}.weight::{part}": tensor for part, tensor in weight.items()},
        **{f"{name}{LOW_RANK}::{part}": tensor for part, tensor in factors.items()},
        **{f"{name}{INPUTS}::{part}": tensor for part, tensor in scales.items()},
        f"{name}.weight::{FACTS}": torch.tensor(list(text.encode()), dtype=torch.uint8),  # [bytes]
    }


def read_facts(name: str, read: Read) -> StoredLinear | None:
    """What is stored of the linear `name`; None where it has no codes. Raises QtoolError where its facts make no sense."""
    key = f"{name}.weight::{FACTS}"
    found = read([key]).get(key)
    if found is None:
        if read([f"{name}.weight::codes"]):
            raise QtoolError(f"model: {name} has codes but no {key}; the checkpoint is damaged, export it again")
        return None
    try:
        facts = json.loads(bytes(found.tolist()))
        weight, low_rank, inputs = (
            {part: (str(dtype), tuple(shape)) for part, (dtype, shape) in parts.items()}
            for parts in (facts["weight"], facts["low_rank"], facts.get("inputs", {}))  # before version 3 there are none
        )
        return StoredLinear(name, Scheme.model_validate(facts["scheme"]), facts, weight, low_rank, inputs)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # no JSON, a field missing, a scheme out of range
        raise _senseless(name, error) from error


def unpack_linear(stored: StoredLinear, read: Read) -> tuple[QuantizedTensor, Scheme]:
    """The quantized weight; raises QtoolError where a part is missing or not as the facts say."""
    parts = _read_parts(f"{stored.name}.weight", stored.weight, read)
    try:
        _check_words(stored)
        quantized, scheme = restore_quantized(parts, stored.facts)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _senseless(stored.name, error) from error
    _check_groups(stored.name, quantized)
    return quantized, scheme


def unpack_low_rank(stored: StoredLinear, read: Read) -> LowRank | None:
    """The low-rank factors, None where there are none; raises QtoolError as `unpack_linear` does."""
    if not stored.low_rank:
        return None
    parts = _read_parts(f"{stored.name}{LOW_RANK}", stored.low_rank, read)
    try:
        return LowRank(parts["left"], parts["right"], parts.get("scale"))
    except KeyError as error:
        raise _senseless(stored.name, error) from error


def unpack_inputs(stored: StoredLinear, read: Read) -> InputScales | None:
    """The static scales of inputs, None where there are none; raises QtoolError as `unpack_linear` does."""
    scheme = stored.scheme.activations
    if scheme is None or not scheme.static:
        return None
    parts = _read_parts(f"{stored.name}{INPUTS}", stored.inputs, read)
    must = {"scale"} | (set() if scheme.symmetric else {"zero"})
    if parts.keys() != must or any(part.shape != (1,) for part in parts.values()):
        forms = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items()) or "nothing"
        raise QtoolError(
            f"model: {stored.name}{INPUTS} has {forms}, must have {' and '.join(sorted(must))} of one number each; the "
            "checkpoint is damaged, export it again"
        )
    return InputScales(scheme, parts["scale"], parts.get("zero"))


def unpack_rotation(name: str, read: Read) -> InputRotation | None:
    """The rotation of the linear's input, None where there is none; raises QtoolError where its signs are none."""
    key = f"{name}{ROTATION}::signs"
    signs = read([key]).get(key)
    if signs is None:
        return None
    if signs.dtype != torch.int8 or signs.ndim != 1 or not bool((signs.abs() == 1).all()):
        is_ = f"{_form(signs)[0]} {list(signs.shape)}"
        raise QtoolError(f"model: {key} is {is_}, must be one sign, int8, for each input; the checkpoint is damaged")
    return InputRotation(signs)


def _form(tensor: Tensor) -> Form:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _read_parts(owner: str, forms: dict[str, Form], read: Read) -> dict[str, Tensor]:
    found = read([f"{owner}::{part}" for part in forms])
    parts = {}
    for part, form in forms.items():
        key = f"{owner}::{part}"
        if key not in found:
            raise QtoolError(f"model: the checkpoint has no tensor {key}; it is damaged, export it again")
        if _form(found[key]) != form:
            is_, must = (f"{dtype} {list(shape)}" for dtype, shape in (_form(found[key]), form))
            raise QtoolError(f"model: {key} is {is_}, must be {must}; the checkpoint is damaged, export it again")
        parts[part] = found[key]
    return parts


def _check_words(stored: StoredLinear) -> None:
    """Raise ValueError where codes have other than the words that their columns take."""
    prefix, inner = "", stored.facts["facts"]
    for columns in stored.facts["columns"]:
        scheme = WeightScheme.model_validate(inner["scheme"])
        words, must = stored.weight[f"{prefix}codes"][1][1], n_words_of(columns, scheme.grid.n_levels)
        if words != must:
            raise ValueError(f"{words} words of codes in a row, must be {must}")
        prefix, inner = f"{prefix}salient_", inner.get("salient", {})


def _check_groups(name: str, quantized: QuantizedTensor) -> None:
    """Raise QtoolError where scales or zero points are not one for each group of their scheme."""
    scheme, (out, columns) = quantized.scheme, quantized.codes.shape
    lead, grouped = (out, columns * scheme.grid.width) if scheme.group_along == "out_channel" else (columns, out)
    must = (lead, math.ceil(grouped / (scheme.group or grouped)))
    for part, tensor in (("scale", quantized.scale), ("zero", quantized.zero)):
        if tensor is not None and tuple(tensor.shape) != must:
            words = f"{part} is {list(tensor.shape)}, must be {list(must)} for {scheme}"
            raise QtoolError(f"model: {name}: {words}; the checkpoint is damaged, export it again")
    if (quantized.zero is None) != scheme.symmetric:
        raise QtoolError(f"model: {name}: zero points do not go with {scheme}; the checkpoint is damaged, export it again")
    if quantized.salient is not None:
        _check_groups(name, quantized.salient.tensor)


def _senseless(name: str, error: Exception) -> QtoolError:
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return QtoolError(f"model: {name}.weight::{FACTS} cannot be read ({what}); the checkpoint is damaged, export it again")
