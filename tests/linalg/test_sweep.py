"""The walk over columns: the same result for every leaf, and the leaves it announces."""

import pytest
import torch

from qtool.linalg.hessian import inverse_factor
from qtool.linalg.sweep import sweep, sweep_both


def problem(n_in: int, n_out: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(n_in)
    x = torch.randn(200, n_in, generator=random) @ torch.randn(n_in, n_in, generator=random)
    return torch.randn(n_in, n_out, generator=random), inverse_factor(x.T @ x / 200, 0.01, lambda text: None)


def eager(columns: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
    """The textbook loop in float64: each error is spread at once over all later columns."""
    W, U = columns.double(), U.double()
    for c in range(len(W)):
        q = (2 * W[c]).round() / 2
        e = (W[c] - q) / U[c, c]
        W[c] = q
        W[c + 1 :] -= U[c, c + 1 :, None] * e
    return W


@pytest.mark.parametrize("n_in", [1, 7, 24, 50])
@pytest.mark.parametrize("leaf", [1, 3, 8, 24, 64])
def test_any_leaf_gives_the_result_of_the_textbook_loop(n_in: int, leaf: int) -> None:
    columns, U = problem(n_in)
    expected = eager(columns, U)
    sweep(columns, U, leaf, lambda start, stop: None, lambda c, w: (2 * w).round() / 2)
    # Both hold multiples of 1/2; one that rounds to another multiple differs by 1/2.
    assert torch.allclose(columns.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n_in", "leaf"), [(24, 8), (20, 8), (7, 32), (9, 1)])
def test_leaves_are_announced_in_order_and_once(n_in: int, leaf: int) -> None:
    columns, U = problem(n_in)
    leaves: list[tuple[int, int]] = []
    turns: list[int] = []

    def settle(c: int, w: torch.Tensor) -> torch.Tensor:
        assert leaves[-1][0] <= c < leaves[-1][1]
        turns.append(c)
        return w

    sweep(columns, U, leaf, lambda start, stop: leaves.append((start, stop)), settle)
    assert leaves == [(start, min(start + leaf, n_in)) for start in range(0, n_in, leaf)]
    assert turns == list(range(n_in))


def test_a_leaf_begins_with_every_earlier_error_in_its_columns() -> None:
    columns, U = problem(24)
    current = columns.double()
    seen: list[torch.Tensor] = []
    sweep(columns, U, 6, lambda start, stop: seen.append(columns[start:stop].clone()), lambda c, w: w.round())
    for start in range(0, 24, 6):
        assert torch.allclose(seen[start // 6].double(), current[start : start + 6], atol=1e-4)  # float32 sums
        for c in range(start, start + 6):
            e = (current[c] - current[c].round()) / U[c, c].double()
            current[c + 1 :] -= U[c, c + 1 :, None].double() * e


def test_columns_that_are_kept_stay_to_the_bit() -> None:
    columns, U = problem(24)
    before = columns.clone()
    sweep(columns, U, 8, lambda start, stop: None, lambda c, w: w)
    assert torch.equal(columns, before)


# ---- rows that have turns too ----


def eager_both(columns: torch.Tensor, U: torch.Tensor, V: torch.Tensor, rows: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """The textbook loop in float64, weight by weight: each error is spread at once over all later rows and columns."""
    W, U, V, P = columns.double(), U.double(), V.double(), P.double()
    settled = W.clone()
    for c in range(len(W)):
        w, f = W[c].clone(), torch.zeros(len(rows), dtype=torch.float64)
        for i, r in enumerate(rows.tolist()):
            wanted = w[r] - U[c, c] * (V[:i, i] @ f[:i])
            settled[c, r] = (2 * wanted).round() / 2
            f[i] = (wanted - settled[c, r]) / (U[c, c] * V[i, i])
        W[c + 1 :] += P[c, c + 1 :, None] * w - U[c, c + 1 :, None] * (w - settled[c]) / U[c, c]
    return settled


@pytest.mark.parametrize(("n_in", "n_out"), [(24, 9), (9, 24), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("leaf", [1, 7, 8, 128])
def test_waves_give_the_result_of_settling_one_weight_after_the_other(n_in: int, n_out: int, leaf: int) -> None:
    columns, U = problem(n_in, n_out)
    _, V = problem(n_out)
    random = torch.Generator().manual_seed(n_in + n_out)
    rows, P = torch.randperm(n_out, generator=random), 0.01 * torch.randn(n_in, n_in, generator=random).triu(1)
    expected = eager_both(columns, U, V, rows, P)
    seen = torch.zeros(n_in, n_out)
    leaves: list[tuple[int, int]] = []

    def settle(turns: slice, which: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen[torch.arange(turns.start, turns.stop), which] += 1
        return (2 * w).round() / 2

    sweep_both(columns, U, V, rows, leaf, lambda start, stop: leaves.append((start, stop)), settle, P)
    assert torch.allclose(columns.double(), expected, rtol=0, atol=1e-6)  # multiples of 1/2 in both
    assert torch.equal(seen, torch.ones(n_in, n_out))
    assert leaves == [(start, min(start + leaf, n_in)) for start in range(0, n_in, leaf)]
