"""Histograms: borders by hand, everything counted once, the same counts in parts as at once."""

import math

import pytest
import torch

from qtool.linalg.histogram import BINS, level_counts, level_edges, magnitude_counts, magnitude_edges, range_over


def test_a_magnitude_belongs_to_the_half_octave_that_holds_it() -> None:
    edges = magnitude_edges()
    assert len(edges) == BINS + 1 and (edges[0], edges[40], edges[-1]) == (2.0**-20, 1.0, 2.0**12)
    for value, b in ((1.0, 40), (-1.0, 40), (1.4142, 40), (1.4143, 41), (1.9999, 41), (2.0, 42), (2.0**-20, 0), (4095.0, 63)):
        assert magnitude_counts(torch.tensor([value])).nonzero().flatten().tolist() == [b], value


def test_what_lies_beyond_is_in_the_outer_bins_and_what_is_no_number_in_none() -> None:
    counts = magnitude_counts(torch.tensor([0.0, 1e-30, -1e30, math.nan, math.inf, -math.inf]))
    assert (int(counts[0]), int(counts[-1]), int(counts.sum())) == (2, 1, 3)
    counts = level_counts(torch.tensor([-100.0, 100.0, math.inf, math.nan]), -8.0, 7.0)
    assert (int(counts[0]), int(counts[-1]), int(counts.sum())) == (1, 2, 3)


def test_counts_are_those_of_a_search_among_the_edges_and_add_up() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).exp() - 1
    counts = magnitude_counts(x)
    edges = torch.tensor(magnitude_edges(), dtype=torch.float64)
    found = torch.bucketize(x.double().abs(), edges, right=True) - 1  # an independent way to the bin
    assert counts.tolist() == torch.bincount(found.clamp(0, BINS - 1), minlength=BINS).tolist()
    assert torch.equal(magnitude_counts(x[:1000]) + magnitude_counts(x[1000:]), counts)


@pytest.mark.parametrize(
    ("ends", "n_levels", "beyond"),
    [
        ((-8.0, 7.0), 16, 1.875),
        ((0.0, 15.0), 16, 1.875),
        ((-1.0, 1.0), 2, 2.0),
        ((-1.0, 1.0), 3, 1.0),
        ((-2.75, 2.75), 65536, 0.6875),
    ],
)
def test_bins_reach_beyond_a_grid_by_a_step_or_an_eighth_of_it(ends: tuple[float, float], n_levels: int, beyond: float) -> None:
    low, high = range_over(ends, n_levels)
    assert (low, high) == (ends[0] - beyond, ends[1] + beyond)
    edges = level_edges(low, high)
    assert len(edges) == BINS + 1 and (edges[0], edges[-1]) == (low, high)
    middles = torch.tensor([(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)])
    assert level_counts(middles, low, high).tolist() == [1] * BINS
