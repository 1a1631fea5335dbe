"""SVFit starts at the matrix itself, and its numbers are the leading singular values."""

import torch

from qtool.methods.factorize.svfit import LeadingValues


def test_it_starts_at_the_matrix_and_ranks_hold_the_energy() -> None:
    W = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    for energy in (0.3, 0.9, 1.0):
        form = LeadingValues(W, energy)
        assert torch.allclose(form(), W, atol=1e-5)
        S = torch.linalg.svdvals(W)
        held = [float(S[:rank].square().sum() / S.square().sum()) for rank in range(8)]
        least = min((rank for rank in range(8) if held[rank] >= energy - 1e-6), default=7)
        assert torch.allclose(form.s, S[:least], atol=1e-5)


def test_its_gradient_is_that_of_each_singular_direction() -> None:
    random = torch.Generator().manual_seed(1)
    W, G = torch.randn(2, 6, 9, generator=random)
    form = LeadingValues(W, 0.8)
    (form() * G).sum().backward()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    by_hand = torch.stack([(G * torch.outer(U[:, i], Vt[i])).sum() for i in range(len(form.s))])
    assert torch.allclose(form.s.grad, by_hand, atol=1e-5)
    assert [name for name, _ in form.named_parameters()] == ["s"]


def test_a_matrix_of_zeros_stays_one() -> None:
    form = LeadingValues(torch.zeros(4, 3), 0.99)
    assert torch.equal(form(), torch.zeros(4, 3))
