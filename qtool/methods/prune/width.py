"""Width pruning: leave out the attention heads, MLP neurons and hidden channels that show least activation (Minitron).

    score of a unit = sqrt( sum over windows of (mean over tokens of |a|)² )
    a: a neuron's input of the down projection, the norm of a head's output, a hidden channel after each norm, all norms added
The units of greatest score stay, in their order: neurons by each MLP, heads by each block, hidden channels by one choice for
the whole model. Of grouped heads whole groups go, by the norm of their heads' scores, then as many heads of each that stays.
Head residual: a head W_i that stays takes on the difference from one that goes,  W_i + (W_i - W_j), in its projections.
Source: Muralidharan et al. 2024, arXiv:2407.14679 (Minitron), sections 2.2 and 2.3. Differs: for its iterative form put the
step several times into a recipe, with distill between.
For: a smaller model of ordinary shape, that every runtime serves; distill after it.
Costs: one pass over the text, and writing the smaller model.
"""

from collections.abc import Callable

from pydantic import Field, model_validator
from torch import Tensor

from qtool.calibration.importance import Importance, head_partners, kept_units
from qtool.model.cutting import Cut
from qtool.model.handle import ModelHandle
from qtool.model.shape import Shape, check_smaller, shape_of_model, with_sizes
from qtool.options import Options
from qtool.registry import Method

SIZES = ("heads", "kv_heads", "neurons", "hidden")


class WidthOptions(Options):
    """How many units stay; what is not stated stays as it is."""

    heads: int | None = Field(None, ge=1, description="query heads of a block that stay")
    kv_heads: int | None = Field(
        None, ge=1, description="key/value heads that stay; null: all, or as many as heads where each head has its own"
    )
    neurons: int | None = Field(None, ge=1, description="neurons of an MLP, of an expert in a mixture, that stay")
    hidden: int | None = Field(None, ge=1, description="channels of the residual stream that stay")
    head_residual: bool = Field(False, description="add to heads that stay the difference from heads that go")

    @model_validator(mode="after")
    def _state_one(self) -> "WidthOptions":
        if all(getattr(self, size) is None for size in SIZES):
            raise ValueError(f"states no size; state one or more of {', '.join(SIZES)}")
        if self.head_residual and self.heads is None:
            raise ValueError("head_residual adds to heads; state heads, or leave it away")
        return self


def width(importance: Importance, options: WidthOptions, note: Callable[[str], None]) -> Cut:
    """The units that stay, of every block."""
    model, shape = importance.model, shape_after(importance.model, options)
    old = shape_of_model(model)
    changed = set(old.changed_axes(shape))
    axes = [axis for axis in ("neurons", "heads", "hidden") if axis in changed or (axis == "heads" and "kv_heads" in changed)]
    scores = importance.of_units(axes)
    kept = kept_units(model, scores, shape)
    partners = residual(scores, kept, old) if options.head_residual else {}
    return Cut(shape, tuple(range(shape.blocks)), kept, partners)


def residual(scores: dict[str, Tensor], kept: dict[str, Tensor], old: Shape) -> dict[str, Tensor]:
    """Partners of the heads that stay, of the keys and values too where each head has its own."""
    found = {}
    for name, values in scores.items():
        axis, _, place = name.partition(":")
        if axis == "heads":
            has_own = old.heads == old.kv_heads
            found[name] = head_partners(values, kept[name], 1 if has_own else old.kv_heads)
            if has_own:
                found[f"kv_heads:{place}"] = found[name]
    return found


def shape_after(model: ModelHandle, options: WidthOptions) -> Shape:
    """The model's shape with these sizes; raises QtoolError where they are none that it can have."""
    old = shape_of_model(model)
    shape = with_sizes(old, {size: value for size in SIZES if (value := getattr(options, size)) is not None})
    check_smaller(shape, old)
    return shape


METHOD = Method(run=width, options=WidthOptions, scope="shape", needs=("inputs",), shape=shape_after)
