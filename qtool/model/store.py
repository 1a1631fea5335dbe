"""What compression changed, on disk: one safetensors file per block, dense tensors and quantized ones side by side.

A quantized weight `name` is stored as `name::codes` (packed int32), `name::scale`, `name::zero`, its scheme in the header;
the low-rank part of a linear as `linear.low_rank::left`, `::right` and, where it has one, `::scale`.
Files appear whole or not at all: written under a temporary name, flushed, renamed.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.low_rank import LowRank
from qtool.formats.packing import unpack_int32
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, code_dtype
from qtool.model.checkpoint import open_file

Stored = Tensor | LowRank | tuple[QuantizedTensor, Scheme]
Changes = dict[str, Stored]
LOW_RANK = ".low_rank"  # after the name of a linear, where its weight has `.weight`


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside path, then rename it; raises QtoolError where the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise QtoolError(f"{path.parent}: cannot write {path.name}: {error}; free space or choose another --out") from error


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    write_atomically(path, lambda temporary: None if temporary.write_text(text, encoding="utf-8") else None)


def save_changes(path: Path, changes: Changes) -> None:
    """Write one block's changes."""
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, object] = {}
    for name, value in changes.items():
        if isinstance(value, Tensor):
            tensors[name] = value.detach().contiguous().cpu()
            continue
        if isinstance(value, LowRank):
            parts = {"left": value.left, "right": value.right, "scale": value.scale}
            tensors |= {f"{name}::{part}": t.contiguous().cpu() for part, t in parts.items() if t is not None}
            continue
        quantized, scheme = value
        tensors[f"{name}::codes"] = quantized.packed().cpu()
        tensors[f"{name}::scale"] = quantized.scale.detach().contiguous().cpu()
        if quantized.zero is not None:
            tensors[f"{name}::zero"] = quantized.zero.contiguous().cpu()
        schemes[name] = {
            "columns": quantized.shape[1],
            "of_tensor": quantized.of_tensor,
            "scheme": scheme.model_dump(),
        }
    header = {"qtool": json.dumps(schemes)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_schemes(path: Path) -> dict[str, Scheme]:
    """Weight: scheme of one block's quantized weights; reads the file's header alone."""
    with open_file(path) as file:
        facts = json.loads(file.metadata()["qtool"])
    return {name: Scheme.model_validate(fact["scheme"]) for name, fact in facts.items()}


def load_low_rank_names(path: Path) -> list[str]:
    """Linears of one block that have a low-rank part; reads the file's header alone."""
    suffix = f"{LOW_RANK}::left"
    with open_file(path) as file:
        return [name.removesuffix(suffix) for name in file.keys() if name.endswith(suffix)]


def load_changes(path: Path) -> Changes:
    """Read one block's changes; raises QtoolError where the file is broken."""
    with open_file(path) as file:
        schemes = json.loads(file.metadata()["qtool"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    changes: Changes = {name: tensor for name, tensor in tensors.items() if "::" not in name}
    for name, facts in schemes.items():
        scheme = Scheme.model_validate(facts["scheme"])
        codes = unpack_int32(tensors[f"{name}::codes"], scheme.weights.bits, facts["columns"]) + scheme.weights.grid.low
        scale, zero = tensors[f"{name}::scale"], tensors.get(f"{name}::zero")
        whole = codes.to(code_dtype(scheme.weights))
        changes[name] = (QuantizedTensor(whole, scale, zero, scheme.weights, facts["of_tensor"]), scheme)
    for name in (name.removesuffix("::left") for name in tensors if name.endswith(f"{LOW_RANK}::left")):
        changes[name] = LowRank(tensors[f"{name}::left"], tensors[f"{name}::right"], tensors.get(f"{name}::scale"))
    return changes
