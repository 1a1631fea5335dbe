"""Mixed precision: the solver's choices against all choices there are, and against dynamic programming over bytes."""

import itertools

import pytest
import torch

from qtool.formats.allocation import Problem, SearchOptions
from qtool.methods.search.mixed_precision import mixed_precision

OPTIONS = SearchOptions.model_validate({"budget": 4, "candidates": ["w3a16g32", "w8a16"]})


def random_problem(seed: int, n_units: int, n_candidates: int, largest: int) -> Problem:
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, largest, (n_units, n_candidates), generator=random)
    losses = torch.rand(n_units, n_candidates, generator=random, dtype=torch.float64) ** 6
    least, most = int(sizes.amin(1).sum()), int(sizes.amax(1).sum())
    return Problem(losses, sizes, least + int((most - least) * float(torch.rand(1, generator=random))))


def least_loss_by_trying(problem: Problem) -> float:
    n_units, n_candidates = problem.sizes.shape
    choices = map(torch.tensor, itertools.product(range(n_candidates), repeat=n_units))
    return min(problem.loss_of(choice) for choice in choices if problem.size_of(choice) <= problem.capacity)


def least_loss_by_bytes(problem: Problem) -> float:
    """Dynamic programming: the least loss of the first units within every number of bytes."""
    best = torch.zeros(problem.capacity + 1, dtype=torch.float64)
    for losses, sizes in zip(problem.losses, problem.sizes.tolist(), strict=True):
        shifted = []
        for loss, size in zip(losses, sizes, strict=True):
            padded = torch.full_like(best, torch.inf)
            padded[size:] = best[: len(best) - size] + loss
            shifted.append(padded)
        best = torch.stack(shifted).amin(0)
    return float(best[-1])


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_as_good_as_the_best_of_all(seed: int) -> None:
    problem = random_problem(seed, n_units=5, n_candidates=3, largest=10**10)  # bytes of a large model
    choice = mixed_precision(problem, OPTIONS)
    assert problem.size_of(choice) <= problem.capacity
    assert problem.loss_of(choice) == pytest.approx(least_loss_by_trying(problem), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_models_worth_of_units_is_solved_exactly(seed: int) -> None:
    problem = random_problem(seed, n_units=120, n_candidates=4, largest=60)
    choice = mixed_precision(problem, OPTIONS)
    assert problem.size_of(choice) <= problem.capacity
    assert problem.loss_of(choice) == pytest.approx(least_loss_by_bytes(problem), rel=1e-9)


def test_a_budget_that_one_choice_meets_to_the_byte_is_used_up() -> None:
    sizes = torch.tensor([[3_000_000_007, 8_000_000_011], [3_000_000_019, 8_000_000_003]])
    losses = torch.tensor([[1.0, 0.1], [2.0, 0.1]]).double()
    for capacity, choice in ((11_000_000_010, [0, 1]), (11_000_000_009, [0, 0]), (11_000_000_030, [0, 1])):
        assert mixed_precision(Problem(losses, sizes, capacity), OPTIONS).tolist() == choice


def test_losses_of_very_different_size_all_count() -> None:
    losses = torch.tensor([[1e3, 1e-3], [2e-9, 1e-9], [3e-9, 1e-9]]).double()  # nats: one hopeless unit, two fine ones
    sizes = torch.tensor([[1, 2], [1, 2], [1, 2]])
    assert mixed_precision(Problem(losses, sizes, 4), OPTIONS).tolist() == [1, 0, 0]
    assert mixed_precision(Problem(losses[1:], sizes[1:], 3), OPTIONS).tolist() == [0, 1]


def test_a_larger_candidate_that_loses_more_is_not_taken() -> None:
    losses, sizes = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[1, 2]])
    assert mixed_precision(Problem(losses, sizes, 100), OPTIONS).tolist() == [0]


def test_without_any_loss_anything_within_the_budget_will_do() -> None:
    problem = Problem(torch.zeros(3, 2).double(), torch.tensor([[1, 5]] * 3), 3)
    assert mixed_precision(problem, OPTIONS).tolist() == [0, 0, 0]
