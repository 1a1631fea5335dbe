"""Reads linears in AWQ's layout "gemm", four bits, whoever wrote them.

    NAME.qweight [in, out / 8]    NAME.qzeros [groups, out / 8]    NAME.scales [groups, out]
See qtool/formats/group_layouts.py. The layout states no symmetry: a linear is symmetric where every zero point is 8.
Source: AutoAWQ 0.2, and GPTQModel 7.7, quantization/awq.
"""

from typing import Any

from qtool.errors import QtoolError
from qtool.formats.group_layouts import AWQ_BITS, awq_is_symmetric, unpack_awq
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint
from qtool.model.readers import read_parts, scheme_of


def read_scheme(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None:
    """The scheme of the linear `name`; None where it is dense. Raises QtoolError for what qtool cannot decode."""
    group = check_config(config)
    parts = read_parts(checkpoint, name, ("scales", "qzeros"))
    if "scales" not in parts:
        return None
    if "qzeros" not in parts:
        raise QtoolError(f"model: {name} has scales but no qzeros; is it AWQ's layout?")
    return scheme_of(name, 4, group, awq_is_symmetric(parts["qzeros"]), parts["scales"].dtype)


def read_linear(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> tuple[QuantizedTensor, Scheme] | None:
    """The quantized weights of the linear `name` with their scheme; None where the checkpoint holds it dense."""
    scheme = read_scheme(checkpoint, name, config)
    if scheme is None:
        return None
    parts = read_parts(checkpoint, name, ("qweight", "qzeros", "scales"))
    if "qweight" not in parts:
        raise QtoolError(f"model: {name} has scales but no qweight; is it AWQ's layout?")
    try:
        return unpack_awq(parts, scheme.weights), scheme
    except QtoolError as error:
        raise QtoolError(f"model: {name}: {error}") from error


def check_config(config: dict[str, Any]) -> int | None:
    """The group, None for a whole row; raises QtoolError for a layout that cannot be read."""
    where = "model: config.json's quantization_config"
    version = str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        raise QtoolError(f"{where}: AWQ's layout {version} cannot be read, gemm can; save it again so")
    bits = config.get("bits", config.get("w_bit", 4))
    if bits not in AWQ_BITS:
        raise QtoolError(f"{where}: {bits} bits in AWQ's layout cannot be read, 4 can")
    group = int(config.get("group_size", config.get("q_group_size", 128)))
    return None if group == -1 else group
