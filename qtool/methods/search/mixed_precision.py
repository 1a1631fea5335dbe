"""Mixed precision: the schemes of least predicted loss that keep to a budget of stored bits per weight.

    minimize  sum_u sum_c losses[u, c] x[u, c]    where  sum_c x[u, c] = 1  and  sum_u sum_c sizes[u, c] x[u, c] <= capacity
    x [units, candidates] in {0, 1}    losses predicted    sizes stored bytes    capacity: budget · weights / 8
Losses of units are taken to add up, so this is a multiple-choice knapsack; branch and bound solves it exactly. A unit's
loss is the KL of the model's predictions with the unit alone rounded, measured or by the Fisher information (see
`sensitivity`), in nats a token. Linears that share an input are one unit and get one scheme.
The budget counts what schemes store; what a quantizer adds beside codes, scales and zero points comes on top.
Why these defaults: on the demo model's validation text, 32 windows of calibration text, GPTQ has KL 0.0073 at 4.25 bits with
schemes found from gradients and, the same ones, from measured KL (66 s and 501 s; 0.0078 with w4a16g64 everywhere). Found from
plain rounding (quantizer quantize/rtn) they give 0.0107: what GPTQ makes up for differs from linear to linear, rank
correlation 0.7 with what rounding loses. With GPTQ's own errors the gradient form is within 10 % of KL measured in float32
at three bits and more, rank correlation 0.99.
Source: Hubara et al. 2020, arXiv:2006.10518 (its integer programming). Differs: bytes for time, KL for a task's loss.
For: a size between two schemes, or a few linears that suffer most; before quantize steps with scheme: search.
Costs: each candidate's rounding once, and a pass forward and back (gradient) or a pass for each unit and candidate (kl).
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
