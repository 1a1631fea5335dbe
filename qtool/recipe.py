"""Recipe: one strict YAML file for a whole run, read with every problem found at once, each with its file and line.

    model: demo | {path, revision, dtype, device, ...}      seed: 0
    pipeline: [kind/method: {options}, ...]                 gates: {metric: {max, min, max_increase, max_drop}}
`extends: other.yaml` (relative to the file) starts from another recipe, and this file wins:
  - under `model` and `gates`, key by key; a model written as one word replaces the other's wholly;
  - in `pipeline`, a step that the other has too changes that step's options, option by option; a new step comes right
    after the step above it in this file, or at the end where it is the first.
Overrides `a.b=value` come last: `model.device=cpu`, `pipeline.quantize/gptq.damp=0.1`, `pipeline.2.alpha=0.7` (steps counted
from 1), `gates.perplexity={max: 8}`; the value is YAML.
Why YAML's node tree instead of plain values: nodes carry lines, through `extends` and overrides, up to the message.
Why no aliases: an override would change two places at once.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, PlainValidator, ValidationError, model_validator
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from qtool import registry
from qtool.errors import QtoolError, RecipeError, nearest
from qtool.options import ModelOptions, Options, valid_values

Problems = list[tuple[yaml.Mark, str]]
Checked = TypeVar("Checked", bound=Options)
NEEDING_TEXT = ("transform", "quantize", "prune", "factorize")
STR, MAP = "tag:yaml.org,2002:str", "tag:yaml.org,2002:map"


def _read_limit(value: object) -> float | str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?\s*%", value):
        return value
    raise ValueError("must be a number, or a percentage of the original's value such as 5%")


Limit = Annotated[float | str, PlainValidator(_read_limit, json_schema_input_type=float | str)]


class Limits(Options):
    """What a metric of the compressed model and of every export must keep to; changes are against the original."""

    max: float | None = Field(None, description="largest value")
    min: float | None = Field(None, description="smallest value")
    max_increase: Limit | None = Field(None, description="largest rise above the original; 5% is relative to it")
    max_drop: Limit | None = Field(None, description="largest fall below the original; 5% is relative to it")

    @model_validator(mode="after")
    def _state_one(self) -> "Limits":
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"states no limit; valid: {', '.join(type(self).model_fields)}")
        return self


@dataclass(frozen=True)
class Gate:
    """Limits of one metric, by its name; a gate that breaks fails the run."""

    metric: str
    limits: Limits

    def broken(self, value: float, original: float | None) -> list[str]:
        """Each limit that `value` breaks, in words; raises QtoolError where a change is limited and there is no original."""
        limits, found = self.limits, []
        if limits.max is not None and not value <= limits.max:
            found.append(f"{self.metric} is {value:.6g}, above max {limits.max:g}")
        if limits.min is not None and not value >= limits.min:
            found.append(f"{self.metric} is {value:.6g}, below min {limits.min:g}")
        for name, limit, sign in (("max_increase", limits.max_increase, 1), ("max_drop", limits.max_drop, -1)):
            if limit is None:
                continue
            if original is None:
                raise QtoolError(f"gates: {self.metric}: {name} needs the original's value, which this metric has not; use max or min")
            allowed = abs(original) * float(limit.rstrip("% ")) / 100 if isinstance(limit, str) else limit
            if not sign * (value - original) <= allowed:
                found.append(f"{self.metric} is {value:.6g} where the original has {original:.6g}, beyond {name} {limit}")
        return found


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
            "gates": {gate.metric: gate.limits.model_dump(mode="json", exclude_none=True) for gate in self.gates},
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved content; the order of keys counts, because the first matching pattern wins."""
        return hashlib.sha256(json.dumps(self.resolved()).encode()).hexdigest()


class _Document(Options):
    """The top level of the file; the pipeline's entries are checked by their methods' own options."""

    model: ModelOptions = Field(description="demo, a local folder, a hub id, or a mapping with path")
    seed: int = Field(0, ge=0, lt=2**32, description="of everything that is random")
    pipeline: list[object] = Field(min_length=1, description="steps in order, each kind/method: options")
    gates: dict[str, Limits] = Field({}, description="metric: limits; a broken limit fails the run")


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and what it extends; raises one RecipeError that lists every problem."""
    problems: Problems = []
    root = _read(Path(path), (), problems)
    return _build(root, overrides, Path(path), problems)


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe that is no file; messages call it `name`."""
    problems: Problems = []
    root = _compose(text, name, problems)
    return _build(root, overrides, None, problems)


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the options of every method that is installed."""
    methods = {key: registry.load(key) for key in registry.list_methods()}
    models = {"": _Document, **{key: method.options for key, method in methods.items()}}
    template = "#/$defs/{model}"
    refs, defs = models_json_schema([(model, "validation") for model in dict.fromkeys(models.values())], ref_template=template)
    document: dict[str, Any] = defs["$defs"].pop(refs[_Document, "validation"]["$ref"].rsplit("/", 1)[-1])
    steps = {
        key: {"anyOf": [refs[method.options, "validation"], {"type": "null"}], "description": registry.list_methods()[key].summary}
        for key, method in methods.items()
    }
    one = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False, "properties": steps}
    document["properties"]["pipeline"]["items"] = one
    document["properties"]["extends"] = {"type": "string", "description": "another recipe to start from, relative to this file"}
    document["anyOf"] = [{"required": document.pop("required")}, {"required": ["extends"]}]
    document["title"], document["description"] = "qtool recipe", "One file for a whole run."
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document, "$defs": defs["$defs"]}


# ---- reading: text to one node tree ----


def _read(path: Path, chain: tuple[Path, ...], problems: Problems) -> MappingNode | None:
    """The node tree of a file, with what it extends merged in; None where there is nothing to go on with."""
    start = yaml.Mark(str(path), 0, 0, 0, None, None)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append((start, "the file does not exist"))
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.append((start, f"cannot be read as UTF-8 text: {error}"))
        return None
    root = _compose(text, str(path), problems)
    index = None if root is None else _find(root, "extends")
    if root is None or index is None:
        return root
    key, value = root.value.pop(index)
    if not isinstance(value, ScalarNode) or not value.value:
        problems.append((key.start_mark, "extends must be the name of one other recipe, relative to this file"))
        return root
    chain = (*chain, path.resolve())
    parent_path = path.parent / value.value
    if parent_path.resolve() in chain:
        problems.append((key.start_mark, f"extends goes round in a circle: {value.value} extends this file, directly or through others"))
        return root
    if not parent_path.is_file():
        problems.append((key.start_mark, f"extends {value.value}, but the file {parent_path} does not exist"))
        return root
    parent = _read(parent_path, chain, problems)
    return root if parent is None else _merge(parent, root, problems)


def _compose(text: str, name: str, problems: Problems) -> MappingNode | None:
    """Parse a mapping; `name` stands in every mark. YAML errors, aliases, tags and keys written twice are problems."""
    root = _compose_any(text, name, problems)
    if isinstance(root, MappingNode):
        return root
    if not problems:
        mark = yaml.Mark(name, 0, 0, 0, None, None)
        problems.append((mark if root is None else root.start_mark, "a recipe is a mapping with model and pipeline"))
    return None


def _compose_any(text: str, name: str, problems: Problems) -> Node | None:
    loader = None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                mark = event.start_mark
                place = yaml.Mark(name, mark.index, mark.line, mark.column, None, None)
                problems.append((place, f"the alias *{event.anchor} is not read; write the value out, or use extends"))
                return None
        loader = yaml.SafeLoader(text)
        loader.name = name
        root: Node | None = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 0 if mark is None else mark.line
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        problems.append((yaml.Mark(name, 0, line, 0, None, None), f"no valid YAML: {what}"))
        return None
    finally:
        if loader is not None:
            loader.dispose()
    if root is not None:
        problems.extend(_find_faults(root))
    return root


def _find_faults(node: Node) -> Iterator[tuple[yaml.Mark, str]]:
    if not node.tag.startswith("tag:yaml.org,2002:"):
        yield node.start_mark, f"the tag {node.tag} is not read; write plain YAML"
    if isinstance(node, SequenceNode):
        for item in node.value:
            yield from _find_faults(item)
    if isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                yield key.start_mark, "a key must be one word"
                continue
            if key.value in lines:
                yield key.start_mark, f'"{key.value}" is written twice, first in line {lines[key.value]}; keep one'
            lines.setdefault(key.value, key.start_mark.line + 1)
            yield from _find_faults(value)


def _find(node: MappingNode, key: str) -> int | None:
    """Where a key stands in a mapping."""
    return next((index for index, (name, _) in enumerate(node.value) if name.value == key), None)


def _merge(parent: MappingNode, child: MappingNode, problems: Problems) -> MappingNode:
    """The parent with the child's keys put over it, as the module's docstring says."""
    for key, value in child.value:
        index = _find(parent, key.value)
        old = None if index is None else parent.value[index][1]
        if isinstance(old, SequenceNode) and isinstance(value, SequenceNode):
            _merge_steps(old, value, problems)
        elif isinstance(old, MappingNode) and isinstance(value, MappingNode):
            _put_over(old, value)
        else:
            _put(parent, key, value)
    return parent


def _merge_steps(parent: SequenceNode, child: SequenceNode, problems: Problems) -> None:
    after = len(parent.value)
    for item in child.value:
        key = _step_key(item)
        same = [index for index, old in enumerate(parent.value) if key is not None and _step_key(old) == key]
        if len(same) > 1:
            problems.append((item.start_mark, f"{key} stands {len(same)} times in the pipeline; extends cannot tell which is meant"))
        elif same:
            (old_key, old), (new_key, new) = parent.value[same[0]].value[0], item.value[0]
            if isinstance(old, MappingNode) and isinstance(new, MappingNode):
                _put_over(old, new)
            elif not _is_null(new):
                parent.value[same[0]].value[0] = (new_key, new)
            after = same[0] + 1
        else:
            parent.value.insert(after, item)
            after += 1


def _put_over(old: MappingNode, new: MappingNode) -> None:
    for key, value in new.value:
        _put(old, key, value)


def _put(node: MappingNode, key: ScalarNode, value: Node) -> None:
    index = _find(node, key.value)
    if index is None:
        node.value.append((key, value))
    else:
        node.value[index] = (key, value)


def _step_key(item: Node) -> str | None:
    """kind/method of a pipeline entry; None where it is not one key with its options."""
    return str(item.value[0][0].value) if isinstance(item, MappingNode) and len(item.value) == 1 else None


def _is_null(node: Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _override(root: MappingNode, text: str, problems: Problems) -> None:
    """Carry out one `a.b=value`."""
    name = f"--set {text}"
    mark = yaml.Mark(name, 0, 0, 0, None, None)
    path, equals, value_text = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        problems.append((mark, "must be path=value, such as seed=3 or pipeline.quantize/gptq.damp=0.1"))
        return
    found: Problems = []
    value = _compose_any(value_text, name, found)
    problems += found
    if found:
        return
    node: Node = root
    for depth, part in enumerate(parts):
        if isinstance(node, SequenceNode) and depth == 1:
            step = _find_step(node, part)
            if isinstance(step, str):
                problems.append((mark, step))
                return
            pairs, index = step.value, 0
        elif isinstance(node, MappingNode):
            key = ScalarNode(STR, part, mark, mark)
            at = _find(node, part)
            if at is None:
                node.value.append((key, ScalarNode("tag:yaml.org,2002:null", "", mark, mark)))
            pairs, index = node.value, len(node.value) - 1 if at is None else at
            pairs[index] = (key, pairs[index][1])
        else:
            problems.append((mark, f"{'.'.join(parts[:depth])} is no mapping that could hold {part}; set it whole"))
            return
        key, node = pairs[index]
        if depth == len(parts) - 1:
            pairs[index] = (key, value or ScalarNode("tag:yaml.org,2002:null", "", mark, mark))
        elif _is_null(node):
            node = MappingNode(MAP, [], mark, mark)
            pairs[index] = (key, node)
        elif parts[:depth + 1] == ["model"] and isinstance(node, ScalarNode):
            node = MappingNode(MAP, [(ScalarNode(STR, "path", node.start_mark, node.end_mark), node)], mark, mark)
            pairs[index] = (key, node)


def _find_step(pipeline: SequenceNode, part: str) -> MappingNode | str:
    """The entry that `part` (kind/method, or a number from 1) names, or what is wrong."""
    keys = [_step_key(item) for item in pipeline.value]
    shown = ", ".join(f"{number}. {key}" for number, key in enumerate(keys, 1))
    same = [index for index, key in enumerate(keys) if key == part]
    if part.isdigit():
        same = [int(part) - 1] if 1 <= int(part) <= len(keys) and keys[int(part) - 1] is not None else []
        if not same:
            return f"the pipeline has no step {part}; it has {shown}"
    if len(same) > 1:
        return f"the pipeline has {part} {len(same)} times; name it by its number: {shown}"
    if not same:
        return f"the pipeline has no step {part}{nearest(part, [key for key in keys if key])}"
    found = pipeline.value[same[0]]
    assert isinstance(found, MappingNode)
    return found


# ---- checking: the node tree to a Recipe ----


def _build(root: MappingNode | None, overrides: Sequence[str], source: Path | None, problems: Problems) -> Recipe:
    if root is None:
        raise _error(problems)
    for override in overrides:
        _override(root, override, problems)
    document = _check(_Document, root, root.start_mark, "", problems)
    index = _find(root, "pipeline")
    pipeline = None if index is None else root.value[index][1]
    steps = _check_steps(pipeline.value, problems) if isinstance(pipeline, SequenceNode) else []
    gates_at = _find(root, "gates")
    if gates_at is not None and document is not None and document.gates and isinstance(pipeline, SequenceNode):
        if not any((_step_key(item) or "").startswith("evaluate/") for item in pipeline.value):
            problems.append((root.value[gates_at][0].start_mark, "gates need an evaluate step that measures; the pipeline has none"))
    if problems or document is None:
        raise _error(problems)
    gates = tuple(Gate(metric, limits) for metric, limits in document.gates.items())
    return Recipe(document.model, document.seed, tuple(steps), gates, source)


def _check_steps(items: list[Node], problems: Problems) -> list[Step]:
    """Every step with its method and options; what is wrong with one does not hide what is wrong with the next."""
    steps: list[Step] = []
    calibrated: str | None = None
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
            continue
        if method.kind == "calibrate":
            if calibrated is not None:
                problems.append((key.start_mark, f"{method.key}: {calibrated} calibrates already; one step serves all after it"))
            calibrated = calibrated or _place(key.start_mark)
        needs_text = method.kind == "distill" or (method.kind in NEEDING_TEXT and method.needs != "nothing")
        if needs_text and calibrated is None:
            problems.append((key.start_mark, f"{method.key} needs calibration text; put a calibrate step, such as calibrate/text, before it"))
        if _is_null(value):
            value = MappingNode(MAP, [], key.start_mark, key.end_mark)
        options = _check(method.options, value, key.start_mark, f"{method.key}: ", problems)
        if options is not None:
            problems.extend(_find_cache_schemes(options, value, method.key))
            steps.append(Step(method.key, method, options, _place(key.start_mark)))
    return steps


def _find_cache_schemes(options: Options, node: Node, key: str) -> Iterator[tuple[yaml.Mark, str]]:
    """Schemes that ask for a quantized key/value cache, which no step makes."""
    from qtool.formats.scheme import Scheme  # here, because it imports torch, and by now the methods have

    for name in type(options).model_fields:
        value = getattr(options, name)
        for part in value.values() if isinstance(value, dict) else [value]:
            if isinstance(part, Scheme) and part.kv is not None:
                text = f"{key}: {name}: {part} quantizes the key/value cache, which no step does; leave kv{part.kv.bits} away"
                yield _nearest_mark(node, (name,), node.start_mark), text


def _check(model: type[Checked], node: Node, at: yaml.Mark, prefix: str, problems: Problems) -> Checked | None:
    """The validated options of a node; None, with every fault reported, where they are not valid."""
    try:
        return model.model_validate(_value(node))
    except ValidationError as error:
        problems.extend(_explain(model, fault, node, at, prefix) for fault in error.errors(include_url=False))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None) or at
        problems.append((mark, f"{prefix}no valid YAML value: {getattr(error, 'problem', error)}"))
    return None


def _value(node: Node) -> object:
    if isinstance(node, MappingNode):
        return {str(key.value): _value(value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return [_value(item) for item in node.value]
    return yaml.constructor.SafeConstructor().construct_object(node)


def _explain(model: type[Options], fault: ErrorDetails, node: Node, at: yaml.Mark, prefix: str) -> tuple[yaml.Mark, str]:
    """One of pydantic's faults as place and advice."""
    loc = fault["loc"]
    mark = _nearest_mark(node, loc, at)
    path = ".".join(map(str, loc))
    if fault["type"] in ("extra_forbidden", "missing"):
        owner, _, inner = _owner(model, loc[:-1])
        inside = ".".join(map(str, loc[:-1]))
        place = prefix + (f"{inside}: " if inside else "")
        if fault["type"] == "missing":
            field = inner.model_fields[str(loc[-1])]
            meaning = f" ({field.description})" if field.description else ""
            return mark, f"{place}{loc[-1]} is missing{meaning}; valid: {valid_values(inner, str(loc[-1]))}"
        return mark, f'{place}there is no "{loc[-1]}"{nearest(str(loc[-1]), inner.model_fields)}'
    if fault["type"] == "value_error":
        return mark, f"{prefix}{path}: {fault['ctx']['error']}" if path else f"{prefix}{fault['ctx']['error']}"
    owner, name, _ = _owner(model, loc)
    given = json.dumps(fault["input"], default=str)
    if name is None:
        return mark, f"{prefix}is {given}; must be a mapping of {', '.join(model.model_fields)}"
    valid = valid_values(owner, name)
    return mark, f"{prefix}{path} is {given}; valid: {valid}"


def _owner(model: type[Options], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], str | None, type[BaseModel]]:
    """The options model and field that a location ends in, and the model inside that field (the first one where none is)."""
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


def _nearest_mark(node: Node, loc: tuple[int | str, ...], at: yaml.Mark) -> yaml.Mark:
    """The mark of the deepest key on the way along `loc`."""
    for part in loc:
        if isinstance(node, MappingNode) and (index := _find(node, str(part))) is not None:
            key, node = node.value[index]
            at = key.start_mark
        elif isinstance(node, SequenceNode) and isinstance(part, int):
            node = node.value[part]
            at = node.start_mark
        else:
            break
    return at


def _place(mark: yaml.Mark) -> str:
    return mark.name if mark.name.startswith("--") else f"{mark.name}:{mark.line + 1}"


def _error(problems: Problems) -> RecipeError:
    ordered = sorted(problems, key=lambda problem: (problem[0].name, problem[0].line))
    return RecipeError([f"{_place(mark)}: {text}" for mark, text in ordered])
