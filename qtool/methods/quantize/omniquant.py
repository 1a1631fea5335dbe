"""OmniQuant's weight clipping: learn how much of each group's range the levels span, block by block, by gradients.

Minimize ‖f^(x) - f(x°)‖² over a block f whose linears round to nearest in the range of each group
    [sigmoid(b) min W, sigmoid(a) max W]      a, b [out, groups, 1], 4 at first, so that 98 % of the range is left; by AdamW
    x, x° [samples, length, hidden]: what the block is fed in the changed and in the original model
Source: Shao et al. 2023, arXiv:2308.13137, equations 1 and 2 (LWC; transform/let is LET). Differs: the best a and b seen are
kept, and the full range where none is better; symmetric grids and tables learn too, the larger end counts. The paper takes
20 epochs of 128 windows, one in an update (2560 steps, batch 1), 40 epochs for two bits, at a learning rate of 0.005.
Why 0.1: a and b must come from 4 to about 1 in few steps. At w3a16g128-asym 60 steps leave of one demo block's error, on
windows not seen, 96 % at 0.01, 67 % at 0.03, 54 % at 0.1 and at 0.3. KL of the demo model's validation text after 100 steps
of each: 0.072; sign_round, which learns each weight's rounding too, 0.033; rtn with range: mse 0.22.
For: two and three bits with ranges learned and rounding plain; quantize/sign_round mostly does better.
Costs: gradients through every block; memory of one block with its activations.
"""

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.formats.tensor import QuantizedTensor
from qtool.layers.rounded_linear import RoundedLinear, group_values
from qtool.model.handle import Block
from qtool.model.linear import weight_of
from qtool.model.tuning import tune, window_errors
from qtool.options import BlockTuning
from qtool.registry import Method

START = 4.0  # of a and b


class OmniquantOptions(SchemeSelection, BlockTuning):
    """Options of OmniQuant's weight clipping."""

    steps: int = Field(200, ge=0, description="updates per block; 0 leaves 98 % of each range")
    lr: float = Field(0.1, gt=0, le=1, description="AdamW's learning rate of a and b")


def omniquant(
    block: Block,
    inputs: Tensor,
    targets: Tensor,
    schemes: dict[str, Scheme],
    options: OmniquantOptions,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, QuantizedTensor]:
    """Quantize the linears named in `schemes`; inputs, targets [samples, length, hidden], the targets f(x°)."""
    weights = {name: weight_of(block.get(name)) for name in schemes}  # [out, in]
    ends = {
        name: tuple(group_values(W, schemes[name], START).requires_grad_() for _ in range(2)) for name, W in weights.items()
    }
    learned = [p for pair in ends.values() for p in pair]
    optimizer = torch.optim.AdamW(learned, lr=options.lr, weight_decay=0)

    def rounded(name: str, *shares: Tensor) -> RoundedLinear:
        return RoundedLinear(weights[name], getattr(block.get(name), "bias", None), schemes[name], *shares)

    def clipped() -> dict[str, RoundedLinear]:
        return {name: rounded(name, a.sigmoid(), b.sigmoid()) for name, (a, b) in ends.items()}

    def forward(x: Tensor) -> Tensor:
        with block.replaced(clipped()):
            return block.call_from_host(x)

    def update(gradients: Sequence[Tensor], step: int) -> None:
        for p, gradient in zip(learned, gradients, strict=True):
            p.grad = gradient
        optimizer.step()

    full = {name: rounded(name) for name in schemes}
    with block.replaced(full):
        errors = window_errors(block.call_from_host, inputs, targets)
    least = tune(forward, learned, update, inputs, targets, errors, options.steps, options.batch, seed)
    if options.steps and least >= 1:
        note("no smaller range lowered the error of the block's output; rounded to nearest in the full range")
        return {name: layer.quantized() for name, layer in full.items()}
    return {name: layer.quantized() for name, layer in clipped().items()}


METHOD = Method(run=omniquant, options=OmniquantOptions, scope="block")
