"""qtool's own layout of a linear: the tensors that a run keeps of it, and one more that says what they are.

    NAME.weight::PART    each part of the quantized weight; NAME.low_rank::PART    of its low-rank factors
    NAME.rotation::signs [in] int8, ±1    where the linear, quantized or dense, rotates its input
    NAME.weight::facts [bytes] uint8, JSON:
        {"scheme": ..., "facts": ..., "columns": [...], "weight": {PART: [dtype, shape]}, "low_rank": {PART: [dtype, shape]}}
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
from qtool.formats.low_rank import LowRank
from qtool.formats.packing import n_words_of
from qtool.formats.rotations import InputRotation
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.store import LOW_RANK, ROTATION, in_json, low_rank_parts, quantized_facts, quantized_parts, restore_quantized

VERSION = 3  # 2: with the scales of a quantized cache; 3: with rotations of inputs
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


def pack_linear(name: str, quantized: QuantizedTensor, scheme: Scheme, low_rank: LowRank | None) -> dict[str, Tensor]:
    """All tensors of the linear `name` by their full names."""
    weight = quantized_parts(quantized)
    factors = {} if low_rank is None else low_rank_parts(low_rank)
    forms = {
        kind: {part: _form(tensor) for part, tensor in parts.items()}
        for kind, parts in (("weight", weight), ("low_rank", factors))
    }
    text = in_json({**quantized_facts(quantized, scheme), **forms})
    return {
        **{f"{name}.weight::{part}": tensor for part, tensor in weight.items()},
        **{f"{name}{LOW_RANK}::{part}": tensor for part, tensor in factors.items()},
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
        weight, low_rank = ({part: (str(dtype), tuple(shape)) for part, (dtype, shape) in facts[kind].items()}
                            for kind in ("weight", "low_rank"))  # fmt: skip
        return StoredLinear(name, Scheme.model_validate(facts["scheme"]), facts, weight, low_rank)
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
