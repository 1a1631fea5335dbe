"""What compression changed, on disk: one safetensors file per block, dense tensors and quantized ones side by side.

A quantized weight `name` is stored as `name::codes` (packed int32), `name::scale`, `name::zero` and so on, see `parts` of
QuantizedTensor, its scheme in the header; scales that are quantized themselves are stored as their codes; the
low-rank part of a linear as `linear.low_rank::left`, `::right` and, where it has one, `::scale`; static scales of its inputs as
`linear.inputs::scale` and, where there are zero points, `::zero`; the signs of a rotation of its input as
`linear.rotation::signs`; the scales of a quantized cache as `attention::k_scale` and `::v_scale`; how KIVI keeps a cache, which
has no tensor, in the header alone, and so does what an attention rounds, which changes name `attention.rounding`.
Files appear whole or not at all: written under a temporary name, flushed, renamed.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.attention import AttentionRounding
from qtool.formats.inputs import InputScales
from qtool.formats.kivi import KiviScheme
from qtool.formats.kv_cache import CacheScales
from qtool.formats.low_rank import LowRank
from qtool.formats.packing import unpack_codes
from qtool.formats.rotations import InputRotation
from qtool.formats.scales import scale_codes, single_scale
from qtool.formats.scheme import KvScheme, Scheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor, code_dtype
from qtool.model.checkpoint import open_file

OfLinear = Tensor | LowRank | InputScales | InputRotation | tuple[QuantizedTensor, Scheme]
Stored = OfLinear | CacheScales | KiviScheme | AttentionRounding
Changes = dict[str, Stored]
LOW_RANK = ".low_rank"  # after the name of a linear, where its weight has `.weight`
INPUTS = ".inputs"  # likewise, of its static scales
ROTATION = ".rotation"  # likewise, of a rotation of its input
ROUNDING = ".rounding"  # after the name of an attention


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
        with contextlib.suppress(OSError):  # there may be no folder that it could stand in
            temporary.unlink(missing_ok=True)
        raise QtoolError(f"{path.parent}: cannot write {path.name}: {error}; free space or choose another --out") from error


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    write_atomically(path, lambda temporary: None if temporary.write_text(text, encoding="utf-8") else None)


def save_changes(path: Path, changes: Changes) -> None:
    """Write one block's changes."""
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, dict[str, object]] = {}
    caches: dict[str, KvScheme | KiviScheme] = {}
    attentions: dict[str, AttentionRounding] = {}
    for name, value in changes.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, CacheScales):
            tensors |= {f"{name}::k_scale": value.k_scale, f"{name}::v_scale": value.v_scale}
            caches[name] = value.scheme
        elif isinstance(value, KiviScheme):
            caches[name] = value
        elif isinstance(value, AttentionRounding):
            attentions[name] = value
        elif isinstance(value, InputScales):
            tensors |= {f"{name}::{part}": tensor.clone() for part, tensor in value.parts().items()}  # several linears' own
        elif isinstance(value, InputRotation):
            tensors[f"{name}::signs"] = value.signs
        elif isinstance(value, LowRank):
            tensors |= {f"{name}::{part}": tensor for part, tensor in low_rank_parts(value).items()}
        else:
            tensors |= {f"{name}::{part}": tensor for part, tensor in quantized_parts(value[0]).items()}
            schemes[name] = quantized_facts(*value)
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    facts = in_json({"weights": schemes, "caches": caches, "attentions": attentions})  # one entry: several have no order
    write_atomically(path, lambda temporary: save_file(whole, temporary, metadata={"qtool": facts}))


def in_json(facts: Mapping[str, Any]) -> str:
    """Facts that hold schemes as text."""
    return json.dumps(facts, default=lambda options: options.model_dump())


def low_rank_parts(low_rank: LowRank) -> dict[str, Tensor]:
    """The tensors of a low-rank part as they are stored."""
    parts = {"left": low_rank.left, "right": low_rank.right, "scale": low_rank.scale}
    return {part: tensor for part, tensor in parts.items() if tensor is not None}


def quantized_facts(quantized: QuantizedTensor, scheme: Scheme) -> dict[str, object]:
    """What beside `quantized_parts` makes a quantized weight and its scheme."""
    return {"scheme": scheme, "facts": quantized.facts(), "columns": columns_of(quantized)}


def restore_quantized(parts: dict[str, Tensor], facts: dict[str, Any]) -> tuple[QuantizedTensor, Scheme]:
    """The quantized weight and the scheme that `quantized_parts` and `quantized_facts` came from."""
    return restore(parts, facts["facts"], facts["columns"]), Scheme.model_validate(facts["scheme"])


def quantized_parts(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a quantized weight as they are stored: codes packed, scales as codes where they are quantized."""
    parts = quantized.parts() | {"codes": quantized.packed()}
    if quantized.second is not None:
        parts["scale"] = scale_codes(quantized.scale, quantized.second)
    if quantized.salient is not None:
        parts |= {f"salient_{name}": part for name, part in quantized_parts(quantized.salient.tensor).items()}
    return parts


def columns_of(quantized: QuantizedTensor) -> list[int]:
    """Codes in a row, of the weight itself and of its salient columns."""
    return [quantized.codes.shape[1], *([] if quantized.salient is None else columns_of(quantized.salient.tensor))]


def restore(parts: dict[str, Tensor], facts: dict[str, Any], columns: list[int]) -> QuantizedTensor:
    """The quantized weight that `quantized_parts` came from."""
    prefix, inner, whole = "", facts, dict(parts)
    for n_columns in columns:
        scheme = WeightScheme.model_validate(inner["scheme"])
        codes = unpack_codes(parts[f"{prefix}codes"], scheme.grid.n_levels, n_columns) + scheme.grid.low
        whole[f"{prefix}codes"] = codes.to(code_dtype(scheme))
        if scheme.double_quant:
            whole[f"{prefix}scale"] = single_scale(parts[f"{prefix}scale"], parts[f"{prefix}second"])
        prefix, inner = f"{prefix}salient_", inner.get("salient", {})
    return QuantizedTensor.from_parts(whole, facts)


def load_schemes(path: Path) -> dict[str, Scheme]:
    """Weight: scheme of one block's quantized weights; reads the file's header alone."""
    with open_file(path) as file:
        facts = json.loads(file.metadata()["qtool"])["weights"]
    return {name: Scheme.model_validate(fact["scheme"]) for name, fact in facts.items()}


def cache_scheme(facts: dict[str, Any]) -> KvScheme | KiviScheme:
    """The scheme of a cache whose fields are facts; raises ValueError for what is none."""
    return KiviScheme.model_validate(facts) if "key_bits" in facts else KvScheme.model_validate(facts)


def load_cache(path: Path) -> KvScheme | KiviScheme | None:
    """What one block's cache is quantized to; reads the file's header alone."""
    with open_file(path) as file:
        caches = json.loads(file.metadata()["qtool"])["caches"]
    return next((cache_scheme(scheme) for scheme in caches.values()), None)


def load_rounding(path: Path) -> AttentionRounding | None:
    """What one block's attention rounds; reads the file's header alone."""
    with open_file(path) as file:
        attentions = json.loads(file.metadata()["qtool"]).get("attentions", {})
    return next((AttentionRounding.model_validate(fields) for fields in attentions.values()), None)


def load_additions(path: Path) -> dict[str, str]:
    """Linears of one block that have more than codes, scales and zero points: what more; reads the file's header alone."""
    with open_file(path) as file:
        return additions_among(file.keys())


def additions_among(names: Iterable[str]) -> dict[str, str]:
    """Linears that have more than codes, scales and zero points by the names of what is stored: what more."""
    marks = {
        f"{LOW_RANK}::left": "low-rank factors",
        ".weight::outlier_values": "outliers",
        ".weight::salient_columns": "salient columns",
        ".weight::column_scale": "column scales",
        f"{ROTATION}::signs": "rotation of the input",  # last, as the last one counts: export/qtool asks for it
    }
    listed = list(names)
    return {name.removesuffix(mark): what for mark, what in marks.items() for name in listed if name.endswith(mark)}


def load_names(path: Path) -> set[str]:
    """Names of what one block's changes hold, dense or quantized; reads the file's header alone."""
    with open_file(path) as file:
        return {name.split("::")[0] for name in file.keys()}


def load_changes(path: Path) -> Changes:
    """Read one block's changes; raises QtoolError where the file is broken."""
    with open_file(path) as file:
        facts = json.loads(file.metadata()["qtool"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    changes: Changes = {name: tensor for name, tensor in tensors.items() if "::" not in name}
    for name, stated in facts["weights"].items():
        prefix = f"{name}::"
        parts = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        changes[name] = restore_quantized(parts, stated)
    for name, fields in facts["caches"].items():
        if isinstance(scheme := cache_scheme(fields), KiviScheme):
            changes[name] = scheme
        else:
            changes[name] = CacheScales(scheme, tensors[f"{name}::k_scale"], tensors[f"{name}::v_scale"])
    for name, fields in facts.get("attentions", {}).items():
        changes[name] = AttentionRounding.model_validate(fields)
    for name in (name.removesuffix("::left") for name in tensors if name.endswith(f"{LOW_RANK}::left")):
        changes[name] = LowRank(tensors[f"{name}::left"], tensors[f"{name}::right"], tensors.get(f"{name}::scale"))
    for name in (name.removesuffix("::scale") for name in tensors if name.endswith(f"{INPUTS}::scale")):
        rounding = Scheme.model_validate(facts["weights"][f"{name.removesuffix(INPUTS)}.weight"]["scheme"]).activations
        assert rounding is not None, f"{name}: a linear with static scales rounds its inputs"
        changes[name] = InputScales(rounding, tensors[f"{name}::scale"], tensors.get(f"{name}::zero"))
    for name in (name.removesuffix("::signs") for name in tensors if name.endswith(f"{ROTATION}::signs")):
        changes[name] = InputRotation(tensors[f"{name}::signs"])
    return changes
