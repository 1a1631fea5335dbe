"""SmoothQuant: move the outliers of activations into the weights, where rounding bears them better.

    s_j = max|X_j|^alpha / max|W_:j|^(1 - alpha),    X <- X / s,  W <- W diag(s)
    X [tokens, in] input of the linears that share it    W [out, in] all their weights together    s [in]
The division is folded into the norm or the linear that makes X, so the model computes the same and needs nothing new.
Source: Xiao et al. 2022, arXiv:2211.10438, equations 3 and 4. Differs: every place where a scale passes through is smoothed,
value -> output and up -> down too, as found by trial (qtool.model.wiring).
For: before schemes with quantized activations, such as w8a8; for weights alone it costs quality.
Costs: one pass through the model.
"""

from collections.abc import Callable

import torch
from pydantic import Field

from qtool.calibration.statistics import LayerStats
from qtool.model.handle import Block
from qtool.model.wiring import Edits, Scaling, edited_weight, largest_per_source, scale_edits
from qtool.options import Options
from qtool.registry import Method

SMALLEST = 1e-5  # of a scale, so that a dead channel does not divide by zero


class SmoothQuantOptions(Options):
    """How far to go."""

    alpha: float = Field(0.5, ge=0, le=1, description="0: weights carry every outlier already; 1: activations become flat")


def smoothquant(
    block: Block,
    scalings: list[Scaling],
    stats: dict[str, LayerStats],
    options: SmoothQuantOptions,
    note: Callable[[str], None],
) -> Edits:
    """Edits that smooth every scaling of the block."""
    edits: Edits = {}
    for scaling in scalings:
        weights = [edited_weight(block, name, edits) for name in scaling.consumers]
        x_max = largest_per_source(stats[scaling.consumers[0]].amax(), scaling)  # [channels of source]
        w_max = largest_per_source(torch.cat(weights).abs().amax(0), scaling)
        s = (x_max.clamp(min=SMALLEST) ** options.alpha / w_max.clamp(min=SMALLEST) ** (1 - options.alpha)).clamp(min=SMALLEST)
        scale_edits(block, scaling, s, edits)
    return edits


METHOD = Method(run=smoothquant, options=SmoothQuantOptions, scope="block", needs=("amax",))
