"""Range search: the shrunken range of each group whose rounding costs least.

    range(a) = a [min w, max w],  a from 1 down to 0.4, or 0.2 for grids of few levels; from above 1 for tables, see below
    keep the a of least  cost(w - w^(a)),  per row and group
    cost: sum_j |e_j|^2.4            plain, GPTQ's own option
          sum_j d_j e_j^2            d_j the curvature of column j
          eᵀ H_gg e                  H_gg the group's block of H: the mean squared error of its part of the output
Source: Frantar et al. 2022, arXiv:2210.17323 (the plain search of its code); Lin et al. 2023, arXiv:2306.00978 (its
clip search). Differs: the third cost is AWQ's in closed form, over every token instead of a sample of them. Tables whose last
levels lie far apart also try wider ranges, which put the largest weight between them or onto the level before (Cook et al.
2025, arXiv:2512.02010, Four Over Six, tries the last two levels of NVFP4). Scales of eight bits are few: each of them is
tried.
Why auto is what it is: the full range of whole numbers is half a step wider than their levels, and the best one as it is: on
the demo model's validation text a search takes nothing off the KL of rounding; of GPTQ it takes 2 % at four bits, adds 2 % at
three and a third at two. Off NF4 and NVFP4 it takes a fifth to a third. Of floats of 8 bits the range hardly matters.
Why 24 steps: on the demo model's layers 80 lower GPTQ's output error by at most 0.4 %; shrinking the two ends apart from
each other lowers it by 1.3 % at three bits, by nothing at four, for nearly twice the time. The third cost feels how
errors add up, so that a finer search pays: 60 steps lower it by 3 to 4 %.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qtool.formats.codebook import CodebookGrid
from qtool.formats.integer import Params
from qtool.formats.scales import scales_between
from qtool.formats.scheme import Grid, WeightScheme

Cost = Callable[[Tensor], Tensor]  # errors [out, groups, group] to costs [out, groups, 1]
STEPS = 24
FINE_STEPS = 60
CHUNK = 1 << 16  # weights searched at once, so that they stay in a core's cache


def chosen_range(choice: str, scheme: WeightScheme) -> str:
    """What `auto` stands for: mse for tables of at most 16 levels, minmax for all else; other choices as they are."""
    if choice != "auto":
        return choice
    return "mse" if isinstance(scheme.grid, CodebookGrid) and scheme.grid.n_levels <= 16 else "minmax"


def search_range(w: Tensor, grid: Grid, cost: Cost, steps: int = STEPS) -> Params:
    """Params [out, groups, 1] of w [out, groups, group]; never worse by `cost` than the full range."""
    return a_few_rows_at_a_time(w, lambda chunk: _search(chunk, grid, cost, steps))


def a_few_rows_at_a_time(w: Tensor, find: Callable[[Tensor], Params]) -> Params:
    """What `find` gives for w [out, groups, group], called on as many rows as stay in a core's cache."""
    parts = [find(chunk) for chunk in w.split(max(1, CHUNK // w[0].numel()))]
    zeros = [part.zero for part in parts if part.zero is not None]
    return Params(torch.cat([part.scale for part in parts]), torch.cat(zeros) if zeros else None)


def plain_cost(error: Tensor) -> Tensor:
    """Costs [out, groups, 1]: sum of |error|^2.4."""
    return error.abs().pow_(2.4).sum(-1, keepdim=True)


def squared_cost(error: Tensor) -> Tensor:
    """Costs [out, groups, 1]: sum of squares."""
    return error.square().sum(-1, keepdim=True)


def weighted_cost(weights: Tensor) -> Cost:
    """Squared errors weighted per column; weights [groups, group]."""
    return lambda error: torch.linalg.vecdot(error * error, weights).unsqueeze(-1)


def output_cost(blocks: Tensor) -> Cost:
    """Mean squared error of each group's part of the output; blocks [groups, group, group] of the Hessian."""
    return lambda error: ((error.transpose(0, 1) @ blocks).transpose(0, 1) * error).sum(-1, keepdim=True)


def diagonal_blocks(H: Tensor, group: int) -> Tensor:
    """Blocks [groups, group, group] along the diagonal of H [in, in]."""
    tiles = H.view(len(H) // group, group, len(H) // group, group)  # [groups, group, groups, group]
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def shares_of(grid: Grid, steps: int) -> list[float]:
    """The shares of the full range to try beside 1, falling: `steps` below 1, wider ones as far apart."""
    low, high = grid.shares
    n = round(steps * (high - low) / (1 - low))
    return [share for step in range(n + 1) if (share := high - (high - low) * step / n) != 1]


def _candidates(grid: Grid, minimum: Tensor, maximum: Tensor, steps: int) -> Iterator[Params]:
    """Params [out, groups, 1] of the ranges to try beside the full one, falling; minimum, maximum [out, groups, 1]."""
    if isinstance(grid, CodebookGrid) and grid.scale_dtype in ("float8_e8m0fnu", "float8_e4m3fn"):
        low, high = (grid.fit_range(share * minimum, share * maximum).scale for share in grid.shares)
        yield from (Params(scale, None) for scale in scales_between(low, high, grid.scale_dtype, grid.of_tensor))
    else:
        yield from (grid.fit_range(share * minimum, share * maximum) for share in shares_of(grid, steps))


def _search(w: Tensor, grid: Grid, cost: Cost, steps: int) -> Params:
    minimum, maximum = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)  # [out, groups, 1]
    best = grid.fit(w)
    least = cost(grid.snap(w, best) - w)  # [out, groups, 1]
    for params in _candidates(grid, minimum, maximum, steps):
        costs = cost(grid.snap(w, params) - w)  # [out, groups, 1]
        better = costs < least
        least = torch.where(better, costs, least)
        scale = torch.where(better, params.scale, best.scale)
        zero = None if params.zero is None or best.zero is None else torch.where(better, params.zero, best.zero)
        best = Params(scale, zero)
    return best
