"""HQQ: find each group's scale and zero point by half-quadratic splitting, without any data.

Minimize ‖W - W^‖_p^p over scale and zero point, split by E, what outliers are let off, into steps that are closed forms:
    q = encode(W)    W^ = decode(q)    E = shrink(W - W^),  shrink(e) = sign(e) max(|e| - |e|^(p-1) / beta, 0)
    scale = cov(q, W - E) / var(q),   zero = mean(q - (W - E) / scale)  over the group;   beta <- kappa beta
    W, W^, E [out, groups, group]    zero, scale [out, groups, 1]
Each group keeps what gave it the least squared error, of two beginnings, the full range (plain rounding) and that whose ends
are levels, and all steps from them.
Source: Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models, https://mobiusml.github.io/hqq_blog.
Differs: a group keeps its own best step, where HQQ stops all of them once their common mean |W - W^| rises, which is as good
(a group's own mean |W - W^| is not: it lets off too much); the scale is found too, which takes a tenth off the KL of most
blocks at w4g64-asymf16; the range holds 0. Only float zero points (-asymf16) can move a little. Where zero points are codes,
or there is none, as in a table, the scale alone is found: scale = <level, W - E> / <level, level>, the same least squares,
`level` being W^ in units of the scale.
Why not zero points rounded to codes at the end: on the demo model's validation text they are as good as none. Its KL there, in
groups of 64, rounded and by HQQ of 20 steps: w4 -asym 0.045, 0.038; symmetric 0.053, 0.042; w3 0.228, 0.179; 0.303, 0.180.
Float zero points cost 0.19 bits per weight; in powers of two, as in mxfp4, nothing is left to find.
For: no calibration text; best with float16 zero points at four bits and below.
Costs: seconds, no calibration.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.integer import IntegerGrid, Params
from qtool.formats.scales import fit_scale
from qtool.formats.scheme import Grid, SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.linalg.ranges import a_few_rows_at_a_time
from qtool.registry import Method


class HqqOptions(SchemeSelection):
    """Options of HQQ."""

    p: float = Field(0.7, gt=0, le=1, description="power of the errors' norm; the smaller, the less outliers count")
    beta: float = Field(10.0, gt=0, description="how closely E follows the errors, at first; in units of the weights")
    kappa: float = Field(1.01, ge=1, description="what beta is multiplied by at each step")
    steps: int = Field(10, ge=0, description="updates of scales and zero points; 0 is rounding to nearest")


def hqq(
    W: Tensor, stats: LayerStats | None, scheme: WeightScheme, options: HqqOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Quantize W [out, in] float32; raises QtoolError where columns do not divide into groups."""
    w = to_groups(W, scheme)  # [out, groups, group]
    grid = scheme.grid.for_tensor(w)
    return quantize(W, scheme, a_few_rows_at_a_time(w, lambda rows: split_and_solve(rows, grid, options)))


def split_and_solve(w: Tensor, grid: Grid, options: HqqOptions) -> Params:
    """The params [out, groups, 1] that the steps find for w [out, groups, group]."""
    beginnings = [grid.fit(w)]
    if options.steps and has_float_zeros(grid):
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)  # [out, groups, 1]
        half_step = (high.clamp(min=0) - low.clamp(max=0)) / (2 * (grid.n_levels - 1))
        beginnings.append(grid.fit_range(low - half_step, high + half_step))
    best, least = beginnings[0], torch.full_like(beginnings[0].scale, torch.inf)
    for params in beginnings:
        beta = options.beta
        for step in range(options.steps + 1):
            q = grid.encode(w, params)  # [out, groups, group]
            error = w - grid.decode(q, params)
            mean = error.square().mean(-1, keepdim=True)  # [out, groups, 1]
            best, least = choose(mean < least, params, best), torch.minimum(mean, least)
            if step < options.steps:
                params = update(w - shrink(error, options.p, beta), q, params, grid)
                beta *= options.kappa
    return best


def has_float_zeros(grid: Grid) -> bool:
    return isinstance(grid, IntegerGrid) and not grid.symmetric and grid.zero_dtype != "int"


def shrink(error: Tensor, p: float, beta: float) -> Tensor:
    """E [...]: errors drawn towards zero, the small ones all the way."""
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)


def update(target: Tensor, q: Tensor, params: Params, grid: Grid) -> Params:
    """Params that fit codes q to the target W - E, both [out, groups, group], by least squares, rounded as stored."""
    if has_float_zeros(grid):
        levels, smallest = grid.levels(q), torch.finfo(torch.float32).tiny
        centred = levels - levels.mean(-1, keepdim=True)  # [out, groups, group]
        slope = (centred * target).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp(min=smallest)
        scale = fit_scale(slope.clamp(min=0) * grid.largest, grid.largest, grid.scale_dtype, grid.of_tensor)
        return Params(scale, grid.round_zero((levels - target / scale).mean(-1, keepdim=True)))
    level = grid.levels(q) if params.zero is None else q - params.zero  # [out, groups, group]
    squares = level.square().sum(-1, keepdim=True)  # [out, groups, 1]
    scale = (level * target).sum(-1, keepdim=True) / squares.clamp(min=torch.finfo(torch.float32).tiny)
    end = -scale * grid.largest  # the range whose scale has this sign
    return Params(grid.fit_range(end.clamp(max=0), end.clamp(min=0)).scale, params.zero)


def choose(is_better: Tensor, new: Params, old: Params) -> Params:
    """The new params where is_better [out, groups, 1], else the old ones."""
    zero = None if new.zero is None or old.zero is None else torch.where(is_better, new.zero, old.zero)
    return Params(torch.where(is_better, new.scale, old.scale), zero)


def operations(options: HqqOptions, out: int, columns: int) -> float:
    """Of one linear's updates."""
    return 1300 * options.steps * out * columns


METHOD = Method(run=hqq, options=HqqOptions, scope="linear", rowwise=True, operations=operations)
