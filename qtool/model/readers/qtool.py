"""Reads linears in qtool's own layout, with all that stands beside their codes, experts of mixtures too.

    NAME.weight::facts, NAME.weight::codes, NAME.weight::scale ...    NAME.low_rank::left, NAME.low_rank::right ...
See qtool/model/own_layout.py. quantization_config has the version, and what a quantized cache is kept as; the facts of
each linear say the rest.
Source: qtool/methods/export/qtool.py.
"""

from typing import Any

from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.attention import AttentionRounding
from qtool.formats.inputs import InputScales
from qtool.formats.kivi import KiviScheme
from qtool.formats.kv_cache import CacheScales
from qtool.formats.low_rank import LowRank
from qtool.formats.rotations import InputRotation
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.own_layout import (
    VERSION,
    Read,
    StoredLinear,
    read_facts,
    unpack_inputs,
    unpack_linear,
    unpack_low_rank,
    unpack_rotation,
)
from qtool.model.readers import scales_of_cache
from qtool.model.store import cache_scheme


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense. Raises QtoolError for what qtool cannot decode."""
    stored = _read(checkpoint, name, config)
    return None if stored is None else stored.scheme


def read_linear(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    stored = _read(checkpoint, name, config)
    return None if stored is None else unpack_linear(stored, _tensors_of(checkpoint))


def read_low_rank(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> LowRank | None:
    """The low-rank factors of the linear `name`; None where it has none."""
    stored = _read(checkpoint, name, config)
    return None if stored is None else unpack_low_rank(stored, _tensors_of(checkpoint))


def read_inputs(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> InputScales | None:
    """The static scales of the inputs of the linear `name`; None where its scheme has none."""
    stored = _read(checkpoint, name, config)
    return None if stored is None else unpack_inputs(stored, _tensors_of(checkpoint))


def read_rotation(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> InputRotation | None:
    """The rotation of the input of the linear `name`, dense ones too; None where it has none."""
    check_config(config)
    return unpack_rotation(name, _tensors_of(checkpoint))


def read_cache(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> CacheScales | KiviScheme | None:
    """How the attention `name` keeps its cache; None where the cache is as it was."""
    check_config(config)
    if "cache" not in config:
        return None
    try:
        scheme = cache_scheme(config["cache"])
    except (ValueError, TypeError) as error:
        what = " ".join(str(error).split())[:200]
        raise QtoolError(f"model: config.json's quantization_config: cache cannot be read ({what}); export it again") from error
    return scheme if isinstance(scheme, KiviScheme) else scales_of_cache(checkpoint, name, scheme)


def read_rounding(config: dict[str, Any]) -> AttentionRounding | None:
    """What attentions round between their linears; None where nothing."""
    check_config(config)
    try:
        return AttentionRounding.model_validate(config["attention"]) if "attention" in config else None
    except ValueError as error:
        what = " ".join(str(error).split())[:200]
        where = "model: config.json's quantization_config: attention"
        raise QtoolError(f"{where} cannot be read ({what}); export it again") from error


def check_config(config: dict[str, Any]) -> None:
    """Raise QtoolError for a version that this reader does not know."""
    version = config.get("version")
    where = "model: config.json's quantization_config"
    if not isinstance(version, int) or version < 1:
        raise QtoolError(f"{where}: version is {version}, must be a whole number from 1 to {VERSION}; export the model again")
    if version > VERSION:
        raise QtoolError(f"{where}: a newer qtool wrote version {version}, this one reads up to {VERSION}; update qtool")


def _read(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> StoredLinear | None:
    check_config(config)
    return read_facts(name, _tensors_of(checkpoint))


def _tensors_of(checkpoint: Checkpoint) -> Read:
    def read(names: list[str]) -> dict[str, Tensor]:
        return dict(checkpoint.read(names, None))

    return read
