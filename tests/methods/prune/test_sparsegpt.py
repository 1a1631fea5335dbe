"""SparseGPT against explicit elimination in float64, and at its edges."""

import pytest
import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.methods.prune import sparsegpt as module
from qtool.methods.prune.magnitude import MagnitudeOptions, magnitude
from qtool.methods.prune.sparsegpt import SparseGptOptions, sparsegpt


def problem(n_out: int = 6, n_in: int = 12, n_tokens: int = 200) -> tuple[Tensor, LayerStats]:
    """Weights [out, in] and statistics of correlated inputs of uneven strength."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(n_in, n_in, generator=random) * (0.1 + torch.rand(n_in, generator=random)) ** 2
    stats = LayerStats(n_in, ("hessian",))
    stats.update(torch.randn(n_tokens, n_in, generator=random) @ mix)
    return torch.randn(n_out, n_in, generator=random), stats


def run(W: Tensor, stats: LayerStats, **choices: object) -> Tensor:
    notes: list[str] = []
    pruned = sparsegpt(W.clone(), stats, SparseGptOptions.model_validate(choices), notes.append)
    assert notes == []
    return pruned


def loss(W: Tensor, pruned: Tensor, stats: LayerStats) -> float:
    E = (W - pruned).double()
    return float(((E @ stats.hessian().double()) * E).sum())


def golden(W: Tensor, stats: LayerStats, block: int, n_zero: int, per_row: bool) -> Tensor:
    """Blocks of columns from the left; in each the n_zero lowest scores go, per row or over all rows together.

    A score is the loss of removing a weight when only columns right of it may make up for it, found by inverting their
    part of H; after each column the later ones are solved anew against the original weights.
    """
    H = stats.hessian().double()
    n_in = len(H)
    H = H + 0.01 * H.diagonal().mean() * torch.eye(n_in, dtype=torch.float64)
    original, current = W.double(), W.double()
    for start in range(0, n_in, block):
        columns = range(start, min(start + block, n_in))
        curvature = {c: 1 / float(torch.linalg.inv(H[c:, c:])[0, 0]) for c in columns}
        scores = {(o, c): float(current[o, c]) ** 2 * curvature[c] for o in range(len(W)) for c in columns}
        by_score = sorted(scores, key=scores.__getitem__)
        rivals = [[place for place in by_score if place[0] == o] for o in range(len(W))] if per_row else [by_score]
        chosen = {place for places in rivals for place in places[:n_zero]}
        for c in columns:
            for o in range(len(W)):
                if (o, c) in chosen:
                    current[o, c] = 0
                done, left = slice(0, c + 1), slice(c + 1, n_in)
                change = current[o, done] - original[o, done]
                current[o, left] = original[o, left] - torch.linalg.solve(H[left, left], H[left, done] @ change)
    return current


@pytest.mark.parametrize(("pattern", "block", "n_zero"), [("2:4", 4, 2), ("1:3", 3, 2), ("5:6", 6, 1), ("6:12", 12, 6)])
def test_a_pattern_gives_what_explicit_elimination_gives(pattern: str, block: int, n_zero: int) -> None:
    W, stats = problem()
    pruned, expected = run(W, stats, pattern=pattern), golden(W, stats, block, n_zero, per_row=True)
    assert torch.equal(pruned == 0, expected == 0)
    assert torch.allclose(pruned.double(), expected, rtol=1e-3, atol=1e-4)  # float32 sums against float64


@pytest.mark.parametrize(("block", "n_zero"), [(12, 36), (4, 12), (6, 18)])
def test_unstructured_gives_what_explicit_elimination_gives(block: int, n_zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    W, stats = problem()
    pruned, expected = run(W, stats, sparsity=0.5), golden(W, stats, block, n_zero, per_row=False)
    assert torch.equal(pruned == 0, expected == 0)
    assert torch.allclose(pruned.double(), expected, rtol=1e-3, atol=1e-4)  # float32 sums against float64


@pytest.mark.parametrize("choice", [{"sparsity": 0.5}, {"sparsity": 0.8}, {"pattern": "2:4"}])
def test_the_loss_is_below_that_of_magnitude_and_of_its_own_mask_without_update(choice: dict[str, object]) -> None:
    W, stats = problem(32, 96, 400)
    pruned = run(W, stats, **choice)
    by_magnitude = magnitude(W.clone(), None, MagnitudeOptions.model_validate(choice), lambda text: None)
    assert loss(W, pruned, stats) < loss(W, by_magnitude, stats)
    assert loss(W, pruned, stats) < loss(W, W.masked_fill(pruned == 0, 0), stats)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.99])
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 7), (3, 300), (5, 129)])
def test_the_whole_matrix_has_the_exact_count_of_zeros(sparsity: float, n_out: int, n_in: int) -> None:
    W, stats = problem(n_out, n_in)
    assert int((run(W, stats, sparsity=sparsity) == 0).sum()) == int(sparsity * n_out * n_in + 0.5)


def test_a_dead_column_goes_first() -> None:
    W, stats = problem()
    stats.hessian()[5], stats.hessian()[:, 5] = 0, 0
    pruned = run(W, stats, sparsity=0.5)
    assert bool((pruned[:, 5] == 0).all())


def test_a_linear_that_no_token_reached_is_pruned_by_magnitude_and_noted() -> None:
    W, _ = problem()
    notes: list[str] = []
    options = SparseGptOptions(pattern="2:4")
    pruned = sparsegpt(W.clone(), LayerStats(12, ("hessian",)), options, notes.append)
    assert torch.equal(pruned, magnitude(W.clone(), None, MagnitudeOptions(pattern="2:4"), notes.append))
    assert notes == ["no calibration token reached it; pruned by magnitude"]


def test_columns_that_do_not_divide_are_refused() -> None:
    W, stats = problem(2, 6)
    with pytest.raises(QtoolError, match="6 columns do not divide into patterns of 4"):
        run(W, stats, pattern="2:4")
