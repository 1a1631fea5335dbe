"""Rounding to nearest: each weight to the closest level of its group's grid.

    Q = decode(encode(W)),   range of each group: all of it, or the shrunken range of least cost (see linalg/ranges.py)
    W, Q [out, in]    H [in, in] mean of x xᵀ, needed only where the range is searched by what inputs see
Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1; range output: Lin et al. 2023, arXiv:2306.00978.
For: eight bits, quick trials, and after transform/awq.
Costs: seconds, no calibration unless ranges are searched by what inputs see.
"""

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.linalg.ranges import (
    FINE_STEPS,
    STEPS,
    Cost,
    chosen_range,
    diagonal_blocks,
    output_cost,
    plain_cost,
    search_range,
    squared_cost,
    weighted_cost,
)
from qtool.options import Needs, Sequential
from qtool.registry import Method


class RtnOptions(SchemeSelection, Sequential):
    """Options of rounding to nearest."""

    range: Literal["auto", "minmax", "mse", "hessian", "output"] = Field(
        "auto",
        description="a group's range: minmax, all of it; mse, of least error; auto, mse for tables of at most 16 levels, "
        "minmax else; hessian, of least error times diag H; output, of least error in the group's part of the output (AWQ's "
        "clip search)",
    )


def rtn(
    W: Tensor, stats: LayerStats | None, scheme: WeightScheme, options: RtnOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Quantize W [out, in] float32; raises QtoolError where columns do not divide into groups."""
    choice = chosen_range(options.range, scheme)
    if choice == "minmax":
        return quantize(W, scheme)
    grouped = to_groups(W, scheme)  # [out, groups, group]
    cost = _cost(choice, grouped.shape[-1], stats, scheme, note)
    steps = FINE_STEPS if choice == "output" else STEPS
    return quantize(W, scheme, search_range(grouped, scheme.grid.for_tensor(grouped), cost, steps))


def _cost(choice: str, group: int, stats: LayerStats | None, scheme: WeightScheme, note: Callable[[str], None]) -> Cost:
    if choice == "mse":
        return plain_cost
    if scheme.group_along == "in_channel":  # a group's weights see one input: its outputs' errors are its weights', scaled
        return squared_cost
    assert stats is not None, "rtn with data-driven ranges runs on statistics"
    if stats.n_tokens == 0:
        note("no calibration token reached it; its ranges are searched by plain error")
        return plain_cost
    H = stats.hessian()  # [in, in]
    if choice == "hessian":
        return weighted_cost(H.diagonal().reshape(-1, group))
    return output_cost(diagonal_blocks(H, group))


def needs(options: RtnOptions) -> Needs:
    """A Hessian only where the range depends on what inputs see."""
    return ("hessian",) if options.range in ("hessian", "output") else ()


METHOD = Method(run=rtn, options=RtnOptions, scope="linear", needs=needs, rowwise=True)
