"""Histograms small enough to keep: of magnitudes, in steps of half an octave, and of values over the levels of a grid.

    magnitudes   bin b holds 2^(b/2) <= |x| / 2^FIRST < 2^((b+1)/2), b = 0 .. 63, the first and the last also what lies beyond
    levels       bins of equal width from below the least level to above the greatest one, by a step between levels, or an
                 eighth of the range where that is more
Why half octaves: outliers of inputs are a thousand times the rest, and one set of bins serves every tensor of every model, so
that histograms add up. A bin is read off exponent and mantissa, exactly: the same counts on every machine.
"""

import torch
from torch import Tensor

BINS = 64
FIRST = -20  # exponent of the least magnitude told apart: 1e-6; the greatest is 2^12
MARGIN = 1 / 8  # of the levels' range, on each side, at the least


def magnitude_edges() -> list[float]:
    """The 65 borders of the bins of magnitudes."""
    return [2.0 ** (FIRST + b / 2) for b in range(BINS + 1)]


def magnitude_counts(x: Tensor) -> Tensor:
    """How many of x [...] have a magnitude of each bin, [64] int64; zeros are in the first, NaN and infinity in none."""
    mantissa, exponent = torch.frexp(x[torch.isfinite(x)].float().abs())  # mantissa in [1/2, 1) · 2^exponent
    b = 2 * (exponent - 1 - FIRST) + (mantissa >= 0.5**0.5)
    b = torch.where(mantissa > 0, b, 0).clamp(0, BINS - 1)
    return torch.bincount(b, minlength=BINS).cpu()


def range_over(ends: tuple[float, float], n_levels: int) -> tuple[float, float]:
    """The range of the bins over a grid of so many levels, the least and the greatest of which are `ends`."""
    low, high = ends
    beyond = (high - low) * max(MARGIN, 1 / (n_levels - 1))
    return low - beyond, high + beyond


def level_edges(low: float, high: float) -> list[float]:
    """The 65 borders of the bins of a range."""
    return [low + (high - low) * b / BINS for b in range(BINS + 1)]


def level_counts(u: Tensor, low: float, high: float) -> Tensor:
    """How many of u [...], values in units of a grid's levels, lie in each bin of a range, [64] int64; NaN in none."""
    b = ((u[~torch.isnan(u)] - low) * (BINS / (high - low))).floor().clamp(0, BINS - 1)
    return torch.bincount(b.long(), minlength=BINS).cpu()
