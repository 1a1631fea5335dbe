"""The search driver: what each unit costs the predictions at each candidate, what it takes, and what the method chooses.

Nothing in the model changes: later quantize steps with `scheme: search` take up what was found.
The reference is the model as it is before the step, which transforms leave equal to the original. Measured losses are
kept block by block, so that a killed run goes on; those from gradients take one pass back and are made again.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qtool import registry
from qtool.errors import QtoolError, nearest
from qtool.formats.allocation import Problem, SearchOptions, sizes_of
from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.model.handle import ModelHandle
from qtool.model.memory import large_pieces_returned
from qtool.options import Curvature, matches
from qtool.pipeline.blockwise import check_selection, head_to_change
from qtool.pipeline.folder import StepFolder
from qtool.pipeline.sensitivity import Unit, discard, measure, predict
from qtool.progress import Progress
from qtool.registry import Method


@large_pieces_returned()
def run_search(
    model: ModelHandle,
    method: Method,
    options: SearchOptions,
    tokens: Tensor,
    seed: int,
    folder: StepFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Find a scheme for every chosen linear; returns `search`, as results.json has it, and the linears' losses."""
    head = head_to_change(model, options)
    is_measured = options.sensitivity == "kl"
    progress.stage(method.key, model.n_blocks + (head is not None) if is_measured else 2 * model.n_blocks + 1)
    names = chosen_names(model, options)
    room = capacity(model, names, options)
    uniform = sizes_of_units(model, [tuple(names)], options)[0]  # [candidates]
    if int(uniform.amax()) <= room:
        largest = int(uniform.argmax())
        what = f"{options.candidates[largest]} everywhere, which is what every linear gets"
        progress.note(f"{method.key}: a budget of {options.budget:g} bits is enough for {what}")
        return describe(model, method, options, [(name,) for name in names], None, torch.full((len(names),), largest))
    if is_measured:
        losses = measure(model, options, tokens, head, folder, progress)
    else:
        losses = predict(model, options, tokens, head, seed, folder, progress)
    discard(folder)
    for unit, values in losses.items():
        if not all(map(math.isfinite, values)):
            raise QtoolError(f"{method.key}: {unit[0]}: its losses are {values}; load the model with dtype: float32")
    order = {name: place for place, name in enumerate(names)}
    units = sorted(losses, key=lambda unit: order[unit[0]])
    sizes = sizes_of_units(model, units, options)
    check_budget(model, method, options, names, sizes)
    problem = Problem(torch.tensor([losses[unit] for unit in units], dtype=torch.float64), sizes, room)
    choice: Tensor = method.run(problem, options)  # [units]
    assert problem.size_of(choice) <= room, f"{method.key} chose more bytes than the budget has"
    return describe(model, method, options, units, problem.losses, choice)


def describe(
    model: ModelHandle, method: Method, options: SearchOptions, units: list[Unit], losses: Tensor | None, choice: Tensor
) -> dict[str, Any]:
    """What the step records; losses [units, candidates], None where nothing had to be predicted."""
    sizes, names = sizes_of_units(model, units, options), [str(scheme) for scheme in options.candidates]
    rows, linears = [], []
    for u, unit in enumerate(units):
        values = [None] * len(names) if losses is None else losses[u].tolist()
        candidates = [
            {"scheme": name, "bytes": int(size), "predicted_loss": loss}
            for name, size, loss in zip(names, sizes[u], values, strict=True)
        ]
        chosen = int(choice[u])
        rows.append({"linears": list(unit), "scheme": names[chosen], "chosen": chosen, "candidates": candidates})
        linears += [{"name": name, "predicted_loss": values[chosen]} for name in unit]
    taken = int(sizes.gather(1, choice[:, None]).sum())
    found = {
        "key": method.key,
        "budget": options.budget,
        "bits_per_weight": 8 * taken / n_weights(model, [name for unit in units for name in unit]),
        "predicted_loss": None if losses is None else float(losses.gather(1, choice[:, None]).sum()),
        "unit": "nats/token",
        "units": rows,
    }
    return {"search": found, "linears": linears, "fallbacks": []}


def found_schemes(options: SearchOptions, search: dict[str, Any]) -> dict[str, Scheme]:
    """Full name: scheme, of a search's recorded result."""
    return {name: options.candidates[row["chosen"]] for row in search["units"] for name in row["linears"]}


# ---- before any work ----


def check_search(model: ModelHandle, method: Method, options: SearchOptions) -> None:
    """Raise QtoolError for patterns that match nothing, groups that do not divide, and a budget that nothing keeps to."""
    valid = [key for key in registry.list_methods() if key.startswith("quantize/")]
    if options.quantizer not in valid:
        raise QtoolError(f'{method.key}: there is no quantizer "{options.quantizer}"{nearest(options.quantizer, valid)}')
    if registry.load(options.quantizer).scope != "linear":
        raise QtoolError(f"{method.key}: {options.quantizer} rounds whole blocks; name a quantizer that works on linears")
    if issubclass(registry.load(options.quantizer).options, Curvature):
        raise QtoolError(f"{method.key}: {options.quantizer} needs gradients that a search does not gather; name quantize/gptq")
    if registry.load(options.quantizer).chooses_inputs:
        raise QtoolError(f"{method.key}: {options.quantizer} chooses inputs' formats, as candidates do; name quantize/rtn")
    for scheme in options.candidates:
        check_selection(model, method, SchemeSelection(scheme=scheme, ignore=options.ignore))
    names = chosen_names(model, options)
    if not names:
        raise QtoolError(f"{method.key}: ignore leaves none of the model's linears; choose fewer patterns")
    for name in model.schemes():
        if name in names:
            raise QtoolError(f"{method.key}: {name} is quantized already; start from a dense model, or add it to ignore")
    check_budget(model, method, options, names, sizes_of_units(model, [(name,) for name in names], options))


def check_covered(model: ModelHandle, method: Method, options: SchemeSelection, search: SearchOptions) -> None:
    """The same for a step that takes up what the search will find; every linear it quantizes must be among the search's."""
    for scheme in search.candidates:
        check_selection(model, method, options.model_copy(update={"scheme": scheme}))
    for name in model.linear_names():
        has_its_own = options.is_ignored(name) or any(matches(name, pattern) for pattern in options.modules)
        if search.is_ignored(name) and not has_its_own:
            raise QtoolError(
                f"{method.key}: {name}: the search ignores it, so there is no scheme for it; ignore it here too, or name its "
                "scheme in modules"
            )


def check_budget(model: ModelHandle, method: Method, options: SearchOptions, names: list[str], sizes: Tensor) -> None:
    """Raise QtoolError where even the smallest candidate of every unit, sizes [units, candidates], takes too much."""
    least = int(sizes.amin(1).sum())
    if least > capacity(model, names, options):
        bits = math.ceil(8e4 * least / n_weights(model, names)) / 1e4
        raise QtoolError(
            f"{method.key}: budget {options.budget:g} bits per weight is below {bits:g}, what the smallest candidates take "
            f"with their scales; use {bits:g} or more, or add a smaller candidate"
        )


def chosen_names(model: ModelHandle, options: SearchOptions) -> list[str]:
    """Every linear that the search covers, in the model's order."""
    return [name for name in model.linear_names() if not options.is_ignored(name)]


def n_weights(model: ModelHandle, names: list[str]) -> int:
    """Weights of these linears."""
    return sum(math.prod(model.linear_shape(name)) for name in names)


def capacity(model: ModelHandle, names: list[str], options: SearchOptions) -> int:
    """Bytes that these linears may take together."""
    return options.capacity(n_weights(model, names))


def sizes_of_units(model: ModelHandle, units: list[Unit], options: SearchOptions) -> Tensor:
    """Bytes [units, candidates]."""
    return sizes_of([[model.linear_shape(name) for name in unit] for unit in units], options.candidates)
