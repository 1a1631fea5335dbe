"""Directions against a singular value decomposition, and ranks against a trial of every choice."""

import itertools

import pytest
import torch

from qtool.errors import QtoolError
from qtool.linalg.low_rank import directions, factors, ranks_within


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_the_product_is_the_truncated_svd_whitened_by_the_cholesky_factor(shape: tuple[int, int]) -> None:
    """SVD-LLM as its paper has it: W S = U Σ Vᵀ, then U_r Σ_r V_rᵀ S⁻¹, which loses the singular values left out."""
    random = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=random)
    x = torch.randn(50, shape[1], generator=random) * torch.rand(shape[1], generator=random)
    M = x.T @ x / len(x)
    S = torch.linalg.cholesky(M.double())
    left, values, right = torch.linalg.svd(W.double() @ S, full_matrices=False)
    U, e = directions(W, M)
    torch.testing.assert_close(e.double(), values.square(), rtol=1e-4, atol=1e-5)  # float32 sums
    for rank in (1, 3, 6):
        A, B = factors(W, U[:, :rank])
        whitened = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(S)
        torch.testing.assert_close((A @ B).double(), whitened, rtol=1e-3, atol=1e-4)
        lost = ((W - A @ B).double() @ S).square().sum()
        assert float(lost) == pytest.approx(float(values[rank:].square().sum()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("keep", [0.45, 0.6, 0.8, 0.95])
def test_no_choice_of_as_few_numbers_loses_less(keep: float) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (6, 12), (12, 5)]
    energies = [torch.rand(min(shape), generator=random).pow(4).sort(descending=True).values for shape in shapes]
    options = [[*range(1, min(shape) + 1), None] for shape in shapes]

    def cost(ranks: tuple[int | None, ...]) -> tuple[int, float]:
        numbers, lost = 0, 0.0
        for rank, (out, columns), e in zip(ranks, shapes, energies, strict=True):
            numbers += out * columns if rank is None else rank * (out + columns)
            lost += 0.0 if rank is None else float(e[rank:].sum() / e.sum())
        return numbers, lost

    found = ranks_within(energies, shapes, keep)
    numbers, lost = cost(tuple(found))
    assert numbers <= keep * sum(out * columns for out, columns in shapes)
    better = [ranks for ranks in itertools.product(*options) if cost(ranks)[0] <= numbers and cost(ranks)[1] < lost - 1e-6]
    assert better == []


def test_all_is_kept_whole_and_too_little_is_refused() -> None:
    e = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.zeros(4)]
    assert ranks_within(e, [(4, 4), (4, 4)], 1.0) == [None, 1]  # the second loses nothing by rank 1
    with pytest.raises(QtoolError, match=r"keep 0.4 leaves less than one rank for each linear; use 0.5 or more"):
        ranks_within(e, [(4, 4), (4, 4)], 0.4)
