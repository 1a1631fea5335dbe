"""CrAM's gradient is that of its paper's algorithm, on a loss whose gradients are known."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qtool.methods.prune.cram import CramOptions, cram, largest_of_all
from qtool.model.course import Trainee


class Quadratic(nn.Module):
    """loss = ½ sum c (w - a)², so that its gradient at w is c (w - a)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)
        random = torch.Generator().manual_seed(0)
        self.a, self.c = torch.randn(2, 4, 8, generator=random)
        self.c = self.c.abs() + 0.1

    def gradient(self, w: torch.Tensor) -> torch.Tensor:
        return self.c * (w - self.a)

    def backward(self) -> float:
        loss = (self.c * (self.layer.weight - self.a).square()).sum() / 2
        loss.backward()
        return float(loss.detach())


@pytest.fixture
def trainee() -> Callable[[Quadratic], Trainee]:
    def make(model: Quadratic) -> Trainee:
        nothing = torch.zeros(0, 2, dtype=torch.int64)
        return Trainee(model, None, ([], []), ("layer",), 10, 0, print, print, nothing, nothing, None)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_gradient_is_that_of_algorithm_1(pattern: str | None, trainee: Callable[[Quadratic], Trainee]) -> None:
    model = Quadratic()
    w = model.layer.weight.detach().clone()
    options = CramOptions(rho=0.3, sparsities=(0.5,), pattern=pattern)
    total = cram(trainee(model), options).gradients(0, model.backward)
    g = model.gradient(w)
    up = w + 0.3 * g
    if pattern is None:
        kept = up.abs() >= up.abs().flatten().sort().values[16]
    else:
        kept = torch.zeros_like(up, dtype=torch.bool)
        for row in range(4):
            for start in (0, 4):
                best = up[row, start : start + 4].abs().topk(2).indices + start
                kept[row, best] = True
    assert torch.allclose(model.layer.weight.grad, g + model.gradient(up * kept) * kept, atol=1e-6)
    assert torch.equal(model.layer.weight, w)
    assert total == pytest.approx(float((model.c * (w - model.a).square()).sum() / 2))


def test_no_step_up_and_no_sparsity_are_twice_the_gradient(trainee: Callable[[Quadratic], Trainee]) -> None:
    model = Quadratic()
    cram(trainee(model), CramOptions(rho=0.0, sparsities=(0.0,))).gradients(0, model.backward)
    assert torch.allclose(model.layer.weight.grad, 2 * model.gradient(model.layer.weight.detach()))


def test_the_largest_of_all_matrices_together_stay() -> None:
    first, second = nn.Parameter(torch.tensor([[1.0, 5.0]])), nn.Parameter(torch.tensor([[2.0], [-7.0]]))
    assert [mask.tolist() for mask in largest_of_all([first, second], 0.5)] == [[[False, True]], [[False], [True]]]
