"""The plan: what a recipe will make of a model, known before any weight is loaded."""

from collections.abc import Iterator, Sequence

from qtool.formats.allocation import SearchOptions
from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.model.handle import ModelHandle
from qtool.recipe import Step


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
            if step.method.kind != "quantize" or not isinstance(options, SchemeSelection):
                continue
            if options.scheme == "search":
                options = options.model_copy(update={"scheme": candidate})
            chosen = {name: options.scheme_of(name) for name in model.linear_names()}
            schemes |= {name: scheme for name, scheme in chosen.items() if scheme is not None}
        yield schemes
