"""Laws of the methods that choose a scheme for every unit, on problems so small that every choice can be tried."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qtool.formats.allocation import Problem
from qtool.registry import Method

UNITS = 6
CANDIDATES = ("w2a16", "w3a16", "w4a16", "w8a16")
SAME = 1e-9  # relative difference of float64 sums that their order explains


def problem(seed: int) -> Problem:
    """Units of uneven size whose losses fall with every bit, but for one whose losses rise and fall."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randint(10, 4000, (UNITS, 1), generator=random)
    sizes = weights * torch.tensor([2, 3, 4, 8]) + torch.randint(0, 50, (UNITS, 1), generator=random)
    steps = torch.rand(UNITS, len(CANDIDATES), generator=random, dtype=torch.float64) ** 4
    losses = steps.flip(1).cumsum(1).flip(1) * 10.0 ** torch.randint(-6, 0, (UNITS, 1), generator=random)
    losses[0] = losses[0, torch.randperm(len(CANDIDATES), generator=random)]
    return Problem(losses, sizes, int(sizes.sum(0)[0]))


def capacities(found: Problem) -> Iterator[int]:
    """From the least that any choice takes to more than any, some of them a choice's exact size."""
    least, most = int(found.sizes.amin(1).sum()), int(found.sizes.amax(1).sum())
    yield from range(least, most + 1000, max((most - least) // 12, 1))
    yield from sorted(found.size_of(choice) for choice in every_choice()[:: 4**UNITS // 12])


def every_choice() -> list[Tensor]:
    """All choices [units] there are."""
    return [torch.tensor(choice) for choice in itertools.product(range(len(CANDIDATES)), repeat=UNITS)]


def choose(method: Method, found: Problem) -> Tensor:
    options = method.options.model_validate({"budget": 4.0, "candidates": list(CANDIDATES)})
    choice = method.run(found, options)
    assert isinstance(choice, Tensor), f"{method.key} returns {type(choice).__name__}, must be Tensor"
    assert choice.shape == (UNITS,), f"shape {tuple(choice.shape)}, must be {(UNITS,)}"
    assert bool(((choice >= 0) & (choice < len(CANDIDATES))).all()), f"{choice.tolist()} are no candidates"
    return choice


def the_budget_is_kept(method: Method) -> None:
    """All stored bytes together are at most the capacity, and the smallest capacity that can be kept is kept."""
    for seed in range(3):
        for capacity in capacities(problem(seed)):
            found = replace(problem(seed), capacity=capacity)
            taken = found.size_of(choose(method, found))
            assert taken <= capacity, f"{taken} bytes, may be {capacity}"


def no_choice_loses_less(method: Method) -> None:
    """Of all choices that keep to the capacity none has less loss."""
    choices = torch.stack(every_choice())  # [choices, units]
    for seed in range(3):
        for capacity in capacities(problem(seed)):
            found = replace(problem(seed), capacity=capacity)
            sizes = torch.stack([found.sizes[u, choices[:, u]] for u in range(UNITS)]).sum(0)  # [choices]
            losses = torch.stack([found.losses[u, choices[:, u]] for u in range(UNITS)]).sum(0)
            least = float(losses[sizes <= capacity].min())
            loss = found.loss_of(choose(method, found))
            assert loss <= least * (1 + SAME), f"capacity {capacity}: loss {loss:.12g}, there is a choice with {least:.12g}"


def a_looser_budget_never_loses_more(method: Method) -> None:
    """The loss falls, or stays, as the capacity rises."""
    for seed in range(3):
        rising = [replace(problem(seed), capacity=capacity) for capacity in sorted(capacities(problem(seed)))]
        losses = [found.loss_of(choose(method, found)) for found in rising]
        for tighter, looser in itertools.pairwise(losses):
            assert looser <= tighter * (1 + SAME), f"loss rises from {tighter:.12g} to {looser:.12g}"


def the_most_sensitive_unit_gets_the_most(method: Method) -> None:
    """Where one unit loses far more than all others, it has the largest candidate as soon as there is room for it."""
    for unit in range(1, UNITS):
        found = problem(unit)
        losses = found.losses / found.losses.amax(1, keepdim=True)
        losses[unit] = 1e6 * torch.arange(len(CANDIDATES), 0, -1)
        least = found.sizes.amin(1)
        room = int(least.sum() - least[unit] + found.sizes[unit].amax())
        choice = choose(method, Problem(losses, found.sizes, room))
        assert int(choice[unit]) == len(CANDIDATES) - 1, f"unit {unit} gets {CANDIDATES[int(choice[unit])]}"


def choosing_is_deterministic(method: Method) -> None:
    """Two runs choose the same."""
    first, second = (choose(method, problem(0)) for _ in range(2))
    assert torch.equal(first, second), "two runs differ"
