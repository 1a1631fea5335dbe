"""Runtimes: which of them serve an export of a compressed model, and what hinders the others, from a table of stated facts.

The table, qtool/assets/runtimes.toml, has one entry for a version of a runtime and an export that it loads, or is known not
to. An entry names where the fact comes from; what its source does not tell is left out, and so counts as not served.
Only what the exports write is asked about: an entry says nothing of checkpoints by other hands. That an export can hold the
schemes at all is its own check (Method.holds); here they are held against what a runtime's loader and kernels take.
Why no devices: kernels differ from GPU to GPU, and an entry holds where one of the runtime's devices serves.
"""

import functools
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from qtool.formats.kivi import KiviScheme
from qtool.formats.scheme import Format, KvScheme, ScaleDtype, Scheme, ZeroDtype
from qtool.model.architectures import fused_units
from qtool.model.checkpoint import EXPERT
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import head_name
from qtool.options import Options

TABLE = Path(__file__).resolve().parent.parent / "assets" / "runtimes.toml"
PLAIN: tuple[ScaleDtype, ...] = ("bfloat16", "float16", "float32")
ModelDtype = Literal["bfloat16", "float16", "float32"]
Shape = tuple[int, int]


class ServedSchemes(Options):
    """Schemes that a runtime serves: every combination of what the fields list.

    in_multiple, out_multiple: of a linear's inputs and outputs, those of joined linears together. alone: served only where all
    quantized linears but experts have one scheme. dtypes: of the model; None: any.
    """

    format: Format
    bits: tuple[int, ...]
    groups: tuple[int, ...] | None = None  # weights of one scale, 0: a whole row; None: any, the row too
    group_multiple: int = 1  # of every group that is no row
    symmetric: tuple[bool, ...] = (True,)
    zero_dtypes: tuple[ZeroDtype, ...] = ("int",)
    scale_dtypes: tuple[ScaleDtype, ...] = PLAIN
    double_quant: tuple[bool, ...] = (False,)
    activations: tuple[str, ...] = ("none",)  # how a linear's input is rounded: none, int8, int8asym, e4m3, mxfp4, ...
    in_multiple: int = 1
    out_multiple: int = 1
    dtypes: tuple[ModelDtype, ...] | None = None
    alone: bool = False
    experts: bool = False

    def misfits(self, scheme: Scheme, shape: Shape, dtype: str, is_expert: bool) -> list[str]:
        """What keeps a linear of shape (out, in) from being served, each as what is and what must be; empty where nothing."""
        weights, (n_out, n_in) = scheme.weights, shape
        inputs = "none" if scheme.activations is None else str(scheme.activations)
        group = weights.group or 0
        zeros = "none" if weights.symmetric else f"zero points, stored as {weights.zero_dtype}"
        may_zeros = [f"zero points, stored as {' or '.join(self.zero_dtypes)}"] if False in self.symmetric else []
        must_zeros = ["none"] * (True in self.symmetric) + may_zeros
        fits_group = (self.groups is None or group in self.groups) and group % self.group_multiple == 0
        asks = [
            (weights.format == self.format, f"its format is {weights.format}, must be {self.format}"),
            (weights.bits in self.bits, f"its weights have {weights.bits} bits, must have {_or(self.bits)}"),
            (
                weights.scale_dtype in self.scale_dtypes,
                f"its scales are {weights.scale_dtype}, must be {_or(self.scale_dtypes)}",
            ),
            (fits_group, f"its groups are of {group or 'a whole row'}, must be of {self._group_words()}"),
            (
                weights.symmetric in self.symmetric and (weights.symmetric or weights.zero_dtype in self.zero_dtypes),
                f"of zero points it has {zeros}, must have {_or(must_zeros)}",
            ),
            (
                weights.double_quant in self.double_quant,
                "its scales are quantized themselves (-dq), must be plain"
                if weights.double_quant
                else "its scales are plain, must be quantized themselves (-dq)",
            ),
            (weights.group_along == "out_channel", "its groups lie along `out` (-ic), must lie along `in`"),
            (inputs in self.activations, f"of rounded inputs it has {inputs}, must have {_or(self.activations)}"),
            (scheme.kv is None, "its cache is quantized, which is a step of its own; leave kv out"),
            (n_in % self.in_multiple == 0, f"it has {n_in} inputs, must have a multiple of {self.in_multiple}"),
            (n_out % self.out_multiple == 0, f"it has {n_out} outputs, must have a multiple of {self.out_multiple}"),
            (
                self.dtypes is None or dtype in self.dtypes,
                f"the model is in {dtype}, must be in {_or(self.dtypes or ('any',))}",
            ),
            (self.experts or not is_expert, "it belongs to an expert, which must have another scheme"),
        ]
        return [words for is_fit, words in asks if not is_fit]

    def _group_words(self) -> str:
        if self.groups is not None:
            return _or("a whole row" if group == 0 else group for group in self.groups)
        return "a whole row" if self.group_multiple == 1 else f"a multiple of {self.group_multiple}, or a whole row"


class Serving(Options):
    """What one version of a runtime serves of one export; without anything served, `reason` says why and what to do."""

    runtime: str
    version: str
    needs: tuple[str, ...] = ()  # packages beside the runtime, with the version looked at
    export: str
    evidence: Literal["documented", "run"]  # documented: by its source or documents; run: scripts/check_exports runs it
    source: str
    reason: str = ""
    architectures: tuple[str, ...] | None = None  # model_type of config.json; None: all that the export takes
    all_schemes: bool = False  # every scheme that the export takes, but `but`
    head: bool = False  # a quantized head
    experts: bool = False  # quantized experts, where `schemes` says so too
    fused_alike: bool = False  # quantized linears that are joined (q, k, v; gate, up) must have one scheme
    fused_dense: Literal["free", "whole", "never"] = "free"  # joined linears may be dense: each, only all together, not at all
    caches: tuple[Literal["e4m3", "int8", "kivi"], ...] = ()  # formats of a quantized key/value cache
    schemes: tuple[ServedSchemes, ...] = ()
    but: tuple[ServedSchemes, ...] = ()

    def __str__(self) -> str:
        return f"{self.runtime} {self.version}" + (f" with {', '.join(self.needs)}" if self.needs else "")

    @property
    def joins(self) -> bool:
        """Whether linears that share an input become one."""
        return self.fused_alike or self.fused_dense != "free"


class Table(Options):
    serves: tuple[Serving, ...]


@functools.cache
def load_table() -> tuple[Serving, ...]:
    """Every entry, in the order of the file."""
    entries = Table.model_validate_json(json.dumps(tomllib.loads(TABLE.read_text(encoding="utf-8"))), strict=True).serves
    for entry in entries:
        serves = entry.all_schemes or bool(entry.schemes)
        assert serves != bool(entry.reason), f"{entry}, {entry.export}: either schemes, or the reason why there are none"
        assert entry.all_schemes or not entry.but, f"{entry}, {entry.export}: `but` goes with all_schemes"
    return entries


def servings(
    export: str, model: ModelHandle, schemes: dict[str, Scheme], cache: KvScheme | KiviScheme | None = None
) -> list[tuple[Serving, str | None]]:
    """Every entry of an export (gguf, gptq, ...) with its refusal of the model, None where it is served."""
    return [(entry, refusal(entry, model, schemes, cache)) for entry in load_table() if entry.export == export]


def refusal(
    entry: Serving, model: ModelHandle, schemes: dict[str, Scheme], cache: KvScheme | KiviScheme | None = None
) -> str | None:
    """Why a runtime does not serve the model with these schemes, {full name of a quantized linear: scheme}; None where it does.

    The first reason found: which linear, what it is against what must be, how to put it right.
    """
    if entry.reason:
        return entry.reason
    kind = str(model.config.model_type)
    if entry.architectures is not None and kind not in entry.architectures:
        return f"{kind} models are not served; use another export, or another runtime"
    if cache is not None and ("kivi" if isinstance(cache, KiviScheme) else str(cache)) not in entry.caches:
        may = f"{_or(entry.caches)} alone" if entry.caches else "none"
        return f"of quantized caches it serves {may}, not {cache}; quantize the cache so, or leave its step away"
    units = fused_units(model.linear_names()) if entry.joins else {}
    return _refused_linear(entry, model, schemes, units) or _refused_unit(entry, schemes, units)


def _refused_linear(entry: Serving, model: ModelHandle, schemes: dict[str, Scheme], units: dict[str, list[str]]) -> str | None:
    head, dtype = head_name(model), str(model.dtype).removeprefix("torch.")
    joined = {name: members for members in units.values() for name in members}
    is_mixed = len({scheme for name, scheme in schemes.items() if EXPERT.fullmatch(name) is None}) > 1
    for name, scheme in schemes.items():
        is_expert = EXPERT.fullmatch(name) is not None
        if name == head and not entry.head:
            return f"{name}: {scheme}: the head must be dense; add it to ignore, or use another export"
        if is_expert and not entry.experts:
            return f"{name}: {scheme}: experts must be dense; add *.experts.* to ignore, or use another export"
        n_out = sum(model.linear_shape(part)[0] for part in joined.get(name, [name]))
        shape = (n_out, model.linear_shape(name)[1])
        if entry.all_schemes:
            if any(not served.misfits(scheme, shape, dtype, False) for served in entry.but):
                return f"{name}: {scheme}: it serves other schemes, not this one; quantize to another, or use another export"
            continue
        asked = [(served, served.misfits(scheme, shape, dtype, is_expert)) for served in entry.schemes]
        fitting = [served for served, misfits in asked if not misfits]
        if not fitting:
            _, nearest = min(asked, key=lambda row: (row[0].format != scheme.weights.format, len(row[1])))
            return f"{name}: {scheme}: {nearest[0]}; quantize so, or use another export"
        if is_mixed and not is_expert and all(served.alone for served in fitting):
            return f"{name}: {scheme}: all quantized linears must have this scheme, or none; give them one"
    return None


def _refused_unit(entry: Serving, schemes: dict[str, Scheme], units: dict[str, list[str]]) -> str | None:
    for unit, members in units.items() if schemes else ():
        parent, _, name = unit.rpartition(".")
        words = ", ".join(f"{part.rsplit('.', 1)[-1]} {schemes.get(part, 'dense')}" for part in members)
        found = [schemes[part] for part in members if part in schemes]
        if entry.fused_dense == "never" and len(found) < len(members):
            return f"{parent}: {words}; it joins them as {name}, which must be quantized: quantize them, or use another export"
        if entry.fused_dense == "whole" and 0 < len(found) < len(members):
            return f"{parent}: {words}; it joins them as {name}, which is quantized or dense: do the same to all of them"
        if entry.fused_alike and len(set(found)) > 1:
            return f"{parent}: {words}; it joins them as {name}, which has one scheme: give them one"
    return None


def _or(words: Iterable[object]) -> str:
    """2, 4 or 8."""
    *most, last = [str(word) for word in words]
    return f"{', '.join(most)} or {last}" if most else last
