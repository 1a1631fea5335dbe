"""Sparsity: counts, patterns, ties, and options that contradict each other."""

import pytest
import torch
from pydantic import ValidationError

from qtool.errors import QtoolError
from qtool.formats.sparsity import SparsitySelection, choose, count

ROUNDED = [(0.5, 12, 6), (0.5, 7, 4), (0.3, 12, 4), (0.0, 9, 0), (0.1, 4, 0)]


@pytest.mark.parametrize(("sparsity", "n", "expected"), ROUNDED)
def test_counts_round_to_nearest_with_halves_up(sparsity: float, n: int, expected: int) -> None:
    assert count(sparsity, n) == expected


def test_the_smallest_scores_of_each_row_are_chosen() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0], [1.0, 9.0, 3.0, 2.0]])
    assert choose(scores, SparsitySelection(sparsity=0.5)).int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]


def test_a_pattern_keeps_n_of_every_m_neighbours() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 40.0, 30.0, 20.0, 10.0]])
    assert choose(scores, SparsitySelection(pattern="1:4")).int().tolist() == [[1, 1, 1, 0, 0, 1, 1, 1]]


def test_of_equal_scores_the_ones_further_left_go() -> None:
    assert choose(torch.ones(2, 6), SparsitySelection(sparsity=0.5)).int().tolist() == [[1, 1, 1, 0, 0, 0]] * 2
    assert choose(torch.zeros(1, 8), SparsitySelection(pattern="2:4")).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "4:4", "2/4", "two:four", "2:4:8"])
def test_a_text_that_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match="write N:M"):
        SparsitySelection(pattern=pattern)


def test_a_pattern_beside_a_sparsity_is_refused() -> None:
    with pytest.raises(ValidationError, match="states the sparsity already"):
        SparsitySelection(pattern="2:4", sparsity=0.6)


def test_columns_that_do_not_divide_into_the_pattern_are_refused() -> None:
    with pytest.raises(QtoolError, match="6 columns do not divide into patterns of 4"):
        choose(torch.ones(2, 6), SparsitySelection(pattern="2:4"))
