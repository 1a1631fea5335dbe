"""Reads linears in GPTQ's layout, whoever wrote them: checkpoint formats gptq and gptq_v2 of 2, 3, 4 and 8 bits.

    NAME.qweight [in b / 32, out]    NAME.qzeros [groups, out b / 32]    NAME.scales [groups, out]    NAME.g_idx [in]
See qtool/formats/group_layouts.py. quantization_config has bits, group_size (-1: a whole row) and sym for all linears, and
`dynamic`, regular expressions that fit from a name's start: "+:" or none with what differs, "-:" where dense; those first.
Groups that do not hold neighbours (desc_act) are refused: a QuantizedTensor has no place for their order.
Source: GPTQModel 7.7, quantization/config.py (dynamic) and utils/model.py (checkpoint formats).
"""

import re
from typing import Any

from qtool.errors import QtoolError
from qtool.formats.group_layouts import GPTQ_BITS, unpack_gptq
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.readers import read_parts, scheme_of

FORMATS = ("gptq", "gptq_v2")


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense. Raises QtoolError for what qtool cannot decode."""
    format_of(config)
    scales = read_parts(checkpoint, name, ("scales",)).get("scales")
    if scales is None:
        return None
    setting = setting_of(name, config)
    if setting["bits"] not in GPTQ_BITS:
        words = ", ".join(map(str, GPTQ_BITS))
        raise QtoolError(f"model: {name}: {setting['bits']} bits in GPTQ's layout cannot be read, {words} can")
    group = None if setting["group_size"] == -1 else setting["group_size"]
    return scheme_of(name, setting["bits"], group, setting["sym"], scales.dtype)


def read_linear(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    scheme = read_scheme(checkpoint, name, config)
    if scheme is None:
        return None
    parts = read_parts(checkpoint, name, ("qweight", "qzeros", "scales", "g_idx"))
    if missing := {"qweight", "qzeros"} - parts.keys():
        raise QtoolError(f"model: {name} has scales but no {' and no '.join(sorted(missing))}; is it GPTQ's layout?")
    try:
        return unpack_gptq(parts, scheme.weights, format_of(config) == "gptq_v2", is_by_gptqmodel(config)), scheme
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error


def format_of(config: dict[str, Any]) -> str:
    """The checkpoint format, gptq where none is stated; raises QtoolError for one that cannot be read."""
    found = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if config.get("is_marlin_format"):
        found = "marlin"
    if found not in FORMATS:
        raise QtoolError(f"model: config.json's quantization_config: GPTQ's checkpoint format {found} cannot be read, gptq and "
                         "gptq_v2 can; save it again as one of them")  # fmt: skip
    return found


def is_by_gptqmodel(config: dict[str, Any]) -> bool:
    """Whether the config says that GPTQModel wrote the file."""
    quantizers = (config.get("meta") or {}).get("quantizer") or []
    return any(str(one).startswith("gptqmodel:") for one in ([quantizers] if isinstance(quantizers, str) else quantizers))


def setting_of(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """bits, group_size and sym of a quantized linear."""
    base = {"bits": 4, "group_size": 128, "sym": True} | config
    dynamic: dict[str, dict[str, Any]] = config.get("dynamic") or {}
    for pattern in sorted(dynamic, key=lambda pattern: not pattern.startswith("-:")):
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            if pattern.startswith("-:"):
                raise QtoolError(f"model: {name} is quantized, but quantization_config's dynamic leaves it out by {pattern}")
            return base | dynamic[pattern]
    return base
