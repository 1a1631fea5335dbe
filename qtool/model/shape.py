"""Shape: the sizes that a model's config states, and which sides of which tensors each of them sets.

    side of a tensor = segments one after the other, each   count of an axis · channels of one unit
    q_proj.weight [heads · head_dim, hidden]    gate_up_proj.weight [neurons + neurons, hidden]    norm.weight [hidden]
Found by experiment: one more skeleton is made with one size changed, and a side that is another there is set by that size. So
are shapes of a smaller model known without a table of families; how units lie within a side is stated here and tried before
it is believed (see cutting.py).
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from qtool.errors import QtoolError
from qtool.layers.experts import Experts
from qtool.model.architectures import EXPERT_NEURONS, PER_BLOCK, SIZES
from qtool.model.checkpoint import EXPERT
from qtool.model.handle import ModelHandle

HEADS = ("heads", "kv_heads")
WORDS = {"blocks": "blocks", "hidden": "hidden channels", "heads": "heads", "kv_heads": "key/value heads",
         "neurons": "neurons", "experts": "experts"}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How many there are of each; experts 0 where the model is no mixture."""

    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    neurons: int
    experts: int

    def __str__(self) -> str:
        found = {words: getattr(self, axis) for axis, words in WORDS.items()}
        return ", ".join(f"{count} {words}" for words, count in found.items() if count)

    def changed_axes(self, other: "Shape") -> list[str]:
        """The axes on which two shapes differ."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]


@dataclass(frozen=True)
class Segment:
    """A part of a side: units of one axis in their order, `width` channels each."""

    axis: str
    width: int


Side = tuple[Segment, ...]  # empty: no size that changes sets it
Sides = dict[str, tuple[Side, ...]]  # full name of a tensor: its sides


def shape_of_model(model: ModelHandle) -> Shape:
    """The sizes that the config states."""
    return Shape(**{axis: 0 if (name := size_name(model, axis)) is None else _size(model, name) for axis in SIZES})


def size_name(model: ModelHandle, axis: str) -> str | None:
    """The config's attribute that states a size; None where it has none."""
    config = model.config.get_text_config()
    if axis == "neurons" and getattr(config, EXPERT_NEURONS, None):
        widths = {down.in_features for down in _expert_downs(model)}
        if widths == {getattr(config, EXPERT_NEURONS)}:
            return EXPERT_NEURONS
    if axis == "kv_heads" and getattr(config, SIZES[axis][0], None) is None:
        return size_name(model, "heads")  # the heads have keys and values of their own
    if axis == "experts" and not _expert_downs(model):
        return None
    return next((name for name in SIZES[axis] if hasattr(config, name)), None)


def _size(model: ModelHandle, name: str) -> int:
    value = getattr(model.config.get_text_config(), name)
    return 4 * model.config.get_text_config().hidden_size if value is None else int(value)  # GPT-2's n_inner says nothing


def _expert_downs(model: ModelHandle) -> list[nn.Linear]:
    return [down for module in model.model.modules() if isinstance(module, Experts) for down in module.down]  # type: ignore[misc]


def config_of(model: ModelHandle, shape: Shape, blocks: Sequence[int]) -> dict[str, Any]:
    """The fields of config.json for another shape; `blocks`: those that stay, which fields of one entry a block follow.

    Raises QtoolError where the sizes do not go together.
    """
    old = shape_of_model(model)
    check_sizes(shape, old, model)
    stated = copy.deepcopy(model.stated_config)
    part = stated["text_config"] if isinstance(stated.get("text_config"), dict) else stated
    config = model.config.get_text_config()
    for axis in old.changed_axes(shape):
        name = size_name(model, axis)
        assert name is not None, f"check_sizes lets no {axis} through"
        part[config.attribute_map.get(name, name)] = getattr(shape, axis)
    if (old.hidden, old.heads) != (shape.hidden, shape.heads):
        part["head_dim"] = model.head_dim  # else the quotient of the two
    if list(blocks) != list(range(old.blocks)):
        for name in PER_BLOCK:
            kinds = getattr(config, name, None)
            if isinstance(kinds, list) and len(kinds) == old.blocks:
                part[name] = [kinds[index] for index in blocks]
    if not model.is_tied and getattr(config, "tie_word_embeddings", False):  # a step has parted head and embedding
        for fields_ in (stated, part):
            fields_["tie_word_embeddings"] = False
    return stated


def check_sizes(shape: Shape, old: Shape, model: ModelHandle) -> None:
    """Raise QtoolError where a shape is no smaller one of the same kind."""
    for axis in old.changed_axes(shape):
        if getattr(old, axis) == 0:
            raise QtoolError(f"{type(model.model).__name__} has no {WORDS[axis]}")
    if shape.heads % shape.kv_heads:
        fitting = [n for n in range(1, old.heads + 1) if n % shape.kv_heads == 0]
        raise QtoolError(
            f"{shape.heads} heads cannot share {shape.kv_heads} key/value heads evenly; keep {', '.join(map(str, fitting))}"
        )
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if shape.experts and chosen is not None and shape.experts < int(chosen):
        raise QtoolError(f"{shape.experts} experts are less than the {chosen} that each token goes to; keep {chosen} or more")


def with_sizes(old: Shape, stated: dict[str, int]) -> Shape:
    """The shape with these sizes by axis; key/value heads follow heads where each has its own.

    Raises QtoolError where heads and key/value heads do not go together.
    """
    sizes = dict(stated)
    if old.heads == old.kv_heads and "heads" in stated:
        sizes.setdefault("kv_heads", stated["heads"])
    shape = replace(old, **sizes)
    if old.heads == old.kv_heads and shape.kv_heads != shape.heads:
        raise QtoolError("each head has keys and values of its own; leave kv_heads away, it follows heads")
    if shape.heads // shape.kv_heads > old.heads // old.kv_heads:
        raise QtoolError(
            f"{old.heads // old.kv_heads} heads share a key/value head, more than that cannot stay of a group; lower heads too"
        )
    return shape


def check_smaller(shape: Shape, old: Shape) -> None:
    """Raise QtoolError where a count is more than there is, or nothing gets smaller."""
    for axis in old.changed_axes(shape):
        count, most = getattr(shape, axis), getattr(old, axis)
        if not 1 <= count <= most:
            raise QtoolError(f"{count} {WORDS[axis]} are to stay of {most}; use 1 to {most}")
    if shape == old:
        raise QtoolError(f"nothing is to go: the model has {old}; ask for less of something")


def smaller(model: ModelHandle, shape: Shape) -> ModelHandle:
    """The model, to plan with, as it is once it has been cut to a shape; its first blocks are taken to stay.

    Raises QtoolError where it cannot be cut so.
    """
    if quantized := model.schemes():
        raise QtoolError(f"{next(iter(quantized))} is quantized already; make the model smaller first, then quantize")
    if (what := model.additions()) or model.cache() is not None or model.rounding() is not None:
        first = next(iter(what.items()), ("the cache or attention", "rounding"))
        raise QtoolError(f"{first[0]} has a {first[1]}, which is made for its sizes; make the model smaller first")
    find_sides(model, shape_of_model(model).changed_axes(shape))
    return model.resized(config_of(model, shape, range(shape.blocks)))


def find_sides(model: ModelHandle, axes: Sequence[str]) -> Sides:
    """Which axes set which sides of every tensor; raises QtoolError, naming the tensor, where a side cannot be read so."""
    old = shape_of_model(model)
    forms = {name: tuple(tensor.shape) for name, tensor in model.model.state_dict().items()}
    labels: dict[str, list[set[str]]] = {name: [set() for _ in form] for name, form in forms.items()}
    looked_at = [axis for axis in axes if axis != "blocks"]
    if set(HEADS) & set(axes):  # one side may hold both
        looked_at += [axis for axis in HEADS if axis not in axes and size_name(model, axis) in SIZES[axis]]
    for axis in looked_at:
        variant = model.resized(config_of(model, _other(old, axis), range(old.blocks)))
        found = False
        for name, tensor in variant.model.state_dict().items():
            for place, (is_, was) in enumerate(zip(tensor.shape, forms.get(name, ()), strict=False)):
                if is_ != was:
                    labels[name][place].add(axis)
                    found = True
        if not found and axis in axes and getattr(old, axis) > 1:
            raise QtoolError(
                f"{type(model.model).__name__}: no tensor is as wide as its {WORDS[axis]} alone make it (config."
                f"{size_name(model, axis)}), so none of them can go by itself; leave {WORDS[axis]} as they are"
            )
    for name, sides in labels.items():
        if len(sides) > 1 and all("hidden" in side for side in sides):
            raise QtoolError(
                f"{name}: both of its sides are as wide as the hidden channels of {type(model.model).__name__}, so that "
                "heads and channels cannot be told apart; leave hidden as it is"
            )
    return {
        name: tuple(_side(name, n, axes_, old, model) for n, axes_ in zip(forms[name], sides, strict=True))
        for name, sides in labels.items()
    }


def _other(old: Shape, axis: str) -> Shape:
    """A shape that differs on one axis, of any model that has the axis."""
    if axis == "kv_heads":
        return replace(old, kv_heads=1 if old.kv_heads > 1 else old.heads)
    return replace(old, **{axis: 2 * getattr(old, axis)})


def _side(name: str, n: int, axes: set[str], old: Shape, model: ModelHandle) -> Side:
    """The segments of a side of n channels that these axes set."""
    if not axes:
        return ()
    head = int(model.head_dim)
    if axes == {"heads", "kv_heads"} and n == (old.heads + 2 * old.kv_heads) * head:
        return (Segment("heads", head), Segment("kv_heads", head), Segment("kv_heads", head))
    axis = next(iter(axes))
    count = getattr(old, axis)
    if len(axes) > 1 or n % count:
        what = " and ".join(WORDS[one] for one in sorted(axes))
        raise QtoolError(f"{name}: how {what} lie in its {n} channels is not known; leave them as they are")
    if axis in HEADS and n % (count * head):
        return (Segment(axis, n // count),)
    width = head if axis in HEADS else 1
    n_parts: int = n // (count * width)
    return (Segment(axis, width),) * n_parts


def place_of(name: str, axis: str, model: ModelHandle) -> str:
    """Where the units of a tensor's side are counted: all of the model, a block, or an MLP, whose choices are its own."""
    if axis == "hidden":
        return ""
    if axis == "neurons":
        linear = name.rpartition(".")[0]
        expert = EXPERT.fullmatch(linear)
        return f"{expert[1]}.{expert[3]}" if expert is not None else linear.rpartition(".")[0]
    return ".".join(name.split(".")[: model.blocks_name.count(".") + 2])


def n_parameters(model: ModelHandle, sides: Sides, shape: Shape) -> int:
    """Parameters that a model of this shape has, its first blocks taken; `sides` of all axes that change."""
    total, tied = 0, model.tied_names()
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        in_block = name.startswith(f"{model.blocks_name}.")
        if name in tied or (in_block and int(name.split(".")[model.blocks_name.count(".") + 1]) >= shape.blocks):
            continue
        expert = EXPERT.fullmatch(name.rpartition(".")[0])
        if expert is not None and int(expert[3]) >= shape.experts:
            continue
        total += math.prod(
            sum(getattr(shape, segment.axis) * segment.width for segment in side) if side else n
            for side, n in zip(sides[name], parameter.shape, strict=True)
        )
    return total
