"""Magnitude pruning against a row-by-row loop."""

import pytest
import torch
from pydantic import ValidationError

from qtool.errors import QtoolError
from qtool.formats.sparsity import count
from qtool.methods.prune.magnitude import MagnitudeOptions, magnitude


def weights(n_out: int = 6, n_in: int = 12) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))


def run(W: torch.Tensor, **choices: object) -> torch.Tensor:
    notes: list[str] = []
    pruned = magnitude(W.clone(), None, MagnitudeOptions.model_validate(choices), notes.append)
    assert notes == []
    return pruned


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_each_row_loses_its_smallest_weights_and_nothing_else(sparsity: float) -> None:
    W = weights()
    expected = W.tolist()
    for row in expected:
        for i in sorted(range(12), key=lambda i: abs(row[i]))[: count(sparsity, 12)]:
            row[i] = 0.0
    assert torch.equal(run(W, sparsity=sparsity), torch.tensor(expected))


def test_all_weights_of_a_linear_are_compared_where_asked() -> None:
    W = weights() * torch.tensor([[10.0], [1.0], [1.0], [1.0], [1.0], [0.01]])  # a strong and a weak channel
    found = run(W, sparsity=0.4, compare="linear")
    limit = sorted(abs(value) for row in W.tolist() for value in row)[count(0.4, 72)]
    assert found.tolist() == [[value if abs(value) >= limit else 0.0 for value in row] for row in W.tolist()]
    assert bool((found[5] == 0).all()) and int((found == 0).sum()) == count(0.4, 72)
    with pytest.raises(ValidationError, match="pattern 2:4 compares neighbours"):
        MagnitudeOptions(pattern="2:4", compare="linear")


def test_a_hand_worked_pattern() -> None:
    W = torch.tensor([[1.0, -2.0, 3.0, -4.0, 0.1, 0.0, -0.2, 0.3]])
    assert run(W, pattern="2:4").tolist() == [[0.0, 0.0, 3.0, -4.0, 0.0, 0.0, pytest.approx(-0.2), pytest.approx(0.3)]]


def test_edges() -> None:
    assert torch.equal(run(torch.zeros(2, 12)), torch.zeros(2, 12))
    assert torch.equal(run(torch.ones(1, 6)), torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]))  # ties: from the left
    with pytest.raises(QtoolError, match="6 columns do not divide into patterns of 4"):
        run(torch.ones(1, 6), pattern="2:4")
