"""Maestro: training in an order of worth finds the singular values' order, and the budget cuts the least."""

import pytest
import torch

from qtool.methods.factorize.maestro import OrderedRanks, ranks_for, tails


def test_ordered_training_of_one_layer_reaches_the_truncated_svds() -> None:
    """The paper's property: for a linear map and even data, b columns come to the best approximation of rank b."""
    random = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(10, 6, generator=random))
    V, _ = torch.linalg.qr(torch.randn(8, 6, generator=random))
    S = torch.tensor([5.0, 3.5, 2.5, 1.5, 1.0, 0.5])
    W = (U * S) @ V.T  # [10, 8], rank 6
    form = OrderedRanks(torch.randn(10, 8, generator=random))  # starts elsewhere
    optimizer = torch.optim.Adam(form.parameters(), lr=0.03)
    for step in range(1500):
        form.shown = 1 + int(torch.randint(8, (1,), generator=random))
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / 1500)
        optimizer.zero_grad()
        (form() - W).square().sum().backward()
        optimizer.step()
    for b in range(1, 6):
        form.shown = b
        best = float(S[b:].square().sum())
        assert float((form().detach() - W).square().sum()) <= best * 1.05 + 1e-3, b


def test_the_penalty_sums_the_norms_of_every_tail() -> None:
    U = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tails(U), torch.stack([U[:, b:].norm() for b in range(3)]))


def test_the_budget_cuts_the_rank_of_least_worth_for_its_size_first() -> None:
    strong, weak = torch.diag(torch.tensor([9.0, 8.0, 7.0, 6.0])), torch.diag(torch.tensor([9.0, 1.0, 0.5, 0.1]))
    forms = [OrderedRanks(strong), OrderedRanks(weak)]
    assert ranks_for(forms, 1.0) == [3, 1]
    assert ranks_for(forms, 2.0) == [4, 4]
    assert ranks_for(forms, 0.01) == [1, 1]  # one rank each is the least


def test_a_cut_leaves_the_leading_ranks() -> None:
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    form = OrderedRanks(W)
    assert torch.allclose(form(), W, atol=1e-5)
    form.cut_to(2)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(form(), (U[:, :2] * S[:2]) @ Vt[:2], atol=1e-5)
    assert form.n_ranks() == 2
    assert float(form().detach().square().sum()) == pytest.approx(float(S[:2].square().sum()), rel=1e-4)
