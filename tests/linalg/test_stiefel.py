"""Cayley SGD stays among orthogonal matrices and finds the nearest rotation."""

import torch

from qtool.linalg.hadamard import mean_keeping_rotation, random_orthogonal
from qtool.linalg.stiefel import CayleyAdam, CayleySGD, cayley, skew_part


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def distance(R: torch.Tensor) -> float:
    return float((R.transpose(-2, -1) @ R - torch.eye(R.shape[-1], dtype=R.dtype)).abs().max())


def test_cayleys_transform_of_a_turn_by_hand() -> None:
    Y = torch.tensor([[0.0, -0.8], [0.8, 0.0]], dtype=torch.float64)  # tan(θ/2) = 0.4: a turn by θ
    cosine, sine = (1 - 0.16) / 1.16, 0.8 / 1.16
    assert torch.allclose(cayley(Y), torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64))


def test_a_direction_that_is_tangent_already_is_kept() -> None:
    R, A = random_orthogonal(6, generator()), torch.randn(6, 6, generator=generator(), dtype=torch.float64)
    tangent = (A - A.T) @ R
    assert torch.allclose(skew_part(tangent, R) @ R, tangent)


def test_every_step_stays_orthogonal_and_the_nearest_rotation_is_found() -> None:
    """min ‖A R - B‖² over rotations is Procrustes' problem: R = U Vᵀ of AᵀB = U S Vᵀ."""
    random = generator()
    A = torch.randn(2, 40, 8, generator=random, dtype=torch.float64)
    target = torch.stack([near_identity(8, random) for _ in range(2)])
    B = A @ target + 0.1 * torch.randn(2, 40, 8, generator=random, dtype=torch.float64)
    U, _, Vt = torch.linalg.svd(A.transpose(1, 2) @ B)
    R = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
    optimizer = CayleySGD([R], 0.5, [False])
    for _ in range(300):
        optimizer.step([A.transpose(1, 2) @ (A @ R - B) / 40], 0.2)
        assert distance(R) < 1e-12
    assert torch.allclose(R, U @ Vt, atol=1e-6)


def near_identity(n: int, random: torch.Generator) -> torch.Tensor:
    A = 0.3 * torch.randn(n, n, generator=random, dtype=torch.float64)
    return cayley(A - A.T)


def test_the_vector_of_ones_stays_where_it_must() -> None:
    R, random = mean_keeping_rotation(12, generator()), generator()
    one = torch.ones(12, dtype=torch.float64)
    before = R.clone()
    optimizer = CayleySGD([R], 0.9, [True])
    for _ in range(5):
        optimizer.step([torch.randn(12, 12, generator=random)], 1.5)
        assert distance(R) < 1e-12 and torch.allclose(R @ one, one, atol=1e-12)
    assert (R - before).abs().max() > 0.1


def test_a_gradient_of_zero_moves_nothing() -> None:
    R = random_orthogonal(4, generator())
    before = R.clone()
    CayleySGD([R], 0.9, [False]).step([torch.zeros(4, 4)], 1.5)
    assert torch.allclose(R, before)


def test_adam_stays_orthogonal_and_does_not_ask_how_large_gradients_are() -> None:
    random = generator()
    A, target = torch.randn(40, 8, generator=random, dtype=torch.float64), near_identity(8, random)
    found = []
    for size in (1.0, 1e-6):
        R = torch.eye(8, dtype=torch.float64)
        optimizer = CayleyAdam([R], [False])
        for step in range(200):
            optimizer.step([size * A.T @ (A @ R - A @ target)], 0.02 * (1 - step / 200))
            assert distance(R) < 1e-12
        assert torch.allclose(R, target, atol=1e-3)
        found.append(R)
    assert torch.allclose(found[0], found[1], atol=1e-9)


def test_adams_first_step_is_as_long_as_its_rate() -> None:
    G = torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=torch.float64)  # tangent at the identity, mean square 4.5
    R = torch.eye(2, dtype=torch.float64)
    CayleyAdam([R], [False]).step([G], 0.1)
    assert torch.allclose(R, cayley(-0.1 * G / 4.5**0.5))
