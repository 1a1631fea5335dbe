"""Submodels: smaller models that share one model's weights, each the first units of it.

    of every axis the first n units stay: blocks, neurons of each MLP, heads of each group, hidden channels, experts
Two of them are nested where one has no more of anything than the other. Cutting and its trials are those of cutting.py.
Source: Valipour et al. 2023, arXiv:2309.00255 (SortedNet), whose sub-models are prefixes in every dimension.
"""

import torch
from torch import Tensor

from qtool.calibration.importance import kept_units
from qtool.model.cutting import Cut, Cutter
from qtool.model.handle import ModelHandle
from qtool.model.shape import Shape, check_smaller, find_sides, place_of, shape_of_model, smaller, with_sizes
from qtool.options import Sizes


def cutter_of(model: ModelHandle, sizes: Sizes) -> Cutter:
    """What makes the sub-model of these sizes; raises QtoolError where the model takes no such."""
    shape = shape_after(model, sizes)
    return Cutter(model, Cut(shape, tuple(range(shape.blocks)), first_units(model, shape)))


def shape_after(model: ModelHandle, sizes: Sizes) -> Shape:
    """The shape of a sub-model; raises QtoolError where the model cannot be cut to it."""
    old = shape_of_model(model)
    shape = with_sizes(old, sizes.stated())
    check_smaller(shape, old)
    smaller(model, shape)
    return shape


def first_units(model: ModelHandle, shape: Shape) -> dict[str, Tensor]:
    """The first units of every axis that gets smaller, by "axis:place" as a Cut has them."""
    old = shape_of_model(model)
    changed = old.changed_axes(shape)
    axes = {"heads" if axis == "kv_heads" else axis for axis in changed if axis != "blocks"}
    places = {
        f"{segment.axis}:{place_of(name, segment.axis, model)}"
        for name, sides in find_sides(model, sorted(axes)).items()
        for side in sides
        for segment in side
        if segment.axis in axes
    }
    falling = {name: torch.arange(getattr(old, name.partition(":")[0]), 0, -1.0) for name in sorted(places)}
    return kept_units(model, falling, shape)
