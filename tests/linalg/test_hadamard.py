"""Hadamard matrices are what they claim to be, in every order that is claimed, and the fast product is the slow one."""

import math

import pytest
import torch

from qtool.linalg.hadamard import (
    hadamard_block,
    hadamard_matrix,
    hadamard_product,
    hadamard_rotation,
    irreducible,
    jacobsthal,
    mean_keeping_rotation,
    prime_power,
    random_orthogonal,
    random_signs,
    small_factor,
)

UNREACHED = [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376]  # below 400, as the docstring lists


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_rows_are_orthogonal_in_every_order_below_400_that_is_not_listed_as_unreached() -> None:
    for n in (1, 2, *range(4, 400, 4)):
        H = hadamard_matrix(n)
        assert (H is None) == (n in UNREACHED), n
        if H is not None:
            assert bool((H.abs() == 1).all()) and torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64)), n


@pytest.mark.parametrize("n", [3, 6, 14, 30, 90])
def test_no_other_order_is_reached(n: int) -> None:
    assert hadamard_matrix(n) is None  # a Hadamard matrix has order 1, 2 or a multiple of 4


@pytest.mark.parametrize(
    ("n", "core"),
    [(4096, 1), (896, 28), (4864, 76), (11008, 344), (13824, 108), (14336, 28), (18944, 148), (156 * 8, 312), (144, 36)],
)
def test_sizes_of_models_have_a_small_core(n: int, core: int) -> None:
    assert small_factor(n) == core and hadamard_block(n) == n


def test_where_no_matrix_is_known_blocks_are_as_large_as_they_can_be() -> None:
    assert (hadamard_block(92), hadamard_block(172), hadamard_block(156), hadamard_block(7)) == (4, 4, 52, 1)
    x = torch.randn(3, 156, generator=generator(), dtype=torch.float64)
    H = hadamard_matrix(52)
    assert H is not None
    expected = torch.cat([part @ H / math.sqrt(52) for part in x.split(52, -1)], -1)
    assert torch.allclose(hadamard_product(x), expected)


@pytest.mark.parametrize("n", [1, 2, 12, 40, 64, 96, 104])
def test_the_fast_product_is_the_matrix_product(n: int) -> None:
    H, x = hadamard_matrix(n), torch.randn(2, 5, n, generator=generator(), dtype=torch.float64)
    assert H is not None
    assert torch.allclose(hadamard_product(x), x @ H / math.sqrt(n))
    assert hadamard_product(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_paleys_matrix_over_seven_elements_is_the_one_worked_by_hand() -> None:
    squares = {1, 2, 4}  # 1², 3², 2² modulo 7
    X = [[0 if a == b else 1 if (a - b) % 7 in squares else -1 for b in range(7)] for a in range(7)]
    expected = torch.eye(8, dtype=torch.float64)
    expected[1:, 1:] += torch.tensor(X)
    expected[0, 1:], expected[1:, 0] = 1, -1
    core = torch.tensor(X, dtype=torch.float64)
    assert torch.equal(jacobsthal(7, 1), core) and torch.equal(expected @ expected.T, 8 * torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize(("p", "degree"), [(3, 2), (3, 3), (5, 2), (11, 1)])
def test_differences_are_squares_as_often_as_not(p: int, degree: int) -> None:
    X, q = jacobsthal(p, degree), p**degree
    assert torch.equal(X @ X.T, q * torch.eye(q, dtype=torch.float64) - 1)  # Paley's lemma
    assert torch.equal(X.T, X if q % 4 == 1 else -X)


def test_prime_powers_and_polynomials() -> None:
    assert [prime_power(q) for q in (0, 1, 2, 9, 343, 12, 171)] == [None, None, (2, 1), (3, 2), (7, 3), None, None]
    assert irreducible(3, 2) == (1, 0)  # x² + 1: no square is -1 modulo 3


@pytest.mark.parametrize("n", [64, 12, 92, 10])
def test_a_rotation_that_keeps_the_mean_keeps_lengths_too(n: int) -> None:
    Q = mean_keeping_rotation(n, generator())
    one = torch.ones(n, dtype=torch.float64)
    assert torch.allclose(Q @ Q.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(Q @ one, one, atol=1e-12) and torch.allclose(one @ Q, one, atol=1e-12)
    # Entries of a random rotation of n deviate by 1 / √n, the largest of n² by √(4 ln n) times as much.
    assert Q.abs().max() < 1.3 * math.sqrt(4 * math.log(n) / n)


def test_signs_flip_the_sides_of_a_rotation_and_random_ones_are_orthogonal() -> None:
    signs = random_signs(12, generator())
    Q, plain = hadamard_rotation(12, signs), hadamard_rotation(12)
    assert Q is not None and plain is not None and torch.equal(Q, torch.diag(signs) @ plain)
    assert hadamard_rotation(92) is None
    R = random_orthogonal(7, generator())
    assert torch.allclose(R @ R.T, torch.eye(7, dtype=torch.float64), atol=1e-12)
