"""Wiring: which linears of a block share an input, and where a channel scale can move from one layer to the next.

Groups are found by tensor identity during one hooked forward: linears whose input is one and the same tensor.
A `Scaling` is a place where   source / s  followed by  consumers * s   leaves the block's output as it was:
    norm -> linears      gain_j / s_j,  W[:, j] s_j
    linear -> linear     A[j, :] / s_j,  B[:, j] s_j    such as up -> down, and value -> output projection
Where source and consumers have biases, a shift d may pass too:  (source - d) / s,  consumers' bias + W d,  as through a norm
and through attention, whose probabilities sum to 1.
Each is tried with a random scale on a float32 copy before it is believed, so a wrong wiring is refused, never applied.
Why by experiment: SiLU forbids gate -> down and ReLU allows it; a trial knows, a table of families forgets.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from qtool.model.architectures import gain_offset
from qtool.model.handle import Block
from qtool.model.linear import is_linear, shape_of, weight_of

Edits = dict[str, Tensor]  # full parameter name: its new value, float32, weights [out, in]

TOLERANCE = 1e-5  # relative change of a float32 block output that rounding explains


@dataclass(frozen=True)
class Group:
    """Linears with one input, in the order of their calls; `norm` feeds them, where one does."""

    linears: tuple[str, ...]
    norm: str | None


@dataclass(frozen=True)
class Scaling:
    """A verified place for a scale s [channels of source]; `spread` [in of consumers] maps consumer to source channels."""

    source: str
    consumers: tuple[str, ...]
    spread: Tensor
    takes_shift: bool = False  # verified too


def find_groups(block: Block, sample: Tensor) -> list[Group]:
    """Groups of a block's linears from one forward of sample [1, length, hidden]."""
    groups, _ = trace(block, sample)
    known = set(block.linears())
    kept = [Group(tuple(name for name in group.linears if name in known), group.norm) for group in groups]
    return [group for group in kept if group.linears]


def find_scalings(block: Block, sample: Tensor) -> list[Scaling]:
    """Every scaling of the block that leaves its output unchanged; sample [1, length, hidden]."""
    groups, order = trace(block, sample)
    wide = _WideBlock(block, sample)
    found = []
    for group in groups:
        if group.norm is not None:
            width = cast(Tensor, block.get(group.norm).weight).numel()
            candidates = [Scaling(group.norm, group.linears, torch.arange(width))]
        else:
            candidates = linear_sources(block, group, order)
        allowed = next((scaling for scaling in candidates if wide.allows(scaling)), None)
        if allowed is not None:
            found.append(replace(allowed, takes_shift=wide.allows_shift(allowed)))
    return found


def scale_edits(block: Block, scaling: Scaling, s: Tensor, edits: Edits | None = None, shift: Tensor | None = None) -> Edits:
    """Add (source - shift) / s and consumers * s to edits, on top of what they hold; gradients reach s and shift.

    s [channels of source], float32, positive; shift [channels of source], float32, where the scaling takes one.
    """
    edits = {} if edits is None else edits
    source = block.get(scaling.source)
    if is_linear(source):
        edits[f"{scaling.source}.weight"] = edited_weight(block, scaling.source, edits) / s[:, None]
    else:
        offset = gain_offset(source)
        edits[f"{scaling.source}.weight"] = (cast(Tensor, source.weight).float() + offset) / s - offset
    bias = edited_bias(block, scaling.source, edits)
    if bias is not None:
        edits[f"{scaling.source}.bias"] = (bias if shift is None else bias - shift) / s
    spread = scaling.spread.to(s.device)
    for name in scaling.consumers:
        W, bias = edited_weight(block, name, edits), edited_bias(block, name, edits)
        edits[f"{name}.weight"] = W * s[spread]
        if shift is not None:
            assert bias is not None, f"{name} has no bias that could take the shift"
            edits[f"{name}.bias"] = bias + W @ shift[spread]
    return edits


def edited_weight(block: Block, name: str, edits: Edits) -> Tensor:
    """The weights [out, in] of a layer as the edits have them so far, float32."""
    layer = block.get(name)
    return edits.get(f"{name}.weight", weight_of(layer) if is_linear(layer) else cast(Tensor, layer.weight).float())


def edited_bias(block: Block, name: str, edits: Edits) -> Tensor | None:
    """The bias of a layer as the edits have it so far, float32; None where it has none."""
    bias = getattr(block.get(name), "bias", None)
    return edits.get(f"{name}.bias", None if bias is None else bias.detach().float())


def largest_per_source(per_input: Tensor, scaling: Scaling) -> Tensor:
    """Largest value over the consumers' channels [in] that one source channel feeds, [channels of source]."""
    n_channels = int(scaling.spread.max()) + 1
    largest = torch.full((n_channels,), -torch.inf, device=per_input.device)
    return largest.scatter_reduce_(0, scaling.spread.to(per_input.device), per_input, "amax")


def apply_edits(module: nn.Module, prefix: str, edits: Edits) -> None:
    """Set parameters of a block's module (its own or a copy), in each parameter's dtype."""
    for name, value in edits.items():
        local = name.removeprefix(f"{prefix}.")
        parameter = module.get_parameter(local)
        parameter.data = oriented(module.get_submodule(local.rpartition(".")[0]), value).to(parameter.dtype)


def change_of_output(block: Block, sample: Tensor, edits: Edits) -> float:
    """Relative change of the block's float32 output that the edits cause on sample [1, length, hidden]."""
    return _WideBlock(block, sample).change(edits)


def oriented(layer: nn.Module, value: Tensor) -> Tensor:
    """A weight [out, in], or any other parameter, as the layer stores it: GPT-2's Conv1D keeps its weight transposed."""
    return (value.T if isinstance(layer, Conv1D) and value.ndim == 2 else value).contiguous()


def linear_sources(block: Block, group: Group, order: list[str]) -> list[Scaling]:
    """Linears called before the group whose channels could be the group's input channels, latest first."""
    if not is_linear(block.get(group.linears[0])):
        return []
    width = shape_of(block.get(group.linears[0]))[1]
    candidates = []
    for name in reversed(order[: order.index(group.linears[0])]):
        if not is_linear(block.get(name)):
            continue
        n_channels = shape_of(block.get(name))[0]
        if n_channels == width:
            candidates.append(Scaling(name, group.linears, torch.arange(width)))
        elif width % n_channels == 0 and block.head_dim and n_channels % block.head_dim == 0:
            heads = torch.arange(n_channels).view(-1, block.head_dim)  # [kv heads, head_dim]
            candidates.append(Scaling(name, group.linears, heads.repeat_interleave(width // n_channels, 0).flatten()))
    return candidates


def trace(block: Block, sample: Tensor) -> tuple[list[Group], list[str]]:
    """Groups in call order (routers included), and the names of all weighted layers in call order."""
    kept: list[Tensor] = []  # keeps every seen tensor alive, so that no address is used twice
    inputs: dict[str, tuple[int, ...]] = {}
    outputs: dict[tuple[int, ...], str] = {}
    hooks = []

    def identity(x: Tensor) -> tuple[int, ...]:
        kept.append(x)
        return (x.data_ptr(), x.numel()) if x.numel() else (id(x),)

    for local, module in block.module.named_modules():
        weight = getattr(module, "weight", None)
        name = f"{block.name}.{local}"
        if is_linear(module) or (isinstance(weight, Tensor) and weight.ndim == 2 and not list(module.children())):

            def enter(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                inputs.setdefault(name, identity(args[0]))

            hooks.append(module.register_forward_pre_hook(enter))
        elif isinstance(weight, Tensor) and weight.ndim == 1 and "Norm" in type(module).__name__:

            def leave(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
                outputs[identity(out)] = name

            hooks.append(module.register_forward_hook(leave))
    try:
        block.forward(sample)
    finally:
        for hook in hooks:
            hook.remove()
    members: dict[tuple[int, ...], list[str]] = {}
    for name, key in inputs.items():
        members.setdefault(key, []).append(name)
    return [Group(tuple(names), outputs.get(key)) for key, names in members.items()], list(inputs)


class _WideBlock:
    """A float32 copy of a block, to try edits on."""

    def __init__(self, block: Block, sample: Tensor) -> None:
        self._block = block
        self._module = copy.deepcopy(block.module).float()
        self._sample = sample.float()
        args, kwargs = block.call_arguments(sample)
        self._args, self._kwargs = tree_map(widen, args), tree_map(widen, kwargs)
        self._reference = self._run()

    def allows(self, scaling: Scaling) -> bool:
        """Whether a random scale between 1/2 and 2 passes through."""
        n_channels = int(scaling.spread.max()) + 1
        s = torch.rand(n_channels, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.5
        return self.change(scale_edits(self._block, scaling, s.to(self._reference.device))) <= TOLERANCE

    def allows_shift(self, scaling: Scaling) -> bool:
        """Whether a random shift between -1/2 and 1/2 passes through."""
        if any(getattr(self._block.get(name), "bias", None) is None for name in (scaling.source, *scaling.consumers)):
            return False
        n_channels = int(scaling.spread.max()) + 1
        shift = (torch.rand(n_channels, generator=torch.Generator().manual_seed(0)) - 0.5).to(self._reference.device)
        return self.change(scale_edits(self._block, scaling, torch.ones_like(shift), shift=shift)) <= TOLERANCE

    @torch.no_grad()
    def change(self, edits: Edits) -> float:
        before = {name: self._parameter(name).data for name in edits}
        for name, value in edits.items():
            self._parameter(name).data = oriented(self._block.get(name.rpartition(".")[0]), value.float())
        try:
            out = self._run()
        finally:
            for name, value in before.items():
                self._parameter(name).data = value
        # What the block adds is what edits touch; the residual stream would hide a change.
        added = self._reference - self._sample.to(self._reference.device)
        return float((out - self._reference).norm() / added.norm().clamp(min=1e-30))

    def _parameter(self, name: str) -> nn.Parameter:
        return self._module.get_parameter(name.removeprefix(f"{self._block.name}."))

    @torch.no_grad()
    def _run(self) -> Tensor:
        device = next(self._module.parameters()).device
        out = self._module(self._sample.to(device), *self._args, **self._kwargs)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def widen(value: Any) -> Any:
    """Floats in float32."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
