"""QSUR: cases worked by hand, the volumes counted point by point, and what rotations and scales do to it."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from qtool.linalg.qsur import chi_square_quantile, most, qsur

ROTATED = torch.tensor([[2.5, 1.5], [1.5, 2.5]])  # diag(4, 1), turned by 45 degrees


def covariance(d: int, seed: int = 0) -> torch.Tensor:
    A = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A @ A.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def score(Sigma: torch.Tensor, mean: torch.Tensor | None = None, **options: object) -> float:
    found = qsur(Sigma, mean, shrinkage=0.0, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_two_channels_worked_by_hand() -> None:
    assert score(torch.diag(torch.tensor([4.0, 1.0]))) ** 2 == pytest.approx(math.pi / 8, rel=1e-12)
    assert score(ROTATED) ** 2 == pytest.approx(math.pi / 5, rel=1e-12)
    assert score(torch.eye(2)) ** 2 == pytest.approx(math.pi / 4, rel=1e-12)


def test_the_papers_extent_takes_the_end_of_the_longest_axis_alone() -> None:
    """Which of the turned ellipse lies at √2, √2: a box of side 2√2 around an ellipse of 2 by 1, which stands out of it."""
    assert score(ROTATED, extent="paper") ** 2 == pytest.approx(2 * math.pi / 8, rel=1e-12)
    straight = torch.diag(torch.tensor([4.0, 1.0]))
    assert score(straight, extent="paper") == pytest.approx(score(straight), rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_it_is_the_share_of_the_cube_that_points_of_the_ellipsoid_fill(offset: float) -> None:
    d, confidence = 3, 0.9
    Sigma, mean = covariance(d), torch.tensor([offset, -0.5, 0.2], dtype=torch.float64)
    c = scipy.stats.chi2.ppf(confidence, d)
    directions = np.random.default_rng(0).standard_normal((200_000, d))
    surface = directions / np.linalg.norm(directions, axis=1, keepdims=True) @ scipy.linalg.sqrtm(Sigma.numpy())
    surface = surface * np.sqrt(c) + mean.numpy()
    low, high = surface.min(), surface.max()  # one range for all channels
    points = np.random.default_rng(1).uniform(low, high, (400_000, d)) - mean.numpy()
    inside = np.einsum("ni,ij,nj->n", points, np.linalg.inv(Sigma.numpy()), points) <= c
    found = score(Sigma, mean, confidence=confidence) ** d
    # A share p of 400000 points is known to sqrt(p / 400000); the surface's extremes are met to 1e-3 of the side.
    assert found == pytest.approx(inside.mean(), abs=4 * math.sqrt(found / 400_000) + 4e-3 * found)


def test_a_mean_of_zero_is_no_mean_and_a_mean_apart_lowers_it() -> None:
    Sigma = covariance(6)
    assert score(Sigma, torch.zeros(6)) == pytest.approx(score(Sigma), rel=1e-12)
    assert score(Sigma, torch.tensor([0, 0, 5.0, 0, 0, 0])) < score(Sigma)
    assert score(Sigma, torch.full((6,), 5.0)) == pytest.approx(score(Sigma), rel=1e-12)  # a zero point takes it away


def test_scale_leaves_it_and_rotation_and_whitening_raise_it_to_the_most() -> None:
    d = 16
    Sigma = torch.diag(torch.arange(1.0, d + 1, dtype=torch.float64) ** 3)
    H = torch.from_numpy(scipy.linalg.hadamard(d) / math.sqrt(d))
    assert score(9 * Sigma) == pytest.approx(score(Sigma), rel=1e-12)
    rotated = score(H.T @ Sigma @ H)
    assert score(Sigma) < rotated < most(d)
    assert rotated == pytest.approx(most(d) * float(Sigma.diagonal().log().mean().div(2).exp() / Sigma.trace().div(d).sqrt()))
    assert score(torch.eye(d)) == pytest.approx(most(d), rel=1e-12)


def test_shrinkage_lets_rotations_through_and_gives_a_dead_channel_a_volume() -> None:
    d = 8
    Sigma = covariance(d)
    Sigma[3], Sigma[:, 3] = 0, 0
    Q = torch.linalg.qr(covariance(d, seed=1))[0]
    assert score(Sigma) == 0
    shrunk = 0.999 * Sigma + 0.001 * Sigma.trace() / d * torch.eye(d, dtype=torch.float64)
    assert qsur(Sigma) == pytest.approx(score(shrunk), rel=1e-12) and score(shrunk) > 0
    assert qsur(Q.T @ Sigma @ Q) == pytest.approx(score(Q.T @ shrunk @ Q), rel=1e-9)


def test_wide_layers_do_not_vanish_in_rounding_and_nothing_that_varies_is_none() -> None:
    assert score(torch.eye(600)) == pytest.approx(most(600), rel=1e-12)
    assert most(600) == pytest.approx(math.sqrt(2 * math.pi * math.e / 600) / 2, rel=0.02)  # Stirling's form
    assert qsur(torch.zeros(4, 4), torch.ones(4)) is None


@pytest.mark.parametrize("d", [1, 2, 100, 14336])
def test_the_quantile_is_that_of_chi_square(d: int) -> None:
    for share in (0.5, 0.99):
        assert chi_square_quantile(d, share) == pytest.approx(scipy.stats.chi2.ppf(share, d), rel=1e-8)
