"""Acceleration: a loaded model's quantized linears made fast, with a count of what was and what was not, and why."""

from dataclasses import dataclass, field

import torch
from torch import nn

from qtool.errors import QtoolError
from qtool.formats.scheme import WeightScheme
from qtool.kernels import launch
from qtool.layers.fast_linear import FastLinear, fast, fast_together
from qtool.layers.quant_linear import QuantLinear
from qtool.model.architectures import fused_units


@dataclass
class Acceleration:
    """Linears by the product that computes them, and those that decode at each call by the reason, all by full names.

    shared: those of the first that share one launch with others.
    """

    products: dict[str, list[str]] = field(default_factory=dict)
    decoded: dict[str, list[str]] = field(default_factory=dict)
    shared: set[tuple[str, ...]] = field(default_factory=set)

    @property
    def n_products(self) -> int:
        """Linears that are computed from their codes."""
        return _count(self.products)

    @property
    def n_decoded(self) -> int:
        """Linears that decode all their weights at each call."""
        return _count(self.decoded)

    def lines(self) -> list[str]:
        """What a user should read: how many linears each product computes, how many share one, how many decode, and why."""
        total = self.n_products + self.n_decoded
        fast = [f"{len(names)} of {total} linears: {product}" for product, names in sorted(self.products.items())]
        if self.shared:
            n_shared = sum(map(len, self.shared))
            fast.append(f"{n_shared} of {total} linears share {len(self.shared)} launches with those that read the same input")
        slow = [
            f"{len(names)} of {total} linears decode at each call, {names[0]} first: {reason}"
            for reason, names in sorted(self.decoded.items())
        ]
        return fast + slow

    def require(self, where: str) -> None:
        """Raise QtoolError where no linear has a product."""
        if not self.products:
            why = "; ".join(self.decoded) or "it has no quantized linear"
            raise QtoolError(f"{where}: no linear has a fast product ({why}); use the runtime reference")

    def accelerate(self, root: nn.Module, prefix: str, dtype: torch.dtype) -> None:
        """Replace every QuantLinear under root, whose full names begin with prefix, by a FastLinear where there is one."""
        layers = {name: module for name, module in root.named_modules() if isinstance(module, QuantLinear)}
        for names in _with_one_input(layers):
            together = fast_together([layers[name] for name in names], dtype)
            if isinstance(together, str):
                continue  # each has its own product, or its own reason
            self.shared.add(tuple(prefix + name for name in names))
            for name, part in zip(names, together, strict=True):
                self._install(root, prefix, name, part)
                del layers[name]
        for name, layer in layers.items():
            self._install(root, prefix, name, fast(layer, dtype))

    def _install(self, root: nn.Module, prefix: str, name: str, made: FastLinear | str) -> None:
        if isinstance(made, str):
            _add(self.decoded, made, prefix + name)
        else:
            root.set_submodule(name, made)
            _add(self.products, made.product.name, prefix + name)


def _with_one_input(layers: dict[str, QuantLinear]) -> list[list[str]]:
    """Names of linears that by their names read one input, and that have one scheme: two and more of each."""
    found: dict[tuple[str, WeightScheme], list[str]] = {}
    for unit, names in fused_units(layers).items():
        for name in names:
            found.setdefault((unit, layers[name].scheme), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def device_of_runtime(runtime: str, device: str) -> str:
    """The device that a runtime, cpu or cuda, stands for; raises QtoolError where another is asked for, or it cannot run."""
    kind = device.partition(":")[0]
    if kind not in ("auto", runtime):
        raise QtoolError(f"--runtime {runtime} with --device {device}: the runtime {runtime} runs on {runtime}; leave one away")
    if runtime == "cuda" and (reason := launch.reason_not_to_run()) is not None:
        raise QtoolError(f"--runtime cuda: {reason}; use --runtime cpu or reference, and see qtool doctor")
    return runtime if kind == "auto" else device


def _add(listed: dict[str, list[str]], key: str, name: str) -> None:
    names = listed.setdefault(key, [])
    if name not in names:  # a block may be loaded many times
        names.append(name)


def _count(listed: dict[str, list[str]]) -> int:
    return sum(map(len, listed.values()))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, each tensor once, what oneDNN keeps in a layout of its own too."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    hidden = sum(module.product.hidden_bytes for module in model.modules() if isinstance(module, FastLinear))
    return sum(storages.values()) + hidden
