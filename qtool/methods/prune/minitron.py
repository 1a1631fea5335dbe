"""Minitron: among the shapes that a budget of parameters allows, cut the model to the one that loses least.

    candidates: shapes of (1 - tolerance) · parameters to parameters, those that shrink the axes most evenly first
    chosen: the one of least KL from the model as it is, each cut by importance; scored on the first 16 windows, not trained
Blocks go by influence, units by activation (see prune/depth and prune/width). Neurons, the finest axis, take up what the other
sizes leave of the budget.
Source: Muralidharan et al. 2024, arXiv:2407.14679 (Minitron), section 2.3. Differs: candidates are scored without the light
retraining, which ranks some of them anew; put distill after the step.
For: a target size where the best split between depth and width is not known.
Costs: two passes over the text; for each candidate, writing it and a pass over 16 windows.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from qtool.calibration.importance import Importance, kept_units, most
from qtool.errors import QtoolError
from qtool.model.cutting import Cut
from qtool.model.handle import ModelHandle
from qtool.model.shape import Shape, Sides, check_sizes, find_sides, n_parameters, shape_of_model
from qtool.options import Options
from qtool.registry import Method

Axis = Literal["blocks", "heads", "neurons", "hidden"]


class MinitronOptions(Options):
    """How large the model may be, what may go, and how many shapes are tried."""

    parameters: float = Field(gt=0, lt=1, description="share of the model's parameters that may stay")
    axes: tuple[Axis, ...] = Field(("blocks", "neurons", "hidden"), description="what may go: blocks, heads, neurons, hidden")
    candidates: int = Field(8, ge=1, description="shapes that are tried, those that shrink all axes most evenly first")
    tolerance: float = Field(0.05, gt=0, lt=1, description="how far below the budget a candidate may stay, in share of it")
    multiple: int = Field(32, ge=1, description="what counts of neurons and hidden channels are multiples of")

    @model_validator(mode="after")
    def _neurons_take_up_the_rest(self) -> "MinitronOptions":
        if "neurons" not in self.axes:
            raise ValueError("axes must hold neurons, which take up what other sizes leave of the budget")
        return self


def minitron(importance: Importance, options: MinitronOptions, note: Callable[[str], None]) -> Cut:
    """The cut of least KL, with all that were tried among its facts."""
    model, old = importance.model, shape_of_model(importance.model)
    shapes = candidates(model, options)
    axes = [axis for axis in ("neurons", "heads", "hidden") if axis in options.axes]
    scores = importance.of_units(axes)
    influence = importance.influence(range(old.blocks)) if "blocks" in options.axes else None
    found: list[tuple[float, Cut]] = []
    for shape in shapes:
        changed = old.changed_axes(shape)
        of_shape = {name: values for name, values in scores.items() if name.partition(":")[0] in changed}
        blocks = range(old.blocks) if influence is None else most(influence, shape.blocks).tolist()
        cut = Cut(shape, tuple(blocks), kept_units(model, of_shape, shape))
        found.append((importance.divergence(cut) if len(shapes) > 1 else math.nan, cut))
    best = min(range(len(found)), key=lambda place: found[place][0])  # of equal ones the first
    tried = [{"shape": str(cut.shape), "kl": None if math.isnan(kl) else kl} for kl, cut in found]
    return replace(found[best][1], facts={"candidates": tried, "chosen": best})


def candidates(model: ModelHandle, options: MinitronOptions) -> list[Shape]:
    """The shapes to try, evenest first; raises QtoolError where none keeps to the budget."""
    old = shape_of_model(model)
    sides = find_sides(model, options.axes)
    budget = options.parameters * n_parameters(model, sides, old)
    found = []
    for shape in grid(model, old, options):
        neurons = most_neurons(model, sides, shape, budget, options.multiple)
        if neurons is None:
            continue
        shape = replace(shape, neurons=neurons)
        if n_parameters(model, sides, shape) >= (1 - options.tolerance) * budget:
            found.append(shape)
    if not found:
        raise QtoolError(
            f"no shape has {100 * (1 - options.tolerance) * options.parameters:g} to {100 * options.parameters:g} % of the "
            f"parameters of {old} in multiples of {options.multiple}; raise tolerance, lower multiple, or let more axes go"
        )
    return sorted(found, key=lambda shape: unevenness(shape, old, options))[: options.candidates]


def grid(model: ModelHandle, old: Shape, options: MinitronOptions) -> Iterator[Shape]:
    """All shapes of fewer blocks, heads and hidden channels that the axes allow, their neurons still open."""
    blocks = range(1, old.blocks + 1) if "blocks" in options.axes else [old.blocks]
    hidden = {*range(options.multiple, old.hidden, options.multiple), old.hidden} if "hidden" in options.axes else {old.hidden}
    is_own = old.heads == old.kv_heads
    heads = range(1, old.heads + 1) if "heads" in options.axes else [old.heads]
    for n_blocks, n_hidden, n_heads in itertools.product(blocks, sorted(hidden), heads):
        shape = replace(old, blocks=n_blocks, hidden=n_hidden, heads=n_heads, kv_heads=n_heads if is_own else old.kv_heads)
        if shape.heads % shape.kv_heads == 0 and shape.hidden % shape.heads == 0:  # as configs want them
            check_sizes(shape, old, model)
            yield shape


def most_neurons(model: ModelHandle, sides: Sides, shape: Shape, budget: float, multiple: int) -> int | None:
    """The most neurons, a multiple or all of them, with which a shape keeps to the budget; None where not even the fewest."""
    counts = sorted({*range(multiple, shape.neurons, multiple), shape.neurons})
    sizes = [n_parameters(model, sides, replace(shape, neurons=counts[place])) for place in (0, -1)]
    if sizes[0] > budget:
        return None
    slope = (sizes[1] - sizes[0]) / max(counts[-1] - counts[0], 1)  # parameters grow evenly with neurons
    fitting: list[int] = [count for count in counts if sizes[0] + slope * (count - counts[0]) <= budget + 0.5]
    return fitting[-1]


def unevenness(shape: Shape, old: Shape, options: MinitronOptions) -> float:
    """Variance of the logarithms of what stays of each axis."""
    logs = [math.log(getattr(shape, axis) / getattr(old, axis)) for axis in options.axes]
    mean = sum(logs) / len(logs)
    return sum((log - mean) ** 2 for log in logs)


def shape_after(model: ModelHandle, options: MinitronOptions) -> Shape:
    """The largest of the candidates."""
    sides = find_sides(model, options.axes)
    return max(candidates(model, options), key=lambda shape: n_parameters(model, sides, shape))


METHOD = Method(run=minitron, options=MinitronOptions, scope="shape", needs=("inputs",), shape=shape_after)
