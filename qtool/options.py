"""The strict pydantic base of every options model, options that many share, and the choice of modules by pattern."""

import fnmatch
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter, field_validator, model_validator

from qtool.errors import QtoolError

Statistic = Literal["amax", "mean_abs", "hessian", "drift", "inputs", "sample", "output_hessian"]
Needs = tuple[Statistic, ...]  # the statistics of a linear that a method reads, of its input but for output_hessian


class Options(BaseModel):
    """Subclass per method; give every field a range and a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Shorthand(Options):
    """Options that one word may stand for, such as w4a16g128 for a scheme."""

    @classmethod
    def expand(cls, word: str) -> dict[str, object]:
        """The long form of a word; raises ValueError that shows what a word must look like."""
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _read_word(cls, value: object) -> object:
        return cls.expand(value) if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core)]}


class ModelOptions(Shorthand):
    """Which model, and where it runs; a word alone is the path."""

    path: str = Field(description="demo, a local folder, or a hub id")
    revision: str | None = Field(None, description="revision of a hub id")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="auto: the checkpoint's")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:1")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    allow_pickle: bool = Field(False, description="read pytorch_model.bin where there is no safetensors file")

    @classmethod
    def expand(cls, word: str) -> dict[str, object]:
        return {"path": word}


class TrainingOptions(Options):
    """Options of a method that the training driver runs."""

    steps: int = Field(200, ge=0, description="optimizer steps")
    batch: int = Field(8, ge=1, description="windows in one optimizer step, of all processes together")
    accumulate: int = Field(1, ge=1, description="forward passes that one optimizer step is split into")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps both moments in eight bits: 10 bytes a parameter in place of 16"
    )
    lr: float = Field(1e-4, gt=0, le=1, description="peak learning rate of AdamW")
    code_lr: float = Field(
        0.0, ge=0, le=1, description="peak learning rate of quantized layers' codes, in units of their scale; 0: they stay"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising rate")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine",
        description="after the warm-up: cosine to zero; wsd, the peak rate until the last `decay`, which falls to zero",
    )
    decay: float = Field(0.2, gt=0, le=1, description="share of the steps in which the rate of wsd falls")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    generate: int = Field(
        0, ge=0, description="more windows to train on, which the original writes itself, begun with the calibration's tokens"
    )
    start: Literal["weights", "random"] = Field(
        "weights", description="random: the shape alone is kept, and with it zeros; what training from scratch would reach"
    )
    labels: float = Field(
        0.0, ge=0, le=1, description="share of the loss that is the cross-entropy of the text's own next tokens; 1: no teacher"
    )
    temperature: float = Field(1.0, gt=0, le=100, description="divides both models' logits")
    top_k: int | None = Field(
        None, ge=1, description="the teacher's likeliest tokens that count each by itself, the others as one; null: every token"
    )
    cache: str | None = Field(
        None, description="folder that keeps the teacher's top_k of each window, for later runs too; no teacher while it trains"
    )
    recompute: bool = Field(False, description="compute blocks' activations again in the way back: less memory, a third slower")
    validation: int = Field(0, ge=0, description="calibration windows, the last ones, that are held out to measure the loss on")
    validate_every: int = Field(50, ge=1, description="steps between measurements")
    patience: int | None = Field(
        None, ge=1, description="measurements without a new least loss that end the training, at the best weights; null: no end"
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints that a killed run goes on from")

    @model_validator(mode="after")
    def _check_together(self) -> "TrainingOptions":
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are more than all steps; lower one of them")
        if self.cache is not None and self.top_k is None:
            raise ValueError("cache keeps the teacher's likeliest tokens; state how many, such as top_k: 64")
        if self.patience is not None and not self.validation:
            raise ValueError("patience looks at windows that are held out; state how many, such as validation: 8")
        return self


class Selection(Options):
    """Options of a method that works on the model's linears."""

    ignore: tuple[str, ...] = Field(("lm_head",), description="name patterns of linears to leave as they are")

    def is_ignored(self, name: str) -> bool:
        return any(matches(name, pattern) for pattern in self.ignore)

    def patterns(self) -> tuple[str, ...]:
        """Every pattern that must match something: those that are not the default's."""
        default = type(self).model_fields["ignore"].default
        return tuple(pattern for pattern in self.ignore if pattern not in default)


class Sequential(Options):
    """Options of a method that reads statistics of a linear's input, once the linears called before it have changed."""

    true_sequential: bool = Field(
        True,
        description="whether linears see what those before them in the block became: one pass that keeps the block's "
        "activations of all samples in memory; false, two passes with one batch in memory",
    )


class BlockTuning(Options):
    """Options of a method that learns by the output of each block."""

    steps: int = Field(200, ge=0, description="updates per block")
    batch: int = Field(8, ge=1, description="windows in one update")


class Sizes(Options):
    """How many units a sub-model has; of what is not stated, all."""

    blocks: int | None = Field(None, ge=1, description="blocks, the first ones")
    hidden: int | None = Field(None, ge=1, description="channels of the residual stream")
    heads: int | None = Field(None, ge=1, description="query heads of a block, as many of each group")
    kv_heads: int | None = Field(
        None, ge=1, description="key/value heads; null: all, or as many as heads where each has its own"
    )
    neurons: int | None = Field(None, ge=1, description="neurons of an MLP, of an expert in a mixture")
    experts: int | None = Field(None, ge=1, description="experts of a block")

    @model_validator(mode="after")
    def _state_one(self) -> "Sizes":
        if not self.stated():
            raise ValueError(f"states no size; state one or more of {', '.join(type(self).model_fields)}")
        return self

    def stated(self) -> dict[str, int]:
        """Those that are stated, by axis."""
        return self.model_dump(exclude_none=True)


class Submodels(Options):
    """Options of a method that trains sub-models together with the whole."""

    submodels: dict[str, Sizes] = Field(
        min_length=1, description="name: sizes, such as small: {blocks: 4, neurons: 512}; qtool export --submodel cuts one out"
    )

    @field_validator("submodels")
    @classmethod
    def _check_names(cls, value: dict[str, Sizes]) -> dict[str, Sizes]:
        for name in value:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f'"{name}" is no name of a sub-model; use letters, digits, "_", "-" and "."')
        return value


class ExportOptions(Options):
    """Options of every export."""

    runtime: str | None = Field(
        None,
        description="the runtime that must serve the export, such as vllm: refused before any work where it cannot; null: any; "
        "qtool plan tells of all",
    )


class Curvature(Selection):
    """Options of a method that reads what changes of a linear's output cost the predictions."""

    gradient_tokens: int = Field(
        65536, ge=1, description="tokens whose gradients tell what outputs are worth; what every block is fed of them is kept"
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a module name fits: `re:` and a regular expression, or a glob over its last or all dotted parts."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def require_matches(where: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raise QtoolError for the first pattern that matches no name."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise QtoolError(f'{where}: pattern "{pattern}" matches no linear; the model has {shown}')


def valid_values(options: type[BaseModel], field: str) -> str:
    """What a field of an options model takes, in words: `integer >= 1 or null`."""
    info = options.model_fields[field]
    annotation: Any = Annotated[info.annotation, info]
    schema = TypeAdapter(annotation).json_schema()
    return _in_words(schema, schema.get("$defs", {}))


def _in_words(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _in_words(defs[schema["$ref"].rsplit("/", 1)[-1]], defs)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_in_words(choice, defs) for choice in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"a list of {_in_words(schema.get('items', {}), defs)}"
    if schema.get("type") == "object":
        if "properties" in schema:
            return f"a mapping of {', '.join(schema['properties'])}"
        inner = schema.get("additionalProperties")
        return "a mapping of names" + (f" to {_in_words(inner, defs)}" if isinstance(inner, dict) else "")
    words = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]}" for name, sign in bounds.items() if name in schema]
    return " ".join([words.get(schema.get("type", ""), "any value"), " and ".join(limits)]).strip()
