"""The cheapest assignment against all of them tried."""

import itertools

import torch

from qtool.linalg.assignment import cheapest_partners


def test_no_order_of_columns_is_cheaper() -> None:
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    sums = {P: float(cost[range(5), P].sum()) for P in itertools.permutations(range(5))}
    assert tuple(cheapest_partners(cost).tolist()) == min(sums, key=lambda P: sums[P])


def test_one_row_has_one_partner() -> None:
    assert cheapest_partners(torch.ones(1, 1)).tolist() == [0]
