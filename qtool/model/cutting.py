"""Cutting: a model made smaller by leaving units out: blocks, heads, neurons, hidden channels, experts.

    of every tensor those channels stay whose units stay, in their order:  T' = T[kept of side 0][:, kept of side 1]
Every block is tried before it is believed: in float32, the block with all that goes set to zero must give what the smaller one
gives, on the channels that stay. A norm over fewer channels takes another mean, so the reference's norms look at the channels
that stay alone (masked norms), and the reference's router is asked about the experts that stay alone.
Head residual: a head that stays may take on the difference from one that goes,  W'_i = W_i + (W_i - W_j), in its projections.
Merge: an expert that stays may be the mean of several, their neurons in its order,  W'_c = sum over e of  s_e P_e W_e.
Source: Muralidharan et al. 2024, arXiv:2407.14679 (Minitron), section 2.3; head residual: the same section.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qtool.errors import QtoolError
from qtool.model.architectures import is_router
from qtool.model.checkpoint import EXPERT
from qtool.model.handle import Block, ModelHandle
from qtool.model.shape import Shape, Side, config_of, find_sides, place_of, shape_of_model
from qtool.model.wiring import TOLERANCE, widen

KINDS = ("attention_type", "layer_type", "sliding_window", "is_sliding", "block_type")  # that modules know


@dataclass(frozen=True)
class Merge:
    """Experts of one mixture that become those that stay, each the sum of share · weights over what is merged into it."""

    into: Tensor  # [experts], the expert that stays; for that one its own number
    shares: Tensor  # [experts], float64, those merged into one add up to 1
    orders: Tensor  # [experts, neurons], which of its neurons stands where

    def members(self, center: int) -> list[int]:
        """The experts merged into one that stays, itself among them."""
        found: list[int] = (self.into == center).nonzero().flatten().tolist()
        return found


@dataclass(frozen=True)
class Cut:
    """What stays: blocks by index, and of each axis and place (see `place_of`) the units, ascending; all where none is named.

    `partners`: at "axis:place", for every unit that stays, the dropped one whose difference from it is added; -1 for none.
    `merges`: at "experts:place", what the experts that stay are made of; themselves where none is named.
    `facts`: what the choice was made by, for the results.
    """

    shape: Shape
    blocks: tuple[int, ...]
    kept: dict[str, Tensor] = field(default_factory=dict)  # "axis:place": [units that stay]
    partners: dict[str, Tensor] = field(default_factory=dict)
    merges: dict[str, Merge] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Tensor]:
        """What stays, to be stored."""
        found = {f"kept:{name}": units for name, units in self.kept.items()}
        found |= {f"partners:{name}": units for name, units in self.partners.items()}
        for name, merge in self.merges.items():
            found |= {f"{part.name}:{name}": getattr(merge, part.name) for part in fields(Merge)}
        return {"blocks": torch.tensor(self.blocks), **found}

    @classmethod
    def from_tensors(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> "Cut":
        """The cut that `to_tensors` was made from."""
        kinds = ("kept", "partners", *(part.name for part in fields(Merge)))
        kept, partners, *parts = (
            {name.removeprefix(f"{kind}:"): units for name, units in tensors.items() if name.startswith(f"{kind}:")}
            for kind in kinds
        )
        merges = {name: Merge(*(part[name] for part in parts)) for name in parts[0]}
        return cls(shape, tuple(tensors["blocks"].tolist()), kept, partners, merges, facts)


class Cutter:
    """A model, what stays of it, and the tensors of the smaller one; raises QtoolError where the model cannot be cut so."""

    def __init__(self, model: ModelHandle, cut: Cut) -> None:
        self.model, self.cut = model, cut
        self._old = shape_of_model(model)
        self._sides = find_sides(model, self._old.changed_axes(cut.shape))
        self.fields = config_of(model, cut.shape, cut.blocks)
        self.target = model.resized(self.fields)
        for index, old in enumerate(cut.blocks):
            self._check_kind(index, old)

    def _check_kind(self, index: int, old: int) -> None:
        before, after = (
            {
                f"{name}.{kind}": getattr(module, kind)
                for name, module in handle.skeleton_of(place).named_modules()
                for kind in KINDS
                if hasattr(module, kind)
            }
            for handle, place in ((self.model, old), (self.target, index))
        )
        if before != after:
            name = next(name for name in before if before[name] != after.get(name))
            raise QtoolError(
                f"{self.model.blocks_name}.{old}: as block {index} it would be of another kind ({name}: {before[name]}, then "
                f"{after.get(name)}), and config.json cannot say otherwise; keep all blocks"
            )

    # ---- the tensors that stay ----

    def block_tensors(self, block: Block, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` of the smaller model, made of `block`, by full names."""
        prefix = f"{self.model.blocks_name}.{index}."
        found, state = {}, {f"{block.name}.{local}": tensor for local, tensor in block.module.state_dict().items()}
        for name, tensor in state.items():
            if (renamed := self._renumbered(name)) is not None:
                found[prefix + renamed.removeprefix(f"{block.name}.")] = self._cut(name, self._merged(name, tensor, state))
        self._check_forms(found)
        return found

    def outer_tensors(self) -> dict[str, Tensor]:
        """The same of what stands outside the blocks; call inside `model.outer()`."""
        names = [name for name in self.model.outer_names() if name not in self.model.tied_names()]
        state = self.model.model.state_dict()
        found = {name: self._cut(name, state[name]) for name in names}
        self._check_forms(found)
        return found

    def parameters_of(self, whole: nn.Module) -> dict[str, Tensor]:
        """The smaller model's parameters by its names, made of those of the whole one in memory, which gradients reach."""
        found = {}
        for name, p in whole.named_parameters(remove_duplicate=False):
            if (renamed := self._renamed(name)) is not None:
                found[renamed] = self._cut(name, p)
        return found

    def _renamed(self, name: str) -> str | None:
        """The name of a tensor in the smaller model; None where its block or its expert goes."""
        renamed, prefix = self._renumbered(name), f"{self.model.blocks_name}."
        if renamed is None or not renamed.startswith(prefix):
            return renamed
        index, _, local = renamed.removeprefix(prefix).partition(".")
        return f"{prefix}{self.cut.blocks.index(int(index))}.{local}" if int(index) in self.cut.blocks else None

    def _check_forms(self, found: dict[str, Tensor]) -> None:
        for name, tensor in found.items():
            form = self.target.model.state_dict()[name].shape
            assert form == tensor.shape, f"{name} is cut to {list(tensor.shape)}, the config makes it {list(form)}"

    def _renumbered(self, name: str) -> str | None:
        """The name of a tensor once its expert has another number; None where the expert goes."""
        linear, _, last = name.rpartition(".")
        expert = EXPERT.fullmatch(linear)
        units = None if expert is None else self._units(name, "experts")
        if expert is None or units is None:
            return name
        place = (units == int(expert[3])).nonzero()
        return f"{expert[1]}.{expert[2]}.{int(place)}.{last}" if len(place) else None

    def _units(self, name: str, axis: str) -> Tensor | None:
        return self.cut.kept.get(f"{axis}:{place_of(name, axis, self.model)}")

    def _kept(self, side: Side, name: str) -> Tensor | None:
        """Channels of a side that stay, ascending; None where no axis of it changes."""
        found, start = [], 0
        for segment in side:
            units, count = self._units(name, segment.axis), getattr(self._old, segment.axis)
            units = torch.arange(count) if units is None else units
            found.append(start + (units[:, None] * segment.width + torch.arange(segment.width)).flatten())
            start += count * segment.width
        return torch.cat(found) if found else None

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        sides = self._sides[name]
        if sides and sides[0]:
            tensor = self._with_partners(sides[0], name, tensor)
        for place, side in enumerate(sides):
            if (kept := self._kept(side, name)) is not None:
                tensor = tensor.index_select(place, kept.to(tensor.device))
        return tensor.contiguous()

    def _merged(self, name: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """A tensor of an expert that stays with all that is merged into it, all of them in `state`; others as they are."""
        linear, _, last = name.rpartition(".")
        expert = EXPERT.fullmatch(linear)
        merge = None if expert is None else self.cut.merges.get(f"experts:{place_of(name, 'experts', self.model)}")
        if expert is None or merge is None:
            return tensor
        total = torch.zeros_like(tensor, dtype=torch.float32)
        for member in merge.members(int(expert[3])):
            W = state[f"{expert[1]}.{expert[2]}.{member}.{last}"].float()
            order = merge.orders[member].to(W.device)
            W = W[:, order] if expert[2] == "down" else W.unflatten(0, (2, -1))[:, order].flatten(0, 1)
            total.add_(W, alpha=float(merge.shares[member]))
        return total.to(tensor.dtype)

    def _with_partners(self, side: Side, name: str, tensor: Tensor) -> Tensor:
        """Rows of heads that stay with their partners' difference added; the whole tensor still."""
        start = 0
        for segment in side:
            count = getattr(self._old, segment.axis)
            partners = self.cut.partners.get(f"{segment.axis}:{place_of(name, segment.axis, self.model)}")
            if partners is not None:
                units = self._units(name, segment.axis)
                assert units is not None, f"{name}: partners of units that all stay"
                has = (partners >= 0).nonzero().flatten()
                into, of = units[has].to(tensor.device), partners[has].to(tensor.device)
                rows = tensor[start : start + count * segment.width].unflatten(0, (count, segment.width))
                changed = rows.clone()
                changed[into] = (2 * rows[into].float() - rows[of].float()).to(rows.dtype)
                tensor = tensor.clone()
                tensor[start : start + count * segment.width] = changed.flatten(0, 1)
            start += count * segment.width
        return tensor

    def _smaller(self, block: Block, index: int, dtype: torch.dtype) -> nn.Module:
        """Block `index` of the smaller model, made of `block`."""
        prefix, new = f"{self.model.blocks_name}.{index}.", copy.deepcopy(self.target.skeleton_of(index))
        tensors = {name.removeprefix(prefix): tensor.to(dtype) for name, tensor in self.block_tensors(block, index).items()}
        new.load_state_dict(tensors, assign=True)
        return new

    @torch.no_grad()
    def forward(self, block: Block, index: int, hidden: Tensor) -> Tensor:
        """All samples [samples, length, hidden] through block `index` of the smaller model, made of `block`, as it is fed."""
        smaller = Block(self.model, block.index, self._smaller(block, index, block.dtype), block.name)
        return smaller.forward(hidden)

    # ---- trials ----

    @torch.no_grad()
    def try_block(self, block: Block, index: int, hidden: Tensor) -> None:
        """Raise QtoolError unless the smaller block computes what `block` does without the units that go.

        hidden [1, length, hidden]: what the block is fed.
        """
        plain = copy.copy(self)
        plain.cut = replace(self.cut, partners={}, merges={})  # which change what a head, an expert computes
        new = plain._smaller(block, index, torch.float32)
        old = copy.deepcopy(block.module).float()
        for local, parameter in old.named_parameters():
            parameter.data = self._masked(f"{block.name}.{local}", parameter.data)
        self._look_at_what_stays(old, new, f"{block.name}.")
        x = hidden.float().to(block.device)
        kept = self.cut.kept.get("hidden:")
        small = x
        if kept is not None:
            kept = kept.to(x.device)
            small, x = x[..., kept], torch.zeros_like(x).index_copy(-1, kept, x[..., kept])
        args, kwargs = tree_map(widen, block.call_arguments(hidden))
        outputs = [module(fed, *args, **kwargs) for module, fed in ((old, x), (new, small))]
        expected, found = (cast(Tensor, out[0] if isinstance(out, tuple) else out) for out in outputs)
        expected = expected if kept is None else expected[..., kept]
        self._compare(block.name, expected - small, found - small)

    @torch.no_grad()
    def try_outer(self, tokens: Tensor, hidden: Tensor) -> None:
        """The same of embedding, last norm and head; tokens [1, length], hidden [1, length, hidden] the last block's output.

        Call inside `model.outer()`.
        """
        kept = self.cut.kept.get("hidden:")
        if kept is None:
            return
        target, kept = self.target, kept.to(self.model.device)
        target.called_like(self.model)
        for name, tensor in self.outer_tensors().items():
            target.put_outer(name, tensor.float())
        if self.model.is_tied:
            target.model.tie_weights()
        entered = self.model.enter(tokens).float()[..., kept.cpu()]
        self._compare("the embedding", entered, target.enter(tokens).float())
        for name in self.model.outer_names():
            self.model.put_outer(name, self._masked(name, self.model.model.state_dict()[name]).float())
        self._look_at_what_stays(self.model.model, target.model, "")
        x = hidden.float()
        masked = torch.zeros_like(x).index_copy(-1, kept.cpu(), x[..., kept.cpu()])
        try:
            expected = self.model.logits(masked)
        finally:
            for module in self.model.model.modules():
                vars(module).pop("forward", None)
        self._compare("the head", expected, target.logits(x[..., kept.cpu()]))

    def _masked(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with all that goes set to zero."""
        for place, side in enumerate(self._sides[name]):
            if (kept := self._kept(side, name)) is not None:
                mask = torch.zeros(tensor.shape[place], dtype=tensor.dtype, device=tensor.device)
                mask[kept.to(tensor.device)] = 1
                tensor = tensor * mask.view(-1, *[1] * (tensor.ndim - place - 1))
        return tensor

    def _look_at_what_stays(self, old: nn.Module, new: nn.Module, prefix: str) -> None:
        """Let norms over hidden channels, and routers, of the reference be the smaller one's on what stays."""
        others = dict(new.named_modules())
        for name, module in old.named_modules():
            if not prefix and name.startswith(f"{self.model.blocks_name}."):  # the whole model, whose blocks are tried apart
                continue
            sides = self._sides.get(f"{prefix}{name}.weight", ())
            of_side = [{segment.axis for segment in side} for side in sides]
            if "Norm" in type(module).__name__ and of_side == [{"hidden"}]:
                module.forward = _on_kept(others[name], self.cut.kept["hidden:"])
            elif is_router(name) and of_side and of_side[0] == {"experts"}:
                experts = self.cut.kept[f"experts:{place_of(f'{prefix}{name}', 'experts', self.model)}"]
                module.forward = _renumbering(others[name], experts, self.cut.kept.get("hidden:"))

    @staticmethod
    def _compare(name: str, expected: Tensor, found: Tensor) -> None:
        change = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        if not change <= TOLERANCE:
            raise QtoolError(
                f"{name}: cut, it would not compute what it does without the units that go (relative change {change:.1e}, more "
                f"than {TOLERANCE:.0e}): their number enters in another way too. Nothing of the step is used; cut other sizes"
            )


def _on_kept(norm: nn.Module, kept: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        where = kept.to(x.device)
        return torch.zeros_like(x).index_copy(-1, where, norm(x[..., where]))

    return forward


def _renumbering(
    router: nn.Module, experts: Tensor, hidden: Tensor | None
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, chosen = router(x if hidden is None else x[..., hidden.to(x.device)])
        return logits, scores, experts.to(x.device)[chosen]

    return forward
