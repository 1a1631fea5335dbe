"""FineQuant: groups as fine as each matrix needs, told by its weights alone, then rounding to nearest.

    while  group >= 2 smallest  and  mean range(group / 2) < tau · mean range(group):   group <- group / 2
    W [out, in]    range(g) [out, in / g] max - min of each group of g weights along `in`, max |w| for symmetric grids
Halving all groups of a matrix without outliers lowers the mean range a little; outliers that reach fewer weights, much.
Source: Kim et al. 2023, arXiv:2308.09723 (adaptive granularity). Differs: tau, the threshold, is our reading of the rule,
and halving stops where the next group would not divide the columns.
Why tau is to be tried: of weights near normal ones, as the demo model's, a half group's range is 0.9 to 0.95 of the whole's.
KL on its validation text at w4, and bits per weight, by tau: 0.9 0.0755 at 4.06, 0.95 0.0508 at 4.23; one group for all: a row
0.0767 at 4.05, 128 0.0714 at 4.12, 64 0.0498 at 4.25. Its matrices are too much alike for it to gain on one group for all.
For: no calibration text, and group sizes that each matrix needs at least.
Costs: seconds, no calibration.
"""

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.linalg.ranges import plain_cost, search_range
from qtool.registry import Method


class FineQuantOptions(SchemeSelection):
    """Options of FineQuant; the scheme's own group is the coarsest, a whole row where it has none."""

    smallest: int = Field(64, ge=8, description="the finest group")
    tau: float = Field(
        0.9, ge=0, le=1, description="groups are halved while that lowers their mean range below tau times what it was"
    )
    range: Literal["minmax", "mse"] = Field("minmax", description="a group's range: minmax, all of it; mse, of least error")


def fine_quant(
    W: Tensor, stats: LayerStats | None, scheme: WeightScheme, options: FineQuantOptions, note: Callable[[str], None]
) -> QuantizedTensor:
    """Quantize W [out, in] float32; raises QtoolError where columns do not divide into the scheme's groups."""
    chosen = choose_group(W, scheme, options)
    grouped = to_groups(W, chosen)  # [out, groups, group]
    if options.range == "minmax":
        return quantize(W, chosen)
    return quantize(W, chosen, search_range(grouped, chosen.grid.for_tensor(grouped), plain_cost))


def choose_group(W: Tensor, scheme: WeightScheme, options: FineQuantOptions) -> WeightScheme:
    """The scheme with the group that halving ends at."""
    whole = mean_range(to_groups(W, scheme), scheme)
    group = to_groups(W, scheme).shape[-1]
    while group % 2 == 0 and group // 2 >= options.smallest:
        finer = scheme.model_copy(update={"group": group // 2})
        halved = mean_range(to_groups(W, finer), finer)
        if halved >= options.tau * whole:
            break
        scheme, group, whole = finer, group // 2, halved
    return scheme


def mean_range(w: Tensor, scheme: WeightScheme) -> float:
    """Mean over all groups of what a grid has to span of w [out, groups, group]."""
    span = w.abs().amax(-1) if scheme.symmetric else w.amax(-1) - w.amin(-1)  # [out, groups]
    return float(span.mean())


METHOD = Method(run=fine_quant, options=FineQuantOptions, scope="linear", chooses=("group",))
