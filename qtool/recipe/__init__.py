"""Recipe: one strict YAML file for a whole run, read with every problem found at once, each with its file and line.

    model: demo | {path, revision, dtype, device, ...}      seed: 0
    pipeline: [kind/method: {options}, ...]                 gates: {metric: {max, min, max_increase, max_drop, ...}}
`extends: other.yaml` (relative to the file) starts from another recipe, and this file wins:
  - under `model` and `gates`, key by key; a model written as one word replaces the other's wholly;
  - in `pipeline`, a step that the other has too changes that step's options, option by option; a new step comes right
    after the step above it in this file, or at the end where it is the first.
Overrides `a.b=value` come last: `model.device=cpu`, `pipeline.quantize/gptq.damp=0.1`, `pipeline.2.alpha=0.7` (steps
counted from 1), `gates.perplexity={max: 8}`; the value is YAML.
Why YAML's node tree instead of plain values: nodes carry lines, through `extends` and overrides, up to the message.
"""

import fnmatch
import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, PlainValidator, ValidationError, model_validator
from pydantic.json_schema import models_json_schema
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from qtool import registry
from qtool.errors import QtoolError, RecipeError, nearest
from qtool.options import ModelOptions, Options, valid_values
from qtool.recipe.tree import (
    MAP,
    Problem,
    Problems,
    compose,
    find,
    is_null,
    nearest_mark,
    override,
    place,
    read,
    step_key,
    value_of,
)

Checked = TypeVar("Checked", bound=Options)
ALWAYS_FED = ("transform", "search", "distill")  # kinds that see text whatever statistics they need, but for single linears
FED_SCOPES = ("cache", "inputs", "training", "course")  # likewise, of any kind
CHANGING = ("transform", "quantize", "prune", "factorize", "distill")  # kinds that change the model


def _read_limit(value: object) -> float | str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value):
        return value
    raise ValueError("must be a number, or a percentage of the original's value such as 5%")


Limit = Annotated[float | str, PlainValidator(_read_limit, json_schema_input_type=float | str)]


class Baseline(Options):
    """A stored run, and what a metric of the same subject there must not be left behind by."""

    results: str = Field(description="path of the stored run's results.json; paired.json beside it pairs windows")
    max_increase: Limit | None = Field(None, description="largest rise above the stored run's; 5% is relative to it")
    max_drop: Limit | None = Field(None, description="largest fall below the stored run's; 5% is relative to it")

    def limits(self) -> dict[str, float | str]:
        """Those that are stated."""
        return self.model_dump(include={"max_increase", "max_drop"}, exclude_none=True)

    @model_validator(mode="after")
    def _state_one(self) -> "Baseline":
        if not self.limits():
            raise ValueError("states no limit; valid: max_increase, max_drop")
        return self


class Limits(Options):
    """What a metric of the compressed model and of every export must keep to; changes are against the original."""

    max: float | None = Field(None, description="largest value")
    min: float | None = Field(None, description="smallest value")
    max_increase: Limit | None = Field(None, description="largest rise above the original; 5% is relative to it")
    max_drop: Limit | None = Field(None, description="largest fall below the original; 5% is relative to it")
    baseline: Baseline | None = Field(None, description="a stored run to keep up with: {results: PATH, max_increase: 1%}")
    significance: float | None = Field(
        None, ge=0, description="fail only beyond what is allowed by more than this many standard errors; null: by anything"
    )
    dataset: str | None = Field(None, description="the dataset that counts; null: every one that the metric was measured on")
    part: str | None = Field(
        None,
        description="the part of it that counts, such as `domain: python`; `domain: *` judges each domain by itself; null: the "
        "whole",
    )

    @model_validator(mode="after")
    def _state_one(self) -> "Limits":
        if not self.limits() and self.baseline is None:
            raise ValueError("states no limit; valid: max, min, max_increase, max_drop, baseline")
        return self

    def limits(self) -> dict[str, float | str]:
        """Those that are stated, but for the baseline's."""
        return self.model_dump(include={"max", "min", "max_increase", "max_drop"}, exclude_none=True)


@dataclass(frozen=True)
class Gate:
    """What one metric must keep to: `limits` holds those stated, a number or a percentage such as "5%"."""

    metric: str
    limits: dict[str, float | str]
    baseline: Baseline | None = None
    significance: float | None = None
    dataset: str | None = None
    part: str | None = None

    def stated(self) -> dict[str, Any]:
        """As the recipe states it."""
        others = {"significance": self.significance, "dataset": self.dataset, "part": self.part}
        baseline = {} if self.baseline is None else {"baseline": self.baseline.model_dump(exclude_none=True)}
        return {**self.limits, **baseline, **{name: value for name, value in others.items() if value is not None}}


@dataclass(frozen=True)
class Step:
    """One entry of the pipeline; `where` is its file and line."""

    key: str
    method: registry.Method
    options: Options
    where: str


@dataclass(frozen=True)
class Recipe:
    """A whole run, checked; nothing in it is still to be looked up."""

    model: ModelOptions
    seed: int
    steps: tuple[Step, ...]
    gates: tuple[Gate, ...]
    source: Path | None

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values, every default spelled out; loads to the same digest."""
        return {
            "model": self.model.model_dump(mode="json"),
            "seed": self.seed,
            "pipeline": [{step.key: step.options.model_dump(mode="json")} for step in self.steps],
            "gates": {gate.metric: gate.stated() for gate in self.gates},
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved content; the order of keys counts, because the first matching pattern wins."""
        return hashlib.sha256(json.dumps(self.resolved()).encode()).hexdigest()

    @property
    def work_digest(self) -> str:
        """As `digest`, without the gates: a run's steps do not depend on them, so that they may change between two calls."""
        return replace(self, gates=()).digest


class _Document(Options):
    """The top level of the file; the pipeline's entries are checked by their methods' own options."""

    model: ModelOptions = Field(description="demo, a local folder, a hub id, or a mapping with path")
    seed: int = Field(0, ge=0, lt=2**32, description="of everything that is random")
    pipeline: list[object] = Field(min_length=1, description="steps in order, each kind/method: options")
    gates: dict[str, Limits] = Field({}, description="metric: limits; a broken limit fails the run")


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and what it extends; raises one RecipeError that lists every problem."""
    problems: Problems = []
    root = read(Path(path), (), problems)
    return _build(root, overrides, Path(path), problems)


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe that is no file; messages call it `name`."""
    problems: Problems = []
    root = compose(text, name, problems)
    return _build(root, overrides, None, problems)


def read_options(path: Path, model: type[Checked]) -> Checked:
    """Another strict YAML file, of these options; raises one RecipeError that lists every problem, each with its line."""
    problems: Problems = []
    try:
        root = compose(path.read_text(encoding="utf-8"), str(path), problems)
    except (OSError, UnicodeDecodeError) as error:
        raise QtoolError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    options = None if root is None else _check(model, root, root.start_mark, "", problems)
    if problems or options is None:
        raise _error(problems)
    return options


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the options of every method that is installed."""
    listed = registry.list_methods()
    methods = {key: registry.load(key) for key in listed}
    models: dict[str, type[Options]] = {"": _Document, **{key: method.options for key, method in methods.items()}}
    template = "#/$defs/{model}"
    unique = list(dict.fromkeys(models.values()))
    refs, defs = models_json_schema([(model, "validation") for model in unique], ref_template=template)
    document: dict[str, Any] = defs["$defs"].pop(refs[_Document, "validation"]["$ref"].rsplit("/", 1)[-1])
    null = {"type": "null"}
    steps = {
        key: {"anyOf": [refs[methods[key].options, "validation"], null], "description": info.summary}
        for key, info in listed.items()
    }
    one = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False, "properties": steps}
    document["properties"]["pipeline"]["items"] = one
    document["properties"]["extends"] = {"type": "string", "description": "recipe to start from, relative to this file"}
    document["anyOf"] = [{"required": document.pop("required")}, {"required": ["extends"]}]
    document["title"], document["description"] = "qtool recipe", "One file for a whole run."
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document, "$defs": defs["$defs"]}


def _build(root: MappingNode | None, overrides: Sequence[str], source: Path | None, problems: Problems) -> Recipe:
    if root is None:
        raise _error(problems)
    for text in overrides:
        override(root, text, problems)
    document = _check(_Document, root, root.start_mark, "", problems)
    index = find(root, "pipeline")
    pipeline = None if index is None else root.value[index][1]
    steps = _check_steps(pipeline.value, problems) if isinstance(pipeline, SequenceNode) else []
    gates_at = find(root, "gates")
    if gates_at is not None and document is not None and document.gates and isinstance(pipeline, SequenceNode):
        if not any((step_key(item) or "").startswith("evaluate/") for item in pipeline.value):
            problems.append((root.value[gates_at][0].start_mark, "gates need an evaluate step; the pipeline has none"))
        elif not problems:  # a step that is wrong would be missed here once more
            problems.extend(_find_unmeasured(root.value[gates_at][1], steps))
    if problems or document is None:
        raise _error(problems)
    gates = tuple(
        Gate(metric, limits.limits(), limits.baseline, limits.significance, limits.dataset, limits.part)
        for metric, limits in document.gates.items()
    )
    return Recipe(document.model, document.seed, tuple(steps), gates, source)


def _find_unmeasured(gates: Node, steps: list[Step]) -> Iterator[Problem]:
    """Gates on metrics that no evaluate step measures, where every step says what it measures."""
    measures = [step.method.measures for step in steps if step.method.kind == "evaluate"]
    if not measures or None in measures or not isinstance(gates, MappingNode):
        return
    patterns = [pattern for names in measures for pattern in names or ()]
    for key, _ in gates.value:
        if not any(fnmatch.fnmatchcase(key.value, pattern) for pattern in patterns):
            known = [pattern for pattern in patterns if "*" not in pattern]
            yield key.start_mark, f'gates: no evaluate step measures "{key.value}"{nearest(key.value, known or patterns)}'


def _check_steps(items: list[Node], problems: Problems) -> list[Step]:
    """Every step with its method and options; what is wrong with one does not hide what is wrong with the next."""
    steps: list[Step] = []
    calibrated: str | None = None
    changed: str | None = None  # kind of the latest step that changes the model
    additions: dict[str, str] = {}  # step that adds to codes and scales: what
    cached: str | None = None  # where the cache is quantized by scales
    kept: str | None = None  # or kept by KIVI
    rounded: str | None = None  # where attentions are told to round
    quantized: str | None = None
    pruned: str | None = None
    is_searched = False
    for number, item in enumerate(items, 1):
        if not isinstance(item, MappingNode) or len(item.value) != 1:
            hint = f'"{item.value}: {{}}"' if isinstance(item, ScalarNode) else "one kind/method: {options}"
            problems.append((item.start_mark, f"step {number} must be {hint}, with a dash of its own"))
            continue
        key, value = item.value[0]
        try:
            method = registry.load(key.value)
        except QtoolError as error:
            problems.append((key.start_mark, str(error)))
            if key.value.startswith("calibrate/"):  # a mistyped name is one problem, not one per step after it
                calibrated = place(key.start_mark)
            is_searched = is_searched or key.value.startswith("search/")
            changed = kind if (kind := key.value.split("/")[0]) in CHANGING else changed
            continue
        if method.kind == "calibrate":
            if calibrated is not None:
                problems.append((key.start_mark, f"{method.key}: {calibrated} calibrates already; one step serves all"))
            calibrated = calibrated or place(key.start_mark)
        if method.kind == "export" and any(step.key == method.key for step in steps):
            problems.append((key.start_mark, f"{method.key} stands here a second time; both would write one folder"))
        if method.kind == "export" and not method.holds_additions:
            for adding, what in additions.items():
                text = f"{method.key} cannot hold the {what} of {adding}; use export/qtool or export/safetensors"
                problems.append((key.start_mark, text))
        if method.kind == "export" and not method.holds_cache and cached is not None:
            text = f"{method.key} cannot hold a quantized cache ({cached}); use export/compressed_tensors or export/qtool"
            problems.append((key.start_mark, text))
        if method.kind == "export" and not method.holds_kivi and kept is not None:
            text = f"{method.key} cannot hold a cache that KIVI keeps ({kept}); use export/qtool"
            problems.append((key.start_mark, text))
        if method.kind == "export" and not method.holds_attention and rounded is not None:
            text = f"{method.key} cannot hold an attention that rounds ({rounded}); use export/qtool"
            problems.append((key.start_mark, text))
        if method.kind == "transform" and method.scope == "block" and (before := quantized) is not None:
            text = f"{method.key} must leave what blocks compute as it is, which rounding ({before}) hides; put it before"
            problems.append((key.start_mark, text))
        if method.scope == "attention":
            if rounded is not None:
                problems.append((key.start_mark, f"{method.key}: {rounded} rounds attentions already; state all in one step"))
            rounded = rounded or place(key.start_mark)
        if method.scope in ("cache", "packed_cache"):
            if (before := cached or kept) is not None:
                problems.append((key.start_mark, f"{method.key}: {before} quantizes the cache already; quantize it once"))
            elif method.scope == "cache":
                cached = place(key.start_mark)
            else:
                kept = place(key.start_mark)
        if method.kind == "search":
            is_searched = True
            if quantized is not None:
                text = f"{method.key} chooses schemes of dense linears, but {quantized} quantizes before it; put it first"
                problems.append((key.start_mark, text))
        if (method.kind, method.scope) == ("transform", "model") and quantized is not None:
            text = f"{method.key} rotates dense weights, but {quantized} quantizes before it; put it first"
            problems.append((key.start_mark, text))
        if (method.kind, method.scope) == ("transform", "model") and pruned is not None:
            text = f"{method.key} mixes weights, so that no zero of a pruned one ({pruned}) would stay; put it first"
            problems.append((key.start_mark, text))
        if method.scope == "shape" and (before := quantized or cached or kept or rounded) is not None:
            text = f"{method.key} makes dense weights smaller, but {before} quantizes before it; put it first"
            problems.append((key.start_mark, text))
        if method.kind == "prune" and method.scope != "shape":
            pruned = pruned or place(key.start_mark)
        if method.kind == "quantize":
            quantized = quantized or place(key.start_mark)
        if (method.kind, method.scope) == ("factorize", "linear") and changed != "quantize":
            text = f"{method.key} makes up for what quantization took; put it right after a quantize step"
            problems.append((key.start_mark, text))
        leaves_weights = method.scope in ("cache", "packed_cache", "attention", "inputs")
        changed = method.kind if method.kind in CHANGING and not leaves_weights else changed
        if is_null(value):
            value = MappingNode(MAP, [], key.start_mark, key.end_mark)
        options = _check(method.options, value, key.start_mark, f"{method.key}: ", problems)
        if options is not None and (what := method.added(options)):
            additions[method.key] = what
        is_unfed = method.scope == "linear" or (method.kind, method.scope) == ("transform", "model")
        is_always_fed = method.scope in FED_SCOPES or (method.kind in ALWAYS_FED and not is_unfed)
        needs_text = is_always_fed or (options is not None and method.needed(options) != ())
        if needs_text and method.kind not in ("calibrate", "evaluate", "export") and calibrated is None:
            problems.append((key.start_mark, f"{method.key} needs calibration text; put calibrate/text before it"))
        if options is None:
            continue
        problems.extend(_find_later_schemes(options, value, method.key))
        if not is_searched and getattr(options, "scheme", None) == "search":
            text = f"{method.key}: scheme is search, but no search step stands before it; put search/mixed_precision there"
            problems.append((nearest_mark(value, ("scheme",), key.start_mark), text))
        steps.append(Step(method.key, method, options, place(key.start_mark)))
    return steps


def _find_later_schemes(options: Options, node: Node, key: str) -> Iterator[Problem]:
    """Schemes that ask for what is a step of its own: a quantized key/value cache, static scales of inputs."""
    from qtool.formats.scheme import Scheme  # here, because it imports torch, and by now the methods have

    for name in type(options).model_fields:
        value = getattr(options, name)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]:
            if not isinstance(part, Scheme):
                continue
            at = nearest_mark(node, (name,), node.start_mark)
            if part.kv is not None:
                bits = part.kv.bits
                kept = next(one for one in (2, 3, 4, 8) if one >= bits)  # bits that words pack
                step = "quantize/kv_cache" if kept == 8 else f"quantize/kivi: {{key_bits: {kept}, value_bits: {kept}}}"
                yield at, f"{key}: {name}: {part}: the cache is a step of its own, {step}; leave kv{bits} away"
            if part.activations is not None and part.activations.static:
                yield at, f"{key}: {name}: {part}: static scales are a step of their own, quantize/inputs; leave static away"


def _check(model: type[Checked], node: Node, at: yaml.Mark, prefix: str, problems: Problems) -> Checked | None:
    """The validated options of a node; None, with every fault reported, where they are not valid."""
    try:
        return model.model_validate(value_of(node))
    except ValidationError as error:
        problems.extend(_explain(model, fault, node, at, prefix) for fault in error.errors(include_url=False))
        return None


def _explain(model: type[Options], fault: Mapping[str, Any], node: Node, at: yaml.Mark, prefix: str) -> Problem:
    """One of pydantic's faults as place and advice."""
    loc: tuple[int | str, ...] = fault["loc"]
    mark = nearest_mark(node, loc, at)
    path = ".".join(map(str, loc))
    if fault["type"] in ("extra_forbidden", "missing"):
        _, _, inner = _owner(model, loc[:-1])
        inside = ".".join(map(str, loc[:-1]))
        prefix += f"{inside}: " if inside else ""
        if fault["type"] == "missing":
            field = inner.model_fields[str(loc[-1])]
            return mark, f"{prefix}{loc[-1]} is missing: {field.description or valid_values(inner, str(loc[-1]))}"
        return mark, f'{prefix}there is no "{loc[-1]}"{nearest(str(loc[-1]), inner.model_fields)}'
    if fault["type"] == "value_error":
        return mark, f"{prefix}{path}: {fault['ctx']['error']}" if path else f"{prefix}{fault['ctx']['error']}"
    owner, name, _ = _owner(model, loc)
    given = textwrap.shorten(json.dumps(fault["input"], default=str), 60, placeholder=" ...")
    if name is None:
        return mark, f"{prefix}is {given}; must be a mapping of {', '.join(model.model_fields)}"
    return mark, f"{prefix}{path} is {given}; valid: {valid_values(owner, name)}"


def _owner(model: type[Options], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], str | None, type[BaseModel]]:
    """The options model and field that a location ends in, and the model inside that field, or else around it."""
    owner: type[BaseModel] = model
    inner: type[BaseModel] = model
    name = None
    for part in loc:
        if part in inner.model_fields:
            owner, name = inner, str(part)
            inner = _model_in(inner.model_fields[name].annotation) or inner
    return owner, name, inner


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_model_in, get_args(annotation)) if found), None)


def _error(problems: Problems) -> RecipeError:
    ordered = sorted(problems, key=lambda problem: (problem[0].name, problem[0].line))
    return RecipeError([f"{place(mark)}: {text}" for mark, text in ordered])
