"""NUPES: learn the codes of a power grid, over their whole range, and each linear's exponent, block by block.

Minimize ‖f^(x) - f(x°)‖² over a block f with weights  W^ = scale · level_a(round(v)),  see layers/power_linear.py,  over v
and a, by Adam, whose rates fall to zero; the best v and a seen are kept:
    v [out, in] in -m .. m: any code may be reached from any other    a: the exponent of a linear, between 0.3 and 1.2
    x, x° [samples, length, hidden]: what the block is fed in the changed and in the original model
The start is PowerQuant (Yvinec et al. 2023, arXiv:2301.09858): data-free, the exponent of least squared error and the nearest
level of each weight, which `quantize/rtn: {scheme: power4g128}` gives by itself.
Source: Yvinec et al. 2023, arXiv:2308.05600. Differs: gradients pass rounding straight through, where the paper's reading is a
soft rounding that hardens: each step then sees the weights that would be stored, so that the best of them can be kept.
For: runtimes that take a table of levels for each matrix, at three and four bits.
Costs: gradients through every block, as quantize/sign_round.
"""

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.formats.tensor import QuantizedTensor
from qtool.layers.power_linear import PowerLinear
from qtool.model.handle import Block
from qtool.model.linear import weight_of
from qtool.options import BlockTuning
from qtool.registry import Method


class NupesOptions(SchemeSelection, BlockTuning):
    """Options of NUPES."""

    steps: int = Field(200, ge=0, description="updates per block; 0 is PowerQuant")
    lr: float | None = Field(None, gt=0, le=1, description="Adam's rate for v in codes, at first; null: 1 / steps")
    exponent_lr: float = Field(1e-3, gt=0, le=1, description="Adam's rate for the exponents, at first")


def nupes(
    block: Block,
    inputs: Tensor,
    targets: Tensor,
    schemes: dict[str, Scheme],
    options: NupesOptions,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, QuantizedTensor]:
    """Quantize the linears named in `schemes`; inputs, targets [samples, length, hidden], the targets f(x°)."""
    check(None, options)
    layers = {
        name: PowerLinear(weight_of(block.get(name)), getattr(block.get(name), "bias", None), scheme)
        for name, scheme in schemes.items()
    }
    groups = [
        {"params": [layer.v for layer in layers.values()], "lr": options.lr or 1 / max(options.steps, 1)},
        {"params": [layer.a for layer in layers.values()], "lr": options.exponent_lr},
    ]
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(options.steps, 1))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    random = torch.Generator().manual_seed(seed)
    least, best = math.inf, [p.detach().clone() for p in trained]
    with block.replaced(layers):
        for _ in range(options.steps):
            rows = torch.randperm(len(inputs), generator=random)[: options.batch]
            out = block.call_from_host(inputs[rows])  # [batch, length, hidden]
            loss = (out.float() - targets[rows].float()).square().mean()
            if float(loss.detach()) < least:
                least, best = float(loss.detach()), [p.detach().clone() for p in trained]
            gradients = torch.autograd.grad(loss, trained)
            for p, gradient in zip(trained, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            falling.step()
            for layer in layers.values():
                layer.clamp()
    with torch.no_grad():
        for p, value in zip(trained, best, strict=True):
            p.copy_(value)
    return {name: layer.quantized() for name, layer in layers.items()}


def check(model: object, options: NupesOptions) -> None:
    """Raise QtoolError, before any work, for schemes that have no exponent."""
    for scheme in (options.scheme, *options.modules.values()):
        if scheme != "search" and scheme.weights.format != "power":
            raise QtoolError(f"quantize/nupes: {scheme} has no exponent to learn; write a power grid, such as power4g128")


METHOD = Method(run=nupes, options=NupesOptions, scope="block", check=check, schemes=("power4g32", "power3g32"))
