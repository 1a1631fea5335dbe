"""Divergence: KL worked by hand, and the Fisher form against the exact second derivative of a small model's KL."""

import math

import pytest
import torch

from qtool.linalg.divergence import kl, log_likelihood_of_draws, squared_product


def test_kl_is_that_of_the_distributions_and_not_of_the_logits() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(kl(p.log() + 7, q.log() - 3)) == pytest.approx(expected, rel=1e-5)
    assert float(kl(p, p + 5)) == pytest.approx(0, abs=1e-7)


def test_the_gradient_of_a_draw_is_one_at_the_draw_less_the_distribution() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(log_likelihood_of_draws(logits, torch.Generator().manual_seed(1)), logits)
    one_at_draw = gradient + logits.softmax(-1)
    assert torch.allclose(one_at_draw.sort(1).values[:, :-1], torch.zeros(50, 5), atol=1e-6)
    assert torch.allclose(one_at_draw.amax(1), torch.ones(50), atol=1e-6)


def test_squared_products_are_of_each_row_by_itself() -> None:
    G, D = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.5]])
    assert squared_product(G, D) == (1 - 2) ** 2 + (6 + 2) ** 2


def test_the_mean_over_draws_is_the_kl_of_a_small_change_of_one_row() -> None:
    """One row alone has no products with others, so that the form is exact to second order."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=random)  # [positions, in]
    W = torch.randn(5, 12, generator=random, requires_grad=True)  # [vocab, in]
    D = torch.zeros(5, 12)
    D[2] = 1e-2 * torch.randn(12, generator=random)
    total, draws = 0.0, 4000
    for _ in range(draws):
        (G,) = torch.autograd.grad(log_likelihood_of_draws(x @ W.T, random), W)
        total += squared_product(G, D)
    exact = float(kl((x @ W.T).detach().double(), (x @ (W + D).T).detach().double()).mean())
    # A square of one nearly normal number: the mean of 4000 is known to sqrt(2 / 4000) = 2.2 %; four times that, and
    # float32 in kl, whose digits of 1e-7 are 1 % of a KL of 1e-5.
    assert total / draws / (2 * len(x)) == pytest.approx(exact, rel=0.1)
