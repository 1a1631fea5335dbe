"""SignRound: learn each weight's rounding and each group's range by the signs of gradients, block by block (AutoRound).

Minimize ‖f^(x) - f(x°)‖² over a block f with weights  W^ = scale · level(W / scale + V), see layers/rounded_linear.py:
    p <- p - lr (1 - t/T) sign(grad p)      p any of V, alpha, beta      t = 0 .. T - 1; the best p seen is kept
    x, x° [samples, length, hidden]: what the block is fed in the changed and in the original model
Source: Cheng et al. 2023, arXiv:2309.05516, Algorithm 1. Differs: nothing in the steps; grids of a table learn as well.
"""

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.formats.tensor import QuantizedTensor
from qtool.layers.rounded_linear import RoundedLinear
from qtool.model.handle import Block
from qtool.model.linear import weight_of
from qtool.registry import Method


class SignRoundOptions(SchemeSelection):
    """Options of SignRound."""

    steps: int = Field(200, ge=0, description="updates per block; 0 is rounding to nearest, two bits take 1000")
    batch: int = Field(8, ge=1, description="windows in one update")
    lr: float | None = Field(None, gt=0, le=1, description="first step of V, falling to zero; null: 1 / steps")
    range_lr: float | None = Field(None, gt=0, le=1, description="first step of alpha and beta; null: lr")


def sign_round(
    block: Block,
    inputs: Tensor,
    targets: Tensor,
    schemes: dict[str, Scheme],
    options: SignRoundOptions,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, QuantizedTensor]:
    """Quantize the linears named in `schemes`; inputs, targets [samples, length, hidden], the targets f(x°)."""
    layers = {
        name: RoundedLinear(weight_of(block.get(name)), getattr(block.get(name), "bias", None), scheme)
        for name, scheme in schemes.items()
    }
    lr = options.lr or 1 / max(options.steps, 1)
    rates = {layer.V: lr for layer in layers.values()}
    rates |= {p: options.range_lr or lr for layer in layers.values() for p in (layer.alpha, layer.beta)}
    random = torch.Generator().manual_seed(seed)
    least, best = math.inf, [p.detach().clone() for p in rates]
    with block.replaced(layers):
        for step in range(options.steps):
            rows = torch.randperm(len(inputs), generator=random)[: options.batch]
            out = block.call_from_host(inputs[rows])  # [batch, length, hidden]
            loss = (out.float() - targets[rows].float()).square().mean()
            if float(loss.detach()) < least:
                least, best = float(loss.detach()), [p.detach().clone() for p in rates]
            gradients = torch.autograd.grad(loss, list(rates))
            with torch.no_grad():
                for (p, rate), gradient in zip(rates.items(), gradients, strict=True):
                    p.sub_(gradient.sign_(), alpha=rate * (1 - step / options.steps))
            for layer in layers.values():
                layer.clamp()
    with torch.no_grad():
        for p, value in zip(rates, best, strict=True):
            p.copy_(value)
    return {name: layer.quantized() for name, layer in layers.items()}


METHOD = Method(run=sign_round, options=SignRoundOptions, scope="block")
