"""AdamW8bit is AdamW but for what eight bits lose, and its state survives a round through a file."""

import pytest
import torch

from qtool.linalg.adamw8bit import SMALL, AdamW8bit, read, write


def train(optimizer: type, size: int, steps: int = 60) -> torch.Tensor:
    """A badly scaled least-squares problem of `size` numbers; returns the numbers."""
    random = torch.Generator().manual_seed(0)
    scales, wanted = torch.logspace(-2, 1, size), torch.randn(size, generator=random)
    w = torch.nn.Parameter(torch.zeros(size))
    made = optimizer([{"params": [w], "lr": 0.05}], weight_decay=0.1, betas=(0.9, 0.95))
    for _ in range(steps):
        w.grad = scales * (w.detach() - wanted)
        made.step()
    return w.detach()


def test_small_parameters_take_the_steps_of_adamw() -> None:
    assert torch.allclose(train(AdamW8bit, SMALL - 1), train(torch.optim.AdamW, SMALL - 1), atol=1e-5)


def test_large_ones_end_near_adamws() -> None:
    found, exact = train(AdamW8bit, 2 * SMALL + 7), train(torch.optim.AdamW, 2 * SMALL + 7)
    assert float((found - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(("power", "n_levels", "error"), [(2, 127, 0.04), (4, 255, 0.02)])
def test_a_moment_comes_back_near_and_zero_as_zero(power: int, n_levels: int, error: float) -> None:
    value = torch.randn(SMALL + 5, generator=torch.Generator().manual_seed(0)) ** 3
    value = value.abs() if power == 4 else value
    value[:7] = 0
    state: dict[str, torch.Tensor] = {}
    write(state, "m", value, power, n_levels)
    assert state["m"].element_size() == 1 and state["m"].shape == value.shape
    found = read(state, "m", power, value)
    assert torch.equal(found[:7], torch.zeros(7))
    large = value.abs() > 0.05 * value.abs().max()
    assert float(((found - value).abs() / value.abs())[large].max()) < error  # half a code of power / codes
    if power == 4:
        assert bool((found[7:] > 0).all())  # no step is divided by eps alone


def test_a_state_that_was_loaded_goes_on_with_the_same_bits() -> None:
    def fresh() -> tuple[torch.nn.Parameter, AdamW8bit]:
        w = torch.nn.Parameter(torch.ones(SMALL))
        return w, AdamW8bit([{"params": [w], "lr": 0.1}], weight_decay=0.0, betas=(0.9, 0.95))

    def gradient(step: int) -> torch.Tensor:
        return torch.randn(SMALL, generator=torch.Generator().manual_seed(step))

    w, optimizer = fresh()
    for step in range(4):
        w.grad = gradient(step)
        optimizer.step()
        if step == 1:
            kept, at = optimizer.state_dict(), w.detach().clone()
            kept = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, kept)
    other, again = fresh()
    other.data.copy_(at)
    again.load_state_dict(kept)
    for step in (2, 3):
        other.grad = gradient(step)
        again.step()
    assert torch.equal(other, w)
