"""Mixed precision: the schemes of least predicted loss that keep to a budget of stored bits per weight.

    minimize  sum_u sum_c losses[u, c] x[u, c]    where  sum_c x[u, c] = 1  and  sum_u sum_c sizes[u, c] x[u, c] <= capacity
    x [units, candidates] in {0, 1}    losses predicted    sizes stored bytes    capacity: budget · weights / 8
Losses of units are taken to add up, so this is a multiple-choice knapsack; branch and bound solves it exactly. A unit's
loss is the KL of the model's predictions with the unit alone rounded, measured or by the Fisher information (see
`sensitivity`), in nats a token. Linears that share an input are one unit and get one scheme.
Source: Hubara et al. 2020, arXiv:2006.10518 (its integer programming). Differs: stored bytes for time, and KL for a task's loss.
"""

import math

import torch
from torch import Tensor

from qtool.formats.allocation import Problem, SearchOptions
from qtool.registry import Method

SPREAD = 1e4  # of the losses as the solver sees them: its absolute gap of 1e-6 is then the tenth digit


def mixed_precision(problem: Problem, options: SearchOptions) -> Tensor:
    """The candidate of every unit [units]; the problem's smallest sizes fit its capacity."""
    import scipy.optimize

    n_units, n_candidates = problem.sizes.shape
    least = problem.sizes.amin(1, keepdim=True)  # [units, 1]
    extra = problem.sizes - least  # [units, candidates]
    unit = max(math.gcd(*extra.flatten().tolist()), 1)  # small whole numbers are exact for the solver
    room = (problem.capacity - int(least.sum())) // unit
    losses = problem.losses - problem.losses.amin(1, keepdim=True)  # [units, candidates]
    one_each = torch.eye(n_units).repeat_interleave(n_candidates, 1)  # [units, units · candidates]
    solved = scipy.optimize.milp(
        (losses * SPREAD / losses.max().clamp(min=1e-300)).flatten().numpy(),
        integrality=1,
        bounds=(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each.numpy(), 1, 1),
            scipy.optimize.LinearConstraint((extra // unit).flatten().numpy(), -math.inf, room),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert solved.x is not None, f"the solver gives up: {solved.message}"
    return torch.from_numpy(solved.x).view(n_units, n_candidates).argmax(1)  # [units]


METHOD = Method(run=mixed_precision, options=SearchOptions, scope="model")
