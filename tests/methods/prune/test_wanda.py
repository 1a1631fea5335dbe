"""Wanda against its equation computed from the inputs themselves."""

from typing import Any

import pytest
import torch

from qtool.calibration.statistics import LayerStats
from qtool.methods.prune.magnitude import MagnitudeOptions, magnitude
from qtool.methods.prune.wanda import WandaOptions, wanda


def problem(n_out: int = 6, n_in: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """W [out, in] and x [tokens, in] of uneven strength."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(50, n_in, generator=random) * torch.rand(n_in, generator=random) ** 3
    return torch.randn(n_out, n_in, generator=random), x


def run(W: torch.Tensor, x: torch.Tensor, **choices: object) -> torch.Tensor:
    stats = LayerStats(W.shape[1], ("hessian",))
    stats.update(x)
    notes: list[str] = []
    pruned = wanda(W.clone(), stats, WandaOptions.model_validate(choices), notes.append)
    assert notes == []
    return pruned


@pytest.mark.parametrize("choice", [{"sparsity": 0.5}, {"sparsity": 0.25}, {"pattern": "2:4"}, {"pattern": "1:6"}])
def test_the_mask_is_that_of_weight_times_input_norm(choice: dict[str, Any]) -> None:
    W, x = problem()
    norms = [float(x[:, j].double().norm()) for j in range(12)]
    pattern = str(choice.get("pattern", ""))
    keep, width = (int(n) for n in pattern.split(":")) if pattern else (12 - int(12 * choice["sparsity"]), 12)
    expected = W.tolist()
    for row in expected:
        for start in range(0, 12, width):
            neighbours = sorted(range(start, start + width), key=lambda j: abs(row[j]) * norms[j])
            for j in neighbours[: width - keep]:
                row[j] = 0.0
    assert torch.equal(run(W, x, **choice), torch.tensor(expected))


def test_with_inputs_of_one_norm_it_is_magnitude_pruning() -> None:
    W, _ = problem()
    expected = magnitude(W.clone(), None, MagnitudeOptions(), lambda text: None)
    assert torch.equal(run(W, torch.eye(12)), expected)


def test_scaling_a_channel_and_its_column_against_each_other_keeps_the_mask() -> None:
    W, x = problem()
    scale = torch.tensor([2.0, 0.5, 4.0]).repeat(4)  # powers of two: exact in float32
    assert torch.equal(run(W / scale, x * scale) == 0, run(W, x) == 0)


def test_a_dead_column_goes_first() -> None:
    W, x = problem()
    x[:, 5] = 0
    W[:, 5] = 100.0
    assert bool((run(W, x)[:, 5] == 0).all())


def test_a_linear_that_no_token_reached_is_pruned_by_magnitude_and_noted() -> None:
    W, _ = problem()
    notes: list[str] = []
    pruned = wanda(W.clone(), LayerStats(12, ("hessian",)), WandaOptions(), notes.append)
    assert torch.equal(pruned, magnitude(W.clone(), None, MagnitudeOptions(), notes.append))
    assert notes == ["no calibration token reached it; pruned by magnitude"]
