"""LowRank: products, what the factors are stored in, and its bytes."""

import pytest
import torch

from qtool.formats.low_rank import LowRank


def factors(n_out: int = 7, rank: int = 3, n_in: int = 10) -> LowRank:
    random = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-3, 1.0, 40.0])[:rank]
    return LowRank(torch.randn(n_out, rank, generator=random) * sizes, torch.randn(rank, n_in, generator=random))


def test_a_product_has_the_shape_and_values_of_its_factors() -> None:
    low_rank = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]]))
    assert low_rank.rank == 1
    assert low_rank.multiply().tolist() == [[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]]


def test_a_scale_multiplies_each_pair_of_vectors() -> None:
    left, right = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), torch.tensor([[5, 6], [7, 8]], dtype=torch.int8)
    low_rank = LowRank(left, right, torch.tensor([0.25, 4.0]))
    expected = left.float() @ torch.tensor([0.25, 4.0]).diag() @ right.float()
    assert torch.equal(low_rank.multiply(), expected)
    A, B = low_rank.factors()
    assert torch.equal(A @ B, expected)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_floats_are_rounded_once(dtype: str, expected: torch.dtype) -> None:
    stored = factors().stored_in(dtype)
    assert torch.equal(stored.left, factors().left.to(expected)) and torch.equal(stored.right, factors().right.to(expected))
    assert stored.scale is None and stored.stored_bytes == 2 * (7 * 3 + 3 * 10)


def test_whole_numbers_are_at_most_half_a_step_away_in_each_vector() -> None:
    exact, stored = factors(), factors().stored_in("int8")
    assert stored.left.dtype == stored.right.dtype == torch.int8
    assert stored.stored_bytes == 7 * 3 + 3 * 10 + 4 * 3
    assert stored.scale is not None and stored.scale.dtype == torch.float32
    for k in range(3):
        steps = float(exact.left[:, k].abs().max()) / 127, float(exact.right[k].abs().max()) / 127
        assert float(stored.scale[k]) == pytest.approx(steps[0] * steps[1], rel=1e-6)
        assert float((exact.left[:, k] - stored.left[:, k] * steps[0]).abs().max()) <= 0.501 * steps[0]
        assert float((exact.right[k] - stored.right[k] * steps[1]).abs().max()) <= 0.501 * steps[1]


def test_whole_numbers_stay_when_they_are_stored_once_more() -> None:
    once = factors().stored_in("int8")
    twice = once.stored_in("int8")
    assert torch.equal(twice.left, once.left) and torch.equal(twice.right, once.right)


def test_a_vector_of_zeros_stays_zero() -> None:
    low_rank = LowRank(torch.zeros(4, 2), torch.ones(2, 5)).stored_in("int8")
    assert torch.equal(low_rank.multiply(), torch.zeros(4, 5))
