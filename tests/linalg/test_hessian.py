"""The factor of the damped inverse: its equation, damping that is raised, inputs that never came."""

import pytest
import torch

from qtool.errors import QtoolError
from qtool.linalg.hessian import inverse_factor


def hessian(n: int = 12, n_tokens: int = 100) -> torch.Tensor:
    x = torch.randn(n_tokens, n, generator=torch.Generator().manual_seed(0))
    return x.T @ x / n_tokens


def refuse(text: str) -> None:
    raise AssertionError(f"noted: {text}")


@pytest.mark.parametrize("n", [1, 7, 12])
def test_the_factor_is_upper_triangular_and_squares_to_the_damped_inverse(n: int) -> None:
    H = hessian(n)
    U = inverse_factor(H, 0.01, refuse).double()
    inverse = torch.linalg.inv(H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(n, dtype=torch.float64))
    assert torch.equal(U, U.triu()) and bool((U.diagonal() > 0).all())
    # A float32 factor of a matrix of condition about 100.
    assert torch.allclose(U.T @ U, inverse, rtol=1e-4, atol=1e-5)


def test_a_pivot_is_the_inverse_curvature_of_a_column_once_those_before_it_are_fixed() -> None:
    H = hessian()
    U = inverse_factor(H, 0.01, refuse)
    damped = H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(12, dtype=torch.float64)
    for c in range(12):
        rest = torch.linalg.inv(damped[c:, c:])[0, 0]
        assert float(U[c, c]) ** 2 == pytest.approx(float(rest), rel=1e-4)


@pytest.mark.parametrize(("least", "expected"), [(-0.05, "0.1"), (-0.5, "1")])
def test_damping_that_is_too_little_is_multiplied_by_ten_and_noted_once(least: float, expected: str) -> None:
    H = torch.eye(12)
    H[0, 0] = least  # rounding can leave a rank-deficient Hessian such an eigenvalue
    notes: list[str] = []
    U = inverse_factor(H, 0.01, notes.append)
    assert notes == [f"damping raised to {expected}"]
    assert bool(torch.isfinite(U).all())


def test_a_matrix_that_no_damping_saves_is_refused() -> None:
    H = torch.eye(4)
    H[0, 0] = -2
    with pytest.raises(QtoolError, match="not positive definite even with damp 1"):
        inverse_factor(H, 0.01, lambda text: None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    H = hessian()
    H[2, 3] = H[3, 2] = value
    with pytest.raises(QtoolError, match="NaN or infinity"):
        inverse_factor(H, 0.01, refuse)


def test_a_hessian_of_zeros_gives_the_identity() -> None:
    assert torch.equal(inverse_factor(torch.zeros(5, 5), 0.01, refuse), torch.eye(5))


def test_a_dead_column_disturbs_no_other() -> None:
    H = hessian()
    alive = [c for c in range(12) if c != 4]
    with_dead = H.clone()
    with_dead[4], with_dead[:, 4] = 0, 0
    mean = with_dead.diagonal().mean()
    U = inverse_factor(with_dead, 0.01, refuse)
    assert float(U[4, 4]) == pytest.approx(float((0.01 * mean) ** -0.5), rel=1e-5)  # its curvature is the damping
    assert float(U[4].abs().sum()) == float(U[4, 4]) and float(U[:, 4].abs().sum()) == float(U[4, 4])
    # The same factor as without it, at the damping that both then have in common.
    rest = with_dead[alive][:, alive]
    alone = inverse_factor(rest, float(0.01 * mean / rest.diagonal().mean()), refuse)
    assert torch.allclose(U[alive][:, alive], alone, rtol=1e-4, atol=1e-5)
