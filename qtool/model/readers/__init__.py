"""Readers of quantized checkpoints, one layout a file, named as config.json's `quant_method` names it.

A reader has two functions; both raise QtoolError for what qtool cannot decode:
    read_scheme(checkpoint, name, config) -> Scheme | None        of the linear `name`; None where it is dense
    read_linear(checkpoint, name, config) -> (QuantizedTensor, Scheme) | None
and, where the layout has low-rank factors beside the codes, a third:
    read_low_rank(checkpoint, name, config) -> LowRank | None     of a quantized linear; None where it has none
and where it can have a quantized key/value cache, a fourth:
    read_cache(checkpoint, name, config) -> CacheScales | KiviScheme | None    of the attention `name`; None: as it was
where attentions can round between their linears, a fifth:
    read_rounding(config) -> AttentionRounding | None             what they round, all alike
and where inputs can be rounded by static scales, a sixth:
    read_inputs(checkpoint, name, config) -> InputScales | None   of a quantized linear; None where its scheme has none
and where linears, dense ones too, can rotate their inputs, a seventh:
    read_rotation(checkpoint, name, config) -> InputRotation | None    None where there is none
config is the quantization_config of config.json.
"""

import importlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from qtool.errors import QtoolError
from qtool.formats.attention import AttentionRounding
from qtool.formats.inputs import InputScales
from qtool.formats.kivi import KiviScheme
from qtool.formats.kv_cache import CacheScales
from qtool.formats.low_rank import LowRank
from qtool.formats.rotations import InputRotation
from qtool.formats.scales import SCALE_DTYPES
from qtool.formats.scheme import ActivationScheme, KvScheme, Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import EXPERT, Checkpoint

SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


class ReadScheme(Protocol):
    def __call__(self, checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None: ...


class ReadLinear(Protocol):
    def __call__(self, checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None: ...


class ReadLowRank(Protocol):
    def __call__(self, checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> LowRank | None: ...


class ReadRotation(Protocol):
    def __call__(self, checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> InputRotation | None: ...


class ReadCache(Protocol):
    def __call__(self, checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> CacheScales | KiviScheme | None: ...


class ReadRounding(Protocol):
    def __call__(self, config: dict[str, Any]) -> AttentionRounding | None: ...


def no_rounding(config: dict[str, Any]) -> AttentionRounding | None:
    """What layouts of weights alone say of attentions."""
    return None


class ReadInputs(Protocol):
    def __call__(self, checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> InputScales | None: ...


def no_inputs(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> InputScales | None:
    """What layouts without static scales have of them."""
    return None


def no_cache(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> CacheScales | None:
    """What layouts of weights alone have of a quantized cache."""
    return None


def no_rotation(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> InputRotation | None:
    """What layouts of codes alone have of a rotation of a linear's input."""
    return None


def no_low_rank(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> LowRank | None:
    """What layouts of codes alone have of low-rank factors."""
    return None


@dataclass(frozen=True)
class Reader:
    """What the modules of this folder hold."""

    read_scheme: ReadScheme
    read_linear: ReadLinear
    read_low_rank: ReadLowRank = no_low_rank
    read_cache: ReadCache = no_cache
    read_rounding: ReadRounding = no_rounding
    read_inputs: ReadInputs = no_inputs
    read_rotation: ReadRotation = no_rotation


def reader_of(config: dict[str, Any]) -> Reader:
    """The reader of a checkpoint's quantization_config; raises QtoolError where there is none."""
    method = config.get("quant_method", "mlx" if "group_size" in config and "bits" in config else None)  # mlx-lm names none
    known = {path.stem.replace("_", "-"): path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__"}
    if method not in known:
        raise QtoolError(f"model: quantization by {method} cannot be read; {', '.join(sorted(known))} can")
    held = vars(importlib.import_module(f"{__name__}.{known[method]}"))
    return Reader(**{field.name: held[field.name] for field in fields(Reader) if field.name in held})


def scheme_of(
    name: str,
    bits: int,
    group: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
    activations: ActivationScheme | None = None,
    format: str = "int",
) -> Scheme:
    """The scheme of the linear `name` as its checkpoint states it; raises QtoolError for one out of range."""
    try:
        return Scheme(
            weights=WeightScheme.model_validate(
                {
                    "format": format,
                    "bits": bits,
                    "group": group,
                    "symmetric": symmetric,
                    "scale_dtype": SCALE_NAMES[scale_dtype],
                }
            ),
            activations=activations,
        )
    except ValueError as error:  # a number of bits, or a group, out of range
        raise QtoolError(f"model: {name}: its scheme cannot be read: {' '.join(str(error).splitlines()[1:3])}") from error


def scales_of_cache(checkpoint: Checkpoint, name: str, scheme: KvScheme) -> CacheScales:
    """The attention's k_scale and v_scale, [1] or [], as stored; raises QtoolError where one is missing or is no scale."""
    found = {key.rsplit(".", 1)[-1]: tensor for key, tensor in checkpoint.read([f"{name}.k_scale", f"{name}.v_scale"], None)}
    for part in ("k_scale", "v_scale"):
        if part not in found:
            raise QtoolError(f"model: {name}: the cache is quantized, but the checkpoint has no {name}.{part}; export it again")
        if found[part].numel() != 1 or not (torch.isfinite(found[part]) & (found[part] > 0)).all():
            is_ = f"{list(found[part].shape)} {str(found[part].dtype).removeprefix('torch.')}"
            raise QtoolError(f"model: {name}.{part} is {is_}, must be one finite scale above zero; export it again")
    return CacheScales(scheme, found["k_scale"].view(1), found["v_scale"].view(1))


def read_parts(checkpoint: Checkpoint, name: str, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors NAME.PART that the checkpoint has, as stored, by part; raises QtoolError for an expert that has some."""
    owner, *_ = checkpoint.stored_as(name) or [name]
    found = {key.rsplit(".", 1)[-1]: tensor for key, tensor in checkpoint.read([f"{owner}.{part}" for part in parts], None)}
    if found and EXPERT.fullmatch(name):
        raise QtoolError(
            f"model: {name}: a mixture's experts can be read from compressed-tensors checkpoints, not from this one"
        )
    return found
