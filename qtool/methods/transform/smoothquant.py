"""SmoothQuant: move the outliers of activations into the weights, where rounding bears them better.

    s_j = max|X_j|^alpha / max|W_:j|^(1 - alpha),    X <- X / s,  W <- W diag(s)
    X [tokens, in] input of the linears that share it    W [out, in] all their weights together    s [in]
The division is folded into the norm or the linear that makes X, so the model computes the same and needs nothing new.
With alpha: search, every place has an alpha of its own, that of the least
    L(s) = sum over its linears  ‖Q_a(X / s) Q(W diag(s))ᵀ - X Wᵀ‖²,    alpha = 0, 1/20, .. 1, or s = 1, which changes nothing
    Q rounding of weights, Q_a of inputs, both as `scheme` says
Source: Xiao et al. 2022, arXiv:2211.10438, equations 3 and 4. Differs: every place where a scale passes through is smoothed,
value -> output and up -> down too, as found by trial (qtool.model.wiring). The search is AWQ's (Lin et al. 2023,
arXiv:2306.00978, section 3.2) over SmoothQuant's scales, with inputs rounded too; L is taken over a sample of the tokens.
Why 0.5 stays the default: it needs no scheme. KL on the demo model's validation text, w8a8 by GPTQ: alpha 0.5 0.00098, search
0.00094; by plain rounding: without 0.00131, 0.5 0.00119, search 0.00116. At w4a8 plain rounding alone has 0.063, 0.5 0.086,
search 0.075: what costs each linear least need not cost the model least.
For: before schemes with eight-bit weights and quantized activations, such as w8a8; four-bit weights lose by it.
Costs: one pass through the model; searching, twenty trial roundings of each linear and of 2048 tokens of its input.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, TypeAdapter, WrapValidator, model_validator
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import Scheme
from qtool.layers.trial_rounding import output_loss
from qtool.model.handle import Block
from qtool.model.wiring import Edits, Scaling, edited_weight, largest_per_source, scale_edits
from qtool.options import Needs, Options
from qtool.registry import Method

SMALLEST = 1e-5  # of a scale, so that a dead channel does not divide by zero
STEPS = 20  # of alpha, from 0 to 1
Share = Annotated[float, Field(ge=0, le=1)]
SHARE: TypeAdapter[float] = TypeAdapter(Share)


def _read_alpha(value: object, _: object) -> float | Literal["search"]:
    return "search" if value == "search" else SHARE.validate_python(value)  # a union would tell a fault once for each part


class SmoothQuantOptions(Options):
    """How far to go."""

    alpha: Annotated[Share | Literal["search"], WrapValidator(_read_alpha)] = Field(
        0.5,
        description="0: weights carry every outlier already; 1: activations become flat; search: each place what rounds best",
    )
    scheme: Scheme | None = Field(None, description="the scheme of the quantize step that follows, for alpha: search")

    @model_validator(mode="after")
    def _agree(self) -> "SmoothQuantOptions":
        if self.alpha == "search" and self.scheme is None:
            raise ValueError("alpha: search tries roundings; state the scheme of the quantize step that follows")
        if self.alpha != "search" and self.scheme is not None:
            raise ValueError(f"with alpha: {self.alpha} nothing is rounded; leave scheme away, or write alpha: search")
        return self


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
        shared = stats[scaling.consumers[0]]
        x_max = largest_per_source(shared.amax(), scaling).clamp(min=SMALLEST)  # [channels of source]
        w_max = largest_per_source(torch.cat(weights).abs().amax(0), scaling).clamp(min=SMALLEST)
        if options.alpha != "search":
            scale_edits(block, scaling, smooth(x_max, w_max, options.alpha), edits)
            continue
        assert options.scheme is not None, "a search has a scheme"
        X, spread = shared.sample(), scaling.spread.to(x_max.device)  # [tokens, in]
        Y = [X @ W.T for W in weights]  # [tokens, out]
        tried = [(output_loss(X, weights, Y, s[spread], options.scheme), s) for s in candidates(x_max, w_max)]
        _, best = min(tried, key=lambda pair: pair[0])  # the first of equals, which is s = 1
        if not bool((best == 1).all()):
            scale_edits(block, scaling, best, edits)
    return edits


def smooth(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """s of the largest magnitudes of inputs and of weights, all [channels of source]."""
    return (x_max**alpha / w_max ** (1 - alpha)).clamp(min=SMALLEST)


def candidates(x_max: Tensor, w_max: Tensor) -> Iterator[Tensor]:
    """Scales [channels of source] to try: first all ones, then those of every alpha."""
    yield torch.ones_like(x_max)
    for step in range(STEPS + 1):
        yield smooth(x_max, w_max, step / STEPS)


def needs(options: SmoothQuantOptions) -> Needs:
    """Inputs themselves only where roundings are tried."""
    return ("amax", "sample") if options.alpha == "search" else ("amax",)


METHOD = Method(run=smoothquant, options=SmoothQuantOptions, scope="block", needs=needs)
