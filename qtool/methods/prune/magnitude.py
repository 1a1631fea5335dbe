"""Magnitude pruning: of each output channel, or of each linear, the weights of smallest magnitude become zero.

    score S_ij = |W_ij|      W, S [out, in], compared within a row, all together, or within M neighbours of a row
Source: Han et al. 2015, arXiv:1506.02626. Differs: a threshold per row unless compare: linear, which with
densities: magnitude is one threshold for all linears together; no retraining.
For: a baseline, and before long training.
Costs: seconds, no calibration.
"""

from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.sparsity import SharedSparsity, choose, count, smallest
from qtool.registry import Method


class MagnitudeOptions(SharedSparsity):
    """Which weights are compared with each other."""

    compare: Literal["output", "linear"] = Field(
        "output", description="output: those of each output channel; linear: all of a linear, so that weak channels lose more"
    )

    @model_validator(mode="after")
    def _check_compare(self) -> "MagnitudeOptions":
        if self.pattern is not None and self.compare == "linear":
            raise ValueError(f"pattern {self.pattern} compares neighbours; leave compare or pattern away")
        return self


def magnitude(W: Tensor, stats: LayerStats | None, options: MagnitudeOptions, note: Callable[[str], None]) -> Tensor:
    """W [out, in] float32 with its smallest weights zero; raises QtoolError where columns do not fit the pattern."""
    scores = W.abs()  # [out, in]
    if options.compare == "linear":
        return W.masked_fill(smallest(scores.flatten(), count(options.sparsity, W.numel())).view_as(W), 0)
    return W.masked_fill(choose(scores, options), 0)


METHOD = Method(run=magnitude, options=MagnitudeOptions, scope="linear")
