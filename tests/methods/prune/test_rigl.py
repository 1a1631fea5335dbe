"""Places move as in the papers: as many grow as drop, none of those dropped, by the largest gradients."""

import pytest
import torch

from qtool.linalg.layerwise_density import erk_densities
from qtool.methods.prune.rigl import move


def test_the_smallest_go_and_the_largest_gradients_come() -> None:
    W = torch.tensor([[0.1, -3.0, 0.0, 0.0], [2.0, 0.0, -0.2, 0.0]])
    G = torch.tensor([[9.0, 9.0, 1.0, -4.0], [9.0, 3.0, 9.0, -2.0]])
    found = move(W, G, W != 0, 2)
    assert found.tolist() == [[False, True, False, True], [True, True, False, False]]  # 0.1 and -0.2 for |-4| and |3|


def test_what_was_dropped_does_not_grow_in_the_same_move_and_the_count_stays() -> None:
    random = torch.Generator().manual_seed(0)
    W, G = torch.randn(2, 20, 30, generator=random)
    mask = torch.rand(20, 30, generator=random) < 0.4
    found = move(W * mask, G, mask, 37)
    assert found.sum() == mask.sum()
    dropped = mask & ~found
    assert dropped.sum() == 37 and (found & ~mask).sum() == 37
    assert (W[dropped].abs().max() <= W[mask & found].abs().min()).item()
    assert (G[found & ~mask].abs().min() >= G[~mask & ~found].abs().max()).item()


def test_no_more_move_than_there_is_room_for() -> None:
    mask = torch.tensor([[True, True, True, False]])
    assert move(torch.ones(1, 4), torch.ones(1, 4), mask, 3).sum() == 3
    full = torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(move(torch.ones(1, 4), torch.ones(1, 4), full, 2), full)


def test_erk_keeps_the_budget_and_gives_narrow_matrices_more() -> None:
    shapes = {"wide": (512, 512), "narrow": (64, 512), "square": (64, 64)}
    found = erk_densities(shapes, 0.2)
    n = {name: a * b for name, (a, b) in shapes.items()}
    assert sum(found[name] * n[name] for name in shapes) == pytest.approx(0.2 * sum(n.values()))
    assert found["wide"] < found["narrow"] < found["square"]
    open_ones = [name for name in shapes if found[name] < 1]
    eps = {name: found[name] / ((shapes[name][0] + shapes[name][1]) / n[name]) for name in open_ones}
    assert max(eps.values()) == pytest.approx(min(eps.values()))


def test_a_matrix_that_would_be_denser_than_dense_is_dense_and_the_others_share_the_rest() -> None:
    shapes = {"wide": (1000, 1000), "tiny": (10, 10)}
    found = erk_densities(shapes, 0.1)
    assert found["tiny"] == 1.0
    assert found["wide"] * 1e6 + 100 == pytest.approx(0.1 * 1_000_100)
    assert erk_densities(shapes, 1.0) == {"wide": 1.0, "tiny": 1.0}
