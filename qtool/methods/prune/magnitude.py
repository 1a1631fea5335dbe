"""Magnitude pruning: in each output channel the weights of smallest magnitude become zero.

    score S_ij = |W_ij|      W, S [out, in], compared within a row or within M neighbours of a row
Source: Han et al. 2015, arXiv:1506.02626, section 3. Differs: a threshold per row instead of per layer; no retraining.
For: a baseline, and before long training.
Costs: seconds, no calibration.
"""

from collections.abc import Callable

from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.sparsity import SparsitySelection, choose
from qtool.registry import Method


class MagnitudeOptions(SparsitySelection):
    """Options of magnitude pruning."""


def magnitude(W: Tensor, stats: LayerStats | None, options: MagnitudeOptions, note: Callable[[str], None]) -> Tensor:
    """W [out, in] float32 with its smallest weights zero; raises QtoolError where columns do not fit the pattern."""
    return W.masked_fill(choose(W.abs(), options), 0)


METHOD = Method(run=magnitude, options=MagnitudeOptions, scope="linear", rowwise=True)
