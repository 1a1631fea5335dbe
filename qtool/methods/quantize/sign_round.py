"""SignRound: learn each weight's rounding and each group's range by the signs of gradients, block by block (AutoRound).

Minimize ‖f^(x) - f(x°)‖² over a block f with weights  W^ = scale · level(W / scale + V), see layers/rounded_linear.py:
    p <- p - lr (1 - t/T) sign(grad p)      p any of V, alpha, beta      t = 0 .. T - 1; the best p seen is kept
    x, x° [samples, length, hidden]: what the block is fed in the changed and in the original model
Source: Cheng et al. 2023, arXiv:2309.05516, Algorithm 1. Differs: nothing in the steps; grids of a table learn as well.
Why four windows in an update, where AutoRound takes eight: on the demo model's validation text at w4a16g128 KL is 0.0074 with
either, in 119 and 262 s.
For: two to four bits with hours at hand, where rounding by AutoRound is wanted; yaqa is faster and gives a lower KL.
Costs: 200 updates through every block, thirty times GPTQ's time; memory of one block with its activations.
"""

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.formats.tensor import QuantizedTensor, to_groups
from qtool.layers.rounded_linear import RoundedLinear, group_values
from qtool.model.handle import Block
from qtool.model.linear import weight_of
from qtool.model.tuning import tune, window_errors
from qtool.options import BlockTuning
from qtool.registry import Method


class SignRoundOptions(SchemeSelection, BlockTuning):
    """Options of SignRound."""

    steps: int = Field(200, ge=0, description="updates per block; 0 is rounding to nearest, two bits take 1000")
    batch: int = Field(4, ge=1, description="windows in one update")
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
    lr = options.lr or 1 / max(options.steps, 1)
    range_lr = options.range_lr or lr
    layers: dict[str, RoundedLinear] = {}
    limits: dict[Tensor, tuple[float, float, float]] = {}  # of what learns: its first step, least and greatest value
    for name, scheme in schemes.items():
        W = weight_of(block.get(name))  # [out, in]
        V = torch.zeros_like(to_groups(W, scheme.weights)).requires_grad_()  # [out, groups, group]
        alpha, beta = (group_values(W, scheme, 1.0).requires_grad_() for _ in range(2))  # [out, groups, 1]
        layers[name] = RoundedLinear(W, getattr(block.get(name), "bias", None), scheme, alpha, beta, V)
        limits |= {V: (lr, -0.5, 0.5), alpha: (range_lr, 0.0, 1.0), beta: (range_lr, 0.0, 1.0)}

    def update(gradients: Sequence[Tensor], step: int) -> None:
        for (p, (rate, low, high)), gradient in zip(limits.items(), gradients, strict=True):
            p.sub_(gradient.sign(), alpha=rate * (1 - step / options.steps)).clamp_(low, high)

    with block.replaced(layers):
        rounded = window_errors(block.call_from_host, inputs, targets)
        tune(block.call_from_host, list(limits), update, inputs, targets, rounded, options.steps, options.batch, seed)
    return {name: layer.quantized() for name, layer in layers.items()}


METHOD = Method(run=sign_round, options=SignRoundOptions, scope="block")
