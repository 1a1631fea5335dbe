"""Readers of quantized checkpoints, one layout a file, named as config.json's `quant_method` names it.

A reader has two functions; both raise QtoolError for what qtool cannot decode:
    read_scheme(checkpoint, name, config) -> Scheme | None        of the linear `name`; None where it is dense
    read_linear(checkpoint, name, config) -> (QuantizedTensor, Scheme) | None
config is the quantization_config of config.json.
"""

import importlib
from pathlib import Path
from typing import Any, Protocol

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.model.checkpoint import Checkpoint


class Reader(Protocol):
    """What the modules of this folder hold."""

    def read_scheme(self, checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Scheme | None: ...

    def read_linear(
        self, checkpoint: Checkpoint, name: str, config: dict[str, Any]
    ) -> tuple[QuantizedTensor, Scheme] | None: ...


def reader_of(config: dict[str, Any]) -> Reader:
    """The reader of a checkpoint's quantization_config; raises QtoolError where there is none."""
    method = config.get("quant_method")
    known = {path.stem.replace("_", "-"): path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__"}
    if method not in known:
        raise QtoolError(f"model: quantization by {method} cannot be read; {', '.join(sorted(known))} can")
    module: Reader = importlib.import_module(f"{__name__}.{known[method]}")
    return module
