"""SLTrain: so many numbers, the dense gradient's values at the support, and a start at given weights."""

import pytest
import torch

from qtool.errors import QtoolError
from qtool.methods.factorize.sltrain import SltrainOptions, SparseAndLowRank, rank_of


def made(W: torch.Tensor, **stated: object) -> SparseAndLowRank:
    return SparseAndLowRank(W, SltrainOptions.model_validate(stated), torch.Generator().manual_seed(0))


def test_the_numbers_are_those_of_the_budget() -> None:
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    form = made(W, rank=3, density=0.1)
    assert sum(p.numel() for p in form.parameters()) == 3 * (24 + 40) + 96
    budget = made(W, keep=0.5, density=0.1)
    assert sum(p.numel() for p in budget.parameters()) <= 0.5 * W.numel()
    assert len(budget.A) == int(0.4 * 960 / 64) == 6


def test_gradients_at_the_support_are_those_of_the_dense_matrix() -> None:
    W = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    form = made(W, rank=2, density=0.25, alpha=4.0)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    (x @ form().T).square().sum().backward()
    dense = form().detach().requires_grad_(True)
    (x @ dense.T).square().sum().backward()
    assert torch.allclose(form.values.grad, dense.grad.flatten()[form.places], atol=1e-4)
    assert torch.allclose(form.B.grad, 2.0 * dense.grad @ form.A.detach().T, atol=1e-4)  # alpha / r = 2


def test_the_start_at_weights_is_the_svd_and_exact_on_the_support() -> None:
    W = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    form = made(W, rank=2, density=0.25, support="largest")
    U, S, Vt = torch.linalg.svd(W)
    rest = W - (U[:, :2] * S[:2]) @ Vt[:2]
    expected = W.clone()
    missed = rest.flatten().abs().argsort(descending=True)[12:]
    expected.flatten()[missed] -= rest.flatten()[missed]
    assert torch.allclose(form(), expected, atol=1e-5)
    drawn = made(W, rank=2, density=0.25)
    assert torch.allclose(drawn().flatten()[drawn.places], W.flatten()[drawn.places], atol=1e-5)


def test_the_papers_start_is_the_sparse_part_alone() -> None:
    form = made(torch.zeros(8, 6), rank=2, density=0.25, start="random")
    assert int((form() != 0).sum()) == 12 and form().abs().max() <= 6**-0.5


def test_a_budget_without_a_rank_is_refused() -> None:
    with pytest.raises(QtoolError, match="would have rank 0; use 1 to 6"):
        rank_of((8, 6), SltrainOptions(keep=0.05, density=0.03))
