"""The generalised Gaussian: known shapes are found again, and its moments are those of scipy's distribution."""

import numpy as np
import pytest
import scipy.stats
import torch

from qtool.linalg.generalized_gaussian import fit_shape, kurtosis_of_shape, moment_ratio
from qtool.linalg.outliers import kurtosis


def sample(shape: float, n: int) -> torch.Tensor:
    """n draws from a generalised Gaussian: |w|^shape is gamma distributed, the sign a coin."""
    random = np.random.default_rng(0)
    magnitudes = random.gamma(1 / shape, size=n) ** (1 / shape)
    return torch.from_numpy(magnitudes * random.choice([-1.0, 1.0], n)).float()


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.5, 2.0, 2.8])
def test_a_known_shape_is_recovered(shape: float) -> None:
    assert fit_shape(sample(shape, 10**6)) == pytest.approx(shape, abs=0.05)


@pytest.mark.parametrize("shape", [0.3, 1.0, 2.0, 3.0])
def test_moments_are_those_of_the_distribution(shape: float) -> None:
    magnitude = 2 * scipy.stats.gennorm(shape).expect(lambda x: x, lb=0)
    mean_square, excess = scipy.stats.gennorm(shape).stats("vk")
    assert moment_ratio(shape) == pytest.approx(mean_square / magnitude**2, rel=1e-6)
    assert kurtosis_of_shape(shape) == pytest.approx(excess + 3, rel=1e-6)


@pytest.mark.parametrize(("shape", "expected"), [(2.0, 3.0), (1.0, 6.0)])
def test_normal_weights_have_shape_2_and_kurtosis_3_and_laplacian_ones_1_and_6(shape: float, expected: float) -> None:
    w = sample(shape, 10**6)
    assert fit_shape(w - w.mean()) == pytest.approx(shape, abs=0.02)
    # Its standard error is sqrt((m8 - 4 m4 m6 + 4 m4³ - m4²) / n) of standardized moments: 0.034 for Laplace; five of them.
    assert kurtosis(w.view(1000, 1000)) == pytest.approx(expected, abs=0.17)
    assert kurtosis_of_shape(shape) == pytest.approx(expected, rel=1e-12)


def test_shapes_beyond_the_span_count_as_its_ends() -> None:
    assert fit_shape(torch.tensor([1.0, -1.0])) == pytest.approx(3.0)
    assert fit_shape(torch.eye(1000)) == pytest.approx(0.1)
