"""What is known to fail before any weight is loaded, and what a recipe will make of a model's linears."""

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from qtool.calibration.tokens import PreservationPool, TextOptions, TextSource
from qtool.calibration.windows import WindowOptions
from qtool.errors import QtoolError, nearest
from qtool.formats.allocation import SearchOptions
from qtool.formats.attention import AttentionRounding
from qtool.formats.kivi import KiviScheme
from qtool.formats.scheme import CacheSelection, InputSelection, KvScheme, Scheme, SchemeSelection
from qtool.model.handle import ModelHandle
from qtool.model.runtimes import servings
from qtool.model.shape import smaller
from qtool.options import ExportOptions, Selection
from qtool.pipeline.blockwise import check_selection
from qtool.pipeline.measuring import names_own_preservation
from qtool.pipeline.search import check_covered, check_search
from qtool.recipe import CHANGING, Gate, Recipe, Step
from qtool.report.gates import check_baseline


def check_recipe(recipe: Recipe) -> ModelHandle:
    """The recipe's model, nothing of it loaded; raises QtoolError for what will fail later."""
    model, search = ModelHandle(recipe.model), None
    planned = model
    for index, step in enumerate(recipe.steps):
        planned = planned_model(planned, [step])  # a transform may part head and embedding
        check_step(planned_text(step, recipe.steps[:index]), planned, search)
        search = step if step.method.kind == "search" else search
    check_exports(recipe.steps, model)
    for gate in recipe.gates:
        check_gate(gate, recipe.steps)
    return model


def check_gate(gate: Gate, steps: Sequence[Step]) -> None:
    """Raise QtoolError for a gate that could not be judged in the end: on a dataset or a change that no step gives, or over a
    stored run that measured something else.
    """
    measuring = check_measured(f"gates: {gate.metric}", gate.metric, gate.dataset, steps)
    if not any(step.method.kind == "export" or step.method.kind in CHANGING for step in steps):
        raise QtoolError(f"gates: {gate.metric}: gates judge what changed, and no step changes or exports the model")
    if gate.baseline is not None:
        own = [(step.key, step.options.model_dump(mode="json")) for step in measuring]
        check_baseline(gate, [one for one in own if gate.dataset in (None, one[1].get("source"))])


def check_measured(where: str, metric: str, dataset: str | None, steps: Sequence[Step]) -> list[Step]:
    """The evaluate steps that may give a metric; raises QtoolError, which begins with `where`, if none does on that dataset."""
    patterns = {step.key: step.method.measures or ("*",) for step in steps if step.method.kind == "evaluate"}
    found = [step for step in steps if any(fnmatch.fnmatchcase(metric, name) for name in patterns.get(step.key, ()))]
    if not found:
        known = [name for names in patterns.values() for name in names]
        raise QtoolError(f'{where}: no evaluate step measures "{metric}"{nearest(metric, known)}')
    sources = {step.options.source for step in found if isinstance(step.options, TextSource)}
    if dataset is not None and dataset not in sources and all(isinstance(step.options, TextSource) for step in found):
        raise QtoolError(f'{where}: no step measures it on "{dataset}"{nearest(dataset, sources)}')  # others name it themselves
    return found


def check_step(step: Step, model: ModelHandle, search: Step | None = None) -> None:
    """What can be known to fail without a weight: patterns that match nothing, groups that do not divide.

    `search` is the latest search step before this one.
    """
    options = step.options
    with located(step):
        if isinstance(options, SearchOptions):
            check_search(model, step.method, options)
        elif isinstance(options, SchemeSelection) and options.scheme == "search":
            assert search is not None, "the recipe check asks for a search step before scheme: search"
            assert isinstance(search.options, SearchOptions), f"{search.key}: options of a search are SearchOptions"
            check_covered(model, step.method, options, search.options)
        elif isinstance(options, Selection):
            check_selection(model, step.method, options)
    if (step.method.kind, step.method.scope) == ("transform", "block"):
        if model.schemes() or model.cache() is not None or model.rounding() is not None:
            with located(step):
                raise QtoolError(f"{step.key}: the model comes quantized; transform the model that it was made from")
    if step.method.scope in ("cache", "packed_cache"):
        with located(step):
            check_uncached(step, model)
    if step.method.check is not None:
        with located(step):
            step.method.check(model, step.options)


def check_exports(steps: Sequence[Step], model: ModelHandle) -> None:
    """Raise QtoolError, before any work, where an export cannot hold what the steps before it will make of the linears.

    Or where a step that finds static scales of inputs does not fit what they will be.
    """
    for index, step in enumerate(steps):
        if step.method.kind == "export":
            model = planned_model(model, steps[:index])
            with located(step):
                check_additions(step, model)
                check_cache(step, model)
                check_rounding(step, model)
        if step.method.holds is not None:
            cache = planned_cache(model, steps[:index])
            has_rounding = planned_rounding(model, steps[:index]) is not None
            holds_without = step.method.holds_attention and (has_rounding or cache is not None)  # quantized linears
            outcomes = list(planned_schemes(model, steps[:index]))
            if step.method.scope == "inputs":  # linears that round none may stand beside those that do
                outcomes = [found for found in outcomes if any(one.activations for one in found.values())] or outcomes[:1]
            for schemes in outcomes:
                with located(step):
                    if schemes or not holds_without:
                        step.method.holds(model, schemes, step.options)
                    check_runtime(model, step, steps[:index], schemes, cache)


def check_additions(step: Step, model: ModelHandle) -> None:
    """Raise QtoolError where an export holds codes and scales alone, and the model has more than that."""
    additions = {} if step.method.holds_additions else model.additions()
    if additions:
        name, what = next(iter(additions.items()))
        raise QtoolError(f"{step.key} cannot hold the {what} of {name}; use export/qtool or export/safetensors")


def check_cache(step: Step, model: ModelHandle) -> None:
    """Raise QtoolError where an export has no place for how a quantized cache is kept, and the model has such."""
    cache = model.cache()
    if isinstance(cache, KiviScheme) and not step.method.holds_kivi:
        raise QtoolError(f"{step.key} cannot hold a cache that KIVI keeps; use export/qtool")
    if isinstance(cache, KvScheme) and not step.method.holds_cache:
        raise QtoolError(f"{step.key} cannot hold a quantized cache; use export/compressed_tensors or export/qtool")


def check_rounding(step: Step, model: ModelHandle) -> None:
    """Raise QtoolError where an export cannot say what attentions round, and the model's do."""
    if not step.method.holds_attention and (rounding := model.rounding()) is not None:
        raise QtoolError(f"{step.key} cannot hold an attention with {rounding}; use export/qtool")


def check_uncached(step: Step, model: ModelHandle) -> None:
    """Raise QtoolError where no attention has a cache to quantize, or it came quantized."""
    if not model.attention_names():
        raise QtoolError(f"{step.key}: no attention of {type(model.model).__name__} takes a cache that could be quantized")
    if (cache := model.cache()) is not None:
        raise QtoolError(f"{step.key}: the model's cache is {cache} already; leave the step away, or use the model before it")


def check_runtime(
    model: ModelHandle, step: Step, before: Sequence[Step], schemes: dict[str, Scheme], cache: KvScheme | KiviScheme | None
) -> None:
    """Raise QtoolError where the runtime that an export's options ask for does not serve these schemes."""
    if not isinstance(step.options, ExportOptions) or (wanted := step.options.runtime) is None:
        return
    found = servings(step.key.removeprefix("export/"), model, schemes, cache)
    asked = [(entry, why) for entry, why in found if entry.runtime == wanted]
    if not asked:
        known = list(dict.fromkeys(entry.runtime for entry, _ in found))
        raise QtoolError(f'{step.key}: runtime: nothing is known of "{wanted}" and this export{nearest(wanted, known)}')
    if all(why is not None for _, why in asked):
        entry, why = asked[0]
        raise QtoolError(f"{step.key}: {entry} does not serve it: {why}")
    if any(entry.fused_alike for entry, _ in asked):
        check_tensor_scales(f"{step.key}: {wanted}", before)


def check_tensor_scales(where: str, steps: Sequence[Step]) -> None:
    """Raise QtoolError, which begins with `where`, if a step without text gives each linear an NVFP4 scale of the tensor."""
    for step in steps:
        if not isinstance(step.options, SchemeSelection) or step.method.scope != "linear" or step.method.needed(step.options):
            continue
        stated = (step.options.scheme, *step.options.modules.values())
        if any(isinstance(one, Scheme) and one.weights.scale_dtype == "float8_e4m3fn" for one in stated):
            raise QtoolError(
                f"{where} joins linears that share an input under one scale of the tensor, and {step.key} without text gives "
                "each its own; take quantize/gptq, or range: hessian"
            )


@contextlib.contextmanager
def located(step: Step) -> Iterator[None]:
    """Put the recipe's file and line before a step's error, one of memory among them."""
    try:
        yield
    except QtoolError as error:
        raise QtoolError(f"{step.where}: {error}") from error
    except RuntimeError as error:  # torch's own, for a GPU's memory of a class of its own, for the host's of none
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise QtoolError(
            f"{step.where}: {step.key}: the memory does not suffice ({str(error).splitlines()[0][:200]}); use fewer or "
            "shorter samples, true_sequential: false where the step has it, or a machine with more"
        ) from error


def planned_model(model: ModelHandle, steps: Sequence[Step]) -> ModelHandle:
    """The model as `steps` leave it, as far as its sizes may change, and head and embedding become two tensors."""
    for step in steps:
        if step.method.parts_head is not None and step.method.parts_head(step.options):
            model = model.parted()
        if step.method.shape is not None:
            with located(step):
                try:
                    model = smaller(model, step.method.shape(model, step.options))
                except QtoolError as error:
                    raise QtoolError(f"{step.key}: {error}") from error
    return model


def planned_text(step: Step, before: Sequence[Step]) -> Step:
    """The step, with as many windows of the pool's text in place of a preservation set that a step before it will choose.

    Raises QtoolError where the set will not hold what the step asks for.
    """
    chosen = next((one.options for one in before if isinstance(one.options, PreservationPool)), None)
    options = step.options
    if chosen is None or not names_own_preservation(options):
        return step
    assert isinstance(options, WindowOptions), "only these name a preservation set"
    for name, asked, there in (("length", options.length, chosen.length), ("samples", options.samples, chosen.n_preserved)):
        if asked is not None and (asked != there if name == "length" else asked > there):
            with located(step):
                raise QtoolError(f"{step.key}: {name} is {asked}, the preservation set has {there}; set {name}: {there}")
    text = chosen.model_dump(include=set(TextOptions.model_fields))
    return replace(step, options=options.model_copy(update=text | {"samples": options.samples or chosen.n_preserved}))


def planned_cache(model: ModelHandle, steps: Sequence[Step]) -> KvScheme | KiviScheme | None:
    """What the key/value cache is quantized to after `steps`."""
    for step in steps:  # the recipe check lets one step through
        if isinstance(step.options, CacheSelection):
            return step.options.scheme
        if isinstance(step.options, KiviScheme):
            return step.options
    return model.cache()


def planned_rounding(model: ModelHandle, steps: Sequence[Step]) -> AttentionRounding | None:
    """What attentions round between their linears after `steps`."""
    stated = [step.options for step in steps if isinstance(step.options, AttentionRounding)]
    return stated[0] if stated else model.rounding()


def planned_schemes(model: ModelHandle, steps: Sequence[Step]) -> Iterator[dict[str, Scheme]]:
    """What each quantized linear, by its full name, is stored in after `steps`.

    One plan; where a search decides, one for each of its candidates, taken for all linears alike. What a method chooses by
    itself, such as the group, stands as the recipe has it.
    """
    searches = [step.options.candidates for step in steps if isinstance(step.options, SearchOptions)]
    for candidate in searches[-1] if searches else (None,):
        schemes = model.schemes()
        for step in steps:
            options = step.options
            if isinstance(options, InputSelection):
                schemes = {name: options.after(name, scheme) for name, scheme in schemes.items()}
            if step.method.kind != "quantize" or not isinstance(options, SchemeSelection):
                continue
            if options.scheme == "search":
                options = options.model_copy(update={"scheme": candidate})
            chosen = {name: options.scheme_of(name) for name in model.linear_names()}
            schemes |= {name: scheme for name, scheme in chosen.items() if scheme is not None}
        yield schemes
