"""LoRC against the singular values it leaves out, and against a search for the least error that knows no decomposition."""

import pytest
import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.low_rank import LowRank
from qtool.methods.factorize.lorc import METHOD, LorcOptions, lorc

WEIGHTINGS = ["plain", "activation", "hessian"]


def problem(n_out: int = 6, n_in: int = 10, tokens: int = 50) -> tuple[Tensor, Tensor]:
    """E [out, in] and correlated x [tokens, in] of uneven strength."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(n_in, n_in, generator=random) * torch.rand(n_in, generator=random) ** 2
    return torch.randn(n_out, n_in, generator=random), torch.randn(tokens, n_in, generator=random) @ mix


def run(E: Tensor, x: Tensor, **choices: object) -> LowRank:
    stats = LayerStats(E.shape[1], ("hessian",))
    stats.update(x)
    notes: list[str] = []
    found = lorc(E.clone(), stats, LorcOptions.model_validate(choices), notes.append)
    assert notes == []
    return found


def metric(x: Tensor, weighting: str) -> Tensor:
    """M [in, in], float64, from the inputs themselves."""
    H = x.double().T @ x.double() / len(x)
    return {"plain": torch.eye(len(H), dtype=torch.float64), "activation": H.diagonal().diag(), "hessian": H}[weighting]


def loss(E: Tensor, product: Tensor, M: Tensor) -> float:
    D = E.double() - product.double()
    return float(((D @ M) * D).sum())


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_plain_error_is_that_of_the_singular_values_left_out(shape: tuple[int, int], rank: int) -> None:
    E, x = problem(*shape)
    left_out = torch.linalg.svdvals(E.double())[rank:].square().sum()
    found = run(E, x, rank=rank, weighting="plain").multiply()
    # Float32 sums: 1e-6 of ||E||² remains where nothing is left out.
    assert loss(E, found, metric(x, "plain")) == pytest.approx(float(left_out), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_plain_factors_share_the_singular_values_in_halves(rank: int) -> None:
    E, x = problem()
    found = run(E, x, rank=rank, weighting="plain")
    S = torch.linalg.svdvals(E)[:rank]
    torch.testing.assert_close(found.left.norm(dim=0), S.sqrt())
    torch.testing.assert_close(found.right.norm(dim=1), S.sqrt())


def least_error(E: Tensor, M: Tensor, rank: int) -> float:
    """The least of tr((E - A B) M (E - A B)ᵀ) that alternating least squares finds from many beginnings."""
    E, random, best = E.double(), torch.Generator().manual_seed(1), float("inf")
    for _ in range(20):
        B = torch.randn(rank, E.shape[1], generator=random, dtype=torch.float64)
        for _ in range(300):
            A = torch.linalg.solve(B @ M @ B.T, B @ M @ E.T).T  # [out, rank], best for this B
            B = torch.linalg.solve(A.T @ A, A.T @ E)  # [rank, in], best for this A, whatever M
        best = min(best, loss(E, A @ B, M))
    return best


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rank", [1, 2])
def test_no_search_finds_factors_of_less_error(weighting: str, rank: int) -> None:
    E, x = problem()
    M = metric(x, weighting)
    found = run(E, x, rank=rank, weighting=weighting).multiply()
    assert loss(E, found, M) == pytest.approx(least_error(E, M, rank), rel=1e-4)  # float32 against float64


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_output_error_never_grows_and_falls_most_where_it_is_what_counts(weighting: str) -> None:
    E, x = problem(24, 40, 200)
    H = metric(x, "hessian")
    losses = [loss(E, run(E, x, rank=rank, weighting=weighting).multiply(), H) for rank in (1, 4, 12, 24)]
    assert [loss(E, torch.zeros_like(E), H), *losses] == sorted([loss(E, torch.zeros_like(E), H), *losses], reverse=True)
    exact = loss(E, run(E, x, rank=4, weighting="hessian").multiply(), H)
    assert exact <= losses[1] * (1 + 1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_all_the_rank_there_is_gives_everything_back(weighting: str) -> None:
    E, x = problem()
    torch.testing.assert_close(run(E, x, rank=6, weighting=weighting).multiply(), E, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_channels_without_input_and_fewer_tokens_than_channels_leave_finite_factors(weighting: str) -> None:
    E, x = problem(tokens=4)
    x[:, 3] = 0
    found = run(E, x, rank=4, weighting=weighting)
    assert bool(torch.isfinite(found.left).all() and torch.isfinite(found.right).all())
    if weighting == "hessian":  # four tokens span four directions, so the outputs for them come back
        assert loss(E, found.multiply(), metric(x, "hessian")) < 1e-9 * loss(E, torch.zeros_like(E), metric(x, "hessian"))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_no_error_gives_factors_of_zeros(weighting: str, dtype: str) -> None:
    _, x = problem()
    found = run(torch.zeros(6, 10), x, rank=3, weighting=weighting).stored_in(dtype)
    assert torch.equal(found.multiply(), torch.zeros(6, 10))


def test_more_rank_than_there_is_is_refused() -> None:
    E, x = problem()
    with pytest.raises(QtoolError, match=r"rank 7 is more than a matrix of \(6, 10\) has; use 6 or less"):
        run(E, x, rank=7)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(broken: float) -> None:
    E, x = problem()
    with pytest.raises(QtoolError, match="NaN or infinity"):
        run(E, x.masked_fill(torch.arange(10) == 2, broken), rank=2)
    E[1, 2] = broken
    with pytest.raises(QtoolError, match="NaN or infinity"):
        run(E, x, rank=2, weighting="plain")


@pytest.mark.parametrize("weighting", ["activation", "hessian"])
def test_without_a_token_it_is_plain_and_says_so(weighting: str) -> None:
    E, x = problem()
    notes: list[str] = []
    found = lorc(E.clone(), LayerStats(10, ("hessian",)), LorcOptions(rank=2, weighting=weighting), notes.append)
    assert torch.equal(found.multiply(), run(E, x, rank=2, weighting="plain").multiply())
    assert len(notes) == 1 and "no calibration token" in notes[0]


def test_text_is_asked_for_only_where_inputs_count() -> None:
    assert METHOD.needed(LorcOptions(weighting="plain")) == ()
    assert METHOD.needed(LorcOptions()) == METHOD.needed(LorcOptions(weighting="activation")) == ("hessian",)
