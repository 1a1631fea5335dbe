"""SoRA's gates follow the soft threshold, and ranks that they close change nothing."""

import torch

from qtool.methods.factorize.sora import GatedRanks, SoraOptions, shrink


def test_the_threshold_minimizes_its_proximal_problem() -> None:
    g, xi = torch.tensor([0.5, -0.02, 0.03, -1.0, 0.0]), 0.03
    grid = torch.linspace(-1.2, 1.2, 240001, dtype=torch.float64)
    for value, found in zip(g.tolist(), shrink(g, xi).tolist(), strict=True):
        best = grid[(0.5 * (grid - value).square() + xi * grid.abs()).argmin()]
        assert abs(found - float(best)) < 2e-5  # the grid's step is 1e-5


def test_more_threshold_leaves_no_more_ranks() -> None:
    g = torch.randn(50, generator=torch.Generator().manual_seed(0))
    left = [int((shrink(g, xi) != 0).sum()) for xi in (0.0, 0.1, 0.5, 1.0, 5.0)]
    assert left == sorted(left, reverse=True) and left[0] == 50 and left[-1] == 0


def test_closed_ranks_may_go() -> None:
    random = torch.Generator().manual_seed(0)
    W = torch.randn(6, 5, generator=random)
    form = GatedRanks(W, SoraOptions(rank=4, alpha=8.0), random)
    assert torch.equal(form(), W)  # B is zero at first
    with torch.no_grad():
        form.B.normal_(generator=random)
        form.g.copy_(torch.tensor([0.0, 1.5, 0.0, -0.5]))
    left = form.g != 0
    by_hand = W + 2.0 * form.B[:, left] @ torch.diag(form.g[left]) @ form.A[left]
    assert torch.allclose(form(), by_hand, atol=1e-6)
