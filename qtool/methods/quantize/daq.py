"""DAQ: put each group's dense middle where its levels are dense, then let zero point and scale learn.

    c = (Q.025 + Q.975) / 2    k = 0.9 max(max w - c, c - min w)    range: c - k .. c + k              Q quantiles of the group
    z <- the best of z - e h, z, z + e h;   s <- the best of s (1 - e), s, s (1 + e),   by L;   for the steps' sizes e in turn
    L = D H_gg Dᵀ,   D = w - decode(encode(w))      w^ = s (level - z)
    w, D [out, groups, group]    z, s, c, k, L [out, groups, 1]    H_gg [groups, group, group] blocks of the mean of x xᵀ
    h: half the span of the levels    e: 5 eps · 0.9^i and eps / 5 · 1.1^i by turns, i = 0, 1, ..
Source: Luo et al. 2024, arXiv:2410.12187. Differs: L is taken over all tokens by H, not over a sample of
them; z and s are rounded as they are stored whenever they are judged; fewer steps of larger sizes; a group whose plain full
range has a lower L starts there.
Why 30 steps: KL on the demo model's validation text at nf4g128 is 0.0116, after 10 steps 0.0120, and 0.0116 from ranges around
zero, as its weights lie there. Rounding has 0.0471 (with zero points 0.0428), HQQ 0.0421; at e2m1g128 DAQ has 0.0150, rounding
0.0570, HQQ 0.0503. The float16 zero points cost 0.125 bits per weight.
For: tables such as NF4 and E2M1 in runtimes that take float zero points.
Costs: one pass through the model and some 120 trial roundings of each group.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.integer import Params
from qtool.formats.scheme import Grid, Scheme, SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.linalg.ranges import CHUNK, Cost, diagonal_blocks, output_cost, squared_cost
from qtool.options import Sequential
from qtool.registry import Method

TAIL = 0.025  # of a group's weights on either side of its dense middle
SHRINK = 0.9  # of the range around the middle


class DaqOptions(SchemeSelection, Sequential):
    """Options of DAQ."""

    align: Literal["density", "zero"] = Field(
        "density",
        description="where ranges start: density, around the group's dense middle; zero, around 0 (the released code)",
    )
    steps: int = Field(30, ge=0, description="updates of zero points and scales; 0 is alignment alone")
    eps: float = Field(0.01, gt=0, le=0.2, description="size of the updates, in half spans of the levels and in scales")


def daq(
    W: Tensor, stats: LayerStats, scheme: WeightScheme, options: DaqOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Quantize W [out, in] float32; raises QtoolError for zero points that cannot move, and where H is not finite."""
    check_zeros(scheme)
    w = to_groups(W, scheme)  # [out, groups, group], along in_channel [in, groups, group]
    grid = scheme.grid.for_tensor(w)
    rows = max(1, CHUNK // w[0].numel())
    cost = cost_of(w.shape[-1], stats, scheme, note)
    parts = [learn(part, grid, cost, options) for part in w.split(rows)]
    zeros = [part.zero for part in parts if part.zero is not None]
    return quantize(W, scheme, Params(torch.cat([part.scale for part in parts]), torch.cat(zeros)))


def learn(w: Tensor, grid: Grid, cost: Cost, options: DaqOptions) -> Params:
    """Params [out, groups, 1] of w [out, groups, group] after all steps."""
    best = grid.fit(w)
    least = cost(grid.snap(w, best) - w)  # [out, groups, 1]

    def consider(scale: Tensor, zero: Tensor | None) -> None:
        nonlocal best, least
        costs = cost(grid.snap(w, Params(scale, zero)) - w)
        is_better = costs < least
        assert zero is not None and best.zero is not None, "zero points were checked before"
        best = Params(torch.where(is_better, scale, best.scale), torch.where(is_better, zero, best.zero))
        least = torch.where(is_better, costs, least)

    aligned = align(w, grid, options.align)
    consider(aligned.scale, aligned.zero)
    low, high = grid.ends
    for size in sizes(options):
        scale, zero = best.scale, best.zero
        assert zero is not None, "zero points were checked before"
        for change in (-size, size):
            consider(scale, grid.round_zero(zero + change * (high - low) / 2))
        zero = best.zero
        for change in (-size, size):
            span = scale * (1 + change) * (high - low)
            consider(grid.fit_range(torch.zeros_like(span), span).scale, zero)
    return best


def align(w: Tensor, grid: Grid, where: Literal["density", "zero"]) -> Params:
    """Params [out, groups, 1] of ranges around the dense middle of w [out, groups, group], or around zero."""
    c = w.new_zeros(1)
    if where == "density":
        c = w.quantile(w.new_tensor([TAIL, 1 - TAIL]), dim=-1, keepdim=True).mean(0)  # [out, groups, 1]
    k = SHRINK * torch.maximum(w.amax(-1, keepdim=True) - c, c - w.amin(-1, keepdim=True))
    scale = grid.fit_range(torch.zeros_like(k), 2 * k).scale
    return Params(scale, grid.round_zero(sum(grid.ends) / 2 - c / scale))


def sizes(options: DaqOptions) -> Iterator[float]:
    """e of every step: a falling sequence and a rising one by turns."""
    for step in range(options.steps):
        yield options.eps / 5 * 1.1 ** (step // 2) if step % 2 else 5 * options.eps * 0.9 ** (step // 2)


def cost_of(group: int, stats: LayerStats, scheme: WeightScheme, note: Callable[[str], None]) -> Cost:
    """L of errors [out, groups, group]; a group of one input's weights, along in_channel, has one factor for all, left away."""
    if stats.n_tokens == 0:
        note("no calibration token reached it; zero points and scales are found by plain squared error")
    if stats.n_tokens == 0 or scheme.group_along == "in_channel":
        return squared_cost
    H = stats.hessian()  # [in, in]
    if not torch.isfinite(H).all():
        raise QtoolError("the Hessian holds NaN or infinity; check the model's weights and load it with dtype: float32")
    return output_cost(diagonal_blocks(H, group))


def check_zeros(scheme: WeightScheme) -> None:
    """Raise QtoolError for a scheme without zero points between codes."""
    if scheme.zero_dtype != "float16":
        plain = scheme.model_copy(update={"symmetric": True})
        raise QtoolError(f"{scheme}: its zero points must be free to move; write {plain}-asymf16")


def check(model: object, options: DaqOptions) -> None:
    """Raise QtoolError before any work for schemes that are no use here."""
    for scheme in (options.scheme, *options.modules.values()):
        if isinstance(scheme, Scheme):  # and not the word search
            check_zeros(scheme.weights)


METHOD = Method(
    run=daq,
    options=DaqOptions,
    scope="linear",
    needs=("hessian",),
    rowwise=True,
    check=check,
    schemes=("nf4g32-asymf16", "e2m1g32-asymf16", "w4a16g32-asymf16"),
)
