"""AWQ: scale up the input channels that carry large activations, so that rounding hurts them less.

    s = a^r, or a^r / m^(1-r),  r over a grid;    keep the s with the smallest  sum over linears  tr(D H Dᵀ),
    D = Q(W diag(s)) diag(s)^-1 - W
    a [in] mean |x|    m [in] mean |W| relative to its group    H [in, in] mean of x xᵀ    W, D [out, in]    Q rounding
1/s is folded into the norm or the linear before, so the model computes the same. r = 0 is plain rounding.
Source: Lin et al. 2023, arXiv:2306.00978, section 3.2. Differs: tr(D H Dᵀ) is the mean squared change of the linears' own
outputs over all tokens, in closed form; the paper runs the surrounding module per candidate. Clipping is the quantizer's
business here: `quantize/rtn: {range: output}` is the paper's clip search.
For: before quantize/rtn with few calibration tokens, and for runtimes tuned for AWQ; GPTQ does better without it.
Costs: one pass through the model and twenty trial roundings of each linear.
"""

from collections.abc import Callable, Iterator

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import from_groups, quantize, to_groups
from qtool.model.handle import Block
from qtool.model.wiring import Edits, Scaling, edited_weight, scale_edits
from qtool.options import Options
from qtool.registry import Method

SMALLEST = 1e-4  # of a scale, as the paper's code has it


class AwqOptions(Options):
    """What the weights will be rounded to, and how finely to search."""

    scheme: Scheme = Field(description="the scheme of the quantize step that follows")
    grid: int = Field(20, ge=2, le=200, description="exponents tried between 0 and 1")


def awq(
    block: Block,
    scalings: list[Scaling],
    stats: dict[str, LayerStats],
    options: AwqOptions,
    note: Callable[[str], None],
) -> Edits:
    """Edits with the best scale of every scaling of the block."""
    edits: Edits = {}
    for scaling in scalings:
        weights = [edited_weight(block, name, edits) for name in scaling.consumers]
        shared = stats[scaling.consumers[0]]
        H = shared.hessian()  # [in, in]
        spread = scaling.spread.to(H.device)
        best_loss, best_s = float("inf"), None
        for s in candidates(torch.cat(weights), shared.mean_abs(), spread, options):
            loss = sum(output_loss(W, s[spread], H, options.scheme.weights) for W in weights)
            if loss < best_loss:
                best_loss, best_s = loss, s
        if best_s is not None:
            scale_edits(block, scaling, best_s, edits)
    return edits


def candidates(W: Tensor, activation: Tensor, spread: Tensor, options: AwqOptions) -> Iterator[Tensor]:
    """Scales [channels of source] to try: first all ones, then both forms for every exponent."""
    grouped = to_groups(W.abs(), options.scheme.weights)
    shares = grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-12)
    m = from_groups(shares, options.scheme.weights).mean(0)  # [in]
    a, m = per_source_mean(activation, spread), per_source_mean(m, spread)
    yield torch.ones_like(a)
    for step in range(1, options.grid + 1):
        r = step / options.grid
        for s in (a**r, a**r / (m ** (1 - r) + SMALLEST)):
            s = s.clamp(min=SMALLEST)
            yield s / (s.max() * s.min()).sqrt()


def output_loss(W: Tensor, s: Tensor, H: Tensor, scheme: WeightScheme) -> float:
    """tr(D H Dᵀ) of rounding W [out, in] under the scale s [in]."""
    D = quantize(W * s, scheme).dequantize() / s - W  # [out, in]
    return float(((D @ H) * D).sum())


def per_source_mean(per_input: Tensor, spread: Tensor) -> Tensor:
    """Mean over the consumers' channels [in] that one source channel feeds, [channels of source]."""
    n_channels = int(spread.max()) + 1
    total = torch.zeros(n_channels, device=per_input.device).index_add_(0, spread, per_input)
    return total * n_channels / len(spread)


METHOD = Method(run=awq, options=AwqOptions, scope="block", needs=("mean_abs", "hessian"))
