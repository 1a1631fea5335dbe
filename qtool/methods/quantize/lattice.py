"""Lattice: eight weights in one code of 16 bits, a point of E8, each code's error made up for by the columns after it (QuIP#).

Minimize tr((W - Q) H (W - Q)ᵀ) over lattice points Q, block B of eight columns by block:
    Q_B = scale · nearest point of W_B / scale      E = (W_B - Q_B) U_BB⁻¹      W_j -= E U_Bj  for every later column j
    W, Q [out, in]    H [in, in] mean of x xᵀ    U [in, in] upper, UᵀU = (H + damp·mean(diag H)·I)⁻¹    U_BB [8, 8]
    scale [out, groups]: multiples of the root mean square of each group are tried, the one of least error is kept
Source: Tseng et al. 2024, arXiv:2402.04396 (QuIP#), section 4.1 (block LDLQ) and 4.2 (the points, see formats/lattice.py).
Differs: blocks may be taken by falling diag H; every row has scales of its own; the randomized Hadamard transform that makes
weights normal is left to rotating transforms, and nothing is tuned afterwards.
Why a lattice and no learned codebooks, as AQLM's: a table that is a rule is not stored, where codebooks of 2^16 points in
eight dimensions take a mebibyte, as much as all codes of a matrix with four million weights; nothing is trained. On the demo
model's validation text KL is 0.163 at 2.05 bits per weight and, in groups of 64, 0.138 at 2.25; GPTQ's with four levels and
zero points in groups of 64 is 0.213 at 2.28.
For: two bits at the least loss without training, where the runtime can decode E8 codes.
Costs: GPTQ's, and a search among 2^16 points for every eight weights.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.integer import Params
from qtool.formats.scheme import Grid, SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, assemble, settle, to_groups
from qtool.linalg.hessian import inverse_factor
from qtool.linalg.ranges import Cost, plain_cost, weighted_cost
from qtool.linalg.sweep import sweep
from qtool.options import Sequential
from qtool.registry import Method

MULTIPLES = (0.7, 0.8, 0.9, 1.1, 1.2, 1.4)  # of the root mean square, tried beside itself


class LatticeOptions(SchemeSelection, Sequential):
    """Options of lattice quantization."""

    damp: float = Field(0.01, gt=0, le=1, description="share of mean(diag H) added to it; raised where too little")
    act_order: Literal["none", "static"] = Field(
        "static", description="order of the blocks of eight columns: none, as they stand; static, by falling diag H"
    )
    range: Literal["rms", "mse", "hessian"] = Field(
        "mse",
        description="a group's scale: rms, what normal weights want; mse, of least error; hessian, of least weighted error",
    )


def lattice(
    W: Tensor, stats: LayerStats, scheme: WeightScheme, options: LatticeOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Quantize W [out, in] float32; raises QtoolError where columns do not divide into groups or H is not finite."""
    refuse_single(scheme)
    if stats.n_tokens == 0:
        note("no calibration token reached it; rounded to nearest")  # its H is zero, U is the identity
    H = stats.hessian()  # [in, in]
    grouped = to_groups(W, scheme)  # [out, groups, group]
    grid = scheme.grid.for_tensor(grouped)
    width = grid.width
    order = order_blocks(H.diagonal(), width, options.act_order)  # [in]
    U = inverse_factor(H, options.damp, note, order)  # [in, in]
    curvature = (U.diagonal() ** -2)[order.argsort()].view(grouped.shape[1:])  # [groups, group], as W stands
    cost = {"rms": None, "mse": plain_cost, "hessian": weighted_cost(curvature)}[options.range]
    params = settle(grid.fit(grouped) if cost is None else search_scale(grouped, grid, cost), scheme)
    scales = params.scale.expand_as(grouped).flatten(1).T  # [in, out], as W stands

    columns = W.T[order]  # [in, out], in turn
    codes = W.new_empty(len(W), W.shape[1] // width)  # [out, in / 8], as W stands
    decoded = torch.empty_like(columns)  # [in, out], in turn
    turns = order.tolist()

    def settle_block(start: int, stop: int) -> None:
        place = turns[start]
        of_block = Params(scales[place].unsqueeze(1), None)  # [out, 1]
        q = grid.encode(columns[start:stop].T, of_block)  # [out, 1]
        codes[:, place // width] = q.squeeze(1)
        decoded[start:stop] = grid.decode(q, of_block).T

    # A leaf of the sweep is a block: settled at once, so that the sweep's errors, column by column, are E = (W_B - Q_B) U_BB⁻¹.
    sweep(columns, U, width, settle_block, lambda c, w: decoded[c])
    return assemble(codes, params, scheme, grid)


def order_blocks(importance: Tensor, width: int, act_order: Literal["none", "static"]) -> Tensor:
    """The columns [in] in the order of their turns, `width` neighbours together; importance [in] is diag H."""
    blocks = importance.view(-1, width).sum(1)  # [in / width]
    first = torch.arange(len(blocks), device=blocks.device)
    first = first if act_order == "none" else blocks.argsort(descending=True, stable=True)
    return (first.unsqueeze(1) * width + torch.arange(width, device=blocks.device)).flatten()


def search_scale(w: Tensor, grid: Grid, cost: Cost) -> Params:
    """Params [out, groups, 1] of w [out, groups, group]: by the multiple of its root mean square of least cost."""
    best = grid.fit(w)
    least = cost(grid.snap(w, best) - w)  # [out, groups, 1]
    for multiple in MULTIPLES:
        params = grid.fit(multiple * w)
        costs = cost(grid.snap(w, params) - w)  # [out, groups, 1]
        best = Params(torch.where(costs < least, params.scale, best.scale), None)
        least = torch.minimum(costs, least)
    return best


def refuse_single(scheme: WeightScheme, where: str = "") -> None:
    """Raise QtoolError for a scheme whose codes hold one weight each."""
    if scheme.grid.width == 1:
        raise QtoolError(f"{where}{scheme} has a code for each weight; write scheme: e8p, or use quantize/gptq")


def check(model: object, options: LatticeOptions) -> None:
    """The same before any work, for all schemes that are stated."""
    for scheme in (options.scheme, *options.modules.values()):
        if scheme != "search":
            refuse_single(scheme.weights, "quantize/lattice: ")


METHOD = Method(
    run=lattice,
    options=LatticeOptions,
    scope="linear",
    needs=("hessian",),
    rowwise=True,
    check=check,
    schemes=("e8p", "e8pg32"),
    adds="codes of eight weights",
)
