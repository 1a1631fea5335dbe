"""OmniQuant's learnable equivalent transformation (LET): learn scales and shifts of channels so that rounding costs least.

Minimize ‖f^(x) - f(x)‖² over a block f whose linears round to nearest, over log s and d, by AdamW:
    X <- (X - d) / s,    W <- W diag(s),    bias <- bias + W d
    X [tokens, in] input of the linears that share it    W [out, in] theirs    s, d [in]    x [samples, length, hidden]
What makes X, a norm or a linear, takes the division and the shift into its own weight and bias, so the model computes the same
and needs nothing new. A scale goes wherever one passes (see model/wiring.py). A shift goes where it passes and both sides
have biases to hold it: norm -> linears and value -> output of OPT, norm -> linears of GPT-2 and GPT-NeoX; LLaMA's kind has
no biases and gets scales alone.
It starts from SmoothQuant's s with the middle of each channel's range for d, or from s = 1, d = 0 where that costs less.
Source: Shao et al. 2023, arXiv:2308.13137, equations 3 and 4. Differs: log s learns, so that s stays positive and a step is
a share of it; up -> down is scaled too; queries and keys (equation 5) are not; inputs are the original model's; ranges are
full while it learns, and quantize/omniquant learns smaller ones afterwards, the paper both at once.
Why 0.01: of the error of a demo block rounded to nearest, on windows not seen, 50 steps leave at w4a4 69 % (0.03: 66 %;
SmoothQuant: 78 %), at w3a16g128-asym 81 % (0.03: 81 %; SmoothQuant: 97 %).
For: before quantize/omniquant, where few channels of the inputs are far larger than the others.
Costs: gradients through every block, the time of quantize/omniquant; memory of one block with its activations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats.scheme import Scheme
from qtool.layers.rounded_linear import RoundedLinear
from qtool.model.handle import Block
from qtool.model.linear import shape_of
from qtool.model.tuning import tune, window_errors
from qtool.model.wiring import Edits, Scaling, edited_bias, edited_weight, largest_per_source, scale_edits
from qtool.options import BlockTuning
from qtool.registry import Method

SMALLEST = 1e-5  # of a scale at first, so that a dead channel does not divide by zero


class LetOptions(BlockTuning):
    """What the weights and inputs will be rounded to, and how to learn."""

    scheme: Scheme = Field(description="the scheme of the quantize step that follows")
    steps: int = Field(200, ge=0, description="updates per block; 0 is SmoothQuant, where it helps at all")
    lr: float = Field(
        0.01, gt=0, le=1, description="AdamW's learning rate of log s and of d, d in units of its channel's range"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="SmoothQuant's, at first")


class Extent:
    """Least and largest value of each channel of a linear's input, [in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.low = torch.full((width,), torch.inf, device=device)
        self.high = torch.full((width,), -torch.inf, device=device)

    def update(self, x: Tensor) -> None:
        """x [..., in]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()  # [tokens, in]
        self.low, self.high = torch.minimum(self.low, rows.amin(0)), torch.maximum(self.high, rows.amax(0))


@dataclass(frozen=True)
class Place:
    """A scaling with its s, and where it takes a shift with its d, in units of half the channel's range."""

    scaling: Scaling
    log_s: Tensor  # [channels of source]
    d: Tensor | None
    unit: Tensor

    def learned(self) -> list[Tensor]:
        return [self.log_s] if self.d is None else [self.log_s, self.d]


def let(
    block: Block,
    scalings: list[Scaling],
    inputs: Tensor,
    targets: Tensor,
    options: LetOptions,
    seed: int,
    note: Callable[[str], None],
) -> Edits:
    """Edits with the best scales and shifts seen; inputs, targets [samples, length, hidden], the targets f(inputs)."""
    if not scalings:
        note(f"{block.name}: no scale passes anywhere; left as it is")
        return {}
    none, smooth = places_at_first(block, scalings, inputs, options)
    errors, smoothed = (
        window_errors(partial(rounded_forward, block, edits_of(block, places), options.scheme), inputs, targets)
        for places in (none, smooth)
    )
    places = smooth if smoothed.sum() < errors.sum() else none
    learned = [p.requires_grad_() for place in places for p in place.learned()]
    optimizer = torch.optim.AdamW(learned, lr=options.lr, weight_decay=0)

    def update(gradients: Sequence[Tensor], step: int) -> None:
        for p, gradient in zip(learned, gradients, strict=True):
            p.grad = gradient
        optimizer.step()

    def tuned(x: Tensor) -> Tensor:
        return rounded_forward(block, edits_of(block, places), options.scheme, x)

    tune(tuned, learned, update, inputs, targets, errors, options.steps, options.batch, seed)
    if not any(p.any() for p in learned):
        note(f"{block.name}: no scale tried lowers the error of the rounded block; left as it is")
        return {}
    with torch.no_grad():
        return edits_of(block, places)


def places_at_first(
    block: Block, scalings: list[Scaling], inputs: Tensor, options: LetOptions
) -> tuple[list[Place], list[Place]]:
    """Scalings that change nothing, and SmoothQuant's, each on top of those before it."""
    extents = {s.consumers[0]: Extent(shape_of(block.get(s.consumers[0]))[1], block.device) for s in scalings}
    block.observe(inputs, extents)
    none, smooth, edits = [], [], Edits()
    for scaling in scalings:
        extent = extents[scaling.consumers[0]]
        high, low = largest_per_source(extent.high, scaling), -largest_per_source(-extent.low, scaling)
        unit = ((high - low) / 2).clamp(min=SMALLEST)  # [channels of source]
        d = (high + low) / 2 if scaling.takes_shift else torch.zeros_like(low)
        x_max = torch.maximum(high - d, d - low).clamp(min=SMALLEST)
        W = torch.cat([edited_weight(block, name, edits) for name in scaling.consumers])  # [out of all, in]
        w_max = largest_per_source(W.abs().amax(0), scaling).clamp(min=SMALLEST)
        log_s = (x_max**options.alpha / w_max ** (1 - options.alpha)).clamp(min=SMALLEST).log()
        zeros = torch.zeros_like(d)
        smooth.append(Place(scaling, log_s, d / unit if scaling.takes_shift else None, unit))
        none.append(Place(scaling, zeros, zeros.clone() if scaling.takes_shift else None, unit))
        edits |= edits_of(block, smooth[-1:], edits)
    return none, smooth


def edits_of(block: Block, places: list[Place], edits: Edits | None = None) -> Edits:
    """All scales and shifts applied, on top of `edits`; gradients reach them."""
    found = dict(edits or {})
    for place in places:
        shift = None if place.d is None else place.d * place.unit
        scale_edits(block, place.scaling, place.log_s.exp(), found, shift)
    return found


def rounded_forward(block: Block, edits: Edits, scheme: Scheme, x: Tensor) -> Tensor:
    """x [batch, length, hidden] through the edited block, its linears rounded to nearest."""
    layers = {
        name: RoundedLinear(edited_weight(block, name, edits), edited_bias(block, name, edits), scheme)
        for name in block.linears()
    }
    others = {name: value for name, value in edits.items() if name.rpartition(".")[0] not in layers}
    with block.replaced(layers):
        return block.call_from_host(x, others)


METHOD = Method(run=let, options=LetOptions, scope="block", needs=("inputs",))
