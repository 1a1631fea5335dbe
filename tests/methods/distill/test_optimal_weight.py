"""The share is the best where predictions are linear in it: a step of kernel ridge regression, worked in full."""

import pytest
import torch

from qtool.methods.distill.optimal_weight import best_share


def test_the_share_is_the_best_of_a_grid_in_kernel_ridge_regression() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, generator=random, dtype=torch.float64) * 6
    y = x.sin() + 0.4 * torch.randn(40, 1, generator=random, dtype=torch.float64)
    held = torch.rand(200, 1, generator=random, dtype=torch.float64) * 6

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (-(a - b.T).square() * 4).exp()

    solve = torch.linalg.inv(kernel(x, x) + 0.05 * torch.eye(40, dtype=torch.float64))
    teacher = kernel(x, x) @ solve @ y  # y_1 on the training points

    def predict(a: float) -> torch.Tensor:
        return kernel(held, x) @ solve @ (a * y + (1 - a) * teacher)

    A, B = predict(1.0), predict(0.0)
    y_held = predict(0.35) + 0.05 * torch.randn(200, 1, generator=random, dtype=torch.float64)
    found = best_share(float(((y_held - B) * (A - B)).sum()), float((A - B).square().sum()))
    losses = {a: float((predict(a) - y_held).square().sum()) for a in torch.linspace(0, 1, 101).tolist()}
    assert float((predict(found) - y_held).square().sum()) <= min(losses.values()) + 1e-9
    assert 0.1 < found < 0.6
    for away in (found - 0.1, found + 0.1):
        assert float((predict(found) - y_held).square().sum()) <= float((predict(away) - y_held).square().sum())


@pytest.mark.parametrize(("along", "length", "share"), [(2.0, 1.0, 1.0), (-1.0, 1.0, 0.0), (0.3, 0.6, 0.5), (0.0, 0.0, 1.0)])
def test_it_keeps_within_nothing_and_all(along: float, length: float, share: float) -> None:
    assert best_share(along, length) == share
