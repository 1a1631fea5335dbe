"""The folder is the registry: qtool/methods/quantize/gptq.py is the method quantize/gptq.

A method's file holds a docstring (its first line is the summary, a line `Source: ...` the paper, paragraphs `For: ...` and
`Costs: ...` when to take it) and one constant
    METHOD = Method(run=gptq, options=GptqOptions, scope="linear", needs=("hessian",))
Plugins join through the entry-point group `qtool.methods`: quantize/mine = "my_package.mine". Built-ins and plugins take
the same road. Listing reads docstrings and imports no method, so `qtool --help` stays fast.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from qtool.artifact import Artifact, describe_folder
from qtool.errors import QtoolError, nearest
from qtool.options import Needs, Options

KINDS = ("calibrate", "transform", "search", "quantize", "prune", "factorize", "distill", "evaluate", "export")
GUIDES = {
    "calibrate": "First: text that steps see. mixture, dsir (like a target), coverage, preservation; self_generated: none.",
    "transform": "Before rounding. The model computes the same, but after deep_shape. GPTQ needs none; activations do.",
    "search": "Before quantizing: which linear gets which scheme.",
    "quantize": "rtn at 8 bits; gptq at 2 to 4, yaqa for the least KL; hqq, fine_quant without text; kv_cache, inputs after.",
    "prune": "Zeros: sparsegpt for quality, wanda for speed; 2:4 where the hardware has it. Then distill.",
    "factorize": "After quantizing, where the runtime can run low-rank factors.",
    "distill": "Last before measuring: training by the original's predictions.",
    "evaluate": "kl_divergence to compare, perplexity to quote, lm_eval for tasks; generation to read what both models write.",
    "export": "what the runtime reads: gguf for llama.cpp, else compressed_tensors, gptq, ...; safetensors for all the rest.",
}
Scope = Literal["linear", "block", "cache", "packed_cache", "attention", "inputs", "model", "shape", "training", "course"]


@dataclass(frozen=True)
class Method:
    """What a method is: its function, its strict options, what it works on and which statistics it needs."""

    run: Callable[..., Any]
    options: type[Options]
    scope: Scope
    needs: Needs | Callable[[Any], Needs] = ()  # stated, or derived from the options
    rowwise: bool = False  # output channels do not influence each other: linears that share an input go in one call
    holds_additions: bool = False  # an export that also holds what stands beside codes and scales: low-rank factors, outliers
    holds_cache: bool = False  # an export that also holds the scales of a quantized cache
    holds_kivi: bool = False  # an export that also says how KIVI keeps a cache
    holds_attention: bool = False  # an export that also says what attentions round
    check: Callable[..., None] | None = None  # (model, options): raises before any work where the model does not fit
    holds: Callable[..., None] | None = None  # an export: (model, {linear: scheme}, options) raises where it cannot write them;
    # a quantizer of inputs: where it has no scales for them
    storage: Callable[..., Any] | None = None  # an export of single linears: from what holds takes to a writer.Storage
    size: Callable[..., int] | None = None  # another export: from what holds takes to the bytes of the folder it will write
    schemes: tuple[str, ...] = ()  # a transform, quantizer or export that takes few schemes: some of them, for the laws
    chooses: tuple[str, ...] = ()  # a quantizer: fields of the scheme that it sets itself, matrix by matrix
    chooses_inputs: bool = False  # a quantizer of linears that takes the whole scheme and returns that of inputs too
    operations: Callable[..., float] | None = None  # (options, out, in): of one linear, beyond one sweep over its columns
    parts_head: Callable[[Any], bool] | None = None  # (options): whether a head and an embedding that were one become two
    adds: str | Callable[[Any], str] = ""  # what its results hold that only exports that hold additions can write; by options
    added_bytes: Callable[..., int] | None = None  # (options, out, in): how much that is for one linear
    shape: Callable[..., Any] | None = None  # of scope shape: (model, options) to the largest shape.Shape that it may come to;
    # raises where the model takes none such
    repeats: bool = True  # an evaluation: whether a second one gives the same figures, which those of time do not
    is_shared: bool = False  # an evaluation that all processes of torchrun do together; the first returns what is found
    measures: tuple[str, ...] | None = None  # an evaluation's metrics, names or patterns; None: known once it has run
    key: str = ""

    @property
    def kind(self) -> str:
        return self.key.split("/")[0]

    def export(self, model: Any, out: Path, options: Options) -> Artifact:
        """Write the model into `out`, an empty folder; raises QtoolError, before any of it, for what cannot be held."""
        if self.check is not None:
            self.check(model, options)
        if self.holds is not None:
            self.holds(model, model.schemes(), options)
        is_lossless: bool = self.run(model, out, options)
        return describe_folder(self.key.removeprefix("export/"), out, is_lossless)

    def asked_of(self, scheme: Any) -> Any:
        """What a quantizer of scope linear takes of a Scheme."""
        return scheme if self.chooses_inputs else scheme.weights

    def found_by(self, result: Any, scheme: Any) -> tuple[Any, Any]:
        """The quantized tensor that such a quantizer returned, and the Scheme that it chose where `scheme` was asked for."""
        tensor, activations = result if self.chooses_inputs else (result, scheme.activations)
        return tensor, scheme.model_copy(update={"weights": tensor.scheme, "activations": activations})

    def added(self, options: Options) -> str:
        """What a run with these options adds that only exports that hold additions can write; empty where nothing."""
        return self.adds(options) if callable(self.adds) else self.adds

    def needed(self, options: Options) -> Needs:
        """The statistics that a run with these options takes."""
        return self.needs(options) if callable(self.needs) else self.needs


@dataclass(frozen=True)
class MethodInfo:
    """What listing knows of a method without importing it."""

    key: str
    module: str
    docstring: str

    @property
    def kind(self) -> str:
        return self.key.split("/")[0]

    @property
    def summary(self) -> str:
        return self.docstring.strip().splitlines()[0]

    @property
    def paper(self) -> str:
        lines = [line.strip() for line in self.docstring.splitlines()]
        return next((line.removeprefix("Source: ") for line in lines if line.startswith("Source: ")), "")

    @property
    def purpose(self) -> str:
        """What the method is for, and when another is to be preferred."""
        return self._paragraph("For")

    @property
    def cost(self) -> str:
        """What it takes."""
        return self._paragraph("Costs")

    def _paragraph(self, name: str) -> str:
        match = re.search(rf"^{name}: (.*?)(?=^\w[\w ]*: |\Z)", inspect.cleandoc(self.docstring), re.DOTALL | re.MULTILINE)
        return "" if match is None else " ".join(match[1].split())


def list_methods() -> dict[str, MethodInfo]:
    """Every method by key, built-ins first by kind, then by name."""
    return {key: MethodInfo(key, module, _docstring(key, module)) for key, module in _modules().items()}


def _modules() -> dict[str, str]:
    """The module of every method by its key, in the order of listings."""
    return _modules_along(tuple(sys.path))


@functools.cache
def _modules_along(search: tuple[str, ...]) -> dict[str, str]:
    """The same where packages are looked for along `search`; once, because every step of every recipe asks."""
    modules = {}
    for path in sorted((Path(__file__).parent / "methods").glob("*/*.py")):
        if path.stem != "__init__":
            modules[f"{path.parent.name}/{path.stem}"] = f"qtool.methods.{path.parent.name}.{path.stem}"
    for entry in entry_points(group="qtool.methods"):
        if entry.name in modules:
            raise QtoolError(f"the plugin {entry.value} brings {entry.name}, which exists already; rename its entry point")
        if entry.name.split("/")[0] not in KINDS or entry.name.count("/") != 1:
            raise QtoolError(f"the plugin {entry.value} is named {entry.name}; write kind/name, kind of: {', '.join(KINDS)}")
        modules[entry.name] = entry.value
    return dict(sorted(modules.items(), key=lambda item: (KINDS.index(item[0].split("/")[0]), item[0])))


def load(key: str) -> Method:
    """Import one method; raises QtoolError with the nearest key where there is none."""
    modules = _modules()
    if key not in modules:
        raise QtoolError(f'there is no method "{key}"{nearest(key, modules)}')
    _docstring(key, modules[key])
    module = importlib.import_module(modules[key])
    if not isinstance(getattr(module, "METHOD", None), Method):
        raise QtoolError(f"{key}: {modules[key]} defines no METHOD = Method(...)")
    method: Method = module.METHOD
    return replace(method, key=key)


def laws(key: str) -> dict[str, Callable[[], None]]:
    """The properties that every method of this kind must satisfy, by name; each raises AssertionError where broken."""
    from qtool import laws as checks  # here, because laws build models and listing must not import torch

    return checks.of(load(key))


def _docstring(key: str, module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise QtoolError(f"{key}: the module {module} does not exist; reinstall the package that brings it")
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    if not docstring:
        raise QtoolError(f"{key}: {module} has no docstring; its first line is the method's summary")
    return docstring
