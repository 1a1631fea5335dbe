"""Tuning keeps the best that was seen, window for window against rounding, and its gradients fit into float16."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.model.tuning import tune, window_errors


def test_the_best_values_are_kept_and_judged_against_roundings_error_on_the_same_windows() -> None:
    """f^(x) = p x of a target of zero; window 1 is ten times as large, so plain errors would favour window 0's p."""
    inputs = torch.tensor([1.0, 10.0]).view(2, 1, 1).expand(2, 3, 4)  # [samples, length, hidden]
    targets, p = torch.zeros(2, 3, 4), torch.tensor([1.0], requires_grad=True)
    path, drawn = [0.5, 0.2, 0.3, 0.7], []

    def forward(x: Tensor) -> Tensor:
        drawn.append(float(x[0, 0, 0]))
        return p * x

    def update(gradients: Sequence[Tensor], step: int) -> None:
        p.copy_(torch.tensor([path[step]]))

    rounded = window_errors(lambda x: x, inputs, targets)
    assert rounded.tolist() == [12.0, 1200.0]
    least = tune(forward, [p], update, inputs, targets, rounded, steps=4, batch=1, seed=0)
    assert set(drawn) == {1.0, 10.0}
    assert abs(least - 0.2**2) < 1e-6 and abs(float(p.detach()) - 0.2) < 1e-6


def test_gradients_of_many_float16_outputs_do_not_vanish() -> None:
    """A mean square over 2**20 outputs that are off by 1e-3 has gradients of 2e-9, less than float16 holds."""
    x = torch.ones(1, 1024, 1024, dtype=torch.float16)
    p, seen = torch.tensor([1e-3], requires_grad=True), []

    def update(gradients: Sequence[Tensor], step: int) -> None:
        seen.append(float(gradients[0]))

    tune(lambda rows: rows * p.half(), [p], update, x, torch.zeros_like(x), torch.ones(1), steps=1, batch=1, seed=0)
    # d ‖p x‖ / d p = ‖x‖ = 1024, summed from 2**20 products of about 1e-3 in float16.
    assert abs(seen[0] / 1024 - 1) < 0.01


def test_without_a_step_nothing_changes() -> None:
    p, x = torch.tensor([0.5], requires_grad=True), torch.ones(2, 3, 4)

    def never(gradients: Sequence[Tensor], step: int) -> None:
        raise AssertionError("no step was asked for")

    assert tune(lambda rows: rows * p, [p], never, x, x, torch.ones(2), steps=0, batch=1, seed=0) == float("inf")
    assert float(p.detach()) == 0.5
