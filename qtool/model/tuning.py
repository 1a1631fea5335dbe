"""Tuning: gradients of the error of a block's output, over a few windows at a time, and the best that was seen.

    loss = ‖f^(x) - y‖² / ‖f_0(x) - y‖²      over the windows of one step
    f^ the block as it is tuned    f_0 the block with its linears rounded to nearest    x, y [batch, length, hidden]
Why relative: some windows are harder than others, and the least plain error would be that of the easiest windows.
Why the gradient is that of ‖f^(x) - y‖: its direction is the loss's, and its values, about 1 / sqrt(batch · length · hidden),
are what float16 holds; those of a mean square fall out of its range.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtool.model.handle import BATCH

Forward = Callable[[Tensor], Tensor]  # [batch, length, hidden] to the same shape, both in host memory
Update = Callable[[Sequence[Tensor], int], None]  # gradients of what learns, and the step: changes what learns in place


def tune(
    forward: Forward,
    learned: Sequence[Tensor],
    update: Update,
    inputs: Tensor,
    targets: Tensor,
    rounded: Tensor,
    steps: int,
    batch: int,
    seed: int,
) -> float:
    """Carry out `steps` updates and leave `learned` at the best values seen; returns the loss there, infinite without a step.

    inputs, targets [samples, length, hidden]; rounded [samples], the `window_errors` of rounding to nearest.
    """
    random = torch.Generator().manual_seed(seed)
    least, best = math.inf, [p.detach().clone() for p in learned]
    for step in range(steps):
        rows = torch.randperm(len(inputs), generator=random)[:batch]
        error = torch.linalg.vector_norm(forward(inputs[rows]).float() - targets[rows].float())
        loss = float(error.detach().square()) / max(float(rounded[rows].sum()), torch.finfo(torch.float32).tiny)
        if loss < least:
            least, best = loss, [p.detach().clone() for p in learned]
        gradients = torch.autograd.grad(error, learned, materialize_grads=True)
        with torch.no_grad():
            update(gradients, step)
    with torch.no_grad():
        for p, value in zip(learned, best, strict=True):
            p.copy_(value)
    return least


@torch.no_grad()
def window_errors(forward: Forward, inputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of the output of each window [samples], float32; inputs, targets [samples, length, hidden]."""
    pairs = zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    return torch.cat([(forward(x).float() - y.float()).square().sum((1, 2)) for x, y in pairs])
